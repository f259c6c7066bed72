"""training/merge.py on tiny bases of every architecture, with adapters whose effect is known."""

import json
import warnings
from pathlib import Path

import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import ARCHITECTURES, make_base
from transformers import AutoModelForCausalLM

from cluster import storage
from cluster.errors import AdapterError, ConfigError, ModelError, ResourceError
from training import merge as room
from training.merge import merge, merged_weight

IDS = torch.tensor([[1, 2, 3, 5, 8, 13, 21, 34, 55, 89]])


def make_adapter(
    directory: Path, base: Path, *, fill: float | None = None, scale: float = 0.05, **fields: object
) -> Path:
    """Write a PEFT adapter for `base`: random factors, or every factor value equal to `fill`."""
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **fields}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **settings))
    for name, parameter in wrapped.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            value = torch.randn(parameter.shape) * scale
            parameter.data = value if fill is None else torch.full_like(parameter, fill)
        elif "magnitude" in name:
            parameter.data = parameter.data * (1 + 0.1 * torch.rand(parameter.shape))
    wrapped.save_pretrained(directory, save_embedding_layers=False)
    return directory


def unquantised(adapter: Path) -> Path:
    """Say in a manifest that the adapter was trained on an unquantised base."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    target = adapter.with_name(f"{adapter.name}-committed")

    def write(directory: Path) -> None:
        for path in adapter.iterdir():
            (directory / path.name).write_bytes(path.read_bytes())

    info = {"base_model": config["base_model_name_or_path"], "quantization": "none"}
    storage.commit(target, write, attempt="1", info=info)
    return target


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("merge") / "base")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_merged_model_answers_like_the_live_one_on_every_architecture(
    architecture: str, tmp_path: Path
) -> None:
    base = make_base(tmp_path / "base", architecture)
    adapter = unquantised(make_adapter(tmp_path / "adapter", base))
    report = merge(adapter, tmp_path / "merged", precision="fp32")
    assert report.max_logit_diff_fp16_base <= 1e-6
    with safe_open(adapter / "adapter_model.safetensors", framework="pt") as file:
        assert report.changed_tensors == sum("lora_A" in key for key in file.keys())  # noqa: SIM118
    live = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    stock = peft.PeftModel.from_pretrained(live, adapter)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        torch.testing.assert_close(merged(IDS).logits, stock(IDS).logits, atol=1e-6, rtol=0)


@pytest.mark.parametrize("variant", ["use_rslora", "use_dora"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_rslora_and_dora_merge_as_peft_runs_them(
    architecture: str, variant: str, tmp_path: Path
) -> None:
    base = make_base(tmp_path / "base", architecture)
    adapter = unquantised(make_adapter(tmp_path / "adapter", base, **{variant: True}))
    assert merge(adapter, tmp_path / "m", precision="fp32").max_logit_diff_fp16_base <= 1e-6


def test_each_layer_is_merged_with_its_own_rank_and_alpha(base: Path, tmp_path: Path) -> None:
    patterns = {"rank_pattern": {"q_proj": 2, "layers.1.mlp.down_proj": 7}}
    adapter = make_adapter(
        tmp_path / "a",
        base,
        **patterns,
        alpha_pattern={"v_proj": 3, "^model.layers.0.self_attn.k_proj": 5},
    )
    report = merge(unquantised(adapter), tmp_path / "m", precision="fp32")
    assert report.max_logit_diff_fp16_base <= 1e-6


def test_constant_adapter_adds_the_number_worked_out_by_hand(base: Path, tmp_path: Path) -> None:
    # B @ A of constant 0.1, rank 4: 4 * 0.1 * 0.1 = 0.04; times alpha / rank = 8 / 4: 0.08.
    adapter = make_adapter(tmp_path / "a", base, fill=0.1, target_modules=["q_proj"])
    merge(adapter, tmp_path / "m", precision="fp32")
    before = load_file(base / "model.safetensors")
    after = load_file(tmp_path / "m" / "model.safetensors")
    assert set(before) == set(after)
    for key, weight in before.items():
        delta = 0.08 if "q_proj" in key else 0.0
        torch.testing.assert_close(after[key], weight + delta, atol=1e-7, rtol=0)


def test_dora_weight_has_the_learned_row_lengths() -> None:
    weight, low, high = torch.randn(6, 5), torch.randn(2, 5), torch.randn(6, 2)
    magnitude = torch.rand(6) + 0.5
    merged = merged_weight(weight, low, high, 0.5, magnitude=magnitude)
    torch.testing.assert_close(merged.norm(dim=1), magnitude)
    transposed = merged_weight(weight.t(), low, high, 0.5, magnitude=magnitude, fan_in_fan_out=True)
    torch.testing.assert_close(transposed, merged.t())


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_merge_is_within_its_stated_bounds(
    precision: room.Precision, base: Path, tmp_path: Path
) -> None:
    adapter = make_adapter(tmp_path / "a", base)
    report = merge(adapter, tmp_path / "m", precision=precision)
    figures = storage.verify(tmp_path / "m").info["merge"]
    assert isinstance(figures, dict)
    assert 0 < report.max_logit_diff_fp16_base <= figures["bound_fp16_base"]
    assert 0 < report.max_logit_diff_live <= figures["bound_live"]
    weights = load_file(tmp_path / "m" / "model.safetensors")
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    assert {weight.dtype for weight in weights.values()} == {dtype}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "m").dtype == dtype


def test_merge_into_an_nf4_trained_adapter_is_compared_with_nf4(base: Path, tmp_path: Path) -> None:
    adapter = unquantised(make_adapter(tmp_path / "a", base))
    manifest = storage.read_manifest(adapter)

    def write(directory: Path) -> None:
        for name in manifest.files:
            (directory / name).write_bytes((adapter / name).read_bytes())

    info = {**manifest.info, "quantization": "nf4"}
    storage.commit(tmp_path / "nf4", write, attempt="1", info=info)
    report = merge(tmp_path / "nf4", tmp_path / "m")
    assert report.max_logit_diff_live > report.max_logit_diff_fp16_base


def test_merged_directory_is_a_standard_one_with_tokenizer_and_manifest(
    base: Path, tmp_path: Path
) -> None:
    report = merge(make_adapter(tmp_path / "a", base), tmp_path / "m")
    names = {path.name for path in report.model_dir.iterdir()}
    wanted = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
    assert wanted | {"chat_template.jinja", "manifest.json"} <= names
    keys = load_file(tmp_path / "m" / "model.safetensors").keys()
    assert not [key for key in keys if "lora" in key or "base_model" in key]
    assert json.loads((tmp_path / "m" / "config.json").read_text())["dtype"] == "float16"
    assert storage.verify(tmp_path / "m").info["base_model"] == str(base)


def test_merge_keeps_the_shards_of_the_base(base: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    sharded = tmp_path / "sharded"
    model.save_pretrained(sharded, max_shard_size="50KB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (sharded / name).write_bytes((base / name).read_bytes())
    adapter = unquantised(make_adapter(tmp_path / "a", sharded))
    assert merge(adapter, tmp_path / "m", precision="fp32").max_logit_diff_fp16_base <= 1e-6
    index = "model.safetensors.index.json"
    before, after = (json.loads((d / index).read_text()) for d in (sharded, tmp_path / "m"))
    assert before["weight_map"] == after["weight_map"]
    assert len(list((tmp_path / "m").glob("*.safetensors"))) > 1


def test_base_checkpoint_without_the_backbone_prefix_is_found(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "gpt2")
    weights = load_file(base / "model.safetensors")
    bare = {key.removeprefix("transformer."): weight for key, weight in weights.items()}
    save_file(bare, base / "model.safetensors", metadata={"format": "pt"})
    adapter = unquantised(make_adapter(tmp_path / "a", base))
    assert merge(adapter, tmp_path / "m", precision="fp32").max_logit_diff_fp16_base <= 1e-6


def test_existing_output_directory_is_refused_and_kept(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "m"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match="exists already"):
        merge(make_adapter(tmp_path / "a", base), out)
    assert (out / "mine.txt").read_text() == "mine"


def test_adapter_that_changes_nothing_is_refused(base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "a", base, scale=1e-6)
    with pytest.raises(AdapterError, match="no weight changes in bf16"):
        merge(adapter, tmp_path / "m", precision="bf16")
    assert not (tmp_path / "m").exists()
    assert not list(tmp_path.glob(".tmp-*"))


def test_untrained_adapter_is_refused(base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "a", base, fill=0.0)
    with pytest.raises(AdapterError, match="every lora_B is zero"):
        merge(adapter, tmp_path / "m")


def test_value_beyond_fp16_is_refused_with_bf16_as_the_way_out(base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "a", base, fill=200.0, target_modules=["q_proj"])
    with pytest.raises(ModelError, match=r"not finite in fp16; write precision bf16"):
        merge(adapter, tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_adapter_of_another_base_is_refused_naming_the_layer(base: Path, tmp_path: Path) -> None:
    other = make_base(tmp_path / "other", "gpt2")
    adapter = make_adapter(tmp_path / "a", base)
    with pytest.raises(AdapterError, match=r"model\.layers\.0\..*has no such weight"):
        merge(adapter, tmp_path / "m", base=str(other))


def test_base_changed_since_the_training_is_refused(base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "a", base)

    def write(directory: Path) -> None:
        for path in adapter.iterdir():
            (directory / path.name).write_bytes(path.read_bytes())

    info = {"base_model": str(base), "quantization": "none", "base_fingerprint": "0" * 64}
    storage.commit(tmp_path / "c", write, attempt="1", info=info)
    with pytest.raises(AdapterError, match="not the model that it was trained on any more"):
        merge(tmp_path / "c", tmp_path / "m")
    assert merge(tmp_path / "c", tmp_path / "m", base=str(base)).changed_tensors == 14


def test_wrong_merge_does_not_pass_the_proof(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = room.merged_weight

    def wrong(*args: torch.Tensor, **options: object) -> torch.Tensor:
        weight, low, high, scaling = args
        return right(weight, low, high, 1.1 * float(scaling), **options)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(room, "merged_weight", wrong)
    adapter = make_adapter(tmp_path / "a", base)
    with pytest.raises(ModelError, match="logits differ by"):
        merge(adapter, tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_quantised_base_is_refused(base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "a", base)
    copy = tmp_path / "quantised"
    copy.mkdir()
    for path in base.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    config = json.loads((copy / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="stored quantised"):
        merge(adapter, tmp_path / "m", base=str(copy))


def test_missing_shard_is_refused(base: Path, tmp_path: Path) -> None:
    sharded = tmp_path / "sharded"
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(sharded, max_shard_size="50KB")
    next(iter(sharded.glob("*.safetensors"))).unlink()
    with pytest.raises(ModelError, match="is missing; fetch the base again"):
        merge(make_adapter(tmp_path / "a", base), tmp_path / "m", base=str(sharded))


def test_full_disk_is_noticed_before_anything_is_written(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = make_adapter(tmp_path / "a", base)
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    with pytest.raises(ResourceError, match="the merged model needs"):
        merge(adapter, tmp_path / "m")


@pytest.mark.parametrize("scale", [0.01, 0.05, 0.3])
def test_bounds_are_close_to_what_they_bound(scale: float, base: Path, tmp_path: Path) -> None:
    # 0.3 is an adapter that dwarfs the base's weights (0.02): its model amplifies every rounding.
    report = merge(make_adapter(tmp_path / "a", base, scale=scale), tmp_path / "m")
    figures = storage.read_manifest(tmp_path / "m").info["merge"]
    assert isinstance(figures, dict)
    assert figures["bound_fp16_base"] <= 20 * report.max_logit_diff_fp16_base
    assert figures["bound_live"] <= 40 * report.max_logit_diff_live
