"""The loop: exact whatever the batches look like, resumable, and loud when something breaks."""

import json
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runs import adapter_bytes, events_of, make_recipe, run_dir_of, train
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_torch
from safetensors.torch import save_file
from tiny import ARCHITECTURES, make_base

from cluster import ownership, storage
from cluster.errors import ConfigError, FencedError, StorageError, TrainingError
from training import checkpoint, loop, optimizer, seat
from training.config import EvaluationConfig, TrainRecipe


def losses(recipe: TrainRecipe) -> list[float]:
    return [event.number("loss") for event in events_of(recipe, "step")]


def weights(recipe: TrainRecipe) -> dict[str, np.ndarray]:
    return load_file(run_dir_of(recipe) / "adapter" / "adapter_model.safetensors")


def furthest(first: dict[str, np.ndarray], second: dict[str, np.ndarray]) -> float:
    assert first.keys() == second.keys()
    return max(float(np.abs(first[name] - second[name]).max()) for name in first)


def test_a_small_run_learns_and_reports(tmp_path: Path, tiny_base: Path) -> None:
    recipe = make_recipe(tmp_path, tiny_base, optim={"max_steps": 20, "learning_rate": 0.1})
    last = train(recipe)
    assert last.kind == "finished"
    values = losses(recipe)
    assert len(values) == 20
    assert values[-1] < values[0] - 0.2
    steps = events_of(recipe, "step")
    assert last.number("real_tokens") == sum(event.number("real_tokens") for event in steps)
    assert last.number("final_loss") == values[-1]


def test_steps_and_evaluations_tell_how_many_tokens_were_the_likeliest(
    tmp_path: Path, tiny_base: Path
) -> None:
    recipe = make_recipe(
        tmp_path,
        tiny_base,
        data={"eval": str(tmp_path / "train.jsonl")},
        optim={"max_steps": 20, "learning_rate": 0.1},
        evaluation={"every_steps": 10},
    )
    train(recipe)
    trained = [e.number("train_mean_token_accuracy") for e in events_of(recipe, "step")]
    held_out = [e.number("valid_mean_token_accuracy") for e in events_of(recipe, "eval")]
    assert (len(trained), len(held_out)) == (20, 2)
    assert all(0 <= value <= 1 for value in (*trained, *held_out))
    assert trained[-1] > trained[0]
    assert held_out[-1] > trained[0]


@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_a_quantised_base_learns_and_is_bitwise_reproducible(
    tmp_path: Path, tiny_base: Path, quantization: str
) -> None:
    settings = {
        "model": {"base": str(tiny_base), "quantization": quantization},
        "optim": {"max_steps": 12, "learning_rate": 0.1},
    }
    runs = [make_recipe(tmp_path, tiny_base, name=name, **settings) for name in ("a", "b")]
    for recipe in runs:
        assert train(recipe).kind == "finished"
    assert losses(runs[0])[-1] < losses(runs[0])[0] - 0.1
    assert adapter_bytes(runs[0]) == adapter_bytes(runs[1])


def test_the_cut_into_micro_batches_changes_nothing(tmp_path: Path, tiny_base: Path) -> None:
    runs = [
        make_recipe(tmp_path, tiny_base, name=f"run{tokens}", memory={"micro_batch_tokens": tokens})
        for tokens in (1, 512)
    ]
    for recipe in runs:
        train(recipe)
    assert np.allclose(losses(runs[0]), losses(runs[1]), atol=1e-6)
    assert furthest(weights(runs[0]), weights(runs[1])) < 1e-5


def test_packing_gives_the_losses_of_padding(tmp_path: Path, tiny_base: Path) -> None:
    runs = [
        make_recipe(tmp_path, tiny_base, name=packing, data={"packing": packing})
        for packing in ("on", "off")
    ]
    for recipe in runs:
        train(recipe)
    assert np.allclose(losses(runs[0]), losses(runs[1]), atol=1e-6)


