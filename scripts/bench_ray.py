"""What Ray Train costs: the same steps through Ray and in a bare process, slice by slice.

usage: python scripts/bench_ray.py [--starts 6] [--seconds 45] [--slice 3] [--rows 1]
Two processes train the demo model on the same rows over and over. One of them is stopped
(SIGSTOP, with all its children) while the other works for a slice, in turn, so that both see the
same machine, whose speed may drift by a tenth within a minute. Two processes that run the same code
may differ by 5 % for as long as they live, so both are started afresh several times. Start-up is
not counted. Prints real tokens a second of each, and the cost with its 95 % interval over starts.
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
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import psutil
from scipy import stats

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from training.events import EventReader  # noqa: E402

START_TIMEOUT_S = 180.0
CONTENDERS = ("bare", "ray")


def main() -> None:
    """Run both contenders in turn and print the ratio."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--starts", type=int, default=6, help="of both, at least 2")
    parser.add_argument("--seconds", type=float, default=45, help="of training, for each start")
    parser.add_argument("--slice", type=float, default=3, help="seconds until the other has a turn")
    parser.add_argument("--rows", type=int, default=1, help="rows of the demo's data in each step")
    parser.add_argument("--one", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        train(options.one, options.work)
        return
    slices = max(1, round(options.seconds / options.slice))
    speeds: list[dict[str, float]] = []
    for number in range(max(2, options.starts)):
        with tempfile.TemporaryDirectory(prefix="loray-bench-") as name:
            work = Path(name)
            source = ROOT / "training" / "recipes" / "tickets_train.jsonl"
            rows = source.read_text(encoding="utf-8").splitlines()[: options.rows]
            (work / "train.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
            speeds.append(compare(work, slices=slices, slice_s=options.slice))
        print(f"start {number + 1}: {speeds[-1]}", file=sys.stderr)
    report(speeds)


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


def compare(work: Path, *, slices: int, slice_s: float) -> dict[str, float]:
    """Real tokens a second of each contender, over its slices."""
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
    finally:
        for process in processes.values():
            send(process, signal.SIGKILL)
    return {name: statistics.mean(values) for name, values in speeds.items()}


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


def report(speeds: Sequence[Mapping[str, float]]) -> None:
    """The figures for people, and as JSON on the last line."""
    costs = [100 * (1 - start["ray"] / start["bare"]) for start in speeds]
    low, high = stats.t.interval(
        0.95, len(costs) - 1, loc=statistics.mean(costs), scale=stats.sem(costs)
    )
    for name, text in (("bare", "bare process"), ("ray", "through Ray ")):
        print(f"{text} {statistics.mean(start[name] for start in speeds):.1f} real tokens/s")
    print(
        f"Ray costs    {statistics.mean(costs):.1f} % (95 % interval {low:.1f} to {high:.1f}; "
        f"{len(costs)} starts: {', '.join(f'{cost:.1f}' for cost in costs)})"
    )
    print(json.dumps({"starts": list(speeds), "cost_percent": costs}))


if __name__ == "__main__":
    main()
