"""How training scales over workers: measured here, on a network of its own, and on paper.

usage: python scripts/bench_scale.py [--parts speed links paper] [--rows 4] [--steps 10]
                                     [--repeats 3] [--tokens 16384] [--tflops 150]
speed: 1, 2 and 4 workers of one thread each train the demo model (DDP over gloo). Weak scaling has
`rows` of rows each, strong scaling as many in all as two of them. Efficiency is real tokens a
second over those of one worker with the same batch (strong) or its share of it (weak), times the
number of workers. Contenders take turns `repeats` times, the median counts. Of the time in the
all-reduce, the transfer is what the last worker to come spends there; the rest waits for it.
links: bytes that a worker sends in a step, from the counters of its own network card in a network
namespace, beside those of the paper. Linux and root.
paper: a ring all-reduce of fp32 gradients (DDP), one for a step, which waits for the backward pass.
The number of workers from which on efficiency is under 90 %. A worker has its own link. What it
computes, `tflops`, is assumed.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

PARTS = ("speed", "links", "paper")
WARM_UP = 2
"""Steps that do not count."""
TIMEOUT_S = 900.0
EFFICIENT = 0.9
HOP_S = 20e-6
"""From one worker to the next, without the bytes: a data centre's TCP."""
MOST_WORKERS = 4096
LINKS = {"10 Gbit/s": 10e9, "100 Gbit/s": 100e9, "400 Gbit/s": 400e9}
RANKS = (8, 16, 32, 64, 128, 256)


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """A Llama's layers, of which every linear one but the head is adapted."""

    hidden: int
    inner: int
    layers: int
    key_value: int
    parameters: float

    def adapter(self, rank: int) -> int:
        """Parameters of an adapter."""
        attention = 2 * 2 * self.hidden + 2 * (self.hidden + self.key_value)
        return self.layers * rank * (attention + 3 * (self.hidden + self.inner))


SHAPES = {
    "7B": Shape(hidden=4096, inner=11008, layers=32, key_value=4096, parameters=6.7e9),
    "13B": Shape(hidden=5120, inner=13824, layers=40, key_value=5120, parameters=13e9),
    "70B": Shape(hidden=8192, inner=28672, layers=80, key_value=1024, parameters=69e9),
}
"""Llama 2."""


def main() -> None:
    """Run the parts that were asked for; their figures as JSON on the last line."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--rows", type=int, default=4, help="of a worker in a step")
    parser.add_argument("--steps", type=int, default=10, help="that count")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=16384, help="of a worker's step, on paper")
    parser.add_argument("--tflops", type=float, default=150.0, help="of a worker, on paper")
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--worker", type=int, nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        work(options.one, *options.worker)
        return
    figures: dict[str, Any] = {}
    if "speed" in options.parts:
        figures["speed"] = speed(options.rows, options.steps, options.repeats)
    if "links" in options.parts:
        figures["links"] = links()
    if "paper" in options.parts:
        figures["paper"] = paper(options.tokens, options.tflops)
    print(json.dumps(figures))


# What a worker does


def work(directory: Path, rank: int, size: int) -> None:
    """Be one worker of a run; what each exchange took goes to `<directory>/<rank>.json`."""
    import torch
    import torch.distributed as dist

    from cluster import config
    from training import worker
    from training.config import TrainRecipe
    from training.strategy import Workers

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    torch.set_num_threads(1)
    if size > 1:
        store = dist.FileStore(str(directory / "store"), size)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    exchanges: list[dict[str, float]] = []
    real = Workers.sum_

    def timed(self: Workers, tensors: Iterable[torch.Tensor]) -> None:
        sent, started = bytes_sent(), time.perf_counter()
        real(self, tensors)
        exchanges.append({"seconds": time.perf_counter() - started, "sent": sent})

    Workers.sum_ = timed
    recipe = config.load(TrainRecipe, directory / "recipe.yaml")
    run_dir = directory / "runs" / recipe.name
    run_dir.mkdir(parents=True, exist_ok=True)
    workers = Workers(rank=rank, size=size)
    device = torch.device("cpu")
    worker.run(recipe, run_dir, workers=workers, device=device, workers_here=size)
    (directory / f"{rank}.json").write_text(json.dumps(exchanges))


def bytes_sent() -> int:
    """By this network namespace's card; 0 where there is none of that name."""
    counter = Path("/sys/class/net/eth0/statistics/tx_bytes")
    return int(counter.read_text()) if counter.exists() else 0


