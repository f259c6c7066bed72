"""ZeRO 1, 2 and 3 beside one worker and DDP: the same losses, the same adapter, one checkpoint."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gang import Gang, gang
from runs import (
    adapter_bytes,
    events_of,
    make_recipe,
    run_dir_of,
    run_here,
    train,
    write_rows,
)
from safetensors.torch import load_file

from cluster.errors import TrainingError
from training import checkpoint, loop, seat, zero
from training.config import TrainRecipe
from training.model import Base
from training.strategy import Workers
from training.trunk import Piece, Trunk

ZERO = ["zero1", "zero2", "zero3"]


@pytest.fixture(scope="module")
def two() -> Iterator[Gang]:
    with gang(2) as workers:
        yield workers


def trained(group: Gang, recipe: TrainRecipe) -> TrainRecipe:
    run_dir_of(recipe).mkdir(parents=True, exist_ok=True)
    group.call(run_here, [recipe])
    return recipe


def losses(recipe: TrainRecipe) -> list[float]:
    return [event.number("loss") for event in events_of(recipe, "step")]


def weights(recipe: TrainRecipe) -> dict[str, torch.Tensor]:
    return load_file(run_dir_of(recipe) / "adapter" / "adapter_model.safetensors")


def assert_same(one: TrainRecipe, other: TrainRecipe, rtol: float = 1e-5) -> None:
    assert np.allclose(losses(one), losses(other), rtol=rtol, atol=0)
    ours, theirs = weights(one), weights(other)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=rtol, atol=rtol)


def recipe_of(directory: Path, base: Path, name: str, **sections: Mapping[str, Any]) -> TrainRecipe:
    """Seven examples a step in small micro-batches, so that shares are of unequal size."""
    optim = {"global_batch_size": 7, "max_steps": 6, **sections.pop("optim", {})}
    memory = {"micro_batch_tokens": 64}
    return make_recipe(directory, base, name=name, optim=optim, memory=memory, **sections)


@pytest.fixture(scope="module")
def four() -> Iterator[Gang]:
    with gang(4) as workers:
        yield workers


@pytest.mark.parametrize("kind", ["ddp", *ZERO])
def test_two_workers_give_what_one_gives(
    tmp_path: Path, tiny_base: Path, two: Gang, kind: str
) -> None:
    alone = recipe_of(tmp_path, tiny_base, "alone")
    train(alone)
    together = recipe_of(tmp_path, tiny_base, kind, scale={"strategy": kind, "workers": 2})
    assert_same(alone, trained(two, together))


@pytest.mark.parametrize("kind", ["ddp", *ZERO])
def test_four_workers_give_what_one_gives_evaluation_and_dropout_included(
    tmp_path: Path, tiny_base: Path, four: Gang, kind: str
) -> None:
    sections = {
        "data": {"eval": str(write_rows(tmp_path / "eval.jsonl", 6)), "max_length": 128},
        "evaluation": {"every_steps": 2},
        "lora": {"rank": 4, "dropout": 0.1},
        "optim": {"max_grad_norm": 0.05},  # every step is clipped
    }
    alone = recipe_of(tmp_path, tiny_base, "alone", **sections)
    train(alone)
    scale = {"strategy": kind, "workers": 4}
    together = trained(four, recipe_of(tmp_path, tiny_base, kind, scale=scale, **sections))
    assert_same(alone, together)
    scores = [[e.number("loss") for e in events_of(r, "eval")] for r in (alone, together)]
    assert len(scores[0]) == 3
    assert np.allclose(*scores, rtol=1e-5, atol=0)
    norms = [[e.number("grad_norm") for e in events_of(r, "step")] for r in (alone, together)]
    assert np.allclose(*norms, rtol=1e-4, atol=0)


@pytest.mark.parametrize("kind", ZERO)
def test_a_checkpoint_goes_from_one_worker_to_zero_and_back(
    tmp_path: Path, tiny_base: Path, two: Gang, kind: str
) -> None:
    whole = recipe_of(tmp_path, tiny_base, "whole")
    train(whole)
    scale = {"strategy": kind, "workers": 2}
    moved = recipe_of(tmp_path, tiny_base, "moved", optim={"stop_after": 2})
    train(moved)
    trained(two, recipe_of(tmp_path, tiny_base, "moved", optim={"stop_after": 4}, scale=scale))
    train(recipe_of(tmp_path, tiny_base, "moved"))
    assert [e.number("from_step") for e in events_of(moved, "started")] == [0, 2, 4]
    assert_same(whole, moved)


@pytest.mark.parametrize("kind", ZERO)
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(
    tmp_path: Path, tiny_base: Path, two: Gang, kind: str
) -> None:
    scale = {"strategy": kind, "workers": 2}
    whole = trained(two, recipe_of(tmp_path, tiny_base, "whole", scale=scale))
    halves = recipe_of(tmp_path, tiny_base, "halves", optim={"stop_after": 3}, scale=scale)
    trained(two, halves)
    trained(two, recipe_of(tmp_path, tiny_base, "halves", scale=scale))
    assert losses(halves) == losses(whole)
    assert adapter_bytes(halves) == adapter_bytes(whole)


@pytest.mark.parametrize("kind", ZERO)
def test_the_optimiser_may_live_on_the_host(
    tmp_path: Path, tiny_base: Path, two: Gang, kind: str
) -> None:
    scale = {"strategy": kind, "workers": 2}
    here = trained(two, recipe_of(tmp_path, tiny_base, "here", scale=scale))
    scale["offload_optimizer"] = True
    assert_same(here, trained(two, recipe_of(tmp_path, tiny_base, "host", scale=scale)))


@pytest.mark.parametrize("kind", ["ddp", *ZERO])
def test_fp16_that_overflows_is_skipped_by_all_workers_alike(
    tmp_path: Path, tiny_base: Path, two: Gang, kind: str
) -> None:
    model = {"quantization": "none", "precision": "fp16"}
    alone = recipe_of(tmp_path, tiny_base, "alone", model=model)
    run_dir_of(alone).mkdir(parents=True)
    overflowing(Workers(), alone)
    together = recipe_of(
        tmp_path, tiny_base, kind, model=model, scale={"strategy": kind, "workers": 2}
    )
    run_dir_of(together).mkdir(parents=True)
    two.call(overflowing, together)
    skipped = [len(events_of(recipe, "warning")) for recipe in (alone, together)]
    assert 0 < skipped[0] == skipped[1] < 6
    assert np.allclose(losses(alone), losses(together), rtol=1e-3, atol=0)
    states = [json.loads((p / "state.json").read_text()) for p in map(last_of, (alone, together))]
    assert states[0]["state"]["scaler"] == states[1]["state"]["scaler"]


def last_of(recipe: TrainRecipe) -> Path:
    return checkpoint.directory(run_dir_of(recipe), 6)


def overflowing(workers: Workers, recipe: TrainRecipe) -> None:
    """A run whose loss scale starts too high."""

    def scaler(base: Base) -> torch.amp.GradScaler:
        return torch.amp.GradScaler(base.device.type, init_scale=2.0**22)

    with pytest.MonkeyPatch.context() as patch:
        for room in (seat, zero):
            patch.setattr(room, "loss_scaler", scaler)
        run_here(workers, [recipe])


@pytest.mark.parametrize("kind", ["ddp", *ZERO])
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_number_that_breaks_on_one_worker_stops_all_before_the_step(
    tmp_path: Path, tiny_base: Path, two: Gang, kind: str, number: float
) -> None:
    recipe = recipe_of(tmp_path, tiny_base, kind, scale={"strategy": kind, "workers": 2})
    run_dir_of(recipe).mkdir(parents=True)
    reasons = two.call(broken_by_one, recipe, number)
    for reason in reasons:
        assert "step 4: " in reason
        assert "the optimiser did not step" in reason
        assert "train.jsonl:" in reason
    found = checkpoint.find_latest_valid(run_dir_of(recipe))
    assert found is not None
    assert found.name == "step-000002"


def broken_by_one(workers: Workers, recipe: TrainRecipe, number: float) -> str:
    """The second worker's gradients of step 4 break; the reason that this one gives for ending."""
    real = seat.turn

    def turn(trunk: Trunk, pieces: Sequence[tuple[seat.Seat, Piece]]) -> None:
        handles = []
        if workers.rank == 1 and pieces[0][0].state.step == 3:
            parameter = next(iter(pieces[0][0].parameters.values()))
            handles = [parameter.register_hook(lambda grad: grad * number)]
        real(trunk, pieces)
        for handle in handles:
            handle.remove()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "turn", turn)
        with pytest.raises(TrainingError) as caught:
            run_here(workers, [recipe])
    return str(caught.value)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_each_of_two_workers_holds_half_of_what_the_stage_shares(
    tmp_path: Path, tiny_base: Path, two: Gang, stage: int
) -> None:
    recipe = recipe_of(tmp_path, tiny_base, "run", scale={"strategy": f"zero{stage}", "workers": 2})
    run_dir_of(recipe).mkdir(parents=True)
    for held in two.call(held_by, recipe):
        assert held["state"] == pytest.approx(held["trained"], rel=0.02)  # two moments, halved
        assert held["base"] == pytest.approx(held["whole_base"] / (2 if stage == 3 else 1), rel=0.1)


def held_by(workers: Workers, recipe: TrainRecipe) -> dict[str, int]:
    """Numbers that this worker holds at the end of a run."""
    seen: list[loop.Job] = []
    real = loop.fit

    def fit(job: loop.Job) -> Any:
        seen.append(job)
        return real(job)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "fit", fit)
        run_here(workers, [recipe])
    (job,) = seen
    assert job.sharded is not None
    frozen = [p for p in job.trunk.model.parameters() if not p.requires_grad]
    parts: list[torch.Tensor] = [getattr(p, "ds_tensor", p) for p in frozen]
    return {
        "state": sum(
            s[key].numel() for s in job.sharded._states() for key in ("exp_avg", "exp_avg_sq")
        ),
        "trained": sum(p.numel() for p in job.trunk.model.parameters() if p.requires_grad),
        "base": sum(part.numel() for part in parts),
        "whole_base": sum(getattr(p, "ds_numel", p.numel()) for p in frozen),
    }
