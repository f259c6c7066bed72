"""A run's events as a job's story: what a line of events.jsonl means to who asked for the job."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from sqlalchemy import select
from sqlalchemy.orm import Session

from cluster.registry.tables import Job, JobCheckpoint, JobEvent, Model
from serving import problems
from serving.job_book import Line, model_name, tell
from training import checkpoint
from training.events import Event, EventReader

RESULT = "adapter"
"""Where in a run's directory its result lies."""
_LATEST = 8
"""Lines of metrics in which those of a checkpoint's step are looked for."""
Ending = Literal["finished", "stopped", "failed", "lost"]


def apply(
    session: Session,
    job: Job,
    event: Event,
    *,
    run_dir: Path,
    organization: str,
    now: float,
) -> None:
    """Go on with a job by an event of its run, in a transaction that holds the job's row."""
    if event.kind == "started":
        # A run that was killed between a checkpoint and its event goes on from it.
        step = int(event.number("from_step"))
        _checkpoint(session, job, event, step, run_dir, organization)
        begin(session, job, event, now, again=f"after step {step}")
    elif event.kind == "step":
        _step(session, job, event)
    elif event.kind == "eval":
        _eval(session, job, event)
    elif event.kind == "checkpoint":
        step = int(event.number("step"))
        _checkpoint(session, job, event, step, run_dir, organization)
    elif event.kind == "warning":
        told = problems.without_paths(event.text("message"))
        line = Line(message=told, level="warn", at=event.time_s)
        tell(session, job, now, line)


def begin(session: Session, job: Job, event: Event, now: float, *, again: str) -> None:
    """Take in that a job has started. again: where it goes on, if it had before."""
    if job.status != "queued":
        return
    job.status = "running"
    message = "Fine-tuning job started"
    if job.started_at is None:
        job.started_at = event.time_s
    else:
        message = f"Fine-tuning job goes on {again}"
    tell(session, job, now, Line(message=message, at=event.time_s))


def ending(run_dir: Path) -> tuple[Ending, Event | None]:
    """How the last attempt of a run ended, and its last event."""
    last = None
    for event in EventReader(run_dir / "events.jsonl").read():
        if event.kind in ("started", "finished", "failed"):
            last = event
    if last is None or last.kind == "started":
        return "lost", last
    if last.kind == "failed":
        return "failed", last
    return ("stopped" if last.fields.get("was_stopped") else "finished"), last


def conclude(session: Session, job: Job, last: Event, now: float) -> None:
    """All of it is told already."""


def results(session: Session, job: Job, run_dir: Path) -> bytes:
    """The results file of a job: CSV, a row for each step."""
    names = ("train_loss", "train_mean_token_accuracy", "valid_loss", "valid_mean_token_accuracy")
    rows: dict[int, dict[str, Any]] = {}
    told = select(JobEvent.data).where(JobEvent.job_id == job.id, JobEvent.type == "metrics")
    for data in session.scalars(told.order_by(JobEvent.place)):
        if data is not None:
            rows.setdefault(int(data["step"]), {}).update(data)
    lines = ["step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy"]
    for step, data in sorted(rows.items()):
        lines.append(",".join([str(step), *(_cell(data.get(name)) for name in names)]))
    return ("\n".join(lines) + "\n").encode()


def add_model(
    session: Session, job: Job, *, name: str, step: int | None, path: Path, created_at: float
) -> None:
    """Have a model of a job be there, which it is where a rebuild of the registry was quicker."""
    session.flush()
    if session.scalar(select(Model.number).where(Model.name == name)) is not None:
        return
    session.add(
        Model(
            name=name,
            project=job.project,
            job_id=job.id,
            base=job.model,
            step=step,
            path=str(path),
            created_at=created_at,
        )
    )


def _cell(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, int | float) else ""


def _step(session: Session, job: Job, event: Event) -> None:
    step, total = int(event.number("step")), int(event.number("num_steps"))
    if job.status == "running":
        job.estimated_finish = event.time_s + (total - step) * event.number("step_s")
    if step <= job.last_step:
        return
    job.last_step = step
    loss = event.number("loss")
    data = {
        "step": step,
        "total_steps": total,
        "train_loss": loss,
        "train_mean_token_accuracy": event.fields.get("train_mean_token_accuracy"),
        "learning_rate": event.fields.get("lr"),
    }
    message = f"Step {step}/{total}: training loss={loss:.2f}"
    tell(session, job, event.time_s, Line(message=message, data=data, at=event.time_s))


def _eval(session: Session, job: Job, event: Event) -> None:
    step, loss = int(event.number("step")), event.number("loss")
    if _metrics(session, job, step).get("valid_loss") is not None:
        return
    data = {
        "step": step,
        "valid_loss": loss,
        "valid_mean_token_accuracy": event.fields.get("valid_mean_token_accuracy"),
    }
    message = f"Step {step}: validation loss={loss:.2f}"
    tell(session, job, event.time_s, Line(message=message, data=data, at=event.time_s))


def _checkpoint(
    session: Session, job: Job, event: Event, step: int, run_dir: Path, organization: str
) -> None:
    path = checkpoint.adapter_directory(run_dir, step)
    made = select(JobCheckpoint).where(JobCheckpoint.job_id == job.id, JobCheckpoint.step == step)
    if session.scalar(made) is not None or not path.is_dir():
        return
    name, metrics = model_name(job, organization, step), _metrics(session, job, step)
    names = ("train_loss", "train_mean_token_accuracy", "valid_loss", "valid_mean_token_accuracy")
    shown: Mapping[str, Any] = {key: metrics.get(key) for key in names}
    session.add(
        JobCheckpoint(
            id=f"ftckpt_{job.id.removeprefix('ftjob-')[:16]}{step:08d}",
            job_id=job.id,
            step=step,
            created_at=event.time_s,
            model=name,
            metrics={
                "step": step,
                **shown,
                "full_valid_loss": shown["valid_loss"],
                "full_valid_mean_token_accuracy": shown["valid_mean_token_accuracy"],
            },
        )
    )
    add_model(session, job, name=name, step=step, path=path, created_at=event.time_s)
    line = Line(message=f"Checkpoint created at step {step}", at=event.time_s)
    tell(session, job, event.time_s, line)


def _metrics(session: Session, job: Job, step: int) -> dict[str, Any]:
    """What was told of a step."""
    session.flush()
    latest = select(JobEvent.data).where(JobEvent.job_id == job.id, JobEvent.type == "metrics")
    found: dict[str, Any] = {}
    for data in session.scalars(latest.order_by(JobEvent.place.desc()).limit(_LATEST)):
        if data is not None and data.get("step") == step:
            found.update(data)
    return found
