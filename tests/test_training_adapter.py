"""training/adapter.py: what a stranger's adapter directory can hold, and what is made of it."""

import json
import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import ARCHITECTURES, make_base
from transformers import AutoModelForCausalLM

from cluster import storage
from cluster.errors import AdapterError
from training import adapter as room
from training.adapter import attach, base_of, read_config, read_tensors

IDS = torch.tensor([[1, 2, 3, 5, 8, 13, 21, 34, 55, 89]])
KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def load(base: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()


def make_adapter(directory: Path, base: Path, *, seed: int = 7, **fields: Any) -> Path:
    torch.manual_seed(seed)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **fields}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(task_type="CAUSAL_LM", **settings)
        model = peft.get_peft_model(load(base), config)
    for name, parameter in model.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            parameter.data = torch.randn(parameter.shape) * 0.05
    model.save_pretrained(directory, save_embedding_layers=False)
    return directory


def edit_config(adapter: Path, **fields: Any) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def edit_tensors(adapter: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(adapter / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, adapter / "adapter_model.safetensors")


@pytest.fixture
def adapter(tiny_base: Path, tmp_path: Path) -> Path:
    return make_adapter(tmp_path / "adapter", tiny_base)


def test_config_says_rank_alpha_variant_and_layers(adapter: Path, tiny_base: Path) -> None:
    config = read_config(adapter)
    assert (config.rank, config.alpha, config.variant) == (4, 8, "lora")
    assert config.base == str(tiny_base)
    assert len(config.layers) == 14
    assert config.target_modules == [
        *("down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj")
    ]
    layer = config.layers["model.layers.1.self_attn.k_proj"]
    assert (layer.in_features, layer.out_features, layer.scaling) == (32, 16, 2.0)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("variant", [{}, {"use_rslora": True}, {"use_dora": True}])
def test_attached_adapter_gives_the_logits_of_stock_peft(
    architecture: str, variant: dict[str, bool], tmp_path: Path
) -> None:
    base = make_base(tmp_path / "base", architecture)
    adapter = make_adapter(tmp_path / "adapter", base, **variant)
    ours, stock = attach(load(base), adapter), peft.PeftModel.from_pretrained(load(base), adapter)
    with torch.no_grad():
        torch.testing.assert_close(ours(IDS).logits, stock(IDS).logits, atol=0, rtol=0)
    assert not any(p.requires_grad for name, p in ours.named_parameters() if "lora_" in name)
    assert not ours.training


def test_own_ranks_and_alphas_of_layers_are_kept(tiny_base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(
        tmp_path / "a",
        tiny_base,
        rank_pattern={"q_proj": 2, "layers.1.mlp.down_proj": 7},
        alpha_pattern={"^model.layers.0.self_attn.k_proj": 5},
    )
    stock = peft.PeftModel.from_pretrained(load(tiny_base), adapter)
    with torch.no_grad():
        ours = attach(load(tiny_base), adapter)
        torch.testing.assert_close(ours(IDS).logits, stock(IDS).logits, atol=0, rtol=0)
    assert read_config(adapter).rank == 7


def test_second_adapter_joins_the_first_without_touching_it(
    adapter: Path, tiny_base: Path, tmp_path: Path
) -> None:
    other = make_adapter(tmp_path / "other", tiny_base, seed=8, r=2, target_modules=["v_proj"])
    with torch.no_grad():
        alone = [attach(load(tiny_base), path)(IDS).logits for path in (adapter, other)]
        model = attach(attach(load(tiny_base), adapter, "one"), other, "two")
        for name, expected in zip(("one", "two"), alone, strict=True):
            model.set_adapter(name)
            torch.testing.assert_close(model(IDS).logits, expected, atol=0, rtol=0)


@pytest.mark.parametrize("init", ["olora", "pissa", "orthogonal"])
def test_init_that_would_rewrite_the_base_has_no_effect(
    init: str, adapter: Path, tiny_base: Path
) -> None:
    edit_config(adapter, init_lora_weights=init)
    base = load(tiny_base)
    before = {name: weight.clone() for name, weight in base.state_dict().items()}
    attach(base, adapter)
    after = {name.replace(".base_layer", ""): w for name, w in base.state_dict().items()}
    assert all(torch.equal(after[name], weight) for name, weight in before.items())


def test_half_precision_adapter_is_attached_in_fp32(adapter: Path, tiny_base: Path) -> None:
    edit_tensors(adapter, lambda t: t.update({k: v.half() for k, v in t.items()}))
    model = attach(load(tiny_base), adapter)
    dtypes = {p.dtype for name, p in model.named_parameters() if "lora_" in name}
    assert dtypes == {torch.float32}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": 0}, "r is 0; allowed: 1 to 4096"),
        ({"r": 200_000}, "r is 200000; allowed: 1 to 4096"),
        ({"r": "8"}, "r is 8; allowed"),
        ({"r": 8}, "says rank 8; the files do not belong together"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan"),
        ({"lora_alpha": -1}, "lora_alpha is -1"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3'; only LORA"),
        ({"use_dora": True}, "and a magnitude"),
        ({"bias": "all"}, "bias is 'all', which is not supported"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is"),
        ({"layer_replication": [[0, 2]]}, "layer_replication is"),
        ({"a_field_of_tomorrow": 1}, "a_field_of_tomorrow is '1', which is not supported"),
        ({"rank_pattern": {"(a+)+$": 4}}, "rank_pattern is"),
        ({"rank_pattern": {"q_proj": 10**6}}, "rank_pattern is"),
        ({"alpha_pattern": ["q_proj"]}, "alpha_pattern is"),
    ],
)
def test_bad_config_field_is_refused_by_name(
    fields: dict[str, Any], message: str, adapter: Path
) -> None:
    edit_config(adapter, **fields)
    with pytest.raises(AdapterError) as caught:
        read_config(adapter)
    assert message in str(caught.value)


def test_missing_directory_and_files_are_named(adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="no such directory"):
        read_config(tmp_path / "nowhere")
    with pytest.raises(AdapterError, match=r"no adapter_config\.json"):
        read_config(tmp_path)
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(AdapterError, match=r"no adapter_model\.safetensors"):
        read_config(adapter)


def test_pickled_weights_are_refused_unread(adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(AdapterError, match=r"only a pickled adapter_model\.bin"):
        read_config(adapter)


def test_broken_config_json_is_refused(adapter: Path) -> None:
    (adapter / "adapter_config.json").write_text('{"r": 4,')
    with pytest.raises(AdapterError, match="not readable as JSON"):
        read_config(adapter)
    (adapter / "adapter_config.json").write_text(" " * (2 << 20))
    with pytest.raises(AdapterError, match="larger than"):
        read_config(adapter)


def test_empty_adapter_file_is_refused(adapter: Path) -> None:
    save_file({}, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(AdapterError, match="holds no tensors"):
        read_config(adapter)
    (adapter / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(AdapterError, match="in a file of 0"):
        read_config(adapter)


def test_oversized_header_is_refused_before_it_is_read(adapter: Path) -> None:
    path = adapter / "adapter_model.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 33 << 20))
        file.truncate(64 << 20)
    with pytest.raises(AdapterError, match="its header claims 34603008 bytes"):
        read_config(adapter)


def test_truncated_and_garbled_weight_files_are_refused(adapter: Path) -> None:
    path = adapter / "adapter_model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(AdapterError, match="damaged"):
        read_config(adapter)
    path.write_bytes(data[:8] + b"x" + data[9:])
    with pytest.raises(AdapterError, match="damaged"):
        read_config(adapter)


def test_header_that_claims_a_huge_tensor_allocates_nothing(adapter: Path) -> None:
    entry = {"dtype": "F32", "shape": [200_000, 4096], "data_offsets": [0, 3_276_800_000]}
    header = json.dumps({KEY: entry}).encode()
    data = struct.pack("<Q", len(header)) + header
    (adapter / "adapter_model.safetensors").write_bytes(data)
    with pytest.raises(AdapterError, match="damaged"):
        read_config(adapter)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(KEY), "expected are matrices A and B"),
        (lambda t: t.update({KEY: torch.ones(3, 32)}), "do not belong together"),
        (lambda t: t.update({KEY: torch.ones(4, 32, 1)}), "expected are matrices A and B"),
        (lambda t: t.update({KEY: torch.ones(4, 32, dtype=torch.int32)}), "is I32; allowed"),
        (lambda t: t.update({"base_model.model.lm_head.weight": torch.ones(2)}), "unexpected"),
    ],
)
def test_tensors_that_do_not_make_a_lora_are_refused(
    change: Callable[[dict[str, torch.Tensor]], Any], message: str, adapter: Path
) -> None:
    edit_tensors(adapter, change)
    with pytest.raises(AdapterError, match=message):
        read_config(adapter)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(value: float, adapter: Path) -> None:
    edit_tensors(adapter, lambda t: t[KEY].fill_(value))
    with pytest.raises(AdapterError, match=r"q_proj\.lora_A\.weight holds NaN or infinite"):
        read_tensors(read_config(adapter))


def test_untrained_adapter_is_refused_unless_asked_for(adapter: Path, tiny_base: Path) -> None:
    edit_tensors(adapter, lambda t: [v.zero_() for k, v in t.items() if "lora_B" in k])
    with pytest.raises(AdapterError, match="every lora_B is zero"):
        attach(load(tiny_base), adapter)
    with torch.no_grad():
        logits = attach(load(tiny_base), adapter, allow_untrained=True)(IDS).logits
        torch.testing.assert_close(logits, load(tiny_base)(IDS).logits, atol=0, rtol=0)


def test_dead_layer_is_reported(adapter: Path, caplog: pytest.LogCaptureFixture) -> None:
    edit_tensors(adapter, lambda t: t[KEY.replace("lora_A", "lora_B")].zero_())
    read_tensors(read_config(adapter))
    assert "dead_layers=1" in caplog.text


def test_adapter_of_another_architecture_is_refused(adapter: Path, tmp_path: Path) -> None:
    other = load(make_base(tmp_path / "other", "gpt2"))
    with pytest.raises(AdapterError, match="which this base does not have"):
        attach(other, adapter)
    assert not any("lora" in name for name, _ in other.named_parameters())


def test_adapter_of_another_size_is_refused(tmp_path: Path, tiny_base: Path) -> None:
    adapter = make_adapter(tmp_path / "a", tiny_base, target_modules=["k_proj"])
    other = load(make_base(tmp_path / "other", "phi3"))
    with pytest.raises(AdapterError, match=r"k_proj, which this base does not have"):
        attach(other, adapter)
    edit_tensors(adapter, lambda t: t.update({k: v.repeat(2, 1) for k, v in t.items() if "B" in k}))
    with pytest.raises(AdapterError, match=r"maps 32 to 32 features, the base's \(32, 16\)"):
        attach(load(tiny_base), adapter)


def test_base_comes_from_the_choice_then_the_manifest_then_the_config(
    adapter: Path, tiny_base: Path, tmp_path: Path
) -> None:
    assert base_of(adapter).base == str(tiny_base)
    assert base_of(adapter, "demo").base == "demo"

    def write(directory: Path) -> None:
        for path in adapter.iterdir():
            (directory / path.name).write_bytes(path.read_bytes())

    info = {"base_model": "org/model", "quantization": "nf4"}
    storage.commit(tmp_path / "c", write, attempt="1", info=info)
    assert (base_of(tmp_path / "c").base, base_of(tmp_path / "c").quantization) == (
        "org/model",
        "nf4",
    )
    edit_config(adapter, base_model_name_or_path=None)
    with pytest.raises(AdapterError, match="does not say which base"):
        base_of(adapter)


def test_committed_adapter_with_a_flipped_byte_is_refused(adapter: Path, tmp_path: Path) -> None:
    def write(directory: Path) -> None:
        for path in adapter.iterdir():
            (directory / path.name).write_bytes(path.read_bytes())

    storage.commit(tmp_path / "c", write, attempt="1", info={"base_model": "demo"})
    path = tmp_path / "c" / "adapter_model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(AdapterError, match="is altered"):
        base_of(tmp_path / "c")


def test_loading_gives_the_base_as_trained_with_or_without_the_adapter(
    adapter: Path, tiny_base: Path
) -> None:
    loaded, model = room.load(str(adapter))
    assert (loaded.quantization, loaded.name) == ("int8", str(tiny_base))
    assert isinstance(model, peft.PeftModel)
    bare, plain = room.load("base", base=str(tiny_base))
    assert plain is bare.model
