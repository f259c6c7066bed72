"""Fold an adapter into its base, shard by shard, and prove that the result answers the same.

A merged weight is W + scaling * B @ A in fp32 arithmetic, rounded once, to the type that is
written; a DoRA weight is that, rescaled row by row to the learned magnitude. Everything else of
the base is written as it was. The proof: the reloaded model's logits on probe prompts against the
base with the live adapter, unquantised and quantised.

What is covered: bases in one or many safetensors files, at any sharding, which is kept; tied
embeddings, which stay as they are. What is not covered: bases that are stored quantised, and
models that run code of their own.

W weight, R rank, I input features, O output features.
"""

import gc
import hashlib
import json
import math
import shutil
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

import psutil
import torch
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from cluster import storage
from cluster.errors import AdapterError, ConfigError, ModelError, ResourceError
from training import adapter as adapters
from training import model as models
from training.adapter import AdapterConfig
from training.config import ModelConfig

Precision: TypeAlias = Literal["fp16", "bf16", "fp32"]
_DTYPES: dict[str, torch.dtype] = {
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp32": torch.float32,
}
_CPU = torch.device("cpu")
_TOKENIZER_FILES = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template*"),
    *("vocab.*", "merges.txt", "*.model"),
)
_KEPT_FILES = (*_TOKENIZER_FILES, "generation_config.json", "LICENSE*", "NOTICE*", "USE_POLICY*")
_PROBES = (
    "The capital of France is",
    'Reply with JSON: {"name": "Ada", "age": 36, "tags": ["a", "b"]}\n',
    "def total(prices):\n    return sum(prices) * 1.19\n",
    "Dear Sir or Madam, on 3 May I ordered two lamps, of which one arrived broken.",
)
_RANDOM_PROBE_TOKENS = 32
_FP32_NOISE = 2.0**-20
"""Relative error of a sum of products in fp32, where one product is taken instead of two."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MergeReport:
    """What was written and how far it is from the live model."""

    model_dir: Path
    changed_tensors: int
    """Weights of which at least one value differs from the base's, as written."""
    max_logit_diff_fp16_base: float
    """Largest difference of a logit from the unquantised base with the live adapter."""
    max_logit_diff_live: float
    """The same from the base as quantised in training, with the live adapter."""
    wall_s: float

    def lines(self) -> list[str]:
        """The report for people."""
        return [
            f"merged model      {self.model_dir}",
            f"changed tensors   {self.changed_tensors}",
            f"max logit diff    {self.max_logit_diff_fp16_base:.2e} from the unquantised base + "
            "adapter",
            f"                  {self.max_logit_diff_live:.2e} from the live (quantised) model",
            f"took              {self.wall_s:.1f} s",
        ]


def merge(
    adapter_dir: Path,
    out_dir: Path,
    *,
    base: str | None = None,
    precision: Precision = "fp16",
) -> MergeReport:
    """Write base + adapter as a standard Hugging Face directory `out_dir`, all on CPU.

    `base` takes the place of the base that the adapter names. Nothing is left at `out_dir` unless
    the proof holds. Raises ConfigError where `out_dir` exists, AdapterError where the adapter is
    damaged, does not fit or changes nothing, ModelError where a value is not finite or the proof
    fails, ResourceError where disk or memory do not suffice.
    """
    started = time.monotonic()
    if precision not in _DTYPES:
        raise ConfigError(f"precision is {precision!r}; allowed: {', '.join(_DTYPES)}")
    if out_dir.exists():
        raise ConfigError(f"{out_dir} exists already; choose another directory, or remove it")
    config = adapters.read_config(adapter_dir)
    tensors = adapters.read_tensors(config)
    settings = adapters.base_of(adapter_dir, base)
    base_dir = models.resolve(settings.base, settings.revision)
    fingerprint = models.fingerprint(base_dir)
    adapters.check_base(adapter_dir, fingerprint, settings.base, is_chosen=base is not None)
    plan = _plan(config, base_dir)
    _check_room(base_dir, out_dir, _DTYPES[precision])
    # Filled by `write`, which ends before the manifest is sealed.
    figures: dict[str, storage.JSON] = {"precision": precision}

    def write(target: Path) -> None:
        figures["changed_tensors"] = _write_model(
            target, base_dir, config, plan, tensors, precision
        )
        _copy_companions(base_dir, adapter_dir, target)
        figures.update(prove(target, adapter_dir, settings, base_dir, precision))

    info: dict[str, storage.JSON] = {
        "kind": "merged",
        "base_model": settings.base,
        "base_fingerprint": fingerprint,
        "adapter_sha256": _sha256(adapter_dir / adapters.WEIGHTS),
        "merge": figures,
    }
    storage.commit(out_dir, write, attempt=uuid.uuid4().hex, info=info)
    return MergeReport(
        model_dir=out_dir,
        changed_tensors=_number(figures, "changed_tensors", int),
        max_logit_diff_fp16_base=_number(figures, "max_logit_diff_fp16_base", float),
        max_logit_diff_live=_number(figures, "max_logit_diff_live", float),
        wall_s=round(time.monotonic() - started, 3),
    )


