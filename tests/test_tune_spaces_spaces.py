"""Spaces: what they draw, how parameters become a recipe, and what is warned of."""

import json
import math
from typing import Any

import numpy as np
import optuna
import pytest

from cluster.errors import ConfigError
from training.config import DataConfig, LoraConfig, ModelConfig, OptimConfig, TrainRecipe
from tune_spaces import config as search_config
from tune_spaces import spaces
from tune_spaces.spaces import AT_RANK_16, Choices, Dimension, Floats, Ints, Space

RECIPE = TrainRecipe(
    name="a",
    model=ModelConfig(base="demo"),
    data=DataConfig(train="train.jsonl", eval="eval.jsonl"),
    lora=LoraConfig(rank=4),
    optim=OptimConfig(learning_rate=1e-3),
)
MIXED = Space(
    name="mixed",
    dimensions=(
        Dimension(path="lora.variant", domain=Choices(values=("lora", "rslora", "dora"))),
        Dimension(path="lora.target_modules", domain=Choices(values=("all-linear", ["q_proj"]))),
        Dimension(path="lora.alpha", domain=Choices(values=(None, 8.0))),
        Dimension(path="lora.rank", domain=Ints(low=1, high=64, is_log=True)),
        Dimension(path=AT_RANK_16, domain=Floats(low=2e-5, high=2e-3, is_log=True)),
        Dimension(path="optim.global_batch_size", domain=Ints(low=4, high=15, step=4)),
        Dimension(
            path="lora.dropout",
            domain=Floats(low=0.0, high=0.2),
            when={"lora.variant": ("lora", "dora"), "lora.alpha": (None,)},
        ),
    ),
)


def _assert_in_mixed(params: dict[str, Any]) -> None:
    has_dropout = params["lora.variant"] in ("lora", "dora") and params["lora.alpha"] is None
    assert ("lora.dropout" in params) == has_dropout
    assert params["lora.target_modules"] in ("all-linear", ["q_proj"])
    assert type(params["lora.rank"]) is int
    assert 1 <= params["lora.rank"] <= 64
    assert 2e-5 <= params[AT_RANK_16] <= 2e-3
    assert params["optim.global_batch_size"] in (4, 8, 12)
    assert 0 <= params.get("lora.dropout", 0) <= 0.2
    assert json.loads(json.dumps(params)) == params
    assert spaces.recipe_for(RECIPE, params).lora.rank == params["lora.rank"]


def test_samples_stay_inside_and_leave_out_what_does_not_apply() -> None:
    rng = np.random.default_rng(0)
    samples = [MIXED.sample(rng) for _ in range(300)]
    for params in samples:
        _assert_in_mixed(params)
    assert len({MIXED.key(params) for params in samples}) == 300
    assert {params["lora.rank"] for params in samples} >= {1, 2, 3, 4}
    below = sum(params[AT_RANK_16] < 2e-4 for params in samples) / len(samples)
    assert 0.4 < below < 0.6, "log-uniform: half of the draws lie below the geometric middle"


def test_same_seed_draws_the_same_parameters() -> None:
    first, second = np.random.default_rng(7), np.random.default_rng(7)
    assert [MIXED.sample(first) for _ in range(20)] == [MIXED.sample(second) for _ in range(20)]


def test_optuna_suggests_inside_the_space_lists_and_conditions_included() -> None:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for _ in range(40):
        trial = study.ask()
        params = MIXED.suggest(trial)
        _assert_in_mixed(params)
        assert set(trial.params) == set(params)
        study.tell(trial, params[AT_RANK_16])
    kinds = {study_trial.params["lora.target_modules"] for study_trial in study.trials}
    assert kinds == {"all-linear", '["q_proj"]'}


def test_grid_has_every_combination_once_and_respects_conditions() -> None:
    space = Space(
        name="small",
        dimensions=(
            Dimension(path="lora.rank", domain=Choices(values=(8, 64))),
            Dimension(path=AT_RANK_16, domain=Floats(low=1e-4, high=1e-2, is_log=True)),
            Dimension(
                path="lora.dropout", domain=Floats(low=0, high=0.1), when={"lora.rank": (64,)}
            ),
        ),
    )
    grid = space.grid(3)
    assert len(grid) == 3 + 3 * 3
    assert len({space.key(row) for row in grid}) == len(grid)
    assert grid[:3] == [
        {"lora.rank": 8, AT_RANK_16: pytest.approx(rate)} for rate in (1e-4, 1e-3, 1e-2)
    ]
    assert [row["lora.dropout"] for row in grid[3:6]] == [0.0, 0.05, 0.1]
    assert grid[0][AT_RANK_16] == 1e-4
    assert grid[2][AT_RANK_16] == 1e-2


