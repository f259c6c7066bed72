"""What large data costs: tokenising it once, opening it, reading batches, and their order.

usage: python scripts/bench_data.py [--rows 400000] [--short 5000000] [--model demo]
Rows of prompt and completion (about 200 tokens) are drawn from the words of this repository's
README; the short examples (12 tokens) are written as tokens, since only their number matters. Each
line is a process of its own: seconds, seconds of CPUs (its children's too), by how much its
resident memory grew at most, and what it alone holds (USS) in the end, in MB. Linux only.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from training import encoding, examples, sampler, token_cache, token_files  # noqa: E402
from training.config import DataConfig  # noqa: E402
from training.token_files import Block  # noqa: E402
from training.token_set import TokenSet  # noqa: E402
from training.tokens import Encoder  # noqa: E402

BATCH = 64
SHORT_TOKENS = 12


def main() -> None:
    """Run the steps one after the other, each in a process of its own."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--rows", type=int, default=400_000)
    parser.add_argument("--speed-rows", type=int, default=40_000, help="to compare processes with")
    parser.add_argument("--short", type=int, default=5_000_000, help="short examples")
    parser.add_argument("--model", default="demo", help="whose tokenizer is used")
    parser.add_argument("--one", choices=STEPS, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measured(options)))
        return
    with tempfile.TemporaryDirectory(prefix="loray-bench-") as name:
        for number, step in enumerate(STEPS):
            command = [sys.executable, __file__, "--one", step, "--work", name]
            for setting in ("rows", "speed_rows", "short", "model"):
                value = str(getattr(options, setting))
                command += [f"--{setting.replace('_', '-')}", value]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)  # noqa: S603
            if number:  # the first only writes the rows
                print(f"{step:14} {done.stdout.splitlines()[-1]}", flush=True)


def measured(options: argparse.Namespace) -> dict[str, object]:
    """What a step tells, with its time and memory."""
    work = STEPS[options.one](options)
    me = psutil.Process()
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is of the imports
    rss, uss = me.memory_info().rss, me.memory_full_info().uss
    cpu = sum(os.times()[:4])  # its own and its children's
    started = time.perf_counter()
    told = work()
    seconds = time.perf_counter() - started
    status = Path("/proc/self/status").read_text()
    (peak_kb,) = (line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))
    rate = {"rows_per_s": round(told["rows"] / seconds)} if "rows" in told else {}
    return {
        **told,
        **rate,
        "wall_s": round(seconds, 2),
        "cpu_s": round(sum(os.times()[:4]) - cpu, 2),
        "peak_rss_mb": round(int(peak_kb) / 1024 - rss / 2**20),
        "uss_mb": round((me.memory_full_info().uss - uss) / 2**20),
    }


def rows(options: argparse.Namespace) -> Callable[[], dict[str, int]]:
    """Write the rows."""
    words = [word for word in (ROOT / "README.md").read_text().split() if word.isascii()]
    draw = random.Random(0)  # noqa: S311

    def work() -> dict[str, int]:
        with (options.work / "rows.jsonl").open("w") as file:
            for i in range(options.rows):
                pair = [" ".join(draw.choices(words, k=draw.randrange(*k))) for k in LENGTHS]
                row = json.dumps(dict(zip(("prompt", "completion"), pair, strict=True)))
                file.write(f"{row}\n")
                if i + 1 == options.speed_rows:
                    file.flush()
                    (options.work / "some.jsonl").write_bytes(Path(file.name).read_bytes())
        return {}

    return work


LENGTHS = (10, 60), (20, 120)


def encoder(options: argparse.Namespace) -> Encoder:
    """The chat template of the model."""
    from transformers import AutoTokenizer

    from training import model  # it takes seconds, in every process that imports this file

    tokenizer = AutoTokenizer.from_pretrained(model.resolve(options.model))
    return Encoder(tokenizer, stop_ids=frozenset({tokenizer.eos_token_id}))


def tokenise(num_processes: int) -> Callable[[argparse.Namespace], Callable[[], dict[str, int]]]:
    """Read and encode some rows, and keep nothing."""

    def step(options: argparse.Namespace) -> Callable[[], dict[str, int]]:
        chosen = encoder(options)
        source = str(options.work / "some.jsonl")

        def work() -> dict[str, int]:
            found = encoding.blocks(examples.stream(source), chosen, num_processes=num_processes)
            return {"rows": sum(len(block.names) for block in found)}

        return work

    return step


def load(options: argparse.Namespace) -> Callable[[], dict[str, int]]:
    """As a driver does: make the token set, or read and prove the one that is there."""
    source = str(options.work / "rows.jsonl")
    wanted = token_cache.Request(
        source=source,
        data=DataConfig(train=source),
        encoder=encoder(options),
        tokenizer_fingerprint="bench",
    )

    def work() -> dict[str, int]:
        found = token_cache.load(wanted, [options.work / "tokens"])
        size = sum(path.stat().st_size for path in found.directory.iterdir())
        return {"rows": len(found), "tokens": found.facts.num_tokens, "set_mb": size >> 20}

    return work


def read(options: argparse.Namespace) -> Callable[[], dict[str, int]]:
    """As one of two workers does: open the set, and read its share of 200 batches."""
    (directory,) = (options.work / "tokens").glob("[!.]*")
    return lambda: batches(TokenSet(directory), 200)


def batches(tokens: TokenSet, num_steps: int) -> dict[str, int]:
    """Read every second example of some batches, in order."""
    order = sampler.Order(len(tokens), BATCH, 0, epochs=1, max_steps=None)
    num_steps = min(num_steps, order.num_steps)
    total = 0
    for step in range(num_steps):
        batch = [tokens[i] for i in order.batch(step)]
        total += sum(example.num_supervised for example in batch)
        for example in sampler.share(batch, 0, 2):
            total += int(example.input_ids.sum()) + int(example.labels.sum())
    return {"examples": len(tokens), "batches": num_steps}


def short(options: argparse.Namespace) -> Callable[[], dict[str, int]]:
    """Write many short examples as tokens."""
    (options.work / "short").mkdir()

    def blocks() -> Iterator[Block]:
        ids = np.arange(encoding.BLOCK_ROWS * SHORT_TOKENS, dtype=np.int32)
        for first in range(0, options.short, encoding.BLOCK_ROWS):
            num = min(encoding.BLOCK_ROWS, options.short - first)
            yield Block(
                ids=ids[: num * SHORT_TOKENS],
                labels=ids[: num * SHORT_TOKENS],
                lengths=np.full(num, SHORT_TOKENS, np.int64),
                supervised=np.full(num, SHORT_TOKENS - 1, np.int32),
                flags=np.zeros(num, np.uint8),
                names=tuple(f"short.jsonl:{first + i + 1}".encode() for i in range(num)),
                bad=(),
            )

    def work() -> dict[str, int]:
        facts = token_files.write(options.work / "short", blocks())
        return {"rows": facts.num_examples, "tokens": facts.num_tokens}

    return work


def read_short(options: argparse.Namespace) -> Callable[[], dict[str, int]]:
    """Open the short examples, make their order, read 200 batches."""
    return lambda: batches(TokenSet(options.work / "short"), 200)


STEPS: dict[str, Callable[[argparse.Namespace], Callable[[], dict[str, int]]]] = {
    "rows": rows,
    "one process": tokenise(1),
    "two processes": tokenise(2),
    "make": load,
    "prove and open": load,
    "worker reads": read,
    "write short": short,
    "read short": read_short,
}

if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