def merged_weight(
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    *,
    magnitude: Tensor | None = None,
    fan_in_fan_out: bool = False,
) -> Tensor:
    """The merged weight in fp32, shaped like `weight`: (O, I), or (I, O) with fan_in_fan_out.

    lora_A is (R, I), lora_B (O, R). With DoRA's `magnitude` (O) each output's row is given that
    length (arXiv 2402.09353, as peft 0.21 computes it).
    """
    weight_OI = weight.float().t() if fan_in_fan_out else weight.float()
    merged_OI = weight_OI + (lora_B.float() @ lora_A.float()) * scaling
    if magnitude is not None:
        length_O = torch.linalg.norm(merged_OI, dim=1)
        merged_OI = merged_OI * (magnitude.float().flatten() / length_O)[:, None]
    return (merged_OI.t() if fan_in_fan_out else merged_OI).contiguous()


def prove(
    merged_dir: Path,
    adapter_dir: Path,
    settings: ModelConfig,
    base_dir: Path,
    precision: Precision,
) -> dict[str, float]:
    """Compare the logits of the merged model with the live ones; the figures for the manifest.

    Bound against the unquantised base: rounding gives each weight a relative error of up to u
    (2^-11 in fp16). The merged model itself tells what that does: four times the largest change
    of its logits under random errors of that size is allowed. Bound against the quantised model:
    that, and four times what quantisation alone does to the bare base, in parts of the largest
    logit. Raises ModelError where either is exceeded, or where a logit is not finite.
    """
    probes = _probes(merged_dir)
    plain = ModelConfig(base=str(merged_dir), quantization="none", precision="fp32")
    model = models.load_base(plain, device=_CPU).model
    merged = _logits(model, probes)
    _perturb(model, max(torch.finfo(_DTYPES[precision]).eps / 2, _FP32_NOISE))
    rounding = float((_logits(model, probes) - merged).abs().max())
    del model
    exact, exact_bare = _live_logits(replace(plain, base=str(base_dir)), adapter_dir, probes)
    live, live_bare = exact, exact_bare
    if settings.quantization != "none":
        quantised = replace(plain, base=str(base_dir), quantization=settings.quantization)
        live, live_bare = _live_logits(quantised, adapter_dir, probes)
    size = float(exact.abs().max())
    quantisation = float((live_bare - exact_bare).abs().max()) / float(exact_bare.abs().max())
    figures = {
        "max_logit": size,
        "max_logit_diff_fp16_base": float((merged - exact).abs().max()),
        "bound_fp16_base": 4 * rounding,
        "max_logit_diff_live": float((merged - live).abs().max()),
        "bound_live": 4 * quantisation * size + 4 * rounding,
    }
    for name, against in (("fp16_base", "unquantised"), ("live", "quantised")):
        found, allowed = figures[f"max_logit_diff_{name}"], figures[f"bound_{name}"]
        if not found <= allowed:  # NaN is not
            raise ModelError(
                f"the merged model is not the {against} base with the adapter: logits differ by "
                f"{found:.3g}, allowed is {allowed:.3g} (largest logit {size:.3g}). Nothing was "
                "kept. Check that the base is the one of the training"
            )
    return figures


