"""What a worker refuses before it loads, and what it tells the driver."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from runs import events_of, make_recipe, run_dir_of, train, write_rows
from transformers import AutoModelForCausalLM

from cluster import storage
from cluster.errors import DataError, ResourceError
from training import checkpoint, dataset, memory, run, worker
from training import model as model_room
from training.config import ModelConfig
from training.strategy import Workers


def test_a_base_that_does_not_fit_is_refused_before_loading(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda _: 1e4)
    with pytest.raises(ResourceError, match=r"needs about .* GB of cpu memory .* Use a smaller"):
        train(make_recipe(tmp_path, tiny_base))


def test_a_disk_without_room_for_checkpoints_is_refused_before_training(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "_free_bytes", lambda _: 1000)
    recipe = make_recipe(tmp_path, tiny_base)
    with pytest.raises(ResourceError, match="checkpoints of the adapter"):
        train(recipe)
    assert events_of(recipe)[-1].kind == "failed"
    assert not events_of(recipe, "step")


def test_other_data_than_the_driver_saw_is_refused(tmp_path: Path, tiny_base: Path) -> None:
    recipe = make_recipe(tmp_path, tiny_base)
    run_dir_of(recipe).mkdir(parents=True)
    with pytest.raises(DataError, match="not those that the driver saw"):
        worker.run(
            recipe,
            run_dir_of(recipe),
            workers=Workers(),
            device=torch.device("cpu"),
            workers_here=1,
            seen=dataset.Seen(fingerprint="another"),
        )


def test_local_paths_become_absolute_and_other_names_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text("{}\n")
    (tmp_path / "demo").mkdir()
    recipe = make_recipe(
        tmp_path,
        tmp_path,
        storage="runs",
        model={"base": "demo"},
        data={"train": ["rows.jsonl", "more/*.jsonl"], "eval": "org/dataset"},
    )
    absolute = worker.with_absolute_paths(recipe)
    assert absolute.data.train == (f"{tmp_path}/rows.jsonl", f"{tmp_path}/more/*.jsonl")
    assert absolute.data.eval == "org/dataset"
    assert absolute.model.base == "demo"
    assert absolute.storage == f"{tmp_path}/runs"


def test_the_adapter_says_where_it_comes_from(tmp_path: Path, tiny_base: Path) -> None:
    recipe = make_recipe(tmp_path, tiny_base)
    train(recipe)
    info = storage.verify(run_dir_of(recipe) / "adapter").info
    assert set(info) >= {
        "base_model", "base_fingerprint", "tokenizer_fingerprint", "quantization", "recipe_sha256",
        "data_fingerprint", "eval", "loray_version", "template", "mask",
    }  # fmt: skip


def test_the_adapter_loads_in_stock_peft_with_the_same_logits(
    tmp_path: Path, tiny_base: Path
) -> None:
    recipe = make_recipe(tmp_path, tiny_base)
    train(recipe)
    directory = run_dir_of(recipe) / "adapter"
    bare = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    stock = PeftModel.from_pretrained(bare, str(directory))
    base = model_room.load_base(
        ModelConfig(base=str(tiny_base), quantization="none"), device=torch.device("cpu")
    )
    ours, _ = model_room.attach_lora(base, recipe.lora, seed=5)
    checkpoint.load_adapter(directory, ours)
    ids = torch.arange(30)[None]
    with torch.no_grad():
        expected = ours(input_ids=ids).logits
        torch.testing.assert_close(stock(input_ids=ids).logits, expected, rtol=0, atol=1e-6)
        with ours.disable_adapter():
            assert not torch.allclose(ours(input_ids=ids).logits, expected, atol=1e-4)


def test_a_worker_takes_the_token_sets_that_the_driver_has_made(
    tmp_path: Path, tiny_base: Path
) -> None:
    recipe = make_recipe(
        tmp_path, tiny_base, data={"eval": str(write_rows(tmp_path / "eval.jsonl", 5))}
    )
    seen = run.inspect(recipe, lambda _: None).seen
    for name in ("train.jsonl", "eval.jsonl"):
        (tmp_path / name).unlink()  # on another node they need not be
    run_dir_of(recipe).mkdir(parents=True)
    worker.run(
        recipe,
        run_dir_of(recipe),
        workers=Workers(),
        device=torch.device("cpu"),
        workers_here=1,
        seen=seen,
    )
    assert events_of(recipe)[-1].kind == "finished"
    made = {path.name for path in (Path(recipe.storage) / ".tokens").glob("[!.]*")}
    assert made == {seen.train, seen.eval}
