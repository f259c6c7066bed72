"""Serving speed, side by side with what people do without a server of this kind.

usage: python scripts/bench_serve.py [--tokens 64] [--requests 16] [--contenders hf peft http ...]
  hf      `generate` of transformers, one request after the other, on an fp32 base
  peft    `generate` with PEFT's `adapter_names`, in static batches of as many as there are at once
  http    this server under Ray Serve, asked over HTTP by as many clients, on an int8 base
  http32  the same on an unquantised (fp32) base
Requests are the demo's held-out messages, greedy, all of the same number of new tokens. For the
base, for 1, 8 and 32 random adapters of rank 16 in turn, and for 1, 4, 8 and 16 requests at once.
Each contender runs in a process of its own, one after the other. Prints new tokens a second over
all requests and the time to the first token (http), and all figures as JSON on the last line.
"""

import argparse
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
CONTENDERS = ("hf", "peft", "http", "http32")
AT_ONCE = (1, 4, 8, 16)
ADAPTERS = (0, 1, 8, 32)
PORT = 8199


def main() -> None:
    """Run the contenders one after the other and print the table."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--tokens", type=int, default=64, help="new tokens of each request")
    parser.add_argument("--requests", type=int, default=16, help="for each figure")
    parser.add_argument("--adapters", type=int, nargs="+", default=ADAPTERS)
    parser.add_argument("--at-once", type=int, nargs="+", default=AT_ONCE)
    parser.add_argument("--contenders", nargs="+", default=CONTENDERS, choices=CONTENDERS)
    parser.add_argument("--one", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        run = over_http if options.one.startswith("http") else in_process
        print(json.dumps(run(options)), flush=True)
        return
    with tempfile.TemporaryDirectory(prefix="loray-bench-") as name:
        options.work = Path(name)
        make_adapters(options.work, max(options.adapters))
        found: dict[str, Any] = {}
        for contender in options.contenders:
            print(f"running {contender} ...", file=sys.stderr, flush=True)
            words = [*sys.argv[1:], "--one", contender, "--work", name]
            done = subprocess.run(  # noqa: S603
                [sys.executable, __file__, *words], stdout=subprocess.PIPE, text=True, check=True
            )
            found[contender] = json.loads(done.stdout.strip().splitlines()[-1])
    print("| adapters | at once | " + " | ".join(found) + " |")
    print("|---|---|" + "---|" * len(found))
    for key in dict.fromkeys(itertools.chain(*(rows for rows in found.values()))):
        adapters, at_once = key.split("x")
        cells = [cell(rows.get(key)) for rows in found.values()]
        print(f"| {adapters} | {at_once} | {' | '.join(cells)} |")
    print(json.dumps(found))


def cell(row: dict[str, float] | None) -> str:
    """`58.1 tok/s, first 240 ms`."""
    if row is None:
        return "-"
    first = f", first token {row['first_ms']:.0f} ms" if "first_ms" in row else ""
    return f"{row['tokens_per_s']:.1f} tok/s{first}"


def make_adapters(work: Path, count: int) -> None:
    """Random adapters of rank 16 on all linear layers of the demo model."""
    import torch

    from training import checkpoint, model
    from training.config import LoraConfig, ModelConfig

    base = model.load_base(ModelConfig(base="demo"), device=torch.device("cpu"))
    peft_model, _ = model.attach_lora(base, LoraConfig(rank=16), seed=0)
    for number in range(count):
        generator = torch.Generator().manual_seed(number)
        for name, parameter in model.trainable(peft_model).items():
            scale = 0.02 if "lora_B" in name else 0.05
            parameter.data = torch.randn(parameter.shape, generator=generator) * scale
        directory = work / f"adapter{number}"
        directory.mkdir()
        checkpoint.write_adapter(peft_model, directory)


def prompts(options: argparse.Namespace) -> list[list[dict[str, str]]]:
    """As many conversations as there are requests."""
    path = ROOT / "training" / "recipes" / "tickets_test.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [
        row["messages"][:-1] for row in itertools.islice(itertools.cycle(rows), options.requests)
    ]


def in_process(options: argparse.Namespace) -> dict[str, Any]:
    """transformers, alone or with PEFT's mixed batches."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from training import model as models

    directory = models.resolve("demo")
    tokenizer = AutoTokenizer.from_pretrained(directory, padding_side="left")
    base: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    texts = [
        str(tokenizer.apply_chat_template(p, tokenize=False, add_generation_prompt=True))
        for p in prompts(options)
    ]
    settings = {
        "max_new_tokens": options.tokens, "min_new_tokens": options.tokens, "do_sample": False,
        "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip

    def timed(run: Any, batches: Sequence[Sequence[int]]) -> dict[str, float]:
        started = time.perf_counter()
        for batch in batches:
            run(batch)
        seconds = time.perf_counter() - started
        return {"tokens_per_s": sum(map(len, batches)) * options.tokens / seconds}

    def generate(batch: Sequence[int], **more: Any) -> None:
        inputs = tokenizer([texts[n] for n in batch], return_tensors="pt", padding=True)
        with torch.no_grad():
            base.generate(**inputs, **settings, **more)

    if options.one == "hf":
        generate([0])
        row = timed(generate, [[n] for n in range(options.requests)])
        return {f"0x{at_once}": row for at_once in options.at_once}
    most = max(options.adapters)
    base = peft.PeftModel.from_pretrained(base, str(options.work / "adapter0"), "adapter0")
    for number in range(1, most):
        base.load_adapter(str(options.work / f"adapter{number}"), f"adapter{number}")
    base.eval()
    found: dict[str, Any] = {}
    for count, at_once in itertools.product(options.adapters, options.at_once):
        if count:
            batches = [
                range(start, min(start + at_once, options.requests))
                for start in range(0, options.requests, at_once)
            ]
            found[f"{count}x{at_once}"] = timed(
                lambda batch, c=count: generate(
                    batch, adapter_names=[f"adapter{n % c}" for n in batch]
                ),
                batches,
            )
    return found


def over_http(options: argparse.Namespace) -> dict[str, Any]:
    """This server, asked by several clients at once."""
    import requests
    import yaml
    from openai import OpenAI
    from transformers import AutoTokenizer

    from training import model as models

    most = max(options.adapters)
    tree = {
        "model": {"base": "demo", "quantization": "int8" if options.one == "http" else "none"},
        "adapters": [
            {"name": f"adapter{n}", "path": str(options.work / f"adapter{n}")} for n in range(most)
        ],
        "registry": str(options.work / f"registry-{options.one}"),
        "limits": {"prefix_tokens": 0},  # every prompt is new to the peers, too
        "http": {"port": PORT},
    }
    path = options.work / f"{options.one}.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    started = time.perf_counter()
    process = subprocess.Popen(  # noqa: S603
        [sys.executable, "-m", "serving", str(path)], cwd=options.work, start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=sys.stderr,
    )  # fmt: skip
    try:
        while True:
            try:
                if requests.get(f"http://127.0.0.1:{PORT}/healthz", timeout=5).ok:
                    break
            except requests.RequestException:
                time.sleep(0.1)
            if process.poll() is not None:
                sys.exit("the server ended")
        print(f"ready after {time.perf_counter() - started:.1f} s", file=sys.stderr)
        client: Any = OpenAI(base_url=f"http://127.0.0.1:{PORT}/v1", api_key="none", timeout=600)
        tokenizer = AutoTokenizer.from_pretrained(models.resolve("demo"))
        bias = {str(tokenizer.eos_token_id): -100}  # answers that go on to their end
        asked = prompts(options)

        def ask(number: int, count: int) -> float:
            began = time.perf_counter()
            stream = client.chat.completions.create(
                model=f"adapter{number % count}" if count else "demo",
                messages=asked[number],
                max_tokens=options.tokens, temperature=0, stream=True, logit_bias=bias,
            )  # fmt: skip
            first = 0.0
            for chunk in stream:
                if not first and chunk.choices and chunk.choices[0].delta.content:
                    first = time.perf_counter() - began
            return first

        ask(0, 0)
        found: dict[str, Any] = {}
        for count, at_once in itertools.product(options.adapters, options.at_once):
            began = time.perf_counter()
            with ThreadPoolExecutor(at_once) as pool:
                first = list(pool.map(lambda n, c=count: ask(n, c), range(options.requests)))
            seconds = time.perf_counter() - began
            found[f"{count}x{at_once}"] = {
                "tokens_per_s": options.requests * options.tokens / seconds,
                "first_ms": 1000 * statistics.median(first),
                "first_max_ms": 1000 * max(first),
            }
        return found
    finally:
        process.send_signal(signal.SIGINT)
        killer = threading.Timer(60, os.killpg, (process.pid, signal.SIGKILL))
        killer.start()
        process.wait()
        killer.cancel()


if __name__ == "__main__":
    main()
