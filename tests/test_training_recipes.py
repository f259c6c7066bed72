"""Every shipped recipe parses, and the shipped data is where the recipes say."""

from pathlib import Path

import pytest

from cluster.config import load
from training.config import TrainRecipe

ROOT = Path(__file__).resolve().parent.parent
RECIPES = sorted((ROOT / "training" / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipe_parses(path: Path) -> None:
    assert load(TrainRecipe, path).name
    assert path.read_text(encoding="utf-8").startswith("# "), "say what the recipe is for"


def test_there_is_a_recipe_for_each_quantisation_of_a_large_base() -> None:
    recipes = [load(TrainRecipe, path) for path in RECIPES]
    assert {"int8", "nf4"} <= {r.model.quantization for r in recipes if r.model.base != "demo"}
    assert len({recipe.name for recipe in recipes}) == len(recipes)


@pytest.mark.parametrize("name", ["tickets", "ddp_two_workers"])
def test_recipe_on_shipped_data_works_from_the_repository(name: str) -> None:
    recipe = load(TrainRecipe, ROOT / "training" / "recipes" / f"{name}.yaml")
    for source in (recipe.data.train, recipe.data.eval):
        assert isinstance(source, str)
        assert (ROOT / source).is_file()
