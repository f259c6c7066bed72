"""The support matrix is true: what it allows trains, what it refuses is refused by name."""

import itertools
from collections.abc import Iterator
from pathlib import Path

import chaos
import pytest
from gang import Gang, gang
from runs import events_of, make_recipe, run_dir_of, run_here, write_rows
from tiny import make_base

from cluster.errors import ConfigError
from training import strategy
from training.config import TrainRecipe

CELLS = list(strategy.combinations())
PAIRS = list(itertools.product(*(strategy.AXES[name] for name in list(strategy.AXES)[:2])))


@pytest.fixture(scope="module")
def two() -> Iterator[Gang]:
    with gang(2) as workers:
        yield workers


@pytest.fixture(scope="module")
def small_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("bases") / "small")


def recipe_of(directory: Path, base: Path, name: str, settings: dict[str, str]) -> TrainRecipe:
    sections: dict[str, dict[str, object]] = {
        "optim": {"max_steps": 3, "global_batch_size": 4},
        "checkpoint": {"every_steps": 100},
    }
    for path, value in settings.items():
        section, field = path.split(".")
        sections.setdefault(section, {})[field] = value
    sections["model"]["base"] = str(base)
    sections["scale"]["workers"] = 1 if settings["scale.strategy"] == "single" else 2
    return make_recipe(directory, base, name=name, **sections)


def is_due(settings: dict[str, str]) -> bool:
    """All of the cells, or of the last four axes nine that have every pair of their values."""
    places = [values.index(settings[name]) for name, values in strategy.AXES.items()][2:]
    precision, checkpointing, packing, variant = places
    number = 3 * precision + variant
    return chaos.IS_FULL or (checkpointing, packing) == (number % 2, number // 2 % 2)


def test_the_matrix_has_every_combination_once() -> None:
    seen = {tuple(settings.values()) for settings, _ in CELLS}
    assert len(CELLS) == len(seen) == 3 * 5 * 3 * 2 * 2 * 3


@pytest.mark.parametrize(("quantization", "kind"), PAIRS)
def test_what_is_supported_trains_three_steps_and_the_rest_is_refused(
    tmp_path: Path, small_base: Path, two: Gang, quantization: str, kind: str
) -> None:
    write_rows(tmp_path / "train.jsonl", 8)
    allowed: list[TrainRecipe] = []
    for number, (settings, refusal) in enumerate(CELLS):
        if list(settings.values())[:2] != [quantization, kind] or not is_due(settings):
            continue
        recipe = recipe_of(tmp_path, small_base, f"run{number}", settings)
        if refusal is not None:
            with pytest.raises(ConfigError, match="Use instead"):
                strategy.check(recipe)
            continue
        run_dir_of(recipe).mkdir(parents=True)
        allowed.append(recipe)
    two.call(run_here, allowed)
    for recipe in allowed:
        losses = [event.number("loss") for event in events_of(recipe, "step")]
        assert len(losses) == 3
        assert losses[2] < losses[0], recipe
        assert (run_dir_of(recipe) / "adapter" / "adapter_model.safetensors").exists()
