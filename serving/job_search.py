"""A search's events as a job's story. The winner is the job's model, and its settings the job's."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from cluster.registry.tables import Job, JobEvent
from serving import job_progress, problems
from serving.job_book import OVER, Line, tell
from serving.job_progress import Ending
from training.events import Event
from training.hyperparameters import LEARNING_RATE
from tune_spaces import record

RESULT = record.BEST
_TOKENS = "supervised_tokens"
_BATCH_SIZE = "optim.global_batch_size"


def apply(
    session: Session,
    job: Job,
    events: Sequence[Event],
    *,
    run_dir: Path,
    organization: str,
    now: float,
) -> None:
    """Go on with a job by the events of its search, in a transaction that holds the job's row."""
    for event in events:
        if job.status in OVER:
            return
        if event.kind == "started":
            _started(session, job, event, now)
        elif event.kind == "result":
            _report(session, job, event, now)
        elif event.kind in ("stopped", "trial_failed"):
            is_failure = event.kind == "trial_failed"
            what = "failed" if is_failure else "was stopped"
            why = event.text("message" if is_failure else "reason")
            message = f"Trial {event.text('trial')} {what}: {problems.without_paths(why)}"
            level = "warn" if is_failure else "info"
            tell(session, job, now, Line(message=message, level=level, at=event.time_s))


def ending(run_dir: Path) -> tuple[Ending, Event | None]:
    """How the last driver of a search ended; of one that is complete, its result as an event."""
    try:
        fields = json.loads((run_dir / record.RESULT).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return job_progress.ending(run_dir)
    return "finished", Event(kind="finished", time_s=0.0, fields=fields)


def results(session: Session, job: Job, run_dir: Path) -> bytes:
    """The table of the trials: CSV, a row for each."""
    return (run_dir / "trials.csv").read_bytes()


def conclude(session: Session, job: Job, last: Event, now: float) -> None:
    """Keep who has won, and echo its settings as those of the job."""
    found = last.fields
    params: Mapping[str, Any] = found["best_config"]  # pyright: ignore[reportAssignmentType]
    rate = last.number("learning_rate")
    metric = job.request["search"]["metric"]
    job.winner = {
        "trial": found["best_trial"],
        "params": dict(params),
        "metric": metric,
        "value": found["best_metric"],
        "base_value": found["base_metric"],
        "trials": found["trials"],
    }
    chosen = dict(job.method["supervised"]["hyperparameters"])
    chosen["learning_rate_multiplier"] = float(f"{rate / LEARNING_RATE:.6g}")
    if _BATCH_SIZE in params:
        chosen["batch_size"] = params[_BATCH_SIZE]
    job.method = {"type": "supervised", "supervised": {"hyperparameters": chosen}}
    base = found["base_metric"]
    settings = ", ".join(f"{name} {_shown(value)}" for name, value in params.items())
    message = (
        f"Trial {found['best_trial']} of {found['trials']} won: {settings}; "
        f"{metric}={_shown(found['best_metric'])}"
    )
    if base is not None:
        message += f" (the base model: {_shown(base)})"
    tell(session, job, now, Line(message=message))


def _started(session: Session, job: Job, event: Event, now: float) -> None:
    if job.status != "queued":
        return
    job.status = "running"
    if job.started_at is None:
        job.started_at = event.time_s
        message = "Fine-tuning job started"
    else:
        message = "Fine-tuning job goes on after the last reports of its trials"
    tell(session, job, now, Line(message=message, at=event.time_s))


def _report(session: Session, job: Job, event: Event, now: float) -> None:
    """Tell of a trial's report, unless a driver that is gone made it, too."""
    trial, tokens = event.text("trial"), int(event.number(_TOKENS))
    told = _told_of(session, job, trial)
    if told is not None and told[_TOKENS] >= tokens:
        return
    if job.status == "queued":  # it was paused, and resumed before its driver had ended
        job.status = "running"
    step, total = int(event.number("step")), int(event.number("num_steps"))
    rank, rate = event.fields.get("rank"), event.number("learning_rate")
    metric = job.request["search"]["metric"]
    data = {
        "trial": trial,
        "step": step,
        "total_steps": total,
        _TOKENS: tokens,
        "rank": rank,
        "learning_rate": rate,
        "train_loss": _finite(event, "train_loss"),
        "valid_loss": _finite(event, "eval_loss"),
        metric: _finite(event, "value"),
    }
    message = (
        f"Trial {trial} (rank {rank}, learning rate {rate:.2e}), step {step}/{total}: "
        f"training loss={event.number('train_loss'):.2f}"
    )
    if metric != "train_loss":
        message += f", {metric}={event.number('value'):.4g}"
    tell(session, job, now, Line(message=message, data=data, at=event.time_s))
    if event.text("reason"):
        ended = Line(message=f"Trial {trial} was stopped: {event.text('reason')}", at=event.time_s)
        tell(session, job, now, ended)


def _told_of(session: Session, job: Job, trial: str) -> dict[str, Any] | None:
    """The last that was told of a trial."""
    session.flush()
    is_its = JobEvent.data["trial"].as_string() == trial
    told = select(JobEvent.data).where(JobEvent.job_id == job.id, is_its)
    return session.scalar(told.order_by(JobEvent.place.desc()).limit(1))


def _finite(event: Event, name: str) -> float | None:
    value = event.number(name)
    return value if math.isfinite(value) else None


def _shown(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