def recipe(directory: Path, *, rows: int, steps: int, rank: int, strategy: str = "auto") -> None:
    """Write what the workers train."""
    source = ROOT / "training" / "recipes" / "tickets_train.jsonl"
    tree = {
        "name": "scale",
        "storage": str(directory / "runs"),
        "model": {"base": "demo", "quantization": "int8"},
        "data": {"train": str(source)},
        "lora": {"rank": rank},
        "optim": {"learning_rate": 1e-5, "warmup": 0, "max_steps": steps},
        "memory": {"micro_batch_tokens": 1024, "gradient_checkpointing": "off"},
        "checkpoint": {"every_steps": 10**6},
        "scale": {"strategy": strategy},
        "log": {"to": []},
    }
    tree["optim"] = {**tree["optim"], "global_batch_size": rows}
    (directory / "recipe.yaml").write_text(yaml.safe_dump(tree))


def words(directory: Path, rank: int, size: int) -> list[str]:
    """The arguments, after Python, that make a process one of the workers."""
    return [__file__, "--one", str(directory), "--worker", str(rank), str(size)]


def steps_of(directory: Path) -> list[Any]:
    """The events of the steps that count."""
    from training.events import EventReader

    events = EventReader(directory / "runs" / "scale" / "events.jsonl").read()
    return [event for event in events if event.kind == "step"][WARM_UP:]


def exchanges_of(directory: Path, size: int, steps: int) -> list[list[dict[str, float]]]:
    """What each worker did in the steps that count, and at the exchange before them."""
    told = [json.loads((directory / f"{rank}.json").read_text()) for rank in range(size)]
    # The first is about where to resume.
    return [exchanges[WARM_UP : WARM_UP + 1 + steps] for exchanges in told]


# Measured speed


@dataclass(frozen=True, kw_only=True, slots=True)
class Turn:
    """What one run gave."""

    tokens_per_s: float
    exchange_share: float
    """Of a step, in the all-reduce, on average over workers."""
    transfer_share: float
    """Of a step, in the all-reduce of the worker that came last."""


def speed(rows: int, steps: int, repeats: int) -> list[dict[str, Any]]:
    """Train with 1, 2 and 4 workers; print and return the table."""
    cases = [(1, rows), (1, 2 * rows), (2, 2 * rows), (4, 2 * rows), (4, 4 * rows)]
    turns: dict[tuple[int, int], list[Turn]] = {case: [] for case in cases}
    for number in range(repeats):
        for size, batch in cases:
            turns[size, batch].append(take_turn(size, batch, steps))
            print(f"repeat {number + 1}: {size} workers: {turns[size, batch][-1]}", file=sys.stderr)
    cores = len(os.sched_getaffinity(0))
    base = {batch: median(turns[1, batch], "tokens_per_s") for batch in (rows, 2 * rows)}
    found: list[dict[str, Any]] = []
    for kind, size, batch, one in (
        ("weak", 2, 2 * rows, base[rows]),
        ("weak", 4, 4 * rows, base[rows]),
        ("strong", 2, 2 * rows, base[2 * rows]),
        ("strong", 4, 2 * rows, base[2 * rows]),
    ):
        tokens_per_s = median(turns[size, batch], "tokens_per_s")
        found.append(
            {
                "scaling": kind,
                "workers": size,
                "rows": batch,
                "tokens_per_s": round(tokens_per_s, 1),
                "times one": round(tokens_per_s / one, 2),
                "efficiency": round(tokens_per_s / one / size, 3),
                "efficiency by cores": round(tokens_per_s / one / min(size, cores), 3),
                "all-reduce": round(median(turns[size, batch], "exchange_share"), 3),
                "transfer": round(median(turns[size, batch], "transfer_share"), 4),
            }
        )
    alone = ", ".join(f"{tokens:.1f} at {batch} rows" for batch, tokens in base.items())
    show(f"one worker: {alone} (real tokens/s); {cores} cores", found)
    return found


