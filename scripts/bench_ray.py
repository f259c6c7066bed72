"""What Ray Train costs: the same steps through Ray and in a bare process, slice by slice.

usage: python scripts/bench_ray.py [--seconds 180] [--slice 5] [--rows 1]
Two processes train the demo model on the same rows over and over. One of them is stopped
(SIGSTOP, with all its children) while the other works for a slice, in turn, so that both see the
same machine, whose speed may drift by a tenth within a minute. Start-up is not counted. Prints
real tokens a second of each, and the ratio with its 95 % interval over the pairs of slices.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from training.events import EventReader  # noqa: E402

START_TIMEOUT_S = 180.0
CONTENDERS = ("bare", "ray")


def main() -> None:
    """Run both contenders in turn and print the ratio."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--seconds", type=float, default=180, help="of training, for each")
    parser.add_argument("--slice", type=float, default=5, help="seconds until the other has a turn")
    parser.add_argument("--rows", type=int, default=1, help="rows of the demo's data in each step")
    parser.add_argument("--one", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        train(options.one, options.work)
        return
    with tempfile.TemporaryDirectory(prefix="loray-bench-") as name:
        work = Path(name)
        source = ROOT / "training" / "recipes" / "tickets_train.jsonl"
        rows = source.read_text(encoding="utf-8").splitlines()[: options.rows]
        (work / "train.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
        report(compare(work, slices=round(options.seconds / options.slice), slice_s=options.slice))


def train(contender: str, work: Path) -> None:
    """Train for ever; the parent ends it."""
    import torch

    from cluster import config
    from training import run, worker
    from training.config import TrainRecipe
    from training.strategy import Workers

    rows = len((work / "train.jsonl").read_text(encoding="utf-8").splitlines())
    tree = {
        "name": contender,
        "storage": str(work / "runs"),
        "model": {"base": "demo", "quantization": "int8"},
        "data": {"train": str(work / "train.jsonl")},
        "optim": {
            "learning_rate": 1e-5,
            "warmup": 0,
            "max_steps": 10**6,
            "global_batch_size": rows,
        },
        "checkpoint": {"every_steps": 10**6},
        "log": {"to": []},
    }
    recipe = config.build(TrainRecipe, tree, where="bench")
    if contender == "ray":
        run.train(recipe, say=lambda _: None, watch=lambda _: None)
        return
    run_dir = work / "runs" / contender
    run_dir.mkdir(parents=True)
    worker.run(recipe, run_dir, workers=Workers(), device=torch.device("cpu"), workers_here=1)


def compare(work: Path, *, slices: int, slice_s: float) -> dict[str, list[float]]:
    """Real tokens a second of each contender in each of its slices."""
    readers = {name: EventReader(work / "runs" / name / "events.jsonl") for name in CONTENDERS}
    processes: dict[str, subprocess.Popen[bytes]] = {}
    speeds: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    try:
        for name in CONTENDERS:
            processes[name] = start(name, work, readers[name])
            send(processes[name], signal.SIGSTOP)
        for number in range(2 * slices):
            name = CONTENDERS[number % 2]
            list(readers[name].read())
            send(processes[name], signal.SIGCONT)
            time.sleep(slice_s)
            send(processes[name], signal.SIGSTOP)
            steps = [event for event in readers[name].read() if event.kind == "step"][1:]
            if not steps:
                sys.exit(f"no whole step in {slice_s:g} s; give a longer --slice or fewer --rows")
            tokens = sum(step.number("real_tokens") for step in steps)
            speeds[name].append(tokens / sum(step.number("step_s") for step in steps))
            print(f"{number + 1}/{2 * slices} {name} {speeds[name][-1]:.1f}", file=sys.stderr)
    finally:
        for process in processes.values():
            send(process, signal.SIGKILL)
    return speeds


def start(name: str, work: Path, reader: EventReader) -> "subprocess.Popen[bytes]":
    """Start a contender and let it warm up for a few steps."""
    words = [sys.executable, __file__, "--one", name, "--work", str(work)]
    with (work / f"{name}.log").open("wb") as log:
        process = subprocess.Popen(  # noqa: S603
            words, env={**os.environ, "HF_HUB_OFFLINE": "1"}, stdout=log, stderr=log
        )
    deadline = time.monotonic() + START_TIMEOUT_S
    steps = 0
    while steps < 5:
        if process.poll() is not None or time.monotonic() > deadline:
            send(process, signal.SIGKILL)
            sys.exit(f"{name} did not start: {(work / f'{name}.log').read_text()[-2000:]}")
        time.sleep(0.2)
        steps += sum(event.kind == "step" for event in reader.read())
    return process


def send(process: "subprocess.Popen[bytes]", number: int) -> None:
    """Send a signal to a process and everything that it started."""
    with suppress(psutil.Error):
        root = psutil.Process(process.pid)
        for child in [root, *root.children(recursive=True)]:
            with suppress(psutil.Error):
                child.send_signal(number)


def report(speeds: dict[str, list[float]]) -> None:
    """The figures for people, and as JSON on the last line."""
    bare, ray = (speeds[name] for name in CONTENDERS)
    losses = [1 - there / here for here, there in zip(bare, ray, strict=True)]
    middle = statistics.mean(losses)
    half = 1.96 * statistics.stdev(losses) / len(losses) ** 0.5
    print(f"bare process {statistics.mean(bare):.1f} real tokens/s")
    print(f"through Ray  {statistics.mean(ray):.1f} real tokens/s")
    print(
        f"Ray costs    {100 * middle:.1f} % (95 % interval {100 * (middle - half):.1f} to "
        f"{100 * (middle + half):.1f}; median {100 * statistics.median(losses):.1f}; "
        f"{len(losses)} pairs of slices)"
    )
    print(json.dumps({"bare": bare, "ray": ray, "cost": middle}))


if __name__ == "__main__":
    main()
