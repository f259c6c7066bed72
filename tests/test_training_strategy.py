"""What goes together, and what is refused with its reason."""

from pathlib import Path

import pytest
from runs import make_recipe

from training import strategy


@pytest.mark.parametrize(
    ("sections", "reason"),
    [
        ({"optim": {"optimizer": "adamw_8bit"}, "scale": {"strategy": "zero2"}}, "in blocks of"),
        (
            {"evaluation": {"metrics": ["loss", "rouge_l"]}, "scale": {"strategy": "zero3"}},
            "no whole base under ZeRO-3",
        ),
        ({"scale": {"offload_optimizer": True, "workers": 2}}, "only DeepSpeed moves"),
        (
            {
                "model": {"base": "x", "quantization": "nf4"},
                "lora": {"variant": "dora"},
                "scale": {"strategy": "zero3"},
            },
            "of which ZeRO-3 knows nothing",
        ),
    ],
)
def test_what_does_not_go_together_is_refused_with_what_to_use(
    tmp_path: Path, sections: dict[str, dict[str, object]], reason: str
) -> None:
    recipe = make_recipe(tmp_path, tmp_path, **sections)
    with pytest.raises(ValueError, match=f"{reason}.*Use instead: "):
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