@pytest.mark.parametrize(
    ("domain", "values"),
    [
        (Ints(low=1, high=3), [1, 2, 3]),
        (Ints(low=0, high=100, step=10), [0, 30, 70, 100]),
        (Ints(low=1, high=64, is_log=True), [1, 4, 16, 64]),
        (Ints(low=1, high=6, is_log=True), [1, 2, 3, 6]),
        (Floats(low=0, high=3), [0.0, 1.0, 2.0, 3.0]),
    ],
)
def test_grid_cuts_a_range_from_end_to_end(domain: Ints | Floats, values: list[float]) -> None:
    space = Space(name="one", dimensions=(Dimension(path="optim.warmup", domain=domain),))
    assert [row["optim.warmup"] for row in space.grid(4)] == values


def test_grid_without_bound_is_refused() -> None:
    wide = Choices(values=tuple(range(1, 400)))
    paths = ("lora.rank", "optim.max_steps", "optim.seed")
    space = Space(name="wide", dimensions=tuple(Dimension(path=p, domain=wide) for p in paths))
    with pytest.raises(ConfigError, match=r"more than 100000 points.*random or optuna"):
        space.grid()


def test_key_does_not_depend_on_the_order() -> None:
    assert Space.key({"b": 1, "a": [2]}) == Space.key({"a": [2], "b": 1}) == '{"a":[2],"b":1}'


def test_learning_rate_falls_with_the_root_of_the_rank() -> None:
    for rank in (1, 8, 16, 64):
        params = {AT_RANK_16: 4e-4, "lora.rank": rank}
        recipe = spaces.recipe_for(RECIPE, params)
        assert recipe.optim.learning_rate == pytest.approx(4e-4 * math.sqrt(16 / rank))
        assert spaces.learning_rates(RECIPE, params) == (4e-4, recipe.optim.learning_rate)


def test_rule_takes_the_recipes_rank_where_the_rank_does_not_vary() -> None:
    assert spaces.recipe_for(RECIPE, {AT_RANK_16: 1e-4}).optim.learning_rate == 2e-4


def test_rule_can_be_turned_off() -> None:
    params = {AT_RANK_16: 1e-4, "lora.rank": 64}
    recipe = spaces.recipe_for(RECIPE, params, is_lr_scaled=False)
    assert recipe.optim.learning_rate == 1e-4
    assert spaces.learning_rates(RECIPE, params, is_lr_scaled=False) == (1e-4, 1e-4)


def test_plain_learning_rate_is_not_scaled_but_its_kin_at_rank_16_is_known() -> None:
    params = {"optim.learning_rate": 1e-3, "lora.rank": 64}
    assert spaces.recipe_for(RECIPE, params).optim.learning_rate == 1e-3
    assert spaces.learning_rates(RECIPE, params) == (2e-3, 1e-3)
    assert spaces.learning_rates(RECIPE, {}) == (pytest.approx(5e-4), 1e-3)


