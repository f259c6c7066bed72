"""What adapters that come, go, crowd and are bad cost those that are being answered.

usage: python scripts/bench_life.py [--slots 32]
One replica in this process, the demo model in int8, random adapters of rank 16. Prints a line for
each: one adapter more than there are slots, loading while an answer runs, a flood beside a quiet
adapter, poisoned ones, and an alias with a shadow beside the same without. About five minutes on
two cores.
"""

import argparse
import asyncio
import itertools
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import torch
import uvicorn
from bench_serve import PORT, InProcess, hear, make_adapters
from safetensors.torch import load_file, save_file

from cluster.errors import AdapterError

_TOKENS = 8
_LONG = 256
_PAUSE_S = 0.5
_POISONS = 20
_QUIET = 100
_BLOCKS = 12
_BLOCK = 12
"""Requests of each kind in a block."""


def main() -> None:
    """Measure one after the other."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--slots", type=int, default=32, help="adapters that may be loaded at once")
    slots = parser.parse_args().slots
    with tempfile.TemporaryDirectory(prefix="loray-bench-") as name:
        work = Path(name)
        torch.set_num_threads(1)  # a second pool of threads in this process would slow the engine's
        make_adapters(work, slots + 1)
        served = InProcess(work, slots + 1, rows=8, adapters=slots)
        try:
            served.ask("", _TOKENS)
            evictions(served, slots)
            loads(served, work, slots)
            floods(served)
            poisons(served, work)
            shadows(served, work)
        finally:
            served.close()


def evictions(served: InProcess, slots: int) -> None:
    """Adapters in turn, as many as there are slots, and one more, so that each has gone."""

    def round_robin(count: int) -> float:
        for number in range(count):
            served.ask(f"adapter{number}", 1)
        began = time.perf_counter()
        for number in range(count):
            served.ask(f"adapter{number}", _TOKENS)
        return (time.perf_counter() - began) / count

    within, beyond = round_robin(slots), round_robin(slots + 1)
    say(
        f"{slots} adapters in turn on {slots} slots: {1000 * within:.0f} ms an answer of {_TOKENS} "
        f"tokens; {slots + 1}: {1000 * beyond:.0f} ms, {beyond / within:.2f} times"
    )


def loads(served: InProcess, work: Path, slots: int) -> None:
    """Gaps between the tokens of one answer, alone and while adapters are loaded now and then."""
    say(f"tokens of one answer, nothing else: {gaps(served.ask('', _LONG))}")
    over, took = threading.Event(), list[float]()

    def load_on() -> None:
        while not over.is_set():
            began = time.perf_counter()
            served.run(served.adapters.put("moving", work / f"adapter{len(took) % slots}"))
            took.append(time.perf_counter() - began)
            over.wait(_PAUSE_S)

    loader = threading.Thread(target=load_on)
    loader.start()
    text = gaps(served.ask("", _LONG))
    over.set()
    loader.join()
    say(
        f"while {len(took)} adapters are loaded one by one "
        f"({1000 * statistics.median(took):.0f} ms each): {text}"
    )


def floods(served: InProcess) -> None:
    """A quiet adapter alone, in a full batch, and beside a queue of another's requests."""
    for what, others in (
        ("alone", 0),
        ("beside 7 answers of another (a full batch, no queue)", 7),
        ("beside 100 requests of another", 100),
    ):
        stop = threading.Event()

        def crowd(stop: threading.Event = stop) -> None:
            while not stop.is_set():
                served.ask("adapter1", 2 * _TOKENS)

        threads = [threading.Thread(target=crowd) for _ in range(others)]
        for thread in threads:
            thread.start()
        if threads:
            time.sleep(2)
        took = sorted(
            1000 * (times[-1] - times[0])
            for times in (served.ask("adapter0", _TOKENS) for _ in range(_QUIET))
        )
        stop.set()
        for thread in threads:
            thread.join()
        say(
            f"{_TOKENS} tokens of a quiet adapter {what}: median {took[len(took) // 2]:.0f} ms, "
            f"longest {took[-1]:.0f} ms"
        )


