"""Choosing a winner: finalists again with other seeds, paired intervals, an honest tie.

The best trials are compared example by example on the same held-out examples. Where the paired
95 % interval of a difference covers zero it is a tie, and the smaller rank wins.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from training import evaluate
from training.config import TrainRecipe
from training.evaluate import Estimate
from tune_spaces import trial as trial_room
from tune_spaces.bench import BASE
from tune_spaces.config import Search
from tune_spaces.hall import AnyHall
from tune_spaces.record import Finalist, SeedValue, Winner
from tune_spaces.trial import Spec

Results = Mapping[str, Mapping[str, Any]]
"""Newest result of each trial."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """Who won, and against whom."""

    winner: Winner
    finalists: tuple[Finalist, ...]
    recipe: TrainRecipe
    """Of the winner; trained again it gives the winner's adapter."""
    estimates: Mapping[str, Estimate]
    """The metric of each finalist's own adapter."""


def finished(results: Results, mode: Literal["min", "max"]) -> list[str]:
    """Candidates, best first: trials that reached their whole budget with a finite metric, or of
    which a guard has kept the best report."""
    sign = 1.0 if mode == "min" else -1.0
    done = [
        name
        for name, result in results.items()
        if result["is_finished"] and result["value"] is not None
    ]
    return sorted(done, key=lambda name: (sign * results[name]["value"], name))


def decide(
    chosen: Search,
    spec: Spec,
    hall: AnyHall,
    results: Results,
    params: Mapping[str, Mapping[str, Any]],
    *,
    mode: Literal["min", "max"],
    say: Callable[[str], None],
) -> Outcome | None:
    """Run the finals; None where no trial finished.

    A metric of the training itself (`train_loss`) has no examples to pair: the best value wins.
    """
    names = finished(results, mode)[: chosen.search.finalists]
    if not names:
        return None
    recipes = {name: _recipe(spec, name, params[name], results[name]) for name in names}
    metric = chosen.search.metric
    if metric == "train_loss":
        return _best_of(names[0], results, recipes[names[0]])
    say(f"{len(names)} finalists, {chosen.search.seeds} seeds each")
    entries = {
        _entry(name, seed): _with_seed(recipes[name], seed)
        for name in names
        for seed in range(chosen.search.seeds)
    }
    scores = hall.scores(entries, metric)
    weights = scores[names[0]]["weights"]
    items = {
        name: np.mean(
            [scores[_entry(name, seed)]["values"] for seed in range(chosen.search.seeds)], axis=0
        )
        for name in names
    }
    sign = 1.0 if mode == "min" else -1.0
    means = {name: evaluate.mean(items[name].tolist(), weights) for name in names}
    best = min(names, key=lambda name: (sign * means[name].value, name))
    gaps = {
        name: evaluate.mean((items[name] - items[best]).tolist(), weights)
        for name in names
        if name != best
    }
    tied = [name for name, gap in gaps.items() if gap.low <= 0.0 <= gap.high]
    winner = min(
        [best, *tied],
        key=lambda name: (recipes[name].lora.rank, sign * means[name].value, name),
    )
    own = {name: _estimate(metric, scores[name]) for name in names}
    return Outcome(
        winner=_winner(winner, best, tied, own[winner], _test(chosen, hall, recipes[winner])),
        finalists=tuple(
            _finalist(recipes[name], chosen.search.seeds, scores, means[name], gaps.get(name))
            for name in names
        ),
        recipe=recipes[winner],
        estimates=own,
    )


def _recipe(
    spec: Spec, name: str, params: Mapping[str, Any], result: Mapping[str, Any]
) -> TrainRecipe:
    """A candidate's own, up to the step that counts for it."""
    recipe = trial_room.recipe_of(spec, name, params)
    step = result.get("kept_step")
    return replace(recipe, optim=replace(recipe.optim, stop_after=step)) if step else recipe


def _finalist(
    recipe: TrainRecipe,
    seeds: int,
    scores: Mapping[str, Mapping[str, list[float]]],
    mean: Estimate,
    gap: Estimate | None,
) -> Finalist:
    return Finalist(
        trial=recipe.name,
        seeds=tuple(
            SeedValue(
                seed=_with_seed(recipe, seed).optim.seed,
                value=_mean(scores[_entry(recipe.name, seed)]),
            )
            for seed in range(seeds)
        ),
        mean=mean.value,
        low=mean.low,
        high=mean.high,
        diff_low=gap.low if gap else None,
        diff_high=gap.high if gap else None,
    )


def _winner(
    name: str, best: str, tied: Sequence[str], own: Estimate, test: Estimate | None
) -> Winner:
    others = tuple(other for other in (best, *tied) if other != name)
    why = "the best finalist, and better than every other beyond chance"
    if tied:
        why = "the smallest rank among finalists that cannot be told apart"
    return Winner(
        trial=name,
        value=own.value,
        low=own.low,
        high=own.high,
        n=own.n,
        test_value=test.value if test else None,
        test_low=test.low if test else None,
        test_high=test.high if test else None,
        test_n=test.n if test else None,
        is_tie=bool(tied),
        tied_with=others,
        why=why if len(others) or not tied else "the best finalist",
    )


def _best_of(name: str, results: Results, recipe: TrainRecipe) -> Outcome:
    value = float(results[name]["value"])
    estimate = Estimate(value=value, low=value, high=value, n=0)
    winner = _winner(name, name, (), estimate, None)
    return Outcome(
        winner=replace(winner, why="the lowest training loss, which has no interval"),
        finalists=(),
        recipe=recipe,
        estimates={name: estimate},
    )


def _test(chosen: Search, hall: AnyHall, recipe: TrainRecipe) -> Estimate | None:
    """The winner on examples that no decision used."""
    if chosen.search.test is None:
        return None
    source = str(Path(chosen.search.test).absolute())
    scores = hall.scores({recipe.name: recipe}, chosen.search.metric, source)
    return _estimate(chosen.search.metric, scores[recipe.name])


def base_estimate(hall: AnyHall, metric: str, recipe: TrainRecipe) -> Estimate:
    """The metric of the untouched base model."""
    return _estimate(metric, hall.scores({BASE: recipe}, metric)[BASE])


def _estimate(metric: str, scores: Mapping[str, list[float]]) -> Estimate:
    if metric == "eval_loss":
        return evaluate.mean(scores["values"], scores["weights"])
    return evaluate.summarise(metric, scores["values"])


def _mean(scores: Mapping[str, list[float]]) -> float:
    return float(np.average(scores["values"], weights=scores["weights"]))


def _entry(trial: str, seed: int) -> str:
    """The first seed is the trial itself."""
    return trial if seed == 0 else f"{trial}-seed{seed}"


def _with_seed(recipe: TrainRecipe, seed: int) -> TrainRecipe:
    optim = replace(recipe.optim, seed=(recipe.optim.seed + seed) % (1 << 31))
    return replace(recipe, name=_entry(recipe.name, seed), optim=optim)
