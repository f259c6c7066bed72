"""Fine-tuning over HTTP, put together from a serving file: for a replica, and the dispatcher."""

import time
from collections.abc import Callable
from pathlib import Path

from cluster.registry.database import Database
from serving.config import ServeRecipe
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
        ),
        models=TunedModels(opened, replica.service.adapters, clock=clock),
        organization=recipe.tuning.organization,
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
    )


def _shelf(recipe: ServeRecipe, opened: Database, clock: Callable[[], float]) -> Shelf:
    assert recipe.tuning is not None
    tuning = recipe.tuning
    limits = FileLimits(
        max_file_bytes=tuning.max_file_bytes,
        max_line_bytes=tuning.max_line_bytes,
        max_project_bytes=tuning.max_project_bytes,
    )
    return Shelf(opened, Path(tuning.storage), limits, clock)
