"""The queue in front of an engine: bounded, and fair to keys and to the models of a key.

Start-time fair queueing (Goyal, Vin, Cheng, SIGCOMM 1996), in two levels: keys share the engine,
and a key's models share what the key gets. The name with the earliest start, in virtual time, goes
first; having got `cost`, it starts that much later. A name that had nothing queued starts now, at
the start of what was taken last. So while two names both have items, what they get differs by at
most the cost of one item of each, and however much one has queued, in however many models, another
waits for one item of it.

Within a key and model it is first come, first served, always.

Pure data, no threads. Each operation is a few binary searches in sorted lists: the keys, a key's
models, the deadlines. A list moves its pointers where a heap would keep what has gone: 25 us where
65,536 keys wait, 5 us for 256.
"""

import itertools
import math
from bisect import bisect_left, bisect_right, insort
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

from cluster.errors import LorayError

T = TypeVar("T")

_PATIENCE = 64
"""Times that an item which does not fit is passed over; then nothing overtakes it any more."""
_REACH = 64
"""Heads that one taking asks whether they fit."""
_REACH_IN_KEY = 8
"""Of them, heads of one key, so that it cannot keep another from being asked."""
_RECENT = 32
"""Items whose taking says how fast the queue moves."""
_LEAST_RETRY_S = 1.0
_MOST_RETRY_S = 60.0


class Full(LorayError, RuntimeError):
    """There is no room in the queue."""

    code = "server_is_overloaded"
    status = 503
    retry_after_s: float = _LEAST_RETRY_S
    is_everybodys: bool = True
    """Whether the whole queue is full, not only a key's or a model's share of it."""


class _Turns:
    """Names that have something queued, by their start in virtual time."""

    def __init__(self) -> None:
        self._sorted: list[tuple[float, int, str]] = []
        """(start, number, name): of equal starts, the one that stands there longest is first."""
        self._entries: dict[str, tuple[float, int, str]] = {}
        self._ahead: dict[str, float] = {}
        """The starts of names that have nothing queued now and have got more than their share."""
        self._now = 0.0
        self._numbers = itertools.count()

    def __iter__(self) -> Iterator[str]:
        return (name for _, _, name in self._sorted)

    def __len__(self) -> int:
        return len(self._sorted)

    def join(self, name: str) -> None:
        """A name has something queued again."""
        self._stand(name, max(self._now, self._ahead.pop(name, 0.0)))

    def charge(self, name: str, cost: float) -> None:
        """A name has got an item."""
        start = self._leave(name)
        self._now = max(self._now, start)
        self._stand(name, start + cost)

    def leave(self, name: str) -> None:
        """A name has nothing queued any more."""
        start = self._leave(name)
        if start > self._now:
            self._ahead[name] = start

    def _stand(self, name: str, start: float) -> None:
        entry = self._entries[name] = (start, next(self._numbers), name)
        insort(self._sorted, entry)

    def _leave(self, name: str) -> float:
        entry = self._entries.pop(name)
        del self._sorted[bisect_left(self._sorted, entry)]
        return entry[0]


@dataclass(kw_only=True, slots=True, eq=False)
class _Place(Generic[T]):
    item: T
    number: int
    key: str
    model: str
    cost: float
    deadline: float
    is_back: bool
    """Whether it was taken before, and is paid for."""
    num_skipped: int = 0


