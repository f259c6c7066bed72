"""Dtypes, placement and the ways in which a base can be unusable."""

import json
import shutil
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import ARCHITECTURES, make_base

from cluster.errors import ConfigError, ModelError
from training import model as model_room
from training.config import LoraConfig, ModelConfig
from training.int8 import Int8Linear

CPU = torch.device("cpu")


def load(directory: Path, **settings: object) -> model_room.Base:
    config = ModelConfig(**{"base": str(directory), "quantization": "none", **settings})  # pyright: ignore
    return model_room.load_base(config, device=CPU)


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_every_linear_layer_but_the_head_is_quantised(
    tmp_path: Path, architecture: str, quantization: str
) -> None:
    base = load(make_base(tmp_path / "base", architecture), quantization=quantization)
    layers = [base.model.get_submodule(n) for n in model_room.linear_layers(base.model)]
    kind = Int8Linear if quantization == "int8" else bnb.nn.Linear4bit
    assert layers
    assert all(type(layer) is kind for layer in layers)
    assert base.model.get_output_embeddings().weight.dtype == torch.float32


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_in_fp16_norms_are_fp32_embeddings_half_and_trainables_fp32(
    tmp_path: Path, architecture: str
) -> None:
    base = load(make_base(tmp_path / "base", architecture), precision="fp16")
    assert base.model.get_input_embeddings().weight.dtype == torch.float16
    norms = [m for m in base.model.modules() if "norm" in type(m).__name__.lower()]
    assert norms
    assert all(p.dtype == torch.float32 for norm in norms for p in norm.parameters())
    model, _ = model_room.attach_lora(base, LoraConfig(rank=4), seed=0)
    assert {p.dtype for p in model_room.trainable(model).values()} == {torch.float32}
    with base.autocast(), torch.no_grad():
        logits = model(input_ids=torch.arange(8)[None], use_cache=False).logits
    assert torch.isfinite(logits).all()


def test_a_half_precision_trainable_is_refused(tiny_base: Path) -> None:
    model, _ = model_room.attach_lora(load(tiny_base), LoraConfig(rank=4), seed=0)
    next(iter(model_room.trainable(model).values())).data = torch.zeros(4, 32, dtype=torch.float16)
    with pytest.raises(ModelError, match=r"torch\.float16; it must be torch\.float32"):
        model_room.check_dtypes(model)


def test_a_trainable_base_weight_is_refused(tiny_base: Path) -> None:
    model, _ = model_room.attach_lora(load(tiny_base), LoraConfig(rank=4), seed=0)
    model.get_input_embeddings().weight.requires_grad_(True)
    with pytest.raises(ModelError, match="only the adapter may be"):
        model_room.check_dtypes(model)


def test_the_init_depends_on_the_seed_alone(tiny_base: Path) -> None:
    def init(seed: int) -> torch.Tensor:
        torch.rand(3)  # whatever happened to the global generator before
        model, _ = model_room.attach_lora(load(tiny_base), LoraConfig(rank=4), seed=seed)
        return next(iter(model_room.trainable(model).values())).detach()

    assert torch.equal(init(1), init(1))
    assert not torch.equal(init(1), init(2))


def test_alpha_defaults_to_the_rank(tiny_base: Path) -> None:
    model, _ = model_room.attach_lora(load(tiny_base), LoraConfig(rank=6), seed=0)
    assert model.peft_config["default"].lora_alpha == 6


@pytest.mark.parametrize(
    ("architecture", "name"), [("gpt_neox", "query_key_value"), ("gpt2", "c_attn")]
)
def test_targets_can_be_named(tmp_path: Path, architecture: str, name: str) -> None:
    base = load(make_base(tmp_path / "base", architecture))
    model, _ = model_room.attach_lora(base, LoraConfig(rank=4, target_modules=(name,)), seed=0)
    assert all(name in parameter for parameter in model_room.trainable(model))


def test_an_unknown_target_lists_what_exists(tiny_base: Path) -> None:
    config = LoraConfig(rank=4, target_modules=("query_key_value",))
    with pytest.raises(ConfigError, match=r"down_proj, gate_proj, k_proj.*or all-linear"):
        model_room.attach_lora(load(tiny_base), config, seed=0)


def test_a_base_with_missing_weights_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny_base, tmp_path / "copy"))
    tensors = load_file(copy / "model.safetensors")
    tensors.pop("model.layers.0.mlp.up_proj.weight")
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"1 weights are missing.*up_proj"):
        load(copy)


def test_pickled_weights_and_no_weights_are_told_apart(tiny_base: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny_base, tmp_path / "copy"))
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(ModelError, match="only pickled weights"):
        load(copy)
    (copy / "pytorch_model.bin").unlink()
    with pytest.raises(ModelError, match="no weights"):
        load(copy)


def test_an_unknown_architecture_is_one_clear_error(tiny_base: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny_base, tmp_path / "copy"))
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "model_type": "frobnicator"}))
    with pytest.raises(ModelError, match="frobnicator"):
        load(copy)


def test_a_damaged_weight_file_is_one_clear_error(tiny_base: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny_base, tmp_path / "copy"))
    (copy / "model.safetensors").write_bytes(b"\0" * 64)
    with pytest.raises(ModelError, match="cannot be loaded"):
        load(copy)


def test_a_hub_id_that_cannot_be_fetched_says_what_to_do() -> None:
    with pytest.raises(ModelError, match="cannot be fetched from the hub"):
        model_room.resolve("nobody/nothing-at-all")


def test_the_base_s_own_dropout_is_off(tmp_path: Path) -> None:
    base = load(make_base(tmp_path / "base", "gpt2"))
    base.model.train()
    assert all(m.p == 0 for m in base.model.modules() if isinstance(m, torch.nn.Dropout))