def take_turn(size: int, batch: int, steps: int) -> Turn:
    """One run of so many workers."""
    with tempfile.TemporaryDirectory(prefix="loray-bench-") as name:
        directory = Path(name)
        recipe(directory, rows=batch, steps=WARM_UP + steps, rank=16)
        wait([launch(directory, rank, size) for rank in range(size)], directory)
        events = steps_of(directory)
        seconds = sum(event.number("step_s") for event in events)
        tokens = sum(event.number("real_tokens") for event in events)
        if size == 1:
            return Turn(tokens_per_s=tokens / seconds, exchange_share=0, transfer_share=0)
        took = [
            [exchange["seconds"] for exchange in exchanges[1:]]
            for exchanges in exchanges_of(directory, size, steps)
        ]
        return Turn(
            tokens_per_s=tokens / seconds,
            exchange_share=sum(map(sum, took)) / size / seconds,
            transfer_share=sum(map(min, zip(*took, strict=True))) / seconds,
        )


def launch(
    directory: Path, rank: int, size: int, within: Sequence[str] = ()
) -> "subprocess.Popen[bytes]":
    """Start a worker; `within`: the command that runs it elsewhere."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    if within:
        environment["GLOO_SOCKET_IFNAME"] = "eth0"
    with (directory / f"{rank}.log").open("wb") as log:
        return subprocess.Popen(  # noqa: S603
            [*within, sys.executable, *words(directory, rank, size)],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )


def wait(processes: Sequence["subprocess.Popen[bytes]"], directory: Path) -> None:
    """Until all workers are done; one that fails ends them all."""
    deadline = time.monotonic() + TIMEOUT_S
    try:
        while any(process.poll() is None for process in processes):
            failed = [rank for rank, process in enumerate(processes) if process.poll()]
            if failed or time.monotonic() > deadline:
                logs = "".join((directory / f"{rank}.log").read_text()[-3000:] for rank in failed)
                sys.exit(f"workers {failed} failed, or all took too long:\n{logs}")
            time.sleep(0.1)
    finally:
        for process in processes:
            process.kill()
            process.wait()


def median(turns: Sequence[Turn], name: str) -> float:
    """Of one of the figures."""
    return statistics.median(getattr(turn, name) for turn in turns)


# Measured bytes


def links() -> list[dict[str, Any]]:
    """Train with each worker in a network namespace of its own; print and return the bytes."""
    network: Any = import_module("netns").network
    found = []
    for size, strategy, rank in (
        (2, "ddp", 8),
        (2, "ddp", 64),
        (4, "ddp", 8),
        (2, "zero1", 8),
        (2, "zero2", 8),
    ):
        steps = 4
        names = "abcd"[:size]
        with network(*names) as hosts, tempfile.TemporaryDirectory(prefix="loray-bench-") as name:
            directory = Path(name)
            recipe(directory, rows=size, steps=WARM_UP + steps, rank=rank, strategy=strategy)
            inside = [["ip", "netns", "exec", hosts[one].space] for one in names]
            wait([launch(directory, r, size, inside[r]) for r in range(size)], directory)
            sent = [
                (exchanges[-1]["sent"] - exchanges[0]["sent"]) / steps
                for exchanges in exchanges_of(directory, size, steps)
            ]
            parameters = started_with(directory)
        expected = bytes_per_step(parameters, size, is_shared=strategy != "ddp")
        found.append(
            {
                "workers": size,
                "strategy": strategy,
                "rank": rank,
                "adapter": parameters,
                "MB sent, most": round(max(sent) / 1e6, 2),
                "MB sent, mean": round(statistics.mean(sent) / 1e6, 2),
                "MB on paper": round(expected / 1e6, 2),
                "of paper": round(statistics.mean(sent) / expected, 3),
            }
        )
    show("bytes that a worker sends in a step", found)
    return found


def started_with(directory: Path) -> int:
    """Parameters of the adapter of a run."""
    from training.events import EventReader

    events = EventReader(directory / "runs" / "scale" / "events.jsonl").read()
    return next(
        int(event.number("trainable_parameters")) for event in events if event.kind == "started"
    )


# On paper


def bytes_per_step(parameters: float, workers: int, *, is_shared: bool = False) -> float:
    """What a worker sends, and receives, of an adapter's fp32 gradients in a ring all-reduce.

    is_shared: under ZeRO-1 and 2 its parameters, too, which each worker steps a share of.
    """
    return (3 if is_shared else 2) * (workers - 1) / workers * 4 * parameters


def efficiency(
    parameters: float, compute_s: float, workers: int, bits_per_s: float, *, hop_s: float = HOP_S
) -> float:
    """Share of a step that computes, where the all-reduce comes after `compute_s`."""
    transfer_s = bytes_per_step(parameters, workers) * 8 / bits_per_s + 2 * (workers - 1) * hop_s
    return compute_s / (compute_s + transfer_s)


def first_inefficient(
    parameters: float, compute_s: float, bits_per_s: float, *, is_strong: bool
) -> int | None:
    """The fewest workers with an efficiency under 90 %; None where 4,096 are not enough.

    compute_s: of one worker alone. is_strong: workers share its step, and do not each bring one.
    """
    for workers in range(2, MOST_WORKERS + 1):
        share_s = compute_s / workers if is_strong else compute_s
        if efficiency(parameters, share_s, workers, bits_per_s) < EFFICIENT:
            return workers
    return None


def paper(tokens: int, tflops: float) -> list[dict[str, Any]]:
    """Print and return bytes and the number of workers for ranks, bases and links.

    A step is 6 operations for each token and weight of the base: forward, its recomputation in
    gradient checkpointing, and the way back to the inputs, 2 each. Of strong scaling, the step of
    one worker has 8 times `tokens`.
    """
    found: list[dict[str, Any]] = []
    for name, shape in SHAPES.items():
        compute_s = 6 * shape.parameters * tokens / (tflops * 1e12)
        for rank in RANKS:
            parameters = shape.adapter(rank)
            row: dict[str, Any] = {
                "base": name,
                "rank": rank,
                "adapter, millions": round(parameters / 1e6, 1),
                "MB a step": round(bytes_per_step(parameters, MOST_WORKERS) / 1e6),
                "step s": round(compute_s, 2),
            }
            for is_strong, kind in ((False, "weak"), (True, "strong")):
                step_s = compute_s * (8 if is_strong else 1)
                for link, bits_per_s in LINKS.items():
                    workers = first_inefficient(parameters, step_s, bits_per_s, is_strong=is_strong)
                    row[f"{kind} {link}"] = workers or f"> {MOST_WORKERS}"
            found.append(row)
    show(
        f"under {EFFICIENT:.0%} from so many workers on ({tokens} tokens and {tflops:g} TFLOP/s "
        "each; strong: 8 times the tokens in all)",
        found,
    )
    return found


def show(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Rows as a table."""
    table = Table(title=title, title_justify="left")
    for name in rows[0]:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*(str(value) for value in row.values()))
    Console(width=200).print(table)


if __name__ == "__main__":
    main()