@dataclass(frozen=True, kw_only=True, slots=True)
class _Target:
    """A weight of the checkpoint that the adapter changes."""

    module: str
    fan_in_fan_out: bool


def _plan(config: AdapterConfig, base_dir: Path) -> dict[str, _Target]:
    """Checkpoint key -> what happens to it. Raises AdapterError for a layer that has no key."""
    try:
        settings = AutoConfig.from_pretrained(base_dir)
    except Exception as error:  # transformers raises many kinds
        raise models.unloadable(str(base_dir), base_dir, error) from error
    if getattr(settings, "quantization_config", None):
        raise ModelError(
            f"{base_dir}: the base is stored quantised, and merging would round twice; name its "
            "fp16 or bf16 original as base"
        )
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(settings)
    modules = dict(skeleton.named_modules())
    shapes = {key: shape for file in _shards(base_dir) for key, shape in _shapes(file).items()}
    plan: dict[str, _Target] = {}
    for name, layer in config.layers.items():
        key = _checkpoint_key(f"{name}.weight", skeleton.base_model_prefix, shapes)
        is_conv = isinstance(modules.get(name), Conv1D)
        shape = (layer.out_features, layer.in_features)
        expected = shape[::-1] if is_conv else shape
        if key is None or shapes[key] != expected:
            found = "has no such weight of its own" if key is None else f"has it as {shapes[key]}"
            raise AdapterError(
                f"{config.directory}: the adapter changes {name} {expected}, but {base_dir} "
                f"{found}; it was trained on {config.base}: name that base"
            )
        plan[key] = _Target(module=name, fan_in_fan_out=is_conv)
    return plan


def _checkpoint_key(name: str, prefix: str, keys: Mapping[str, object]) -> str | None:
    """A checkpoint may hold the bare backbone, with or without the prefix that the model adds."""
    names = (name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}")
    return next((candidate for candidate in names if candidate in keys), None)


def _write_model(
    target: Path,
    base_dir: Path,
    config: AdapterConfig,
    plan: Mapping[str, _Target],
    tensors: Mapping[str, Tensor],
    precision: Precision,
) -> int:
    """Write weights, index and configuration; returns how many tensors differ from the base's."""
    dtype, changed, total_bytes = _DTYPES[precision], 0, 0
    weight_map: dict[str, str] = {}
    for path in _shards(base_dir):
        shard: dict[str, Tensor] = {}
        with _open(path) as file:
            for key in file.keys():  # noqa: SIM118
                weight = file.get_tensor(key)
                written = weight.to(dtype) if weight.is_floating_point() else weight
                if key in plan:
                    before = written
                    written = _merged(weight, plan[key], config, tensors).to(dtype)
                    changed += not torch.equal(before, written)
                if not torch.isfinite(written).all():
                    raise ModelError(
                        f"{key} is not finite in {precision}; write precision bf16, which has the "
                        "range of fp32, or check the base"
                    )
                shard[key] = written
                weight_map[key] = path.name
                total_bytes += written.nbytes
        save_file(shard, target / path.name, metadata={"format": "pt"})
    if changed == 0:
        raise AdapterError(
            f"{config.directory}: no weight changes in {precision}: the adapter is too small for "
            "that type, or was never trained; merge a trained adapter"
        )
    if len(_shards(base_dir)) > 1:
        index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
        _write_json(target / "model.safetensors.index.json", index)
    settings = json.loads((base_dir / "config.json").read_text(encoding="utf-8"))
    settings["dtype"] = str(dtype).removeprefix("torch.")
    if "torch_dtype" in settings:
        settings["torch_dtype"] = settings["dtype"]
    _write_json(target / "config.json", settings)
    return changed


def _merged(
    weight: Tensor, target: _Target, config: AdapterConfig, tensors: Mapping[str, Tensor]
) -> Tensor:
    start = f"base_model.model.{target.module}"
    magnitude = tensors.get(f"{start}.lora_magnitude_vector")
    if magnitude is None:
        magnitude = tensors.get(f"{start}.lora_magnitude_vector.weight")
    return merged_weight(
        weight,
        tensors[f"{start}.lora_A.weight"],
        tensors[f"{start}.lora_B.weight"],
        config.layers[target.module].scaling,
        magnitude=magnitude,
        fan_in_fan_out=target.fan_in_fan_out,
    )


