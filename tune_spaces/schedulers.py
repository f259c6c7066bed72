"""Ray Tune's schedulers and our searchers, as a search file asks for them.

All of Tune's schedulers run unmodified; their clock is the supervised tokens that a trial has seen.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
from ray.tune.schedulers import (
    AsyncHyperBandScheduler,
    FIFOScheduler,
    HyperBandScheduler,
    MedianStoppingRule,
    PopulationBasedTraining,
    TrialScheduler,
)
from ray.tune.search import Searcher

from cluster.errors import ConfigError
from tune_spaces.config import SearchConfig
from tune_spaces.searcher import ListSearcher, OptunaSearcher
from tune_spaces.spaces import Space

TOKENS = "supervised_tokens"
Mode = Literal["min", "max"]


def mode_of(metric: str) -> Mode:
    """Losses are to be small, shares of right answers large."""
    return "min" if metric.endswith("loss") else "max"


def make_scheduler(
    search: SearchConfig, space: Space, *, budget: int, report: int
) -> TrialScheduler:
    """budget, report: supervised tokens of a whole trial, and between two of its reports."""
    grace = search.grace_tokens or report
    far = 2 * budget  # a trial ends by its own schedule, never by the scheduler's limit
    if search.scheduler == "asha":
        return AsyncHyperBandScheduler(
            time_attr=TOKENS,
            max_t=far,
            grace_period=grace,
            reduction_factor=search.reduction_factor,
        )
    if search.scheduler == "hyperband":
        # It makes a bracket for each power of its factor in max_t: count reports, not tokens.
        return HyperBandScheduler(
            time_attr="training_iteration",
            max_t=max(2, budget // report + 1),
            reduction_factor=search.reduction_factor,
            stop_last_trials=False,
        )
    if search.scheduler == "median":
        return MedianStoppingRule(time_attr=TOKENS, grace_period=grace, min_samples_required=3)
    if search.scheduler == "pbt":
        return _population(search, space, every=max(grace, report))
    if search.scheduler == "pb2":
        raise ConfigError("search.scheduler: pb2 is not part of this release; use pbt")
    return FIFOScheduler()


def make_searcher(
    search: SearchConfig, space: Space, *, directory: Path, fixed: dict[str, Any]
) -> tuple[Searcher, int]:
    """The searcher of a space without stages, and how many trials it will hand out.

    fixed: parameters that every trial gets beside its own.
    """
    if search.searcher == "optuna":
        return OptunaSearcher(
            suggest=Suggestion(space, fixed),
            metric=search.metric,
            mode=mode_of(search.metric),
            seed=search.seed,
            num_trials=search.trials,
            journal=directory / "study.journal",
            study_name=space.name,
            sampler=search.sampler,
        ), search.trials
    rows = drawn(search, space, fixed=fixed)
    return ListSearcher(rows), len(rows)


def drawn(search: SearchConfig, space: Space, *, fixed: dict[str, Any]) -> list[dict[str, Any]]:
    """The parameters of all trials of a grid or of random search, in order."""
    if search.searcher == "grid":
        rows = space.grid()[: search.trials]
    else:
        rng = np.random.default_rng(search.seed)
        rows = [space.sample(rng) for _ in range(search.trials)]
    return [{**fixed, **row} for row in rows]


def _population(search: SearchConfig, space: Space, *, every: int) -> TrialScheduler:
    """Population based training over what may change in the middle of a trial."""
    if search.searcher == "optuna":
        raise ConfigError(
            "search.scheduler: pbt changes the parameters itself, which Optuna could not follow; "
            "set search.searcher: random (or grid) for its first population"
        )
    rng = np.random.default_rng(search.seed)

    def draw(domain: Any) -> Callable[[], Any]:
        return lambda: domain.sample(rng)

    mutable = {dimension.path: draw(dimension.domain) for dimension in space.mutable()}
    if not mutable:
        raise ConfigError(
            f"search.scheduler: pbt changes learning rate, weight decay or dropout, and space "
            f"{space.name!r} has none of them; add one, or use asha"
        )
    return PopulationBasedTraining(
        time_attr=TOKENS,
        perturbation_interval=every,
        hyperparam_mutations={"params": mutable},
    )


class Suggestion:
    """`space.suggest`, with what earlier stages have found; Tune pickles it with the searcher."""

    def __init__(self, space: Space, fixed: dict[str, Any]) -> None:
        self._space = space
        self._fixed = fixed

    def __call__(self, trial: Any) -> dict[str, Any]:
        return {**self._fixed, **self._space.suggest(trial)}
