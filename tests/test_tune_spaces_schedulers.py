"""What a search file makes of Tune's schedulers and of our searchers."""

import math
from pathlib import Path

import pytest
from ray.tune import schedulers as tune_schedulers
from ray.tune.schedulers.pb2 import PB2

from cluster.errors import ConfigError
from tune_spaces import config, spaces
from tune_spaces.config import SearchConfig
from tune_spaces.schedulers import (
    TOKENS,
    make_scheduler,
    make_searcher,
    mode_of,
    population,
    rungs,
)
from tune_spaces.searcher import ListSearcher, OptunaSearcher


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("fifo", tune_schedulers.FIFOScheduler),
        ("asha", tune_schedulers.AsyncHyperBandScheduler),
        ("hyperband", tune_schedulers.HyperBandScheduler),
        ("median", tune_schedulers.MedianStoppingRule),
        ("pbt", tune_schedulers.PopulationBasedTraining),
    ],
)
def test_the_schedulers_are_tune_s_own(name: str, kind: type) -> None:
    search = SearchConfig(scheduler=name, searcher="random")  # pyright: ignore
    made = make_scheduler(search, spaces.rank_lr(), budget=800, report=100)
    assert type(made) is kind


def test_asha_judges_by_supervised_tokens_from_the_first_report_on() -> None:
    made = make_scheduler(SearchConfig(), spaces.rank_lr(), budget=800, report=100)
    assert isinstance(made, tune_schedulers.AsyncHyperBandScheduler)
    assert made._time_attr == TOKENS
    assert [rung for rung, _ in made._brackets[0]._rungs][-1] == 100


def test_population_based_training_needs_something_that_may_change() -> None:
    space = config.parse({"lora.rank": [8, 16]})
    search = SearchConfig(scheduler="pbt", searcher="random")
    with pytest.raises(ConfigError, match="pbt changes learning rate"):
        make_scheduler(search, space, budget=800, report=100)
    with pytest.raises(ConfigError, match=r"set search\.searcher: random"):
        make_scheduler(SearchConfig(scheduler="pbt"), spaces.rank_lr(), budget=800, report=100)
    with pytest.raises(ConfigError, match="pb2 changes the parameters itself"):
        make_scheduler(SearchConfig(scheduler="pb2"), space, budget=800, report=100)


@pytest.mark.parametrize(
    "dropout", [[0.0, 0.1], {"uniform": [0.0, 0.1], "when": {"lora.rank": [16]}}]
)
def test_pb2_needs_ranges_without_conditions(dropout: object) -> None:
    space = config.parse({"lora.rank": [8, 16], "lora.dropout": dropout})
    search = SearchConfig(scheduler="pb2", searcher="random")
    with pytest.raises(ConfigError, match=r"lora\.dropout of space 'inline' has choices or a cond"):
        make_scheduler(search, space, budget=800, report=100)


def test_pb2_searches_a_log_range_by_its_logarithm() -> None:
    space = config.parse(
        {
            "lora.rank": [8],
            "optim.learning_rate": {"log_uniform": [1e-5, 1e-2]},
            "lora.dropout": {"uniform": [0.0, 0.2]},
        }
    )
    search = SearchConfig(scheduler="pb2", searcher="random", trials=4)
    made = make_scheduler(search, space, budget=800, report=100)
    assert isinstance(made, PB2)
    bounds = made._hyperparam_bounds_flat
    assert bounds["params/lora.dropout"] == [0.0, 0.2]
    assert bounds["log/optim.learning_rate"] == pytest.approx([math.log(1e-5), math.log(1e-2)])
    first = population(search, space, fixed={})
    rows = first["params"]["grid_search"]
    assert len(rows) == 4
    drawn = first["log"].sample({"params": rows[0]})
    assert drawn == {"optim.learning_rate": math.log(rows[0]["optim.learning_rate"])}
    assert made._custom_explore_fn is not None
    moved = {"params": rows[0], "log": {"optim.learning_rate": math.log(3e-4)}, "spec": "s"}
    changed = made._custom_explore_fn(moved)["params"]
    assert changed["optim.learning_rate"] == pytest.approx(3e-4)
    assert changed["lora.dropout"] == rows[0]["lora.dropout"]
    moved["params"] = {**rows[0], "lora.dropout": 0.20000000298023224}
    assert made._custom_explore_fn(moved)["params"]["lora.dropout"] == 0.2
    moved["log"] = {"optim.learning_rate": math.log(1e-2) + 1e-6}  # as float32 has it
    assert made._custom_explore_fn(moved)["params"]["optim.learning_rate"] == 1e-2


def test_random_draws_are_those_of_the_seed_and_a_grid_has_its_points(tmp_path: Path) -> None:
    space = config.parse({"lora.rank": [8, 16, 32], "lora.dropout": [0.0, 0.1]})

    def drawn(search: SearchConfig) -> list[dict[str, object]]:
        searcher, count = make_searcher(search, space, directory=tmp_path, fixed={"optim.seed": 3})
        assert isinstance(searcher, ListSearcher)
        rows = [searcher.suggest(str(number)) for number in range(count)]
        return [row["params"] for row in rows if row is not None]

    first = drawn(SearchConfig(searcher="random", trials=5, seed=1))
    assert len(first) == 5
    assert first == drawn(SearchConfig(searcher="random", trials=5, seed=1))
    assert first != drawn(SearchConfig(searcher="random", trials=5, seed=2))
    assert all(row["optim.seed"] == 3 for row in first)
    assert len(drawn(SearchConfig(searcher="grid", trials=100))) == 6
    assert len(drawn(SearchConfig(searcher="grid", trials=4))) == 4


def test_optuna_proposes_within_the_space_and_keeps_what_is_fixed(tmp_path: Path) -> None:
    searcher, count = make_searcher(
        SearchConfig(trials=3), spaces.rank_lr(), directory=tmp_path, fixed={"lora.dropout": 0.1}
    )
    assert isinstance(searcher, OptunaSearcher)
    assert count == 3
    row = searcher.suggest("t")
    assert row is not None
    assert row["params"]["lora.rank"] in (8, 16, 32, 64)
    assert row["params"]["lora.dropout"] == 0.1


@pytest.mark.parametrize(
    ("metric", "mode"), [("eval_loss", "min"), ("train_loss", "min"), ("exact_match", "max")]
)
def test_losses_are_to_be_small_and_shares_large(metric: str, mode: str) -> None:
    assert mode_of(metric) == mode


def test_rungs_are_where_the_scheduler_compares() -> None:
    def found(**settings: float | str) -> tuple[int, ...]:
        chosen = SearchConfig(**settings)  # pyright: ignore
        return rungs(chosen, budget=6000, report=750)

    assert found(scheduler="asha", reduction_factor=4) == (750, 3000)
    assert found(scheduler="asha", reduction_factor=2, grace_tokens=1000) == (1000, 2000, 4000)
    assert found(scheduler="fifo") == ()
    assert found(scheduler="median") == tuple(range(750, 6001, 750))
