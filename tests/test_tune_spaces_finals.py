"""Choosing among finalists: a clear win, an honest tie, a test split, nothing to choose from."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from cluster import config
from cluster.errors import ClusterError
from training.config import TrainRecipe
from tune_spaces import config as search_config
from tune_spaces import finals
from tune_spaces.hall import Hall, mean_filled, places_of
from tune_spaces.trial import Spec, recipe_of

ITEMS = 40


class FixedHall:
    """Stands where trained adapters would: scores by trial and seed, example by example."""

    def __init__(self, scores: Mapping[str, Sequence[float]]) -> None:
        self.scored = scores
        self.asked: list[tuple[list[str], str | None]] = []
        self.recipes: dict[str, TrainRecipe] = {}

    def scores(
        self, recipes: Mapping[str, TrainRecipe], metric: str, source: str | None = None
    ) -> dict[str, dict[str, list[float]]]:
        self.asked.append((list(recipes), source))
        self.recipes |= recipes
        return {
            name: {"values": list(self.scored[name.split("-")[0]]), "weights": [1.0] * ITEMS}
            for name in recipes
        }


def make_search(path: Path, metric: str = "eval_loss", **search: Any) -> search_config.Search:
    tree = {
        "name": "s",
        "model": {"base": "demo"},
        "data": {"train": "a.jsonl", "eval": "b.jsonl"},
        "search": {"finalists": 3, "seeds": 2, "metric": metric, **search},
    }
    file = path / "s.json"
    file.write_text(json.dumps(tree))
    return search_config.load(file)


def make_spec(search: search_config.Search) -> Spec:
    return Spec(
        recipe=config.plain(search.recipe),
        directory="trials",
        namespace="n",
        benches=("bench0",),
        metric=search.search.metric,
        is_lr_scaled=True,
        report_every=10,
        budget=None,
        tokens_per_example=5.0,
        base_loss=None,
    )


def decide(
    search: search_config.Search, values: Mapping[str, Sequence[float]], mode: Any = "min"
) -> tuple[finals.Outcome | None, FixedHall]:
    hall = FixedHall(values)
    ranks = dict(zip(values, (32, 8, 16, 4), strict=False))
    outcome = finals.decide(
        search,
        make_spec(search),
        cast(Hall, hall),
        {n: {"is_finished": True, "value": float(np.mean(v))} for n, v in values.items()},
        {name: {"lora.rank": rank} for name, rank in ranks.items()},
        mode=mode,
        say=lambda _: None,
    )
    return outcome, hall


def noise(seed: int, mean: float, spread: float = 0.3) -> list[float]:
    return (mean + spread * np.random.default_rng(seed).standard_normal(ITEMS)).tolist()


def test_a_clear_winner_is_no_tie_whatever_its_rank(tmp_path: Path) -> None:
    outcome, _ = decide(make_search(tmp_path), {"a": noise(1, 1.0), "b": noise(2, 2.0)})
    assert outcome is not None
    assert (outcome.winner.trial, outcome.winner.is_tie) == ("a", False)
    assert outcome.recipe.lora.rank == 32
    other = next(finalist for finalist in outcome.finalists if finalist.trial == "b")
    assert other.diff_low is not None
    assert 0.5 < other.diff_low < 1.0
    assert [len(finalist.seeds) for finalist in outcome.finalists] == [2, 2]


def test_a_tie_goes_to_the_smallest_rank(tmp_path: Path) -> None:
    same = noise(1, 1.0)
    values = {"a": same, "b": [v + d for v, d in zip(same, noise(3, 0.01), strict=True)]}
    outcome, _ = decide(make_search(tmp_path), values)
    assert outcome is not None
    assert (outcome.winner.trial, outcome.winner.is_tie) == ("b", True)
    assert outcome.winner.tied_with == ("a",)
    assert outcome.recipe.lora.rank == 8


def test_shares_are_to_be_large(tmp_path: Path) -> None:
    values = {"a": [1.0] * 10 + [0.0] * 30, "b": [1.0] * 36 + [0.0] * 4}
    outcome, _ = decide(make_search(tmp_path, "exact_match"), values, mode="max")
    assert outcome is not None
    assert outcome.winner.trial == "b"
    assert outcome.winner.value == pytest.approx(0.9)
    assert outcome.winner.low is not None
    assert outcome.winner.low < 0.9


def test_only_the_winner_is_shown_the_test_examples(tmp_path: Path) -> None:
    search = make_search(tmp_path, test="c.jsonl")
    outcome, hall = decide(search, {"a": noise(1, 1.0), "b": noise(2, 2.0)})
    assert outcome is not None
    assert outcome.winner.test_n == ITEMS
    assert [(names, source is not None) for names, source in hall.asked] == [
        (["a", "a-seed1", "b", "b-seed1"], False),
        (["a"], True),
    ]


def test_only_as_many_finalists_as_asked_and_none_where_none_finished(tmp_path: Path) -> None:
    values = {name: noise(i, 1.0 + i) for i, name in enumerate("abcd")}
    outcome, _ = decide(make_search(tmp_path, finalists=2), values)
    assert outcome is not None
    assert [finalist.trial for finalist in outcome.finalists] == ["a", "b"]
    assert decide(make_search(tmp_path), {})[0] is None


def test_trials_that_were_stopped_or_broke_are_no_finalists() -> None:
    results = {
        "good": {"is_finished": True, "value": 2.0},
        "better": {"is_finished": True, "value": 1.0},
        "stopped": {"is_finished": False, "value": 0.5},
        "broken": {"is_finished": True, "value": None},
    }
    assert finals.finished(results, "min") == ["better", "good"]
    assert finals.finished(results, "max") == ["good", "better"]


def test_a_trial_of_which_an_early_report_counts_is_repeated_up_to_its_step(tmp_path: Path) -> None:
    values = {"a": noise(1, 1.0), "b": noise(2, 2.0)}
    search = make_search(tmp_path)
    hall = FixedHall(values)
    results = {
        "a": {"is_finished": True, "value": 1.0, "kept_step": 7},
        "b": {"is_finished": True, "value": 2.0},
    }
    outcome = finals.decide(
        search,
        make_spec(search),
        cast(Hall, hall),
        results,
        {"a": {}, "b": {}},
        mode="min",
        say=lambda _: None,
    )
    assert outcome is not None
    assert outcome.recipe.optim.stop_after == 7
    stops = {name: recipe.optim.stop_after for name, recipe in hall.recipes.items()}
    assert stops == {"a": 7, "a-seed1": 7, "b": None, "b-seed1": None}


def test_a_training_loss_has_no_interval_and_the_lowest_wins(tmp_path: Path) -> None:
    outcome, hall = decide(
        make_search(tmp_path, "train_loss"), {"a": noise(1, 1.0), "b": noise(2, 2.0)}
    )
    assert outcome is not None
    assert (outcome.winner.trial, outcome.finalists, hall.asked) == ("a", (), [])


def test_a_trial_s_schedule_ends_at_its_budget_whatever_its_batch(tmp_path: Path) -> None:
    search = make_search(tmp_path)
    spec = config_with_budget(make_spec(search), 1000)
    for batch, steps in ((8, 25), (32, 6), (512, 2)):
        recipe = recipe_of(spec, "t", {"optim.global_batch_size": batch})
        assert recipe.optim.max_steps == steps
    assert recipe_of(make_spec(search), "t", {}).optim.max_steps is None


def config_with_budget(spec: Spec, budget: int) -> Spec:
    from dataclasses import replace

    return replace(spec, budget=budget)


def test_mean_seats_are_weighted_by_time() -> None:
    assert mean_filled([]) == 0.0
    assert mean_filled([(0.0, 3)]) == 3.0
    assert mean_filled([(0.0, 1), (1.0, 4), (4.0, 0)]) == pytest.approx(13 / 4)


def node(id: str, *, cpus: int, gpus: int = 0, is_alive: bool = True) -> dict[str, Any]:
    return {"NodeID": id * 56, "Alive": is_alive, "Resources": {"CPU": cpus, "GPU": gpus}}


def test_a_bench_has_a_free_gpu_or_a_node_without_any() -> None:
    nodes = [
        node("a", cpus=8, gpus=4),
        node("b", cpus=8, gpus=1),
        node("c", cpus=4),
        node("d", cpus=4, is_alive=False),
        node("e", cpus=0),
    ]
    free = {"a" * 56: {"CPU": 7, "GPU": 3}, "b" * 56: {"CPU": 8}, "c" * 56: {"CPU": 3}}
    places = places_of(nodes, free)
    assert [(place.num_cpus, place.num_gpus, place.threads) for place in places] == [
        (1.0, 1, 2),
        (1.0, 1, 2),
        (1.0, 1, 2),
        (2.0, 0, 4),
    ]
    with pytest.raises(ClusterError, match="free GPU"):
        places_of(nodes[1:2], free)
