"""The queue in front of an engine: bounded, and fair to keys and to models.

Start-time fair queueing (Goyal, Vin, Cheng, SIGCOMM 1996): a flow is what one key asks of one
model; each item starts where its flow's last one finished, or now, and finishes `cost` later, in
virtual time; the earliest start goes first. A flow of a thousand items cannot keep another's first
one waiting, whatever it has queued.

Pure data, no threads. n items.
"""

import heapq
import itertools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from cluster.errors import LorayError

T = TypeVar("T")

_PATIENCE = 64
"""Times that an item which does not fit is passed over; then nothing overtakes it any more."""
_LEAST_RETRY_S = 1.0
_MOST_RETRY_S = 60.0


class Full(LorayError, RuntimeError):
    """There is no room in the queue."""

    code = "server_is_overloaded"
    status = 503
    retry_after_s: float = _LEAST_RETRY_S
    is_everybodys: bool = True
    """Whether the whole queue is full, not only a key's or a model's share of it."""


@dataclass(slots=True, order=True)
class _Place(Generic[T]):
    start: float
    number: int
    item: T = field(compare=False)
    key: str = field(compare=False)
    model: str = field(compare=False)
    deadline: float | None = field(compare=False)
    num_skipped: int = field(compare=False, default=0)
    is_gone: bool = field(compare=False, default=False)


class Waiting(Generic[T]):
    """Items with a key, a model and a cost."""

    def __init__(
        self,
        *,
        max_items: int,
        max_per_key: int,
        max_per_model: int,
        clock: Callable[[], float],
    ) -> None:
        """clock: seconds."""
        self._max = (max_items, max_per_key, max_per_model)
        self._clock = clock
        self._heap: list[_Place[T]] = []
        self._numbers = itertools.count()
        self._finish: dict[tuple[str, str], float] = {}
        """Of each flow's last item, in virtual time, while it lies ahead."""
        self._now = 0.0
        """Virtual time: the start of the item that was taken last."""
        self._keys: Counter[str] = Counter()
        self._models: Counter[str] = Counter()
        self._size = 0
        self._taken_at: list[float] = []
        """When the last items were taken."""

    def __len__(self) -> int:
        return self._size

    def put(
        self, item: T, *, key: str, model: str, cost: float, deadline: float | None = None
    ) -> None:
        """Queue an item. Raises Full, which says when to try again, where a bound is reached."""
        counts = (self._size, self._keys[key], self._models[model])
        for what, count, most in zip(
            ("the queue", "the queue of this key", "the queue of this model"),
            counts,
            self._max,
            strict=True,
        ):
            if count >= most:
                full = Full(f"{what} is full: {count} requests wait; try again later")
                full.retry_after_s = self._retry_after_s()
                full.is_everybodys = what == "the queue"
                raise full
        flow = (key, model)
        start = max(self._now, self._finish.get(flow, 0.0))
        self._finish[flow] = start + cost
        place = _Place(start, next(self._numbers), item, key, model, deadline)
        heapq.heappush(self._heap, place)
        self._keys[key] += 1
        self._models[model] += 1
        self._size += 1

    def put_back(self, item: T, *, key: str, model: str) -> None:
        """Queue an item that was taken once more, before all others and beyond all bounds."""
        place = _Place(self._now, -next(self._numbers), item, key, model, None)
        heapq.heappush(self._heap, place)
        self._keys[key] += 1
        self._models[model] += 1
        self._size += 1

    def take(self, accept: Callable[[T], bool] = lambda _: True) -> T | None:
        """The first item that is accepted, or None.

        One that is not accepted keeps its place; after it was passed over 64 times, nothing
        behind it is taken until it fits.
        """
        passed: list[_Place[T]] = []
        found: T | None = None
        while self._heap:
            place = heapq.heappop(self._heap)
            if place.is_gone:
                continue
            if accept(place.item):
                self._leave(place)
                self._now = max(self._now, place.start)
                self._taken_at = [*self._taken_at[-31:], self._clock()]
                found = place.item
                break
            passed.append(place)
            if place.num_skipped >= _PATIENCE:
                break
        for place in passed:
            place.num_skipped += found is not None
            heapq.heappush(self._heap, place)
        if not self._size:
            self._finish.clear()
        return found

    def expired(self) -> list[T]:
        """Take out all items whose deadline, on the clock, is over."""
        now = self._clock()
        return self._drop(lambda place: place.deadline is not None and place.deadline <= now)

    def remove(self, item: T) -> bool:
        """Take out an item wherever it stands; whether it was there."""
        return bool(self._drop(lambda place: place.item is item))

    def _drop(self, is_over: Callable[[_Place[T]], bool]) -> list[T]:
        over = [place for place in self._heap if not place.is_gone and is_over(place)]
        for place in over:
            place.is_gone = True
            self._leave(place)
        return [place.item for place in over]

    def _leave(self, place: _Place[T]) -> None:
        self._size -= 1
        for counter, name in ((self._keys, place.key), (self._models, place.model)):
            counter[name] -= 1
            if not counter[name]:
                del counter[name]

    def _retry_after_s(self) -> float:
        """As long as the queue takes at the rate of the last items."""
        if len(self._taken_at) < 2:
            return _LEAST_RETRY_S
        seconds = (self._taken_at[-1] - self._taken_at[0]) / (len(self._taken_at) - 1)
        return min(_MOST_RETRY_S, max(_LEAST_RETRY_S, seconds * self._size))