def poisons(served: InProcess, work: Path) -> None:
    """Time and memory to refuse an adapter whose last tensor holds a NaN."""
    bad = work / "bad"
    shutil.copytree(work / "adapter0", bad)
    weights = bad / "adapter_model.safetensors"
    tensors = load_file(weights)
    tensors[max(tensors)][0, 0] = float("nan")
    save_file(tensors, weights)
    (bad / "manifest.json").unlink(missing_ok=True)
    del tensors
    process, took = psutil.Process(), list[float]()
    before = process.memory_full_info().uss
    for _ in range(_POISONS):
        began = time.perf_counter()
        try:
            served.run(served.adapters.put("bad", bad))
        except AdapterError:
            took.append(time.perf_counter() - began)
    after = process.memory_full_info().uss
    say(
        f"{len(took)} of {_POISONS} poisoned adapters refused, {1000 * statistics.median(took):.0f}"
        f" ms each; memory {(after - before) / 1e6:+.1f} MB"
    )


def shadows(served: InProcess, work: Path) -> None:
    """An alias that stands for one adapter, over HTTP, without a shadow and with another adapter as
    its shadow, in blocks of requests that take turns."""
    from cluster.registry import database
    from serving import inference, tuning
    from serving.access import Access
    from serving.metrics import Metrics
    from serving.quotas import Quotas
    from serving.rollout import Target

    opened = database.open_(database.sqlite_url(work / "aliases.db"))
    aliases = tuning.open_aliases(opened, served.replica)
    access, quotas = Access(opened, keys_file=None, host="127.0.0.1"), Quotas(opened)
    app = inference.make_app(
        served.replica, root=work, access=access, quotas=quotas, metrics=Metrics(known=["demo"]),
        aliases=aliases,
        lifespan=lambda _: inference.following(
            served.replica, access, quotas, None, aliases
        ),
    )  # fmt: skip
    server = uvicorn.Server(uvicorn.Config(app, port=PORT, log_level="error", lifespan="on"))
    serving = asyncio.run_coroutine_threadsafe(server.serve(), served.loop)
    while not server.started:
        time.sleep(0.01)
    target, shadow = Target(model="adapter0", weight=1), Target(model="adapter1", is_shadow=True)
    kinds = {"alone": [target], "shadowed": [target, shadow]}
    for name, targets in kinds.items():
        served.run(aliases.put("default", name, targets, None, by="bench"))
    for adapter in ("adapter0", "adapter1"):
        served.ask(adapter, 1)
    engine = served.replica.service.base.engine

    def ask(name: str, number: int, pause_s: float) -> float:
        time.sleep(pause_s)
        body = {
            "model": name, "max_tokens": 2 * _TOKENS, "temperature": 0, "stream": True,
            "messages": [{"role": "user", "content": f"Ticket {number}: the printer is on fire"}],
            "logit_bias": {"2": -100},  # so that it goes on to its end
        }  # fmt: skip
        began, times, _ = hear(body)
        return times[-1] - began

    numbers = itertools.count()
    for at_once, pause_s in ((1, _PAUSE_S), (1, 0.0), (4, 0.0)):
        took: dict[str, list[float]] = {name: [] for name in kinds}
        with ThreadPoolExecutor(at_once) as pool:
            for name in [*kinds] * _BLOCKS:
                asked = [next(numbers) for _ in range(_BLOCK)]
                took[name] += pool.map(ask, [name] * _BLOCK, asked, [pause_s] * _BLOCK)
                while engine.num_running:  # the last copy is nobody's concern
                    time.sleep(0.01)
        served.run(aliases.step())
        one = aliases.find("default", "shadowed")
        assert one is not None
        copies = served.run(asyncio.to_thread(aliases.book.last_minute, one)).get("adapter1")
        alone, with_ = (sorted(1000 * seconds for seconds in took[name]) for name in kinds)
        say(
            f"{at_once} at once, pauses of {pause_s:g} s, {len(alone)} answers of {2 * _TOKENS} "
            f"tokens each: median {statistics.median(alone):.0f} ms alone, "
            f"{statistics.median(with_):.0f} ms with a shadow, "
            f"{statistics.median(with_) / statistics.median(alone):.2f} times; p95 "
            f"{alone[len(alone) * 95 // 100]:.0f} and {with_[len(with_) * 95 // 100]:.0f} ms; "
            f"copies that ended within the last minute: {copies.requests if copies else 0}"
        )
    server.should_exit = True
    serving.result(60)
    opened.close()


def gaps(times: Sequence[float]) -> str:
    """Of the tokens that came at `times`, all but the first of which are tokens."""
    found = sorted(1000 * (b - a) for a, b in itertools.pairwise(times[1:]))
    return f"median {found[len(found) // 2]:.0f} ms, longest {found[-1]:.0f} ms"


def say(line: str) -> None:
    """Print at once: the next figure takes a while."""
    print(line, flush=True)


if __name__ == "__main__":
    main()
