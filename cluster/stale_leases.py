"""Ends workers that hold a node's CPUs or GPUs for an actor of a head that is no more.

A raylet (Ray 2.60) keeps the requests for workers that the old head's control service had queued
on it, and grants them to a head that never hears of it: the worker idles for ever, and what it
holds is lost to the cluster (ray-project/ray#66199). To end a worker of Ray's pool by mistake costs
a second, when the next task wants one.
"""

import time
from collections.abc import Callable
from contextlib import suppress

import psutil

from cluster import offspring

_IDLE = "ray::IDLE"
"""How Ray calls the process of a worker that runs nothing."""
_LOOK_S = 5.0
_STALE_S = 60.0
"""An actor's class is loaded under this name, too: imports of half a minute are no rarity."""


class StaleLeases:
    """Workers below this process that have idled at every look for a minute."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        """clock: seconds."""
        self._clock = clock
        self._next_look = 0.0
        self._idle_since: dict[psutil.Process, float] = {}

    def end(self) -> list[int]:
        """Ask those to end; their pids. Looks at most every 5 s."""
        now = self._clock()
        if now < self._next_look:
            return []
        self._next_look = now + _LOOK_S
        idle = [process for process in offspring.living() if _title(process) == _IDLE]
        self._idle_since = {process: self._idle_since.get(process, now) for process in idle}
        stale = [process for process in idle if now - self._idle_since[process] >= _STALE_S]
        for process in stale:
            with suppress(psutil.Error):
                process.terminate()
        return [process.pid for process in stale]


def _title(process: psutil.Process) -> str:
    with suppress(psutil.Error):
        return " ".join(process.cmdline()).strip()
    return ""
