"""What runs the jobs, as the dispatcher sees it: Ray Jobs, or plain processes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

RunState = Literal["alive", "ended", "unknown"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Room:
    """Of a cluster, by resource (CPU, GPU)."""

    free: Mapping[str, float]
    total: Mapping[str, float]


class Runner(Protocol):
    """Runs `python -m` and some words under names that are used once. Raises ClusterError."""

    def start(self, run_job: str, words: Sequence[str]) -> None:
        """Start a run, unless one of this name was started before."""
        ...

    def state(self, run_job: str) -> RunState:
        """unknown: nothing of this name was started, or nobody remembers."""
        ...

    def stop(self, run_job: str) -> None:
        """End a run soon; nothing happens where it has ended."""
        ...

    def room(self) -> Room:
        """What is free now."""
        ...