class Waiting(Generic[T]):
    """Items with a key, a model and a cost. An item is itself, not what it equals."""

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
        self._numbers = itertools.count()
        self._places: dict[int, _Place[T]] = {}
        """By the item's `id`."""
        self._flows: dict[tuple[str, str], OrderedDict[int, _Place[T]]] = {}
        """What a key asks of a model, by number; never empty."""
        self._keys = _Turns()
        self._models: dict[str, _Turns] = {}
        """Of each key that has a flow."""
        self._back: OrderedDict[int, _Place[T]] = OrderedDict()
        self._deadlines: list[tuple[float, int, _Place[T]]] = []
        """Sorted; numbers differ, so places are never compared."""
        self._num_of_key: Counter[str] = Counter()
        self._num_of_model: Counter[str] = Counter()
        self._taken_at: deque[float] = deque(maxlen=_RECENT)
        """When the last items were taken, since the queue was empty."""

    def __len__(self) -> int:
        return len(self._places)

    def by_model(self) -> Mapping[str, int]:
        """Items of each model that has any."""
        return dict(self._num_of_model)

    def put(
        self, item: T, *, key: str, model: str, cost: float, deadline: float | None = None
    ) -> None:
        """Queue an item. Raises Full, which says when to try again, where a bound is reached.

        cost: tokens that it will take. deadline: on the clock.
        """
        counts = (len(self), self._num_of_key[key], self._num_of_model[model])
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
        assert 0 <= cost < math.inf
        place = self._place(item, key, model, cost, deadline)
        if key not in self._models:
            self._models[key] = _Turns()
            self._keys.join(key)
        if (key, model) not in self._flows:
            self._flows[key, model] = OrderedDict()
            self._models[key].join(model)
        self._flows[key, model][place.number] = place

    def put_back(self, item: T, *, key: str, model: str, deadline: float | None = None) -> None:
        """Queue an item that was taken once more, before all others and beyond all bounds."""
        place = self._place(item, key, model, 0, deadline, is_back=True)
        self._back[place.number] = place

    def take(self, accept: Callable[[T], bool] = lambda _: True) -> T | None:
        """The first item that is accepted, or None.

        Asked are those that were put back, the latest first, then the head of each flow in the
        order of their turns, 64 at most and 8 of a key. One that is not accepted keeps its place,
        and its flow waits with it; after others were taken past it 64 times, nothing behind it is
        taken until it fits.
        """
        passed: list[_Place[T]] = []
        for place in itertools.islice(self._heads(), _REACH):
            if accept(place.item):
                for other in passed:
                    other.num_skipped += 1
                self._taken_at.append(self._clock())
                if not place.is_back:
                    self._keys.charge(place.key, place.cost)
                    self._models[place.key].charge(place.model, place.cost)
                self._forget(place)
                return place.item
            if place.num_skipped >= _PATIENCE:
                break
            passed.append(place)
        return None

    def expired(self) -> list[T]:
        """Take out all items whose deadline, on the clock, is over; the earliest first."""
        num_over = bisect_right(self._deadlines, self._clock(), key=lambda entry: entry[0])
        places = [place for _, _, place in self._deadlines[:num_over]]
        for place in places:
            self._forget(place)
        return [place.item for place in places]

    def remove(self, item: T) -> bool:
        """Take out an item wherever it stands, free of charge; whether it was there."""
        place = self._places.get(id(item))
        if place is not None:
            self._forget(place)
        return place is not None

    def _place(
        self,
        item: T,
        key: str,
        model: str,
        cost: float,
        deadline: float | None,
        is_back: bool = False,
    ) -> _Place[T]:
        assert id(item) not in self._places, "the item is queued already"
        place = _Place(
            item=item,
            number=next(self._numbers),
            key=key,
            model=model,
            cost=cost,
            deadline=math.inf if deadline is None else deadline,
            is_back=is_back,
        )
        self._places[id(item)] = place
        self._num_of_key[key] += 1
        self._num_of_model[model] += 1
        insort(self._deadlines, (place.deadline, place.number, place))
        return place

    def _heads(self) -> Iterator[_Place[T]]:
        yield from reversed(self._back.values())
        for key in self._keys:
            for model in itertools.islice(self._models[key], _REACH_IN_KEY):
                yield next(iter(self._flows[key, model].values()))

    def _forget(self, place: _Place[T]) -> None:
        """Take a place out of everything."""
        del self._places[id(place.item)]
        del self._deadlines[bisect_left(self._deadlines, (place.deadline, place.number, place))]
        for counter, name in ((self._num_of_key, place.key), (self._num_of_model, place.model)):
            counter[name] -= 1
            if not counter[name]:
                del counter[name]
        if place.is_back:
            del self._back[place.number]
        else:
            self._forget_in_flow(place)
        if not self._places:  # nobody waits, so nobody is ahead of anybody
            self._keys = _Turns()
            self._taken_at.clear()

    def _forget_in_flow(self, place: _Place[T]) -> None:
        flow = self._flows[place.key, place.model]
        del flow[place.number]
        if flow:
            return
        del self._flows[place.key, place.model]
        self._models[place.key].leave(place.model)
        if not self._models[place.key]:
            del self._models[place.key]
            self._keys.leave(place.key)

    def _retry_after_s(self) -> float:
        """As long as the queue takes at the rate of the last items, and since."""
        if not self._taken_at:
            return _LEAST_RETRY_S
        seconds = (self._clock() - self._taken_at[0]) / len(self._taken_at)
        return min(_MOST_RETRY_S, max(_LEAST_RETRY_S, seconds * len(self)))
