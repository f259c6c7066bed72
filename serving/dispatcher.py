"""Takes fine-tuning jobs from their rows to their ends. One process at a time does.

All that it knows is in the registry and in the runs' directories: a dispatcher that dies is
replaced by one that goes on where it was. A run's events, the job's state and how far the events
are read change together; whoever has lost the lease writes nothing more.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sqlalchemy import select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from cluster import storage
from cluster.errors import ConfigError, FencedError, LorayError, RegistryError
from cluster.registry import cards, leases
from cluster.registry.cards import Card
from cluster.registry.database import Database
from cluster.registry.tables import Job, JobCheckpoint
from serving import job_files, job_progress, job_recipe, problems, turns
from serving.job_book import OVER, Line, model_name, tell
from serving.job_files import Fate, Usable
from serving.job_kind import kind_of
from serving.job_progress import Ending
from serving.problems import ApiError
from serving.runner import Runner
from serving.shelf import Shelf
from serving.tuning_config import TuningConfig
from training import hyperparameters, loop
from training.config import ModelConfig
from training.events import Event, parse

log = logging.getLogger(__name__)

LEASE = "dispatcher"
_LEASE_S = 15.0
_LOOK_S = 0.3
_BATCH_BYTES = 1 << 20
_STOP_EVERY_S = 10.0
_PATIENCE_S = 600.0
"""For a run that is to pause; its step may be long. Then it is stopped."""
_REST_S = 5.0
_LONGEST_REST_S = 300.0
_TRY_AGAIN = ("cluster_unavailable", "run_in_use", "attempt_superseded", "registry_unavailable")
"""Codes of errors that are the cluster's, not the job's."""


@dataclass(kw_only=True, slots=True, eq=False)
class Dispatcher:
    """The loop."""

    database: Database
    shelf: Shelf
    runner: Runner
    tuning: TuningConfig
    model: ModelConfig
    """The base that jobs start from."""
    holder: str
    """Tells this process from others."""
    clock: Callable[[], float] = time.time
    lease_s: float = _LEASE_S
    """After so long without a word of it, another dispatches."""
    rest_s: float = _REST_S
    """Before a run that was lost is started again; twice as long each time, up to 5 minutes."""
    on_end: Callable[[Session, Job], None] = lambda session, job: None
    """Called in the transaction in which a job comes to its end."""
    _token: int = 0
    """Of the lease; 0: another has it."""
    _renew_at: float = 0.0
    _asked: dict[str, float] = field(default_factory=dict)
    """Run jobs that were asked to end, and when to ask again."""
    _pausing: dict[str, float] = field(default_factory=dict)
    """Run jobs that are to pause, and since when."""

    def run(self, stop: threading.Event) -> None:
        """Dispatch until told to stop."""
        while not stop.is_set():
            try:
                self.step()
            except FencedError:  # another has taken over
                self._token = 0
            except (LorayError, OSError) as error:  # the registry, the disk or Ray; all come back
                log.warning("dispatcher=%s error=%r", self.holder, str(error)[:500])
            stop.wait(_LOOK_S)
        if self._token:
            leases.give_back(self.database, LEASE, self._token)

    def step(self) -> bool:
        """Look at everything once; whether this process is the one that dispatches."""
        if not self._hold():
            return False
        with self.database.read() as session:
            validating = session.scalars(
                select(Job).where(Job.status == "validating_files").order_by(Job.number)
            ).all()
            occupying = session.scalars(select(Job).where(Job.run_job.is_not(None))).all()
            is_over = (Job.status.in_(OVER), Job.run_job.is_(None))
            untidy = session.scalars(select(Job).where(*is_over, ~Job.is_tidy)).all()
        for job in validating:
            self._each(job, self._validate)
        for job in occupying:
            self._each(job, self._follow)
        for job in untidy:
            self._each(job, self._tidy)
        self._start_next()
        return True

    def _hold(self) -> bool:
        """Take the lease, or keep it, which is a write that waits for the disk: not every time."""
        now = self.clock()
        if self._token and now < self._renew_at:
            return True
        token = leases.take(self.database, LEASE, holder=self.holder, now=now, for_s=self.lease_s)
        self._token, self._renew_at = token or 0, now + self.lease_s / 3
        return token is not None

    def _each(self, job: Job, act: Callable[[Job], None]) -> None:
        """What goes wrong with one job does not keep the others."""
        try:
            act(job)
        except (FencedError, RegistryError):
            raise
        except (LorayError, OSError, IntegrityError) as error:  # of a row that has just come
            log.warning("job=%s error=%r", job.id, str(error)[:500])

    def _locked(self, session: Session, seen: Job) -> Job | None:
        """A job's row, held, if it is as it was seen. Raises FencedError."""
        leases.require(session, LEASE, self._token)
        job = session.scalar(select(Job).where(Job.id == seen.id).with_for_update())
        if job is None or (job.attempt, job.run_job) != (seen.attempt, seen.run_job):
            return None
        return job

    def _validate(self, seen: Job) -> None:
        found = [
            job_files.examine(self.shelf, seen, param, min_examples=self.tuning.min_examples)
            for param in job_files.PARAMS
            if getattr(seen, param) is not None
        ]
        if None in found:
            return
        bad = next((one for one in found if isinstance(one, Fate)), None)
        with self.database.write() as session:
            job = self._locked(session, seen)
            if job is None or job.status != "validating_files":
                return
            if bad is not None:
                self._fail(session, job, bad)
                return
            files = [one for one in found if isinstance(one, Usable)]
            kind, num_examples = job.method["type"], files[0].examples
            chosen = hyperparameters.resolve(
                kind, job.method[kind]["hyperparameters"], num_examples=num_examples
            )
            job.num_examples = num_examples
            job.method = {"type": kind, kind: {"hyperparameters": chosen.echo()}}
            job.status = "queued"
            lines = [Line(message=file.warning, level="warn") for file in files if file.warning]
            lines.append(Line(message="Files validated, moving job to queued state"))
            tell(session, job, self.clock(), *lines)

    def _start_next(self) -> None:
        """Start the job whose turn it is, where there is room."""
        with self.database.read() as session:
            at_once = self.tuning.jobs_at_once
            chosen = turns.next_of(session, at_once=at_once, now=self.clock())
        if chosen is not None:
            self._each(chosen, self._start)

    def _start(self, seen: Job) -> None:
        try:
            files = self._files(seen)
            plan = job_recipe.plan_of(self.tuning, self.model, seen)
        except ApiError:
            message = "The training or validation file was deleted while the job was queued."
            return self._end_badly(seen, Fate(code="invalid_training_file", message=message))
        except ConfigError as error:
            return self._end_badly(seen, Fate(code=error.code, message=str(error)))
        room = self.runner.room()
        needs = job_recipe.needs(plan.recipe, room.total)
        if any(room.free.get(name, 0) < amount for name, amount in needs.items()):
            return None
        job_recipe.write(self.tuning, seen, plan, files)
        with self.database.write() as session:
            job = self._locked(session, seen)
            if job is None or job.status != "queued":
                return None
            job.attempt += 1
            started = job.run_job = f"{job.id}-{job.attempt}"
        self.runner.start(started, job_recipe.words(self.tuning, seen))
        return None

    def _files(self, job: Job) -> dict[str, Path]:
        """The files of a job that has not begun; one that has holds links of its own."""
        if job.attempt:
            return {}
        return {
            param: self.shelf.path(self.shelf.get(job.project, getattr(job, param)))
            for param in job_files.PARAMS
            if getattr(job, param) is not None
        }

    def _follow(self, seen: Job) -> None:
        """Take a job as far as its run has come."""
        assert seen.run_job is not None
        directory = job_recipe.run_dir(self.tuning, seen)
        state = self.runner.state(seen.run_job)  # before its events: the last ones are seen, too
        if state == "unknown":
            is_wanted = seen.wanted == "run" and seen.status in ("queued", "running")
            # A cluster that was lost has forgotten runs that had come to their end, too.
            if is_wanted and kind_of(seen).ending(directory)[0] != "finished":
                self.runner.start(seen.run_job, job_recipe.words(self.tuning, seen))
                return
            state = "ended"
        if state == "alive":
            self._ask_to_end(seen, directory)
        block = _block(directory / "events.jsonl", seen.events_offset)
        events = list(parse(block))
        if block or state == "ended":
            is_over = state == "ended" and len(block) < _BATCH_BYTES
            self._record(seen, events, len(block), directory, is_over=is_over)

    def _ask_to_end(self, seen: Job, directory: Path) -> None:
        assert seen.run_job is not None
        now = self.clock()
        if seen.wanted == "pause" and not job_recipe.is_search(seen):  # whose reports are kept
            since = self._pausing.setdefault(seen.run_job, now)
            if now - since < _PATIENCE_S:
                loop.stop_file(directory).touch()  # again and again: a run that begins removes it
                return
        elif seen.wanted == "run" and seen.status != "paused":
            return
        if now >= self._asked.get(seen.run_job, 0.0):
            self._asked[seen.run_job] = now + _STOP_EVERY_S
            self.runner.stop(seen.run_job)

    def _record(
        self, seen: Job, events: Sequence[Event], num_bytes: int, directory: Path, *, is_over: bool
    ) -> None:
        result: str | None = None
        kind = kind_of(seen)
        how, last = kind.ending(directory) if is_over else ("lost", None)
        wants_result = is_over and how == "finished" and seen.wanted != "cancel"
        if wants_result:
            storage.verify(directory / kind.RESULT)
        with self.database.write() as session:
            job = self._locked(session, seen)
            if job is None or job.events_offset != seen.events_offset:
                return
            place = {"run_dir": directory, "organization": self.tuning.organization}
            for event in events if job.status not in OVER else ():
                kind.apply(session, job, event, **place, now=self.clock())
            job.events_offset += num_bytes
            content = kind.results(session, job, directory) if wants_result else b""
            if any(event.kind in ("started", "checkpoint") for event in events):
                self._write_card(session, job)
        if not is_over:
            return
        if wants_result:
            result = self._put_results(seen, content)
        with self.database.write() as session:
            job = self._locked(session, seen)
            if job is None:
                return
            self._conclude(session, job, how, last, result, directory)
            self._write_card(session, job)
        for book in (self._asked, self._pausing):
            book.pop(seen.run_job or "", None)

    def _put_results(self, job: Job, content: bytes) -> str:
        """The id of a job's results file, which is one, however often this is tried."""
        id_ = f"file-{job.id.removeprefix('ftjob-')}"
        name = f"{job.id}.csv"
        return self.shelf.put(job.project, name, "fine-tune-results", content, id=id_).id

    def _conclude(
        self,
        session: Session,
        job: Job,
        how: Ending,
        last: Event | None,
        result: str | None,
        directory: Path,
    ) -> None:
        """What becomes of a job whose run has ended."""
        job.run_job = None
        if job.status == "cancelled":
            self.on_end(session, job)
        elif how == "finished" and last is not None and result is not None:
            self._succeed(session, job, last, result, directory)
        elif job.status == "paused":
            return
        elif how == "failed" and last is not None and last.text("code") not in _TRY_AGAIN:
            self._fail(
                session, job, Fate(code=last.text("code"), message=last.text("message")[:4000])
            )
        elif how == "stopped":
            job.status, job.estimated_finish = "queued", None
        else:
            self._lose(session, job)

    def _lose(self, session: Session, job: Job) -> None:
        """Have a run that was lost be started again, after a rest, or end its job."""
        job.losses += 1
        if job.losses >= self.tuning.attempts:
            message = f"The run was lost {job.losses} times; see the cluster's logs."
            self._fail(session, job, Fate(code="server_error", message=message))
            return
        if job.status == "running":
            message = "The run was lost; it goes on from its last checkpoint"
            tell(session, job, self.clock(), Line(message=message, level="warn"))
        rest_s = min(self.rest_s * 2 ** (job.losses - 1), _LONGEST_REST_S)
        job.status, job.start_after, job.estimated_finish = "queued", self.clock() + rest_s, None

    def _succeed(
        self, session: Session, job: Job, last: Event, result: str, directory: Path
    ) -> None:
        name = model_name(job, self.tuning.organization)
        now = self.clock()
        kind = kind_of(job)
        kind.conclude(session, job, last, now)
        path = directory / kind.RESULT
        job_progress.add_model(session, job, name=name, step=None, path=path, created_at=now)
        job.status, job.fine_tuned_model, job.result_files = "succeeded", name, [result]
        job.trained_tokens = int(last.number("real_tokens"))
        job.finished_at, job.estimated_finish = now, None
        tell(
            session,
            job,
            now,
            Line(message=f"New fine-tuned model created: {name}"),
            Line(message="The job has successfully completed"),
        )
        self.on_end(session, job)

    def _end_badly(self, seen: Job, fate: Fate) -> None:
        with self.database.write() as session:
            job = self._locked(session, seen)
            if job is not None and job.status in ("validating_files", "queued", "running"):
                self._fail(session, job, fate)

    def _fail(self, session: Session, job: Job, fate: Fate) -> None:
        job.status, job.finished_at, job.estimated_finish = "failed", self.clock(), None
        message = problems.without_paths(fate.message)  # the run's own events keep them
        job.error = {"code": fate.code, "message": message, "param": fate.param}
        line = Line(message=f"The job failed: {message}", level="error")
        tell(session, job, self.clock(), line)
        self.on_end(session, job)

    def _tidy(self, seen: Job) -> None:
        """Give back what only a job that may go on has use for."""
        job_recipe.tidy(self.tuning, seen)
        with self.database.write() as session:
            job = self._locked(session, seen)
            if job is not None:
                job.is_tidy = True

    def _write_card(self, session: Session, job: Job) -> None:
        """So that a lost registry can be made anew. At the end of the transaction whose outcome it
        tells: who is killed after it has a card, and who is killed in it is followed by another."""
        session.flush()
        steps = session.execute(
            select(JobCheckpoint.step, JobCheckpoint.model)
            .where(JobCheckpoint.job_id == job.id)
            .order_by(JobCheckpoint.step)
        ).all()
        card = Card(
            job_id=job.id,
            project=job.project,
            model=model_name(job, self.tuning.organization),
            base=job.model,
            created_at=job.created_at,
            status=job.status,
            checkpoints=tuple((step, name) for step, name in steps),
            result=kind_of(job).RESULT,
        )
        cards.write(job_recipe.run_dir(self.tuning, job), card)


def _block(path: Path, offset: int) -> bytes:
    """Whole lines from an offset on, up to about a megabyte."""
    try:
        with path.open("rb") as file:
            file.seek(offset)
            block = file.read(_BATCH_BYTES)
    except FileNotFoundError:
        return b""
    return block[: block.rfind(b"\n") + 1]
