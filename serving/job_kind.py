"""What the dispatcher asks of the two kinds of jobs: a run, and a search whose winner counts."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from sqlalchemy.orm import Session

from cluster.registry.tables import Job
from serving import job_progress, job_recipe, job_search
from serving.job_progress import Ending
from training.events import Event


class Kind(Protocol):
    """A module that reads what a job's processes leave in its directory."""

    @property
    def RESULT(self) -> str:
        """Where in the directory the adapter lies that becomes the model."""
        ...

    def apply(
        self,
        session: Session,
        job: Job,
        events: Sequence[Event],
        *,
        run_dir: Path,
        organization: str,
        now: float,
    ) -> None:
        """Go on with a job by its events, in a transaction that holds the job's row."""
        ...

    def ending(self, run_dir: Path) -> tuple[Ending, Event | None]:
        """How the last attempt ended, and its last event."""
        ...

    def results(self, session: Session, job: Job, run_dir: Path) -> bytes:
        """The results file: CSV."""
        ...

    def conclude(self, session: Session, job: Job, last: Event, now: float) -> None:
        """What a job that has finished learns of its last event."""
        ...


def kind_of(job: Job) -> Kind:
    """That of a job."""
    return job_search if job_recipe.is_search(job) else job_progress
