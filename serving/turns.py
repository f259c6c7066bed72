"""Whose turn it is among the jobs that wait."""

from collections import Counter
from collections.abc import Mapping, Sequence

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from cluster.registry.tables import ApiKey, Job


def next_of(session: Session, *, at_once: int, now: float) -> Job | None:
    """The job to start now; None where none waits or may start.

    One starts at a time, since what a run takes is not taken before its workers are there.
    """
    busy = session.scalars(select(Job).where(Job.run_job.is_not(None))).all()
    if len(busy) >= at_once or any(job.status == "queued" for job in busy):
        return None
    is_waiting = (Job.status == "queued", Job.run_job.is_(None))
    has_rested = Job.start_after.is_(None) | (Job.start_after <= now)
    waiting = session.scalars(select(Job).where(*is_waiting, has_rested).order_by(Job.number)).all()
    if not waiting:
        return None
    keys = {job.key_id for job in waiting}
    limits = select(ApiKey.id, ApiKey.concurrent_jobs).where(ApiKey.id.in_(keys))
    starts = select(Job.key_id, func.max(Job.started_at)).where(Job.key_id.in_(keys))
    return choose(
        waiting,
        busy,
        limits=dict(session.execute(limits).all()),
        starts=dict(session.execute(starts.group_by(Job.key_id)).all()),
    )


def choose(
    waiting: Sequence[Job],
    busy: Sequence[Job],
    *,
    limits: Mapping[str, int | None],
    starts: Mapping[str, float | None],
) -> Job | None:
    """Whose turn it is: of the key that has least running, and of those the one whose last start
    is longest ago, its oldest job.

    waiting: oldest first. limits: jobs that a key may have running. starts: each key's last start.
    """
    running = Counter(job.key_id for job in busy)
    oldest: dict[str, Job] = {}
    for job in waiting:
        limit = limits.get(job.key_id)
        if limit is None or running[job.key_id] < limit:
            oldest.setdefault(job.key_id, job)
    if not oldest:
        return None
    key = min(oldest, key=lambda id: (running[id], starts.get(id) or 0.0, oldest[id].number))
    return oldest[key]
