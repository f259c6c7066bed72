"""All trials of a packed search in one process, where Ray Tune would start one for each.

A trial on a bench only asks and waits (`trial.SeatTrial`), yet Tune (Ray 2.60) gives it an actor of
its own: 125 MB, seconds of imports, and a hundred wake-ups a second that the bench's threads pay
for. Inside `one_process`, the two modules of Tune that make actors see a `ray` of ours, whose
"actors" are handles of trials inside a single actor. Tune itself, its schedulers and its searchers
are unchanged. The private names of Tune that this takes are all in this file.
"""

import itertools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import ray
import ray.exceptions
from ray.air.execution._internal import actor_manager
from ray.tune import Trainable
from ray.tune.execution import class_cache
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.errors import ClusterError

_CALLS_OF_A_TRIAL = 4
"""One that trains, and what Tune asks meanwhile or wants next."""
_START_S = 30.0
"""How long a call may be here before the start of its trial, which was sent before it."""
_PATCHED: tuple[Any, ...] = (actor_manager, class_cache)


class TrialHost:
    """The actor: trials by key, each asked one thing at a time, in the order of the numbers."""

    def __init__(self) -> None:
        self._trials: dict[str, Trainable] = {}
        self._turns: dict[str, int] = {}
        """The number of the call that each trial waits for, or is at."""
        self._changed = threading.Condition()

    @ray.method(max_task_retries=-1)  # the process may be starting again
    def start(self, key: str, make: Callable[..., Trainable], arguments: Mapping[str, Any]) -> None:
        """Make a trial; it is call 0. Raises whatever its setup does."""
        with self._changed:
            self._turns[key] = 0
        try:
            self._trials[key] = make(**arguments)
        except BaseException:
            self.forget(key)
            raise
        self._end_turn(key)

    def ask(
        self, key: str, number: int, method: str, values: Sequence[Any], named: Mapping[str, Any]
    ) -> Any:
        """What a method of a trial returns or raises, once the calls before it are over."""
        with self._changed:
            is_known = self._changed.wait_for(lambda: key in self._turns, _START_S)
            self._changed.wait_for(lambda: self._turns.get(key, number) == number)
            if not is_known or key not in self._turns:
                raise ClusterError(
                    f"the trial of call {number} ({method}) is gone, maybe since the process of "
                    "all trials was started again"
                )
            trial = self._trials[key]
        try:
            return getattr(trial, method)(*values, **named)
        finally:
            if method == "stop":
                self.forget(key)
            self._end_turn(key)

    def forget(self, key: str) -> None:
        """Answer no more calls of a trial; one that is running runs on, and nobody hears of it."""
        with self._changed:
            self._turns.pop(key, None)
            self._trials.pop(key, None)
            self._changed.notify_all()

    def _end_turn(self, key: str) -> None:
        with self._changed:
            if key in self._turns:
                self._turns[key] += 1
            self._changed.notify_all()


class _TrialHandle:
    """What Tune takes for the handle of an actor."""

    def __init__(self, host: Any, key: str, started: Any) -> None:
        self._host = host
        self._key = key
        self._started = started
        self._numbers = itertools.count(1)  # the start was 0

    def __getattr__(self, method: str) -> "_Method":
        if method == "__ray_ready__":
            return _Method(lambda: self._started)
        method = "stop" if method == "__ray_terminate__" else method
        if method.startswith("_"):
            raise AttributeError(method)
        return _Method(lambda *values, **named: self._ask(method, values, named))

    def forget(self) -> None:
        self._host.forget.remote(self._key)

    def _ask(self, method: str, values: Sequence[Any], named: Mapping[str, Any]) -> Any:
        return self._host.ask.remote(self._key, next(self._numbers), method, values, named)


@dataclass(frozen=True)
class _Method:
    remote: Callable[..., Any]
    """Returns a future, as a method of an actor does."""


class _TrialClass:
    """What Tune takes for the class of an actor."""

    _keys = itertools.count()

    def __init__(self, host: Any, make: type[Trainable]) -> None:
        self._host = host
        self._make = make

    def options(self, **_resources: Any) -> "_TrialClass":
        """A trial needs nothing of its own; Tune counts how many there may be."""
        return self

    def remote(self, **arguments: Any) -> _TrialHandle:
        key = f"trial{next(self._keys)}"
        started = self._host.start.remote(key, self._make, arguments)
        return _TrialHandle(self._host, key, started)


class _Ray:
    """`ray` for the modules of Tune that make and end actors."""

    def __init__(self, seats: int) -> None:
        self._calls = 8 + _CALLS_OF_A_TRIAL * seats
        self.host: Any = None

    def __getattr__(self, name: str) -> Any:
        return getattr(ray, name)

    def remote(self, *classes: _TrialClass, **options: Any) -> Any:
        """As a function of a _TrialClass, which it leaves as it is, or as a decorator's maker."""
        if classes:
            return classes[0]
        if self.host is None:
            here = ray.get_runtime_context().get_node_id()
            make: Any = ray.remote(TrialHost)
            self.host = make.options(
                **options,
                num_cpus=0,
                max_concurrency=self._calls,
                max_restarts=-1,
                scheduling_strategy=NodeAffinitySchedulingStrategy(here, soft=True),
            ).remote()
        return lambda trainable: _TrialClass(self.host, trainable)

    def kill(self, handle: _TrialHandle) -> None:
        handle.forget()


@contextmanager
def one_process(seats: int) -> Iterator[None]:
    """Let Tune's trials of the block share a process; seats: how many may run at once."""
    ours: Any = _Ray(seats)
    for module in _PATCHED:
        module.ray = ours
    try:
        yield
    finally:
        for module in _PATCHED:
            module.ray = ray
        if ours.host is not None:
            with suppress(ray.exceptions.RayError):
                ray.kill(ours.host, no_restart=True)