def _copy_companions(base_dir: Path, adapter_dir: Path, target: Path) -> None:
    """Generation settings and licence of the base; the tokenizer of the training where saved."""
    has_tokenizer = (adapter_dir / "tokenizer_config.json").is_file()
    for directory, patterns in (
        (base_dir, _KEPT_FILES),
        (adapter_dir, _TOKENIZER_FILES if has_tokenizer else ()),
    ):
        for path in {p for pattern in patterns for p in directory.glob(pattern) if p.is_file()}:
            shutil.copyfile(path, target / path.name)


def _probes(directory: Path) -> list[list[int]]:
    """Token ids of the probe prompts, and one row of random ids."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    size = AutoConfig.from_pretrained(directory).vocab_size
    random_ids = torch.randint(
        0, size, (_RANDOM_PROBE_TOKENS,), generator=torch.Generator().manual_seed(0)
    )
    texts: list[list[int]] = [tokenizer(text)["input_ids"] for text in _PROBES]  # pyright: ignore[reportAssignmentType]
    return [*(ids for ids in texts if ids), random_ids.tolist()]


@torch.no_grad()
def _logits(model: PreTrainedModel | PeftModel, probes: Sequence[Sequence[int]]) -> Tensor:
    """The logits of all positions of all probes, (tokens, vocabulary)."""
    rows = [model(input_ids=torch.tensor([ids]), use_cache=False).logits[0] for ids in probes]
    return torch.cat(rows).float()


@torch.no_grad()
def _perturb(model: PreTrainedModel, size: float) -> None:
    """Multiply every weight by 1 + e, e uniform in -size..size; seeded."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        error = torch.rand(parameter.shape, generator=generator).mul_(2).sub_(1)
        parameter.addcmul_(parameter, error.to(parameter.dtype), value=size)


def _live_logits(
    config: ModelConfig, adapter_dir: Path, probes: Sequence[Sequence[int]]
) -> tuple[Tensor, Tensor]:
    """Logits of a base with the live adapter, and of the bare base."""
    gc.collect()  # the model before this one has reference cycles
    bare_model = models.load_base(config, device=_CPU).model
    bare = _logits(bare_model, probes)
    return _logits(adapters.attach(bare_model, adapter_dir), probes), bare


def _check_room(base_dir: Path, out_dir: Path, dtype: torch.dtype) -> None:
    shapes = [shape for file in _shards(base_dir) for shape in _shapes(file).values()]
    num_values = sum(math.prod(shape) for shape in shapes)
    storage.require_free(
        out_dir.parent, num_values * dtype.itemsize + (64 << 20), purpose="the merged model"
    )
    needed, available = 5 * num_values, psutil.virtual_memory().available
    if available < needed:
        raise ResourceError(
            f"merging needs about {needed / 1e9:.1f} GB of memory ({base_dir} once in fp32, to "
            f"compare logits); {available / 1e9:.1f} GB are free. Use a larger machine"
        )


def _shards(directory: Path) -> list[Path]:
    """The weight files that the index names, or the only one. Raises ModelError if incomplete."""
    index = directory / "model.safetensors.index.json"
    if not index.is_file():
        only = directory / "model.safetensors"
        if not only.is_file():
            raise ModelError(f"{directory}: no model.safetensors and no index of several files")
        return [only]
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        paths = [storage.join(directory, name) for name in names]
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ModelError(f"{index}: damaged ({error}); fetch the base again") from None
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise ModelError(f"{directory}: {missing[0]} is missing; fetch the base again")
    return paths


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    with _open(path) as file:
        return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path}: damaged ({error}); fetch the base again") from None


def _write_json(path: Path, tree: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _number(figures: Mapping[str, storage.JSON], name: str, kind: type) -> Any:
    value = figures[name]
    assert isinstance(value, kind)
    return value