@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_checkpointing_gives_the_same_gradients(
    tmp_path: Path, tiny_base: Path, quantization: str
) -> None:
    runs = [
        make_recipe(
            tmp_path,
            tiny_base,
            name=f"run-{setting}",
            model={"base": str(tiny_base), "quantization": quantization},
            memory={"gradient_checkpointing": setting},
            lora={"rank": 4, "dropout": 0.2},
        )
        for setting in ("on", "off")
    ]
    for recipe in runs:
        train(recipe)
    norms = [[e.number("grad_norm") for e in events_of(recipe, "step")] for recipe in runs]
    assert np.allclose(norms[0], norms[1], rtol=1e-6)
    assert furthest(weights(runs[0]), weights(runs[1])) < 1e-6


def test_the_same_recipe_twice_is_bitwise_the_same(tmp_path: Path, tiny_base: Path) -> None:
    runs = [make_recipe(tmp_path, tiny_base, name=name) for name in ("a", "b")]
    for recipe in runs:
        train(recipe)
    assert adapter_bytes(runs[0]) == adapter_bytes(runs[1])


@pytest.mark.parametrize(
    ("optimizer", "variant", "precision"),
    [
        ("adamw", "lora", "fp32"),
        ("adamw_8bit", "lora", "fp32"),
        ("adamw", "dora", "fp32"),
        ("adamw", "rslora", "fp16"),
    ],
)
def test_a_run_stopped_again_and_again_is_bitwise_the_uninterrupted_one(
    tmp_path: Path, tiny_base: Path, optimizer: str, variant: str, precision: str
) -> None:
    settings = {
        "model": {"base": str(tiny_base), "quantization": "none", "precision": precision},
        "lora": {"rank": 4, "dropout": 0.1, "variant": variant},
        "optim": {
            "learning_rate": 1e-2,
            "max_steps": 7,
            "global_batch_size": 5,
            "optimizer": optimizer,
            "schedule": "cosine",
        },
        "checkpoint": {"every_steps": 3},
    }
    whole = make_recipe(tmp_path, tiny_base, name="whole", **settings)
    train(whole)
    stopped = make_recipe(tmp_path, tiny_base, name="stopped", **settings)
    for _ in range(3):
        run_dir_of(stopped).mkdir(parents=True, exist_ok=True)
        loop.stop_file(run_dir_of(stopped)).touch()  # stops after one step, with a checkpoint
        assert train(stopped).fields["was_stopped"]
    loop.stop_file(run_dir_of(stopped)).unlink()
    assert not train(stopped).fields["was_stopped"]
    starts = [event.number("from_step") for event in events_of(stopped, "started")]
    assert starts == [0, 1, 2, 3]
    assert adapter_bytes(stopped) == adapter_bytes(whole)


@pytest.mark.parametrize("damage", ["truncate", "empty", "flip", "remove"])
def test_a_damaged_checkpoint_is_quarantined_and_the_one_before_used(
    tmp_path: Path, tiny_base: Path, damage: str
) -> None:
    whole = make_recipe(tmp_path, tiny_base, name="whole")
    train(whole)
    recipe = make_recipe(tmp_path, tiny_base, name="hurt")
    train(recipe)
    newest = checkpoint.directory(run_dir_of(recipe), 6)
    victim = newest / "optimizer.safetensors"
    body = victim.read_bytes()
    if damage == "remove":
        victim.unlink()
    else:
        cut = {"truncate": body[:-7], "empty": b"", "flip": body[:-9] + b"\x7f" + body[-8:]}
        victim.write_bytes(cut[damage])
    train(recipe)
    assert events_of(recipe, "started")[-1].number("from_step") == 4
    (warning,) = events_of(recipe, "warning")
    assert "step-000006" in warning.text("message")
    assert (run_dir_of(recipe) / "checkpoints").glob(".broken-*")
    assert adapter_bytes(recipe) == adapter_bytes(whole)


