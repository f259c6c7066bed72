"""The aliases as one replica knows them: read every second, counted, and guarded.

Every replica adds what it has counted to the registry and looks at the sum over all of them; the
one that sees a version do too badly goes back, in a transaction that only the first can make.
While the registry is away, what was read last goes on.
"""

import asyncio
import logging
import os
import secrets
import socket
import time
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from cluster.errors import AdapterError, LorayError, RegistryError, StorageError
from serving import problems, rollout
from serving.alias_book import BY_ITSELF, SPAN_S, AliasBook, Key
from serving.problems import ApiError
from serving.rollout import Count, Guard, Rollout, Target

log = logging.getLogger(__name__)

_PERIOD_S = 1.0
_FORGET_S = 3600.0
_MAX_PENDING = 10_000
_MAX_REPLICA_CHARS = 64
_Result = TypeVar("_Result")


def _replica_id() -> str:
    """Of this process, and of no other there ever was."""
    own = f"-{os.getpid()}-{secrets.token_hex(4)}"
    return socket.gethostname()[: _MAX_REPLICA_CHARS - len(own)] + own


@dataclass(kw_only=True, slots=True, eq=False)
class Aliases:
    """What an alias is, here and now."""

    book: AliasBook
    fixed: Callable[[], Collection[str]]
    """The names of what is served to everybody."""
    clock: Callable[[], float] = time.time
    replica: str = field(default_factory=_replica_id)
    _known: dict[tuple[str, str], Rollout] | None = None
    """None: not read yet."""
    _pending: dict[Key, Count] = field(default_factory=dict)
    _stuck: set[tuple[str, str, int]] = field(default_factory=set)
    """Aliases, at a revision, that cannot go back."""
    _forgot_at: float = 0.0
    _is_away: bool = False
    """Whether the registry was, when it was last asked."""

    def find(self, project: str, name: str) -> Rollout | None:
        """What a name stands for. Raises ApiError (503) until the registry could be read."""
        if self._known is None:
            raise problems.overloaded(_PERIOD_S)
        return self._known.get((project, name))

    async def find_new(self, project: str, name: str) -> Rollout | None:
        """What a name stands for that `find` does not know: it may have been set elsewhere within
        this second."""
        if self._known is None or self._is_away:
            return None
        try:
            one = await asyncio.to_thread(self.book.find, project, name)
        except RegistryError:
            return None
        if one is not None:
            self._known[project, name] = one
        return one

    def of(self, project: str) -> list[Rollout]:
        """Those of a project, by name. Raises ApiError (503) until the registry could be read."""
        if self._known is None:
            raise problems.overloaded(_PERIOD_S)
        return sorted(
            (one for one in self._known.values() if one.project == project),
            key=lambda one: one.name,
        )

    def count(self, one: Rollout, model: str, *, seconds: float, is_fault: bool) -> None:
        """Note what became of a request."""
        span = int(self.clock()) // SPAN_S * SPAN_S
        key = (one.project, one.name, one.revision, model, span)
        if key in self._pending or len(self._pending) < _MAX_PENDING:
            old = self._pending.get(key, Count())
            self._pending[key] = old.plus(Count(requests=1, errors=int(is_fault), seconds=seconds))

    async def put(
        self, project: str, name: str, targets: Sequence[Target], guard: Guard | None, *, by: str
    ) -> Rollout:
        """As the book's; this replica knows it at once, others within a second."""
        fixed = frozenset(self.fixed())
        return await self._known_here(
            asyncio.to_thread(self.book.put, project, name, targets, guard, by=by, fixed=fixed)
        )

    async def rollback(
        self, project: str, name: str, *, by: str, reason: str, revision: int | None = None
    ) -> Rollout | None:
        """As the book's; this replica knows it at once, others within a second."""
        fixed = frozenset(self.fixed())
        return await self._known_here(
            asyncio.to_thread(
                self.book.rollback,
                project,
                name,
                by=by,
                reason=reason,
                fixed=fixed,
                revision=revision,
            )
        )

    async def score(
        self, project: str, name: str, model: str, metric: str, value: float, *, by: str
    ) -> Rollout:
        """As the book's; this replica knows it at once, others within a second."""
        fixed = frozenset(self.fixed())
        return await self._known_here(
            asyncio.to_thread(
                self.book.score, project, name, model, metric, value, by=by, fixed=fixed
            )
        )

    async def remove(self, project: str, name: str, *, by: str) -> None:
        """As the book's; this replica knows it at once, others within a second."""
        await self._known_here(asyncio.to_thread(self.book.remove, project, name, by=by))

    async def follow(self) -> None:
        """Read, tell what was counted, and guard, over and over."""
        while True:
            await self.step()
            await asyncio.sleep(_PERIOD_S)

    async def step(self) -> None:
        """Do so once; what fails is tried again the next time."""
        try:
            await self._read()
            await self._tell()
            for one in list((self._known or {}).values()):
                if one.guard is not None and one.guard.error_rate is not None:
                    await self._guard(one)
            if self.clock() - self._forgot_at > _FORGET_S:
                self._forgot_at = self.clock()
                await asyncio.to_thread(self.book.forget)
            self._is_away = False
        except RegistryError as error:
            self._is_away = True
            log.warning("aliases=%s", error)

    async def _known_here(self, change: Awaitable[_Result]) -> _Result:
        result = await change
        await self._read()
        return result

    async def _read(self) -> None:
        rows = await asyncio.to_thread(self.book.all)
        self._known = {(one.project, one.name): one for one in rows}

    async def _tell(self) -> None:
        if not self._pending:
            return
        told, self._pending = self._pending, {}
        try:
            await asyncio.to_thread(self.book.add, self.replica, told)
        except RegistryError:
            for key, count in told.items():
                self._pending[key] = count.plus(self._pending.get(key, Count()))
            raise

    async def _guard(self, one: Rollout) -> None:
        """Go back where a version does too badly."""
        at = (one.project, one.name, one.revision)
        if at in self._stuck:
            return
        why = rollout.breach(one, await asyncio.to_thread(self.book.last_minute, one))
        if why is None:
            return
        try:
            back = await self.rollback(
                one.project, one.name, by=BY_ITSELF, reason=why, revision=one.revision
            )
        except ApiError as error:
            self._stuck.add(at)
            log.warning("alias=%s revision=%d stays: %s", one.name, one.revision, error)
            return
        if back is not None:
            log.warning("alias=%s revision=%d went back: %s", one.name, back.revision, why)


def fault_of(error: Exception | None) -> bool | None:
    """Whether a request failed by its version's fault; None: it says nothing about the version.

    Not its fault: what the client asked for, a full queue, the registry, a client that went.
    """
    if error is None:
        return False
    if isinstance(error, AdapterError | StorageError):
        return True
    status = problems.of_exception(error)[0]
    if isinstance(error, LorayError) and status in (503, 507):
        return None
    return True if status >= 500 else None
