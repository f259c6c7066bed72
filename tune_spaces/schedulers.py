"""Ray Tune's schedulers and our searchers, as a search file asks for them.

All of Tune's schedulers run unmodified; their clock is the supervised tokens that a trial has seen.
"""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from ray import tune
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
from tune_spaces.guards import mode_of
from tune_spaces.searcher import ListSearcher, OptunaSearcher
from tune_spaces.spaces import Choices, Ints, Space

TOKENS = "supervised_tokens"
POPULATION = ("pbt", "pb2")
"""Schedulers that change the parameters of running trials, and so need a fixed population."""
_LOGS = "log"
"""In a trial's config under pb2: natural logarithms of its parameters with a log range."""


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
    if search.scheduler in POPULATION:
        return _population(search, space, every=max(grace, report))
    return FIFOScheduler()


def rungs(search: SearchConfig, *, budget: int, report: int) -> tuple[int, ...]:
    """Supervised tokens at which trials are compared and stopped: of asha its rungs, of fifo none,
    of the others every report."""
    if search.scheduler == "fifo":
        return ()
    if search.scheduler != "asha":
        return tuple(range(report, budget + 1, report))
    found = [search.grace_tokens or report]
    while found[-1] * search.reduction_factor <= budget:
        found.append(round(found[-1] * search.reduction_factor))
    return tuple(found)


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


def population(search: SearchConfig, space: Space, *, fixed: dict[str, Any]) -> dict[str, Any]:
    """The first population, as part of Tune's `param_space`: a grid, since a searcher may not be
    beside these schedulers."""
    params: dict[str, Any] = {"params": tune.grid_search(drawn(search, space, fixed=fixed))}
    if search.scheduler == "pb2":
        params[_LOGS] = tune.sample_from(_Box(space).logs)
    return params


def _population(search: SearchConfig, space: Space, *, every: int) -> TrialScheduler:
    """Population based training, or bandits (PB2), over what may change amid a trial."""
    name = search.scheduler
    if search.searcher == "optuna":
        raise ConfigError(
            f"search.scheduler: {name} changes the parameters itself, which Optuna could not "
            "follow; set search.searcher: random (or grid) for its first population"
        )
    if not space.mutable():
        raise ConfigError(
            f"search.scheduler: {name} changes learning rate, weight decay or dropout, and space "
            f"{space.name!r} has none of them; add one, or use asha"
        )
    if name == "pb2":
        return _bandits(space, every=every)
    rng = np.random.default_rng(search.seed)

    def draw(domain: Any) -> Callable[[], Any]:
        return lambda: domain.sample(rng)

    mutable = {dimension.path: draw(dimension.domain) for dimension in space.mutable()}
    return PopulationBasedTraining(
        time_attr=TOKENS,
        perturbation_interval=every,
        hyperparam_mutations={"params": mutable},
    )


def _bandits(space: Space, *, every: int) -> TrialScheduler:
    """PB2: its Gaussian process works on a box, so a log range goes by its logarithm."""
    from ray.tune.schedulers.pb2 import PB2  # scikit-learn: a second that no other needs

    for dimension in space.mutable():
        if isinstance(dimension.domain, Choices) or dimension.when is not None:
            raise ConfigError(
                f"search.scheduler: pb2 moves along ranges, and {dimension.path} of space "
                f"{space.name!r} has choices or a condition; give it uniform or log_uniform "
                "[low, high] without `when`, or use pbt"
            )
    box = _Box(space)
    return PB2(
        time_attr=TOKENS,
        perturbation_interval=every,
        hyperparam_bounds=box.bounds(),
        custom_explore_fn=box.back,
    )


class _Box:
    """The ranges of a space that may change amid a trial, as PB2 sees them."""

    def __init__(self, space: Space) -> None:
        domains = {dimension.path: dimension.domain for dimension in space.mutable()}
        self._domains = {p: d for p, d in domains.items() if not isinstance(d, Choices)}

    def bounds(self) -> dict[str, Any]:
        """Section of a trial's config -> path -> [low, high]."""
        boxes: dict[str, dict[str, list[float]]] = {"params": {}, _LOGS: {}}
        for path, domain in self._domains.items():
            ends = domain.ends()
            boxes[_LOGS if domain.is_log else "params"][path] = (
                [math.log(end) for end in ends] if domain.is_log else list(ends)
            )
        return {section: box for section, box in boxes.items() if box}

    def logs(self, config: Mapping[str, Any]) -> dict[str, float]:
        """Of a trial's own parameters; Tune calls it with a config whose grid is resolved."""
        return {
            path: math.log(config["params"][path])
            for path, domain in self._domains.items()
            if domain.is_log
        }

    def back(self, config: dict[str, Any]) -> dict[str, Any]:
        """A config that PB2 has changed, with the parameters of its logarithms.

        It calculates in float32 (Ray 2.60), which can miss the end of a range.
        """
        params = dict(config["params"])
        for path, domain in self._domains.items():
            low, high = domain.ends()
            value = math.exp(config[_LOGS][path]) if domain.is_log else params[path]
            value = round(value) if isinstance(domain, Ints) else value
            params[path] = min(max(value, low), high)
        return {**config, "params": params}


class Suggestion:
    """`space.suggest`, with what earlier stages have found; Tune pickles it with the searcher."""

    def __init__(self, space: Space, fixed: dict[str, Any]) -> None:
        self._space = space
        self._fixed = fixed

    def __call__(self, trial: Any) -> dict[str, Any]:
        return {**self._fixed, **self._space.suggest(trial)}
