"""What is measured decides the layout, and says why."""

from pathlib import Path

import pytest
import torch
from runs import make_recipe
from tiny import VOCAB_SIZE, make_base

from cluster.errors import ResourceError
from training import memory, objective
from training import model as model_room
from training.memory import MemoryPlan

CPU = torch.device("cpu")


def decide(
    tmp_path: Path, base_dir: Path, *, longest: int = 64, free_bytes: float = 1e10, **sections: dict
) -> MemoryPlan:
    recipe = make_recipe(tmp_path, base_dir, memory={"micro_batch_tokens": "auto"}, **sections)
    base = model_room.load_base(recipe.model, device=CPU)
    model, _ = model_room.attach_lora(base, recipe.lora, seed=0)
    chosen = objective.probe(model, memory.random_probe(VOCAB_SIZE, 258), base.autocast)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "free_bytes", lambda _: free_bytes)
        return memory.decide(
            recipe, base, chosen, longest_tokens=longest, pad_id=258, workers_here=1
        )


def test_with_room_nothing_is_recomputed(tmp_path: Path, tiny_base: Path) -> None:
    plan = decide(tmp_path, tiny_base)
    assert (plan.gradient_checkpointing, plan.is_packed) == (False, True)
    assert "fits without" in plan.note


def test_without_room_checkpointing_comes_on_and_says_so(tmp_path: Path, tiny_base: Path) -> None:
    roomy = decide(tmp_path, tiny_base, longest=1000)
    assert not roomy.gradient_checkpointing
    tight = decide(tmp_path, tiny_base, longest=1000, free_bytes=7e6)
    assert tight.gradient_checkpointing
    assert "does not fit without" in tight.note


def test_where_not_even_one_example_fits_it_says_what_to_do(
    tmp_path: Path, tiny_base: Path
) -> None:
    with pytest.raises(ResourceError, match=r"data\.max_length"):
        decide(tmp_path, tiny_base, longest=100_000, free_bytes=2e7)


@pytest.mark.parametrize("architecture", ["falcon", "bloom"])
def test_where_packing_is_not_exact_it_pads_and_says_so(tmp_path: Path, architecture: str) -> None:
    base = make_base(tmp_path / "base", architecture)
    plan = decide(tmp_path, base)
    assert not plan.is_packed
    assert f"{architecture} gives other logits in packed rows" in plan.note


def test_packing_on_is_refused_where_it_is_not_exact(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "bloom")
    with pytest.raises(ResourceError, match=r"data\.packing is on"):
        decide(tmp_path, base, data={"train": "x", "packing": "on"})


def test_checkpointing_keeps_less(tiny_base: Path, tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path, tiny_base)
    base = model_room.load_base(recipe.model, device=CPU)
    model, _ = model_room.attach_lora(base, recipe.lora, seed=0)
    probe = memory.random_probe(VOCAB_SIZE, 258)
    chosen = objective.probe(model, probe, base.autocast)
    plain = memory.bytes_per_token(chosen, base, probe)
    memory.set_checkpointing(chosen, is_on=True)
    assert memory.bytes_per_token(chosen, base, probe) < plain / 2


def test_the_plan_is_kept_with_the_run(tmp_path: Path) -> None:
    plan = MemoryPlan(
        is_packed=True, micro_batch_tokens=7, gradient_checkpointing=False, pad_id=2, note="x"
    )
    assert memory.stored(tmp_path) is None
    memory.store(tmp_path, plan)
    assert memory.stored(tmp_path) == plan
