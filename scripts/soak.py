"""Training, a search and a server on one private Ray, one random fault after the other.

usage: python scripts/soak.py [--minutes 60] [--seed 0] [--fault-every 60] [--out soak.json]
A random base of two layers, so that two cores suffice. The same recipe is trained and the same
space searched over and over, and a client asks the server once a second. What must hold: every run
and search ends well, every run with the same bytes, every answer is the same, and a broken adapter
is refused. Prints what did not hold, the share of requests that were answered, and how memory grew;
the exit status is 1 where something did not hold.
"""

import argparse
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import requests
import torch
import yaml
from safetensors.torch import load_file, save_file

from cluster import config, session, storage
from cluster.errors import StorageError
from serving.__main__ import PRIVATE_RAY
from training import checkpoint, worker
from training.config import TrainRecipe
from training.strategy import Workers

ROOT = Path(__file__).resolve().parent.parent
QUESTION = [{"role": "user", "content": "Say red please"}]
COLOURS = ("red", "green", "blue", "white", "black", "amber")
_CPUS = 6
_START_S = 180.0
_END_S = 120.0
_STUCK_S = 600.0
"""A run or search that takes so long hangs: undisturbed they take about half a minute."""


@dataclass(kw_only=True, slots=True)
class Record:
    """What was seen; threads add to it."""

    faults: Counter[str] = field(default_factory=Counter)
    breaks: list[str] = field(default_factory=list)
    num_asked: int = 0
    num_answered: int = 0
    refusals: Counter[str] = field(default_factory=Counter)
    longest_gap_s: float = 0.0
    runs: int = 0
    searches: int = 0
    memory: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    """By process: (seconds, MB)."""

    def broken(self, what: str) -> None:
        """Note that something that must hold did not."""
        self.breaks.append(f"{time.strftime('%H:%M:%S')} {what}")
        say(f"BROKEN {what}")


