"""Fine-tuning over HTTP, put together from a serving file: for a replica, and the dispatcher."""

import time
from collections.abc import Callable
from pathlib import Path

from sqlalchemy.orm import Session

from cluster.registry import webhooks
from cluster.registry.database import Database
from cluster.registry.tables import Job
from serving import webhook
from serving.alias_book import AliasBook
from serving.aliases import Aliases
from serving.config import ServeRecipe
from serving.courier import Courier
from serving.dispatcher import Dispatcher
from serving.inference import Tuning
from serving.job_book import JobBook
from serving.replica import Replica
from serving.runner import Runner
from serving.shelf import FileLimits, Shelf
from serving.tuned_models import TunedModels


def open_tuning(
    recipe: ServeRecipe,
    opened: Database,
    replica: Replica,
    *,
    clock: Callable[[], float] = time.time,
) -> Tuning | None:
    """What a replica needs; None where tuning is off."""
    if recipe.tuning is None:
        return None
    shelf = _shelf(recipe, opened, clock)
    return Tuning(
        shelf=shelf,
        book=JobBook(
            opened,
            shelf,
            base=recipe.model_name,
            unfinished_per_key=recipe.tuning.unfinished_per_key,
            clock=clock,
            on_end=_tell_of_ends(recipe, clock),
        ),
        models=TunedModels(opened, replica.service.adapters, clock=clock),
        organization=recipe.tuning.organization,
    )


def open_aliases(
    opened: Database, replica: Replica, *, clock: Callable[[], float] = time.time
) -> Aliases:
    """The names that stand for a replica's models."""
    base = replica.service.base.name
    return Aliases(
        book=AliasBook(opened, clock=clock),
        fixed=lambda: [base, *replica.registry.entries()],
        clock=clock,
    )


def open_dispatcher(
    recipe: ServeRecipe,
    opened: Database,
    runner: Runner,
    *,
    holder: str,
    clock: Callable[[], float] = time.time,
) -> Dispatcher:
    """What takes the jobs to their ends. holder: tells this process from others."""
    assert recipe.tuning is not None
    return Dispatcher(
        database=opened,
        shelf=_shelf(recipe, opened, clock),
        runner=runner,
        tuning=recipe.tuning,
        model=recipe.model,
        holder=holder,
        clock=clock,
        on_end=_tell_of_ends(recipe, clock),
    )


def open_courier(
    recipe: ServeRecipe, opened: Database, *, clock: Callable[[], float] = time.time
) -> Courier:
    """What delivers to the webhooks. Raises ConfigError for a secret that is none."""
    for hook in recipe.webhooks:
        hook.secret()
    return Courier(database=opened, hooks=recipe.webhooks, clock=clock)


def _tell_of_ends(
    recipe: ServeRecipe, clock: Callable[[], float]
) -> Callable[[Session, Job], None]:
    def on_end(session: Session, job: Job) -> None:
        type_ = f"fine_tuning.job.{job.status}"
        urls = webhook.destinations(recipe.webhooks, project=job.project, type=type_)
        webhooks.enqueue(
            session, project=job.project, type=type_, data_id=job.id, now=clock(), urls=urls
        )

    return on_end


def _shelf(recipe: ServeRecipe, opened: Database, clock: Callable[[], float]) -> Shelf:
    assert recipe.tuning is not None
    tuning = recipe.tuning
    limits = FileLimits(
        max_file_bytes=tuning.max_file_bytes,
        max_line_bytes=tuning.max_line_bytes,
        max_project_bytes=tuning.max_project_bytes,
    )
    return Shelf(opened, Path(tuning.storage), limits, clock)