def test_a_full_disk_keeps_earlier_checkpoints(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe(tmp_path, tiny_base)
    real = checkpoint.save_file

    def full(tensors: dict[str, torch.Tensor], path: Path, **options: object) -> None:
        if "000004" in str(path) and path.name == "optimizer.safetensors":
            raise OSError(28, "No space left on device")
        real(tensors, path, **options)

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(StorageError, match=r"(?i)free"):
        train(recipe)
    assert events_of(recipe)[-1].kind == "failed"
    found = checkpoint.find_latest_valid(run_dir_of(recipe))
    assert found is not None
    assert found.name == "step-000002"
    monkeypatch.undo()
    assert train(recipe).kind == "finished"


def test_fp16_really_is_half_precision_and_skips_what_overflows(
    tmp_path: Path, tiny_base: Path
) -> None:
    half = make_recipe(
        tmp_path,
        tiny_base,
        name="half",
        model={"base": str(tiny_base), "quantization": "none", "precision": "fp16"},
        optim={"max_steps": 8},
    )
    full = make_recipe(tmp_path, tiny_base, name="full", optim={"max_steps": 8})
    last = train(half)
    train(full)
    state = json.loads(
        (checkpoint.directory(run_dir_of(half), 8) / "state.json").read_text(encoding="utf-8")
    )
    assert state["state"]["scaler"]["scale"] > 1
    assert losses(half) != losses(full)
    assert np.allclose(losses(half), losses(full), atol=0.05)
    skipped = [e for e in events_of(half, "warning") if "overflow" in e.text("message")]
    assert last.number("skipped_steps") == len(skipped)


def test_a_loss_that_is_not_finite_stops_before_the_optimiser(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe(tmp_path, tiny_base)
    real = seat.Seat.add_loss

    def poisoned(self: seat.Seat, loss: torch.Tensor) -> None:
        real(self, loss * float("nan") if self.state.step == 3 else loss)

    monkeypatch.setattr(seat.Seat, "add_loss", poisoned)
    with pytest.raises(TrainingError, match=r"step 4: loss nan.*train\.jsonl:\d+"):
        train(recipe)
    found = checkpoint.find_latest_valid(run_dir_of(recipe))
    assert found is not None
    assert found.name == "step-000002"


def test_layers_that_do_not_learn_are_named(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe(tmp_path, tiny_base)
    real = optimizer.Replicated.reduce

    def cut_off(self: optimizer.Replicated, *sums: torch.Tensor) -> None:
        for parameter in list(self._parameters.values())[2:4]:
            parameter.grad = None
        real(self, *sums)

    monkeypatch.setattr(optimizer.Replicated, "reduce", cut_off)
    with pytest.raises(TrainingError, match=r"2 of 28 adapter tensors.*k_proj\.lora_A"):
        train(recipe)


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_every_architecture_trains_and_every_layer_moves(tmp_path: Path, architecture: str) -> None:
    base = make_base(tmp_path / "base", architecture)
    recipe = make_recipe(
        tmp_path,
        base,
        model={"base": str(base), "quantization": "int8"},
        optim={"max_steps": 2, "global_batch_size": 4},
    )
    assert train(recipe).kind == "finished"
    tensors = load_torch(run_dir_of(recipe) / "adapter" / "adapter_model.safetensors")
    moved = [name for name, tensor in tensors.items() if "lora_B" in name and tensor.any()]
    assert len(moved) == len(tensors) / 2
    is_packed = json.loads((run_dir_of(recipe) / "memory.json").read_text())["is_packed"]
    assert is_packed == (architecture not in ("falcon", "bloom"))


def test_the_best_evaluation_becomes_the_adapter_and_patience_ends_the_run(
    tmp_path: Path, tiny_base: Path
) -> None:
    recipe = make_recipe(
        tmp_path,
        tiny_base,
        data={"eval": str(tmp_path / "train.jsonl")},
        optim={"learning_rate": 0.5, "schedule": "constant", "max_steps": 60},
        evaluation={"every_steps": 2, "early_stopping": 2},
    )
    last = train(recipe)
    evals = {e.number("step"): e.number("loss") for e in events_of(recipe, "eval")}
    best = min(evals, key=lambda step: evals[step])
    assert last.number("adapter_step") == best
    assert last.number("steps") == best + 4
    manifest = storage.verify(run_dir_of(recipe) / "adapter")
    assert manifest.info["step"] == best


def test_a_held_run_goes_no_further_than_it_is_let(tmp_path: Path, tiny_base: Path) -> None:
    free = make_recipe(tmp_path, tiny_base, name="free")
    train(free)
    recipe = make_recipe(tmp_path, tiny_base, name="held")
    run_dir_of(recipe).mkdir(parents=True)
    loop.let_pass(run_dir_of(recipe), 0)
    with ThreadPoolExecutor() as pool:
        held = pool.submit(train, recipe, is_held=True)
        for step in (2, 4):
            deadline = time.monotonic() + 60
            while len(events_of(recipe, "checkpoint")) < step / 2:
                assert time.monotonic() < deadline
                time.sleep(0.02)
            assert len(losses(recipe)) == step
            loop.let_pass(run_dir_of(recipe), step)
        assert not held.result(60).fields["was_stopped"]
    assert adapter_bytes(recipe) == adapter_bytes(free)


def test_a_held_run_that_is_stopped_ends_at_its_checkpoint(tmp_path: Path, tiny_base: Path) -> None:
    recipe = make_recipe(tmp_path, tiny_base)
    run_dir_of(recipe).mkdir(parents=True)
    loop.let_pass(run_dir_of(recipe), 2)
    with ThreadPoolExecutor() as pool:
        held = pool.submit(train, recipe, is_held=True)
        while len(events_of(recipe, "checkpoint")) < 2 and not held.done():
            time.sleep(0.02)
        loop.stop_file(run_dir_of(recipe)).touch()
        last = held.result(60)
    assert (last.number("steps"), last.fields["was_stopped"]) == (4, True)


def test_nobody_who_comes_ends_the_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "_HOLD_TIMEOUT_S", 0)
    assert not loop._may_pass(tmp_path, 2)
    assert loop.stop_file(tmp_path).exists()


def test_all_metrics_are_measured_during_the_run_where_asked(
    tmp_path: Path, tiny_base: Path
) -> None:
    recipe = make_recipe(
        tmp_path,
        tiny_base,
        data={"eval": str(tmp_path / "train.jsonl")},
        optim={"max_steps": 4},
        evaluation={"every_steps": 2, "metrics": ["loss", "rouge_l"], "metrics_during_run": True},
    )
    last = train(recipe)
    evals = events_of(recipe, "eval")
    assert [event.number("step") for event in evals] == [2, 4]
    assert all(0 <= event.number("rouge_l") <= 1 for event in evals)
    scores: Any = last.fields["eval"]
    best = next(e for e in evals if e.number("step") == last.number("adapter_step"))
    assert best.number("rouge_l") == pytest.approx(scores["rouge_l"]["value"])
    with pytest.raises(ConfigError, match=r"metrics_during_run needs evaluation\.every_steps"):
        EvaluationConfig(metrics_during_run=True)


def test_a_run_that_stops_early_is_the_beginning_of_the_whole_one(
    tmp_path: Path, tiny_base: Path
) -> None:
    optim = {"max_steps": 8, "schedule": "cosine", "warmup": 2}
    whole = make_recipe(tmp_path, tiny_base, name="whole", optim=optim)
    short = make_recipe(tmp_path, tiny_base, name="short", optim={**optim, "stop_after": 4})
    train(whole)
    end = train(short)
    assert (end.fields["steps"], end.fields["num_steps"]) == (4, 8)
    steps = [events_of(recipe, "step") for recipe in (whole, short)]
    told = [[(e.fields["loss"], e.fields["lr"]) for e in events] for events in steps]
    assert told[1] == told[0][:4]
    kept = checkpoint.rewind(run_dir_of(whole), step=6)
    assert checkpoint.find_latest_valid(run_dir_of(whole)) == kept
    with pytest.raises(StorageError, match="step-000008"):
        checkpoint.rewind(run_dir_of(whole), step=8)
    assert kept.exists()
    again = train(make_recipe(tmp_path, tiny_base, name="whole", optim=optim))
    assert again.fields["steps"] == 8


def test_an_old_attempt_cannot_commit(tmp_path: Path, tiny_base: Path) -> None:
    recipe = make_recipe(tmp_path, tiny_base, checkpoint={"every_steps": 100})
    run_dir = run_dir_of(recipe)
    run_dir.mkdir(parents=True)
    real = checkpoint.save

    def superseded(*args: object, **kwargs: object) -> Path:
        ownership.next_attempt(run_dir)  # another worker has taken the run over meanwhile
        return real(*args, **kwargs)  # pyright: ignore

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "save", superseded)
        with pytest.raises(FencedError, match="superseded"):
            train(recipe)
    assert checkpoint.find_latest_valid(run_dir) is None


def test_an_old_attempt_that_finds_its_checkpoint_committed_ends_too(
    tmp_path: Path, tiny_base: Path
) -> None:
    recipe = make_recipe(tmp_path, tiny_base, checkpoint={"every_steps": 2, "keep": 9})
    train(recipe)
    run_dir = run_dir_of(recipe)
    kept = sorted((run_dir / "checkpoints").iterdir())
    real = checkpoint.find_latest_valid

    def overtaken(*args: object, **kwargs: object) -> None:
        ownership.next_attempt(run_dir)  # which is ahead of this one already

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "find_latest_valid", overtaken)
        with pytest.raises(FencedError, match="superseded"):
            train(recipe)
    assert sorted((run_dir / "checkpoints").iterdir()) == kept
    assert real(run_dir) == kept[-1]
    assert events_of(recipe, "failed") == []


