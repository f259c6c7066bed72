"""The models that came out of jobs, by name: looked up in the registry, loaded when asked for.

A replica keeps what it has looked up for a second. Names are never split: what `ft:...` means is
what the registry says.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import select, update

from cluster.errors import RegistryError
from cluster.registry import cards
from cluster.registry.database import Database
from cluster.registry.tables import Model
from serving.access import Caller
from serving.adapters import Adapters

log = logging.getLogger(__name__)

_FRESH_S = 1.0
_MAX_NAME_CHARS = 512


@dataclass(frozen=True, kw_only=True, slots=True)
class Tuned:
    """One of them."""

    name: str
    project: str
    path: str
    base: str
    created: int
    job_id: str | None
    step: int | None


class TunedModels:
    """Those of all projects; a caller sees his own project's."""

    def __init__(
        self,
        database: Database,
        adapters: Adapters,
        *,
        clock: Callable[[], float] = time.time,
        steady: Callable[[], float] = time.monotonic,
    ) -> None:
        self._database = database
        self._adapters = adapters
        self._clock = clock
        self._steady = steady
        self._known: dict[str, tuple[Tuned, float]] = {}
        """Names that adapters know from here, and when each was last looked up."""

    def is_known(self, name: str) -> bool:
        """Whether a name that is served comes from here."""
        return name in self._known

    async def find(self, caller: Caller, name: str) -> Tuned | None:
        """A model of the caller's project, ready to be asked; None where there is none."""
        if not name or len(name) > _MAX_NAME_CHARS or "\0" in name:
            return None
        known = self._known.get(name)
        if known is None or self._steady() - known[1] > _FRESH_S:
            try:
                found = await asyncio.to_thread(self._look_up, [name])
            except RegistryError:
                if known is None:
                    raise
                found = {name: known[0]}  # what was there goes on while the database is away
            await self._note([name], found)
            known = self._known.get(name)
        if known is None or known[0].project != caller.project:
            return None
        return known[0]

    async def list_(self, caller: Caller) -> Sequence[Tuned]:
        """The models of the caller's project, in the order in which they came."""
        return await asyncio.to_thread(self._of_project, caller.project)

    async def delete(self, caller: Caller, name: str) -> bool:
        """Serve a model of the caller's project no more, on any replica; whether there was one."""
        found = await self.find(caller, name)
        if found is None:
            return False
        await asyncio.to_thread(self._mark_deleted, found)
        await self._note([name], {})
        return True

    async def follow(self) -> None:
        """Forget what was deleted elsewhere, over and over."""
        while True:
            await asyncio.sleep(_FRESH_S)
            names = list(self._known)
            if not names:
                continue
            try:
                await self._note(names, await asyncio.to_thread(self._look_up, names))
            except RegistryError as error:
                log.warning("tuned_models=%s", error)

    async def _note(self, names: Sequence[str], found: dict[str, Tuned]) -> None:
        for name in names:
            tuned = found.get(name)
            if tuned is None:
                if self._known.pop(name, None) is not None:
                    await self._adapters.remove(name)
            else:
                self._known[name] = (tuned, self._steady())
                self._adapters.know(name, Path(tuned.path))

    def _look_up(self, names: Sequence[str]) -> dict[str, Tuned]:
        rows = select(Model).where(Model.name.in_(names), Model.deleted_at.is_(None))
        with self._database.read() as session:
            return {row.name: _tuned(row) for row in session.scalars(rows)}

    def _of_project(self, project: str) -> list[Tuned]:
        rows = select(Model).where(Model.project == project, Model.deleted_at.is_(None))
        with self._database.read() as session:
            return [_tuned(row) for row in session.scalars(rows.order_by(Model.number))]

    def _mark_deleted(self, model: Tuned) -> None:
        cards.mark_deleted(Path(model.path))  # first: a rebuilt registry must not bring it back
        with self._database.write() as session:
            session.execute(
                update(Model)
                .where(Model.name == model.name, Model.deleted_at.is_(None))
                .values(deleted_at=self._clock())
            )


def _tuned(row: Model) -> Tuned:
    return Tuned(
        name=row.name,
        project=row.project,
        path=row.path,
        base=row.base,
        created=int(row.created_at),
        job_id=row.job_id,
        step=row.step,
    )
