"""A lost registry made anew from storage: models that jobs have left, proved by their manifests.

What is not covered: keys, files, jobs and aliases, which are nowhere else.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import select

from cluster import storage
from cluster.errors import StorageError
from cluster.registry import cards
from cluster.registry.cards import Card
from cluster.registry.database import Database
from cluster.registry.tables import Job, Model

_NO_RESULT = ("failed", "cancelled")


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """What was found below a storage."""

    added: tuple[str, ...]
    """Names of models that the registry did not know."""
    num_known: int
    """Those that it knew, which stay as they are, deleted ones too."""
    num_deleted: int
    """Those that it did not know and that were deleted before it was lost."""
    broken: tuple[str, ...]
    """What was left out, and why."""


def rebuild(
    database: Database,
    directory: Path,
    *,
    adapter_of: Callable[[Path, int], Path],
    clock: Callable[[], float] = time.time,
) -> Report:
    """Bring the models of all runs below a storage into the registry; again and again as wanted.

    adapter_of: where a run keeps the adapter of a checkpoint's step. Raises StorageError where the
    storage cannot be read, RegistryError.
    """
    added: list[str] = []
    broken: list[str] = []
    num_known = num_deleted = 0
    for run_dir in _runs(directory):
        try:
            card = cards.read(run_dir)
        except StorageError as error:
            broken.append(str(error))
            continue
        if card is None:
            continue
        is_over = not _has_job(database, card.job_id)
        for name, step, path in _models(card, run_dir, adapter_of, is_over=is_over):
            if _is_known(database, name):
                num_known += 1
                continue
            if cards.is_deleted(path):
                num_deleted += 1
                continue
            try:
                storage.verify(path)
            except StorageError as error:
                broken.append(f"{name}: {error}")
                continue
            if _add(database, _row(card, name, step, path, now=clock())):
                added.append(name)
            else:
                num_known += 1
    return Report(
        added=tuple(added), num_known=num_known, num_deleted=num_deleted, broken=tuple(broken)
    )


def _runs(directory: Path) -> list[Path]:
    try:
        found = sorted(path for path in directory.iterdir() if path.is_dir())
    except OSError as error:
        raise StorageError(f"{directory} cannot be read ({error.strerror})") from None
    return [path for path in found if not path.name.startswith(".")]


def _models(
    card: Card, run_dir: Path, adapter_of: Callable[[Path, int], Path], *, is_over: bool
) -> Iterator[tuple[str, int | None, Path]]:
    """Name, step and directory of what a job has left; its result comes last, as it did.

    is_over: nobody else will bring the result of a job that was running.
    """
    for step, name in card.checkpoints:
        yield name, step, adapter_of(run_dir, step)
    result = run_dir / card.result
    is_late = is_over and card.status not in _NO_RESULT and result.is_dir()
    if card.status == "succeeded" or is_late:
        yield card.model, None, result


def _has_job(database: Database, job_id: str) -> bool:
    with database.read() as session:
        return session.scalar(select(Job.number).where(Job.id == job_id)) is not None


def _is_known(database: Database, name: str) -> bool:
    with database.read() as session:
        return session.scalar(select(Model.number).where(Model.name == name)) is not None


def _add(database: Database, row: Model) -> bool:
    """Whether it was not there."""
    with database.write() as session:
        if session.scalar(select(Model.number).where(Model.name == row.name)) is not None:
            return False  # the job's own dispatcher was quicker
        session.add(row)
        return True


def _row(card: Card, name: str, step: int | None, path: Path, *, now: float) -> Model:
    return Model(
        name=name,
        project=card.project,
        job_id=card.job_id,
        base=card.base,
        step=step,
        path=str(path.absolute()),
        created_at=min(card.created_at, now),
        deleted_at=None,
    )