def main() -> int:
    """Set up, disturb, sum up."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fault-every", type=float, default=60, metavar="SECONDS")
    parser.add_argument("--out", type=Path, default=Path("soak.json"))
    options = parser.parse_args()
    record = Record()
    with tempfile.TemporaryDirectory(prefix="loray-soak-") as name:
        work = Path(name)
        prepare(work)
        with (
            session.environment({**PRIVATE_RAY, "PYTHONWARNINGS": "ignore"}),
            session.connect(num_cpus=_CPUS) as ray_session,
        ):
            dice = random.Random(options.seed)  # noqa: S311 - no secrets
            soak = Soak(work, ray_session.address, record, dice)
            soak.run(60 * options.minutes, options.fault_every)
    body = summary(record, options.minutes)
    options.out.write_text(json.dumps(body, indent=1))
    print("\n".join(lines(body)))
    return 1 if record.breaks else 0


class Soak:
    """The doors as processes, and the threads that use, watch and disturb them."""

    def __init__(self, work: Path, address: str, record: Record, dice: random.Random) -> None:
        self._work = work
        self._address = address
        self._record = record
        self._dice = dice
        self._is_over = threading.Event()
        self._doors: dict[str, subprocess.Popen[bytes]] = {}
        self._started = time.monotonic()
        self._url = f"http://127.0.0.1:{free_port()}"

    def run(self, seconds: float, fault_every_s: float) -> None:
        """Soak for so long; whoever works then may end what it is at."""
        server = self._serve()
        threads = [
            threading.Thread(target=self._guarded, args=(target,))
            for target in (self._train_on, self._search_on, self._ask_on, self._measure_on)
        ]
        for thread in threads:
            thread.start()
        end = time.monotonic() + seconds
        try:
            while time.monotonic() + fault_every_s < end:
                time.sleep(fault_every_s)
                self._disturb()
                if server.poll() is not None:
                    self._record.broken(f"the server ended with status {server.returncode}")
                    break
            time.sleep(max(0.0, end - time.monotonic()))
        finally:
            self._is_over.set()
            for thread in threads:
                thread.join(_STUCK_S)
            server.send_signal(signal.SIGINT)
            if server.wait(_END_S):
                self._record.broken(f"the server ended with status {server.returncode}")

    def _guarded(self, target: Callable[[], None]) -> None:
        try:
            target()
        except Exception as error:
            self._record.broken(f"the soak itself: {type(error).__name__}: {error}")

    def _open(self, name: str, words: Sequence[str]) -> "subprocess.Popen[bytes]":
        log = (self._work / f"{name}.log").open("ab")
        with log:
            door = subprocess.Popen(  # noqa: S603 - our own doors
                [sys.executable, "-m", *words, "--address", self._address],
                cwd=self._work,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        self._doors[name] = door
        return door

    def _serve(self) -> "subprocess.Popen[bytes]":
        port = self._url.rpartition(":")[2]
        server = self._open("serve", ["serving", "serve.yaml", f"http.port={port}"])
        deadline = time.monotonic() + _START_S
        while not answers(f"{self._url}/healthz"):
            if server.poll() is not None or time.monotonic() > deadline:
                raise SystemExit((self._work / "serve.log").read_text())
            time.sleep(0.2)
        return server

    def _finish(self, name: str, words: Sequence[str]) -> bool:
        """Call a door, again where its driver is killed, until it ends; whether it ended well."""
        while True:
            door = self._open(name, words)
            try:
                status = door.wait(_STUCK_S)
            except subprocess.TimeoutExpired:
                door.kill()
                self._record.broken(f"{name} took more than {_STUCK_S:.0f} s")
                return False
            if status == 0:
                return True
            if status != -signal.SIGKILL:
                log = (self._work / f"{name}.log").read_text(errors="replace")
                self._record.broken(f"{name} ended with status {status}: {log.strip()[-500:]}")
                return False

    def _train_on(self) -> None:
        first: bytes | None = None
        while not self._is_over.is_set():
            name = f"run{self._record.runs}"
            if not self._finish("train", ["training", "train.yaml", f"name={name}"]):
                continue
            adapter = self._work / "runs" / name / "adapter"
            try:
                storage.verify(adapter)
            except StorageError as error:
                self._record.broken(str(error))
            found = (adapter / checkpoint.WEIGHTS).read_bytes()
            first = first or found
            if found != first:
                self._record.broken(f"{name} has learned something else than run0")
            self._record.runs += 1

    def _search_on(self) -> None:
        while not self._is_over.is_set():
            name = f"search{self._record.searches}"
            words = ["tune_spaces", "search.yaml", f"name={name}"]
            if (self._work / "runs" / name).exists():
                words.append("--resume")
            if self._finish("search", words):
                self._record.searches += 1

    def _ask_on(self) -> None:
        """Ask once a second, as a client without retries does."""
        first: str | None = None
        last_answer = time.monotonic()
        while not self._is_over.is_set():
            began = time.monotonic()
            self._record.num_asked += 1
            try:
                answer = requests.post(
                    f"{self._url}/v1/chat/completions",
                    json={"model": "good", "messages": QUESTION, "max_tokens": 8, "temperature": 0},
                    timeout=30,
                )
                answer.raise_for_status()
                text = answer.json()["choices"][0]["message"]["content"]
                self._record.num_answered += 1
                first = text if first is None else first
                if text != first:
                    self._record.broken(f"another answer: {text!r} for {first!r}")
                gap = time.monotonic() - last_answer
                self._record.longest_gap_s = max(self._record.longest_gap_s, gap)
                last_answer = time.monotonic()
            except requests.HTTPError as error:
                status = 0 if error.response is None else error.response.status_code
                self._record.refusals[f"HTTP {status}"] += 1
            except requests.RequestException as error:
                self._record.refusals[type(error).__name__] += 1
            self._is_over.wait(max(0.0, 1 - (time.monotonic() - began)))

    def _measure_on(self) -> None:
        while not self._is_over.wait(5):
            groups = {"soak driver": [psutil.Process()], "serve driver": self._door("serve")}
            groups["proxy"] = self._actors("ray::ProxyActor")
            groups["replicas"] = self._actors("ray::ServeReplica:loray")
            for name, processes in groups.items():
                resident = 0
                for process in processes:
                    try:
                        resident += process.memory_info().rss
                    except psutil.Error:
                        continue
                at = time.monotonic() - self._started
                self._record.memory.setdefault(name, []).append((at, resident / 1e6))

    def _door(self, name: str) -> list[psutil.Process]:
        door = self._doors.get(name)
        return [psutil.Process(door.pid)] if door is not None and door.poll() is None else []

    def _actors(self, title: str) -> list[psutil.Process]:
        found = []
        for process in psutil.Process().children(recursive=True):
            try:
                if process.cmdline()[:1] and process.cmdline()[0].startswith(title):
                    found.append(process)
            except psutil.Error:
                continue
        return found

    # Faults

    def _disturb(self) -> None:
        """One fault of those that there is something for."""
        faults = {
            "worker killed": lambda: self._hit(self._actors("ray::RayTrainWorker"), signal.SIGKILL),
            "worker stopped": lambda: self._hit(
                self._actors("ray::RayTrainWorker"), signal.SIGSTOP
            ),
            "worker told to end": lambda: self._hit(
                self._actors("ray::RayTrainWorker"), signal.SIGTERM
            ),
            "training driver killed": lambda: self._hit(self._door("train"), signal.SIGKILL),
            "replica killed": lambda: self._hit(
                self._actors("ray::ServeReplica:loray"), signal.SIGKILL
            ),
            "bench killed": lambda: self._hit(self._actors("ray::BenchActor"), signal.SIGKILL),
            "Ray Train's state lost": self._lose_state,
            "newest checkpoint damaged": self._damage,
            "broken adapter offered": self._offer_poison,
        }
        names = list(faults)
        self._dice.shuffle(names)
        for name in names:
            if faults[name]():
                self._record.faults[name] += 1
                say(f"fault: {name}")
                return

    def _hit(self, victims: Sequence[psutil.Process], number: signal.Signals) -> bool:
        for victim in self._dice.sample(list(victims), len(victims)):
            try:
                victim.send_signal(number)
            except psutil.NoSuchProcess:
                continue
            return True
        return False

    def _lose_state(self) -> bool:
        found = list(Path(tempfile.gettempdir()).glob(f"loray-*/run{self._record.runs}"))
        found = [path for path in found if path.parent.name != self._work.name]
        for path in found:
            shutil.rmtree(path, ignore_errors=True)
        return bool(found)

    def _damage(self) -> bool:
        """A bit of the newest checkpoint, and a worker killed, so that it is looked for."""
        run_dir = self._work / "runs" / f"run{self._record.runs}"
        found = sorted(run_dir.glob("checkpoints/step-*"))
        workers = self._actors("ray::RayTrainWorker")
        if not found or not workers:
            return False
        path = found[-1] / self._dice.choice((checkpoint.WEIGHTS, "optimizer.safetensors"))
        try:
            data = bytearray(path.read_bytes())
            data[self._dice.randrange(len(data))] ^= 1 << self._dice.randrange(8)
            path.write_bytes(data)
        except OSError:  # it was pruned meanwhile
            return False
        return self._hit(workers, signal.SIGKILL)

    def _offer_poison(self) -> bool:
        try:
            answer = requests.post(
                f"{self._url}/v1/adapters",
                json={"name": "good", "path": "poison", "mode": "live"},
                timeout=60,
            )
        except requests.RequestException:
            return False
        if answer.status_code < 400:
            self._record.broken("an adapter with a number that is not finite was accepted")
        return True


def prepare(work: Path) -> None:
    """A tiny base, rows, a recipe, a search, a good adapter, a broken one, a serving file."""
    sys.path.insert(0, str(ROOT / "tests"))
    base = import_module("tiny").make_base(work / "base")
    for name, count in (("train", 96), ("eval", 12), ("test", 9)):
        with (work / f"{name}.jsonl").open("w") as file:
            for i in range(count):
                colour = COLOURS[i % 6]
                row = {
                    "prompt": f"Say {colour}" + " please" * (i % 5),
                    "completion": colour * (1 + i % 3),
                }
                file.write(json.dumps(row) + "\n")
    tree: dict[str, Any] = {
        "name": "good",
        "storage": str(work / "runs"),
        "model": {"base": str(base), "quantization": "none"},
        "data": {"train": str(work / "train.jsonl"), "max_length": 128},
        "lora": {"rank": 4, "dropout": 0.1},
        "optim": {"learning_rate": 1e-2, "max_steps": 3000, "global_batch_size": 6},
        "memory": {"micro_batch_tokens": 256},
        "checkpoint": {"every_steps": 20},
        "scale": {"workers": 2, "cpus_per_worker": 1, "max_failures": 10},
        "log": {"to": []},
    }
    (work / "train.yaml").write_text(yaml.safe_dump(tree))
    short = {**tree, "optim": {**tree["optim"], "max_steps": 20}, "scale": {"cpus_per_worker": 1}}
    recipe = config.build(TrainRecipe, short, where="soak")
    run_dir = work / "runs" / "good"
    run_dir.mkdir(parents=True)
    worker.run(recipe, run_dir, workers=Workers(), device=torch.device("cpu"), workers_here=1)
    shutil.copytree(run_dir / "adapter", work / "good")
    shutil.copytree(work / "good", work / "poison")
    tensors = load_file(work / "poison" / checkpoint.WEIGHTS)
    next(iter(tensors.values())).view(-1)[0] = float("nan")
    save_file(tensors, work / "poison" / checkpoint.WEIGHTS, metadata={"format": "pt"})
    (work / "poison" / storage.MANIFEST).unlink()  # as one that another tool has made
    tree["data"]["eval"] = str(work / "eval.jsonl")
    tree["optim"] = {"max_steps": 64, "global_batch_size": 4}
    del tree["scale"], tree["name"], tree["lora"]
    tree["space"] = {
        "lora.rank": [2, 4, 8],
        "optim.learning_rate_at_rank_16": {"log_uniform": [1e-3, 3e-2]},
    }
    tree["search"] = {
        "trials": 6, "seats": 3, "finalists": 2, "seeds": 2, "test": str(work / "test.jsonl"),
        "searcher": "random", "fill_window_s": 10,
    }  # fmt: skip
    (work / "search.yaml").write_text(yaml.safe_dump({"name": "search", **tree}))
    serve = {
        "model": {"base": str(base), "quantization": "none"},
        "adapters_root": str(work),
        "adapters": [{"name": "good", "path": str(work / "good")}],
        "replicas": 2,
        "cpus_per_replica": 1,
        "limits": {"rows": 4, "context_tokens": 256, "kv_tokens": 1024, "prefix_tokens": 256},
    }
    (work / "serve.yaml").write_text(yaml.safe_dump(serve))


def summary(record: Record, minutes: float) -> dict[str, Any]:
    """What was seen, as JSON."""
    return {
        "minutes": minutes,
        "faults": dict(record.faults),
        "breaks": record.breaks,
        "availability": record.num_answered / max(1, record.num_asked),
        "asked": record.num_asked,
        "refusals": dict(record.refusals),
        "longest_gap_s": round(record.longest_gap_s, 1),
        "runs": record.runs,
        "searches": record.searches,
        "memory_mb": {name: round(rows[-1][1]) for name, rows in record.memory.items() if rows},
        "memory_mb_per_hour": {
            name: round(slope(rows), 1) for name, rows in record.memory.items() if len(rows) > 24
        },
    }


def slope(rows: Sequence[tuple[float, float]]) -> float:
    """MB an hour, by least squares over the second half, when everything has been loaded."""
    late = np.array(rows[len(rows) // 2 :])
    return float(np.polyfit(late[:, 0] / 3600, late[:, 1], 1)[0])


def lines(body: dict[str, Any]) -> list[str]:
    """A summary as text."""
    faults = ", ".join(f"{count} {name}" for name, count in sorted(body["faults"].items()))
    return [
        f"{body['minutes']:g} minutes, {sum(body['faults'].values())} faults: {faults}",
        f"answered {body['availability']:.2%} of {body['asked']} requests, longest gap "
        f"{body['longest_gap_s']} s; not answered: {body['refusals'] or 'none'}",
        f"{body['runs']} runs and {body['searches']} searches finished",
        f"memory, MB: {body['memory_mb']}; MB an hour: {body['memory_mb_per_hour']}",
        f"{len(body['breaks'])} times something did not hold",
        *(f"  {line}" for line in body["breaks"]),
    ]


def answers(url: str) -> bool:
    """Whether a URL answers well."""
    try:
        return requests.get(url, timeout=5).ok
    except requests.RequestException:
        return False


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def say(line: str) -> None:
    """A line with the time, at once."""
    print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.exit(main())