def test_an_adapter_of_zeros_is_not_committed(tmp_path: Path, tiny_base: Path) -> None:
    recipe = make_recipe(tmp_path, tiny_base)
    real = checkpoint.write_adapter

    def emptied(model: object, target: Path, **options: str) -> None:
        real(model, target, **options)  # pyright: ignore
        path = target / checkpoint.WEIGHTS
        save_file({n: torch.zeros_like(t) for n, t in load_torch(path).items()}, path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "write_adapter", emptied)
        with pytest.raises(Exception, match="every lora_B is zero"):
            train(recipe)


def test_old_checkpoints_are_pruned_and_two_are_kept(tmp_path: Path, tiny_base: Path) -> None:
    recipe = make_recipe(tmp_path, tiny_base, optim={"max_steps": 10})
    train(recipe)
    names = sorted(p.name for p in (run_dir_of(recipe) / "checkpoints").iterdir())
    assert names == ["step-000008", "step-000010"]


def test_every_checkpoints_adapter_is_kept_also_where_the_run_was_killed_before_it_was(
    tmp_path: Path, tiny_base: Path
) -> None:
    kept = {"every_steps": 2, "keep_adapters": True}
    recipe = make_recipe(tmp_path, tiny_base, optim={"max_steps": 6}, checkpoint=kept)
    train(recipe)
    folder = run_dir_of(recipe) / "adapters"
    assert sorted(p.name for p in folder.iterdir()) == ["step-000002", "step-000004", "step-000006"]
    shutil.rmtree(folder / "step-000006")
    (run_dir_of(recipe) / "events.jsonl").unlink()
    train(recipe)
    assert events_of(recipe, "started")[-1].number("from_step") == 6
    assert checkpoint.is_export_of(folder / "step-000006", checkpoint.directory(folder.parent, 6))


def test_streaming_sees_what_a_resume_would_see(tmp_path: Path, tiny_base: Path) -> None:
    whole = make_recipe(tmp_path, tiny_base, name="whole", data={"streaming": True})
    train(whole)
    stopped = make_recipe(tmp_path, tiny_base, name="stopped", data={"streaming": True})
    run_dir_of(stopped).mkdir(parents=True)
    loop.stop_file(run_dir_of(stopped)).touch()
    train(stopped)
    loop.stop_file(run_dir_of(stopped)).unlink()
    train(stopped)
    assert adapter_bytes(stopped) == adapter_bytes(whole)


def test_target_names_that_match_nothing_list_what_there_is(
    tmp_path: Path, tiny_base: Path
) -> None:
    recipe = make_recipe(tmp_path, tiny_base, lora={"rank": 4, "target_modules": ["q_porj"]})
    with pytest.raises(ConfigError, match=r"'q_porj' matches no linear layer.*'q_proj'.*v_proj"):
        train(recipe)