def test_parameters_change_what_they_name_and_nothing_else() -> None:
    params = {"lora.target_modules": ["q_proj", "v_proj"], "optim.global_batch_size": 8}
    recipe = spaces.recipe_for(RECIPE, params)
    assert recipe.lora == LoraConfig(rank=4, target_modules=("q_proj", "v_proj"))
    assert recipe.optim == OptimConfig(learning_rate=1e-3, global_batch_size=8)
    assert (recipe.name, recipe.model, recipe.data) == (RECIPE.name, RECIPE.model, RECIPE.data)
    assert spaces.recipe_for(RECIPE, {}) == RECIPE


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"lora.rank": 0}, ["parameters of a trial", "lora.rank is 0", "1..4096"]),
        ({AT_RANK_16: 11.0, "lora.rank": 16}, ["optim.learning_rate is 11.0"]),
        ({"lora.rnk": 8}, ["unknown field 'lora.rnk'", "Did you mean 'lora.rank'?"]),
        ({"model.base": "x"}, ["model.base cannot vary", "share one base model"]),
        ({"name": "x"}, ["name cannot vary"]),
        ({"name.first": "x"}, ["unknown field 'name.first'"]),
    ],
)
def test_parameters_that_a_recipe_refuses_are_refused(
    params: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        spaces.recipe_for(RECIPE, params)
    for word in words:
        assert word in str(caught.value)


def test_only_rates_weight_decay_and_dropout_change_during_a_trial() -> None:
    assert [d.path for d in MIXED.mutable()] == [AT_RANK_16, "lora.dropout"]
    assert [d.path for d in spaces.lr_first().mutable()] == [AT_RANK_16]


@pytest.mark.parametrize("name", sorted(spaces.NAMED))
def test_named_space_says_its_evidence_and_each_of_its_trials_is_a_recipe(name: str) -> None:
    make = spaces.NAMED[name]
    space = make()
    assert space.name == name
    assert any(source in str(make.__doc__) for source in ("arXiv", "LoRA Without Regret"))
    best: dict[str, Any] = {}
    for stage in space.stages or (space,):
        rows = [{**best, **row} for row in stage.grid()]
        assert all(spaces.recipe_for(RECIPE, row, is_lr_scaled=space.is_lr_scaled) for row in rows)
        best = rows[-1]


def test_rank_lr_varies_rank_and_rate_and_keeps_alpha_at_rank() -> None:
    grid = spaces.rank_lr().grid()
    assert {row["lora.rank"] for row in grid} == {8, 16, 32, 64}
    assert {min(row[AT_RANK_16] for row in grid), max(row[AT_RANK_16] for row in grid)} == {
        2e-5,
        2e-3,
    }
    assert {spaces.recipe_for(RECIPE, row).lora.alpha for row in grid} == {None}


def test_lr_first_keeps_the_rate_found_while_it_tries_ranks() -> None:
    rates, ranks = spaces.lr_first().stages
    best = rates.grid()[1]
    assert best["lora.rank"] == 64
    trials = [{**best, **row} for row in ranks.grid()]
    assert [row["lora.rank"] for row in trials] == [8, 16, 32, 64]
    assert {row[AT_RANK_16] for row in trials} == {best[AT_RANK_16]}
    assert Space.key(trials[-1]) == Space.key(best)


def test_dimension_reads_as_text() -> None:
    texts = [str(dimension.domain) for dimension in MIXED.dimensions[1:6]]
    assert texts == [
        'all-linear, ["q_proj"]',
        "null, 8.0",
        "1 to 64, log",
        "2e-05 to 0.002, log",
        "4 to 15, step 4",
    ]


def test_small_ranks_are_warned_of() -> None:
    (warning,) = spaces.warnings_for(spaces.seed_article(), RECIPE)
    assert "rank below 8 is small for instruction data" in warning
    assert spaces.warnings_for(spaces.rank_lr(), RECIPE) == []


def test_losses_of_other_tokens_are_warned_of() -> None:
    masks = Dimension(path="data.mask", domain=Choices(values=("completion", "all")))
    (warning,) = spaces.warnings_for(Space(name="masks", dimensions=(masks,)), RECIPE)
    assert warning.startswith("data.mask: trials are then scored on other tokens")


@pytest.mark.parametrize("lora", [LoraConfig(alpha=32), LoraConfig(variant="rslora")])
def test_rule_is_warned_of_where_it_was_not_made_for_the_recipe(lora: LoraConfig) -> None:
    recipe = TrainRecipe(name="a", model=RECIPE.model, data=RECIPE.data, lora=lora)
    (warning,) = spaces.warnings_for(spaces.rank_lr(), recipe)
    assert "scale_learning_rate: false" in warning
    assert spaces.warnings_for(spaces.targets(), recipe) == []


def test_the_largest_adapter_has_the_highest_rank_and_most_targets_at_the_smallest_batch() -> None:
    space = search_config.parse(
        {
            "lora.rank": [4, 64, 8],
            "lora.target_modules": [["q_proj"], "all-linear", ["q_proj", "v_proj"]],
            "optim.global_batch_size": [8, 32],
        }
    )
    recipe = spaces.largest(space, RECIPE)
    assert recipe.lora.rank == 64
    assert recipe.lora.target_modules == "all-linear"
    assert recipe.optim.global_batch_size == 8
    assert spaces.largest(Space(name="none"), RECIPE) is RECIPE
