"""How much a key may ask for: requests a minute and tokens a day, over all replicas.

Windows are fixed: a minute begins with the minute, a day at midnight UTC. Each replica counts by
itself, adds what it has counted to the registry about once a second, and reads the sum of all, so
that no request waits for the database. What a key can have beyond its quota is bounded:
- with R replicas, what R - 1 of them let through in the second or two before they read of each
  other, and never more than R times the quota, which also holds while the database is away;
- the tokens of answers that were on their way when the quota was used up: tokens are counted at an
  answer's end, whether its client is still there or not.
"""

import asyncio
import logging
import math
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

from sqlalchemy import delete
from sqlalchemy.dialects import postgresql, sqlite

from cluster.errors import RegistryError
from cluster.registry.database import Database
from cluster.registry.tables import Usage
from serving import problems
from serving.access import Caller

log = logging.getLogger(__name__)

Kind = Literal["requests", "tokens"]
_WINDOW_S: dict[Kind, int] = {"requests": 60, "tokens": 86400}
_PER: dict[Kind, str] = {"requests": "minute", "tokens": "day"}
_PERIOD_S = 1.0
_GAP_S = 0.1
_CLEAN_S = 3600.0
_KEEP_S = 2 * 86400


@dataclass(slots=True)
class _Count:
    """What a key has used in its window."""

    window: int
    """When it began, in seconds since the epoch."""
    known: int = 0
    """Of all replicas, as the registry said last."""
    own: int = 0
    """Of this one, since then."""


@dataclass(frozen=True, slots=True)
class _Row:
    """What is to be added to the registry."""

    key_id: str
    kind: Kind
    window: int
    own: int


class Quotas:
    """The counts of one replica. Used from one event loop."""

    def __init__(self, database: Database, *, clock: Callable[[], float] = time.time) -> None:
        """clock: seconds since the epoch."""
        self._database = database
        self._clock = clock
        self._counts: dict[tuple[str, Kind], _Count] = {}
        self._touched: set[tuple[str, Kind]] = set()
        self._wake = asyncio.Event()
        self._cleaned = clock()
        self._is_away = False
        self._is_ending = False

    def take(self, caller: Caller) -> None:
        """Count a request. Raises ApiError (429) where the caller has none left, or no tokens."""
        limits = _limits(caller)
        counts = {kind: self._count(caller.key_id, kind) for kind in limits}
        for kind, limit in limits.items():
            if counts[kind].known + counts[kind].own >= limit:
                self._touched.add((caller.key_id, kind))
                reset_s = self._reset_s(kind)
                raise problems.rate_limited(
                    reset_s,
                    f"Rate limit reached for {kind} per {_PER[kind]}: {limit}. Please try again in "
                    f"{duration(reset_s)}.",
                    kind=kind,
                    headers=self.headers(caller),
                )
        if "requests" in counts:
            self._add(caller.key_id, "requests", 1)

    def spend(self, key_id: str, tokens: int) -> None:
        """Count the tokens of an answer to a request that was taken."""
        if (key_id, "tokens") in self._counts:
            self._add(key_id, "tokens", tokens)

    def headers(self, caller: Caller) -> dict[str, str]:
        """The x-ratelimit-* of an answer; none of what has no limit."""
        found: dict[str, str] = {}
        for kind, limit in _limits(caller).items():
            count = self._count(caller.key_id, kind)
            found[f"x-ratelimit-limit-{kind}"] = str(limit)
            found[f"x-ratelimit-remaining-{kind}"] = str(max(0, limit - count.known - count.own))
            found[f"x-ratelimit-reset-{kind}"] = duration(self._reset_s(kind))
        return found

    async def follow(self) -> None:
        """Share the counts with the other replicas over and over, until `end`."""
        while True:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), _PERIOD_S)
            self._wake.clear()
            is_last = self._is_ending
            await self.sync()
            if is_last:
                return
            await asyncio.sleep(_GAP_S)

    def end(self) -> None:
        """Have `follow` share what there is and return."""
        self._is_ending = True
        self._wake.set()

    async def sync(self) -> None:
        """Add to the registry what was counted here, and read what all have used."""
        touched = [(place, self._counts[place]) for place in self._touched]
        rows = [_Row(key_id, kind, count.window, count.own) for (key_id, kind), count in touched]
        rows.sort(key=lambda row: (row.key_id, row.kind))  # or replicas could deadlock
        self._touched.clear()
        self._forget()
        if not rows:
            return
        try:
            sums = await asyncio.to_thread(self._exchange, rows)
        except RegistryError as error:
            if not self._is_away:
                log.warning("quotas=counted_here_only registry=%s", error)
            self._is_away = True
            self._touched.update((row.key_id, row.kind) for row in rows)
            return
        self._is_away = False
        for row, used in zip(rows, sums, strict=True):
            count = self._counts.get((row.key_id, row.kind))
            if count is not None and count.window == row.window:
                count.known = used
                count.own -= row.own

    def _exchange(self, rows: Sequence[_Row]) -> list[int]:
        """Add rows to the registry; the sums of all replicas, in their order."""
        make = sqlite.insert if self._database.is_sqlite else postgresql.insert
        now = self._clock()
        with self._database.write() as session:
            sums: list[int] = []
            for row in rows:
                new = make(Usage).values(
                    key_id=row.key_id, kind=row.kind, window=row.window, used=row.own
                )
                upsert = new.on_conflict_do_update(
                    index_elements=[Usage.key_id, Usage.kind, Usage.window],
                    set_={"used": Usage.used + new.excluded.used},
                )
                sums.append(session.scalars(upsert.returning(Usage.used)).one())
            if now - self._cleaned > _CLEAN_S:
                self._cleaned = now
                session.execute(delete(Usage).where(Usage.window < int(now) - _KEEP_S))
        return sums

    def _add(self, key_id: str, kind: Kind, used: int) -> None:
        self._count(key_id, kind).own += used
        self._touched.add((key_id, kind))

    def _count(self, key_id: str, kind: Kind) -> _Count:
        """The count of the window that is now."""
        window = self._window(kind)
        count = self._counts.get((key_id, kind))
        if count is None or count.window != window:
            count = self._counts[key_id, kind] = _Count(window=window)
            self._touched.add((key_id, kind))
            self._wake.set()  # others may have counted already
        return count

    def _forget(self) -> None:
        """Drop the counts of keys that have not asked for a whole window."""
        over = [
            place
            for place, count in self._counts.items()
            if count.window < self._window(place[1]) - _WINDOW_S[place[1]]
        ]
        for place in over:
            del self._counts[place]
            self._touched.discard(place)

    def _window(self, kind: Kind) -> int:
        length = _WINDOW_S[kind]
        return int(self._clock() // length) * length

    def _reset_s(self, kind: Kind) -> float:
        return self._window(kind) + _WINDOW_S[kind] - self._clock()


def duration(seconds: float) -> str:
    """Whole seconds, at least one, as OpenAI writes them: 1s, 6m0s, 23h59m59s."""
    whole = max(1, math.ceil(seconds))
    hours, rest = divmod(whole, 3600)
    minutes, left = divmod(rest, 60)
    if hours:
        return f"{hours}h{minutes}m{left}s"
    return f"{minutes}m{left}s" if minutes else f"{left}s"


def _limits(caller: Caller) -> dict[Kind, int]:
    given: dict[Kind, int | None] = {
        "requests": caller.requests_per_minute,
        "tokens": caller.tokens_per_day,
    }
    return {kind: limit for kind, limit in given.items() if limit is not None}
