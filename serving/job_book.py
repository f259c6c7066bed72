"""The rows of fine-tuning jobs: created once, changed by guarded steps, their stories in order.

What a client sees (`status`) and what occupies the cluster (`run_job`) are two things: a job that
is cancelled or paused has that status at once, and keeps `run_job` until its run has ended.
"""

import hashlib
import json
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sqlalchemy import ColumnElement, func, select, text
from sqlalchemy.orm import Session

from cluster.registry.database import Database
from cluster.registry.tables import Job, JobCheckpoint, JobEvent
from serving import pages, problems
from serving.access import Caller
from serving.pages import Page
from serving.problems import ApiError
from serving.shelf import Shelf
from serving.tuning_schema import CreateJob

Level = Literal["info", "warn", "error"]
UNFINISHED = ("validating_files", "queued", "running", "paused")
OVER = ("succeeded", "failed", "cancelled")
_TWICE_S = 60.0
"""The same request within so long is the same job."""
_KEY_S = 86400.0
"""The same for the same Idempotency-Key."""
_LOCK = 0x10A4A8


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """One line of a job's story."""

    message: str
    level: Level = "info"
    data: Mapping[str, Any] | None = None
    """Of a line of metrics."""
    at: float | None = None
    """When it happened; None: now."""


class JobBook:
    """The jobs of all projects. Its methods block: async code calls them in threads."""

    def __init__(
        self,
        database: Database,
        shelf: Shelf,
        *,
        base: str,
        unfinished_per_key: int,
        clock: Callable[[], float],
        on_end: Callable[[Session, Job], None] = lambda session, job: None,
    ) -> None:
        """base: the name of the model that jobs start from. on_end: called in the transaction in
        which a job ends of which nothing runs; the dispatcher sees the others end."""
        self.database = database
        self._shelf = shelf
        self._base = base
        self._unfinished_per_key = unfinished_per_key
        self._clock = clock
        self._on_end = on_end

    def create(self, body: CreateJob, caller: Caller, *, idempotency_key: str | None = None) -> Job:
        """A new job, or the one that the same request has made already.

        Raises ApiError: 404 for a model or file that there is not, 400 for a file of another
        purpose, 409 for an Idempotency-Key of another request, 429 for too many jobs.
        """
        if body.model != self._base:
            raise ApiError(
                f"The model `{body.model[:80]}` does not exist or you do not have access to it. "
                f"The one that is fine-tuned here: {self._base}",
                status=404,
                code="model_not_found",
                param="model",
            )
        request = body.model_dump(mode="json")
        whole = [caller.project, caller.key_id, idempotency_key or request]
        digest = hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()
        with self.database.write() as session:
            if not self.database.is_sqlite:  # which lets one writer in at a time
                session.execute(text(f"SELECT pg_advisory_xact_lock({_LOCK})"))
            same = self._same(session, digest, _KEY_S if idempotency_key else _TWICE_S)
            if same is not None:
                if same.request != request:
                    raise ApiError(
                        "This Idempotency-Key came with another request before; use a new one.",
                        status=409,
                        code="idempotency_key_reused",
                    )
                return same
            self._require_files(body, caller)
            self._require_room(session, caller)
            job = self._new(body, caller, request, digest)
            session.add(job)
            session.flush()
            validation = f" and validation file: {job.validation_file}"
            tell(
                session,
                job,
                self._clock(),
                Line(message=f"Created fine-tuning job: {job.id}"),
                Line(
                    message=f"Validating training file: {job.training_file}"
                    + (validation if job.validation_file else "")
                ),
            )
            return job

    def get(self, project: str, id: str) -> Job:
        """A job. Raises ApiError (404) for what the project does not have."""
        with self.database.read() as session:
            return self._get(session, project, id)

    def list_(
        self,
        project: str,
        *,
        after: str | None,
        limit: int,
        metadata: Mapping[str, str] | None = None,
        without_metadata: bool = False,
    ) -> Page[Job]:
        """The jobs of a project, the newest first; those with all of this metadata, or none."""
        where: list[ColumnElement[bool]] = []
        for name, value in (metadata or {}).items():
            where.append(Job.labels[name].as_string() == value)
        if without_metadata:
            where.append(Job.labels.is_(None))
        with self.database.read() as session:
            within = [Job.project == project]
            return pages.page(session, Job, within=within, where=where, after=after, limit=limit)

    def events(self, project: str, id: str, *, after: str | None, limit: int) -> Page[JobEvent]:
        """A job's story, the newest line first."""
        with self.database.read() as session:
            within = [JobEvent.job_id == self._get(session, project, id).id]
            return pages.page(session, JobEvent, within=within, after=after, limit=limit)

    def checkpoints(
        self, project: str, id: str, *, after: str | None, limit: int
    ) -> Page[JobCheckpoint]:
        """A job's checkpoints, the newest first."""
        with self.database.read() as session:
            within = [JobCheckpoint.job_id == self._get(session, project, id).id]
            return pages.page(session, JobCheckpoint, within=within, after=after, limit=limit)

    def cancel(self, project: str, id: str) -> Job:
        """End a job; what runs of it is stopped soon. Raises ApiError (400) for one at its end."""
        with self.database.write() as session:
            job = self._get(session, project, id, lock=True)
            if job.status == "cancelled":
                return job
            self._require_status(job, "cancelled", UNFINISHED)
            job.wanted, job.status = "cancel", "cancelled"
            job.finished_at, job.estimated_finish = self._clock(), None
            tell(session, job, self._clock(), Line(message="The job was cancelled"))
            if job.run_job is None:
                self._on_end(session, job)
            return job

    def pause(self, project: str, id: str) -> Job:
        """Have a job wait; its run saves a checkpoint and frees its device. Raises ApiError."""
        with self.database.write() as session:
            job = self._get(session, project, id, lock=True)
            if job.status == "paused":
                return job
            self._require_status(job, "paused", ("validating_files", "queued", "running"))
            job.wanted, job.status, job.estimated_finish = "pause", "paused", None
            tell(session, job, self._clock(), Line(message="The job was paused"))
            return job

    def resume(self, project: str, id: str) -> Job:
        """Have a paused job go on where it was. Raises ApiError (400) for one that is not."""
        with self.database.write() as session:
            job = self._get(session, project, id, lock=True)
            self._require_status(job, "resumed", ("paused",))
            job.wanted = "run"
            job.status = "validating_files" if job.num_examples is None else "queued"
            tell(session, job, self._clock(), Line(message="The job was resumed, and is queued"))
            return job

    def _same(self, session: Session, digest: str, within_s: float) -> Job | None:
        since = self._clock() - within_s
        made = select(Job).where(Job.content_hash == digest, Job.created_at > since)
        return session.scalars(made.order_by(Job.number.desc()).limit(1)).first()

    def _require_files(self, body: CreateJob, caller: Caller) -> None:
        for param in ("training_file", "validation_file"):
            id: str | None = getattr(body, param)
            if id is None:
                continue
            try:
                file = self._shelf.get(caller.project, id)
            except ApiError:
                message = f"{param}: there is no file of this id; upload it first"
                raise ApiError(message, status=400, code="invalid_value", param=param) from None
            if file.purpose != "fine-tune":
                raise problems.invalid(param, f"its purpose is {file.purpose}; allowed: fine-tune")

    def _require_room(self, session: Session, caller: Caller) -> None:
        unfinished = select(func.count()).where(
            Job.project == caller.project,
            Job.key_id == caller.key_id,
            Job.status.in_(UNFINISHED),
        )
        if (session.scalar(unfinished) or 0) >= self._unfinished_per_key:
            raise problems.rate_limited(
                60,
                f"{self._unfinished_per_key} jobs of this key are not finished; wait or cancel one",
            )

    def _new(self, body: CreateJob, caller: Caller, request: dict[str, Any], digest: str) -> Job:
        names = ("n_epochs", "batch_size", "learning_rate_multiplier")
        auto = dict.fromkeys((*names, "beta") if body.kind == "dpo" else names, "auto")
        return Job(
            id=f"ftjob-{secrets.token_hex(12)}",
            project=caller.project,
            key_id=caller.key_id,
            content_hash=digest,
            request=request,
            model=body.model,
            suffix=body.suffix,
            seed=secrets.randbelow(1 << 31) if body.seed is None else body.seed,
            method={"type": body.kind, body.kind: {"hyperparameters": {**auto, **body.asked}}},
            labels=dict(body.metadata) if body.metadata else None,
            training_file=body.training_file,
            validation_file=body.validation_file,
            status="validating_files",
            wanted="run",
            attempt=0,
            losses=0,
            run_job=None,
            events_offset=0,
            last_step=0,
            created_at=self._clock(),
            result_files=[],
        )

    def _get(self, session: Session, project: str, id: str, *, lock: bool = False) -> Job:
        found = select(Job).where(Job.id == id, Job.project == project)
        job = session.scalar(found.with_for_update() if lock else found)
        if job is None:
            raise problems.not_found("fine-tuning job", id)
        return job

    def _require_status(self, job: Job, verb: str, allowed: Sequence[str]) -> None:
        if job.status not in allowed:
            raise ApiError(
                f"Job {job.id} is {job.status} and cannot be {verb}; allowed: a job that is "
                f"{' or '.join(allowed)}",
                status=400,
                code="invalid_value",
                param="id",
            )


def tell(session: Session, job: Job, now: float, *lines: Line) -> None:
    """Go on with a job's story, in a transaction that holds the job's row."""
    last = select(func.max(JobEvent.place)).where(JobEvent.job_id == job.id)
    place = session.scalar(last) or 0
    for number, line in enumerate(lines, start=place + 1):
        session.add(
            JobEvent(
                id=f"ftevent-{secrets.token_hex(12)}",
                job_id=job.id,
                place=number,
                created_at=now if line.at is None else line.at,
                level=line.level,
                message=line.message[:4000],
                type="message" if line.data is None else "metrics",
                data=None if line.data is None else dict(line.data),
            )
        )
    session.flush()


def model_name(job: Job, organization: str, step: int | None = None) -> str:
    """The name under which a job's model, or that of a step, answers."""
    name = f"ft:{job.model}:{organization}:{job.suffix or ''}:{job.id[-8:]}"
    return name if step is None else f"{name}:ckpt-step-{step}"
