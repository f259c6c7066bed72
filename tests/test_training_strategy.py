"""What goes together, and what is refused with its reason."""

from pathlib import Path

import pytest
from runs import make_recipe

from training import strategy


@pytest.mark.parametrize("kind", ["zero1", "zero2", "zero3"])
def test_deepspeed_is_refused_by_name(tmp_path: Path, kind: str) -> None:
    recipe = make_recipe(tmp_path, tmp_path, scale={"strategy": kind})
    with pytest.raises(ValueError, match=f"scale.strategy: {kind}: .*Use instead: ddp"):
        strategy.check(recipe)


def test_int8_with_zero3_names_its_own_reason(tmp_path: Path) -> None:
    recipe = make_recipe(
        tmp_path,
        tmp_path,
        model={"base": "x", "quantization": "int8"},
        scale={"strategy": "zero3"},
    )
    with pytest.raises(ValueError, match=r"bitsandbytes #1451"):
        strategy.check(recipe)


@pytest.mark.parametrize(("workers", "kind"), [(1, "single"), (2, "ddp")])
def test_auto_follows_the_number_of_workers(tmp_path: Path, workers: int, kind: str) -> None:
    assert strategy.check(make_recipe(tmp_path, tmp_path, scale={"workers": workers})) == kind
