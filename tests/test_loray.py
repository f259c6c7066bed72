"""The verbs of the `loray` command on a tiny adapter; `train` has tests of its own."""

import json
from pathlib import Path

import pytest
import yaml
from runs import make_recipe, run_dir_of, train

import loray
from cluster import command, config
from training.config import TrainRecipe


@pytest.fixture
def recipe(tmp_path: Path, tiny_base: Path) -> TrainRecipe:
    return make_recipe(
        tmp_path, tiny_base, data={"template": "alpaca", "mask": "last_turn", "max_length": 400}
    )


@pytest.fixture
def adapter(recipe: TrainRecipe) -> str:
    train(recipe)
    return str(run_dir_of(recipe) / "adapter")


def call(*words: str) -> int:
    return command.run(loray.app, words)


def test_schema_prints_every_section(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("schema", "train") == 0
    schema = json.loads(capsys.readouterr().out)
    assert {"name", "model", "data", "lora", "optim", "scale"} <= set(schema["properties"])
    rank = schema["properties"]["lora"]["properties"]["rank"]
    assert rank == {"type": "integer", "default": 16, "description": rank["description"]}


def test_doctor_shows_one_example_and_trains_nothing(
    tmp_path: Path, recipe: TrainRecipe, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(config.plain(recipe)))
    assert call("doctor", str(path)) == 0
    out = capsys.readouterr().out
    assert "⟦" in out
    assert "refused: model.quantization: int8, scale.strategy: zero3" in out
    assert not run_dir_of(recipe).exists()


def test_merge_evaluate_and_generate_take_the_adapter_as_it_was_trained(
    tmp_path: Path, adapter: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("merge", adapter, "--out", str(tmp_path / "merged"), "--json") == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["changed_tensors"] == 14
    assert report["max_logit_diff_fp16_base"] < 1e-2
    data = str(tmp_path / "train.jsonl")
    words = ("--metric", "loss", "--metric", "exact_match", "--max-new-tokens", "4", "--json")
    assert call("evaluate", adapter, data, *words) == 0
    metrics = json.loads(capsys.readouterr().out.splitlines()[-1])["metrics"]
    assert set(metrics) == {"loss", "exact_match"}
    assert metrics["loss"]["low"] <= metrics["loss"]["value"] <= metrics["loss"]["high"]
    assert metrics["loss"]["n"] == 24
    assert call("generate", adapter, "Say red", "--max-new-tokens", "4") == 0


def test_evaluate_prompts_with_the_template_of_the_training(adapter: str) -> None:
    from training import adapter as adapters

    base, _ = adapters.load(adapter)
    assert adapters.encoder_for(adapter, base).template_name == "alpaca"
    assert adapters.encoder_for(adapter, base).mask == "last_turn"
    assert adapters.encoder_for("base", base).template_name == "chat"


def test_bad_usage_is_status_2_and_bad_input_status_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("train") == 2
    assert call("merge", str(tmp_path), "--out", str(tmp_path / "out")) == 1
    assert "error [invalid_adapter]" in capsys.readouterr().err
    assert call("generate", str(tmp_path / "nowhere"), "hello") == 1


def test_version_is_the_package_s(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("version") == 0
    assert capsys.readouterr().out.strip() == "0.1.0"
