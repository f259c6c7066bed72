"""Which workers are ended for idling, and when."""

import signal
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest
from processes import wait_until

from cluster import offspring
from cluster.stale_leases import StaleLeases


@contextmanager
def process(title: str) -> Iterator["subprocess.Popen[bytes]"]:
    words = ["bash", "-c", 'exec -a "$0" cat', title]
    with subprocess.Popen(words, stdin=subprocess.PIPE) as child:
        has_title = lambda: any(  # noqa: E731
            each.pid == child.pid and each.cmdline() == [title] for each in offspring.living()
        )
        wait_until(has_title)
        try:
            yield child
        finally:
            child.kill()


@pytest.fixture
def processes() -> Iterator[dict[str, "subprocess.Popen[bytes]"]]:
    with ExitStack() as stack:
        titles = ["ray::IDLE", "ray::Trainer.step", "ray::IDLE_SpillWorker", "cat"]
        yield {title: stack.enter_context(process(title)) for title in titles}


def test_only_workers_that_idle_for_a_minute_are_ended(
    processes: dict[str, "subprocess.Popen[bytes]"],
) -> None:
    seconds = iter([*range(61), 65])
    stale = StaleLeases(clock=lambda: next(seconds))
    idle = processes.pop("ray::IDLE")
    assert [idle.pid in stale.end() for _ in range(61)] == [False] * 60 + [True]
    assert idle.wait(10) == -signal.SIGTERM
    assert idle.pid not in stale.end()
    assert [child.poll() for child in processes.values()] == [None] * 3


def test_each_worker_has_a_minute_of_its_own() -> None:
    seconds = iter([0, 30, 61, 90])
    stale = StaleLeases(clock=lambda: next(seconds))
    with process("ray::IDLE") as first:
        assert first.pid not in stale.end()
        with process("ray::IDLE") as second:
            assert first.pid not in stale.end()
            ended = stale.end()
            assert first.pid in ended
            assert second.pid not in ended
            first.wait(10)
            assert second.pid in stale.end()
