"""An adapter directory: checked from its headers first, then loaded, then hung on a base.

Adapters come from anywhere. Nothing is allocated before the sizes are known to be sane, nothing is
unpickled, and the PEFT config is rebuilt from the few fields that describe a LoRA, so that no
field of a stranger's file reaches PEFT: `init_lora_weights: pissa`, for one, would rewrite the
weights of the base it is loaded into (peft 0.21).

What is covered: LoRA, rsLoRA and DoRA on linear layers, different ranks and alphas in one adapter.
What is not covered: embeddings, biases, `modules_to_save` and other fully trained weights.

R rank, I input features, O output features.
"""

import json
import logging
import math
import re
import typing
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import peft
import torch
from peft import PeftModel
from peft.utils import set_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from cluster import storage
from cluster.errors import AdapterError, StorageError
from training import special_ids
from training.config import ModelConfig
from training.model import Base, load_base
from training.tokens import Encoder

Quantization = Literal["int8", "nf4", "none"]
WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
MAX_RANK = 4096
_MAX_CONFIG_BYTES = 1 << 20
_MAX_HEADER_BYTES = 1 << 20
_MAX_ALPHA = 1e6
_DTYPES = ("F32", "F16", "BF16")
_KEY = re.compile(
    r"base_model\.model\.(?P<module>.+)\.(?:lora_(?P<factor>[AB])\.weight"
    r"|(?P<magnitude>lora_magnitude_vector)(?:\.weight)?)"
)
_READ = {
    *("peft_type", "base_model_name_or_path", "revision", "r", "lora_alpha", "use_rslora"),
    *("use_dora", "rank_pattern", "alpha_pattern"),
}
# Fields that say how training started or where to look for targets; the tensors say the rest.
_WITHOUT_EFFECT = {
    *("task_type", "auto_mapping", "peft_version", "inference_mode", "target_modules"),
    *("exclude_modules", "layers_to_transform", "layers_pattern", "lora_dropout"),
    *("fan_in_fan_out", "init_lora_weights", "loftq_config", "eva_config", "corda_config"),
    *("lora_ga_config", "megatron_config", "megatron_core", "qalora_group_size"),
    *("runtime_config", "ensure_weight_tying"),
}

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Layer:
    """What an adapter adds to one linear layer."""

    rank: int
    alpha: float
    scaling: float
    """Factor of B @ A: alpha / rank, or alpha / sqrt(rank) for rslora."""
    in_features: int
    out_features: int


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterConfig:
    """What the headers of an adapter directory say, checked."""

    directory: Path
    base: str | None
    """The base model as the adapter's config names it."""
    revision: str | None
    rank: int
    """The largest rank of any layer."""
    alpha: float
    variant: Literal["lora", "rslora", "dora"]
    layers: Mapping[str, Layer]
    """Full module name in the base -> its update."""

    @property
    def target_modules(self) -> list[str]:
        """Last parts of the names of the layers, such as q_proj, sorted."""
        return sorted({name.rsplit(".", 1)[-1] for name in self.layers})


def read_config(directory: Path) -> AdapterConfig:
    """Check config and tensor header of an adapter directory without loading a tensor.

    Raises AdapterError for whatever is missing, damaged, oversized or not supported.
    """
    fields = _read_fields(directory)
    shapes = _read_shapes(directory)
    where = directory / CONFIG
    rank = _number(fields, "r", where, 1, MAX_RANK, default=8)
    alpha = _number(fields, "lora_alpha", where, 0, _MAX_ALPHA, default=8)
    ranks = _pattern(fields, "rank_pattern", where, MAX_RANK)
    alphas = _pattern(fields, "alpha_pattern", where, _MAX_ALPHA)
    is_rslora, is_dora = (fields.get(name) is True for name in ("use_rslora", "use_dora"))
    layers: dict[str, Layer] = {}
    for module, parts in sorted(_by_module(directory, shapes, is_dora).items()):
        expected = int(_matching(ranks, module, rank))
        (found, in_features), (out_features, inner) = parts["A"], parts["B"]
        if found != expected or inner != expected:
            raise AdapterError(
                f"{directory / WEIGHTS}: {module} has lora_A {parts['A']} and lora_B {parts['B']}, "
                f"but {CONFIG} says rank {expected}; the files do not belong together"
            )
        layer_alpha = float(_matching(alphas, module, alpha))
        layers[module] = Layer(
            rank=expected,
            alpha=layer_alpha,
            scaling=layer_alpha / (math.sqrt(expected) if is_rslora else expected),
            in_features=in_features,
            out_features=out_features,
        )
    base, revision = fields.get("base_model_name_or_path"), fields.get("revision")
    return AdapterConfig(
        directory=directory,
        base=base if isinstance(base, str) and base else None,
        revision=revision if isinstance(revision, str) else None,
        rank=max(layer.rank for layer in layers.values()),
        alpha=float(alpha),
        variant="dora" if is_dora else "rslora" if is_rslora else "lora",
        layers=layers,
    )


def read_tensors(config: AdapterConfig, *, allow_untrained: bool = False) -> dict[str, Tensor]:
    """The tensors of an adapter by their names in the file, on CPU, every value finite.

    Raises AdapterError for NaN or infinite values and, unless `allow_untrained`, where every
    lora_B is zero: such an adapter changes nothing.
    """
    path = config.directory / WEIGHTS
    try:
        with safe_open(path, framework="pt") as file:
            tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise AdapterError(f"{path}: cannot be read ({error}); save or copy it again") from None
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise AdapterError(
                f"{path}: {name} holds NaN or infinite values; use an earlier checkpoint"
            )
    zero = [name for name, t in tensors.items() if ".lora_B." in name and not t.any()]
    if len(zero) == len(config.layers) and config.variant != "dora" and not allow_untrained:
        raise AdapterError(
            f"{path}: every lora_B is zero, so the adapter changes nothing: it was saved before "
            "its first step, or its layers never moved. Train it, or use another checkpoint"
        )
    if zero and len(zero) < len(config.layers):
        _log.warning("dead_layers=%d first=%s adapter=%s", len(zero), zero[0], config.directory)
    return tensors


def attach(
    base_model: PreTrainedModel | PeftModel,
    directory: Path,
    name: str = "default",
    *,
    allow_untrained: bool = False,
) -> PeftModel:
    """Hang the adapter in `directory` on a base as adapter `name`, frozen, in eval mode.

    A PeftModel gets one more adapter and keeps its active one; fp32 factors on their layers'
    devices. Raises AdapterError where layers of the adapter are not in this base.
    """
    config = read_config(directory)
    wrapped = base_model if isinstance(base_model, PeftModel) else None
    base = wrapped.get_base_model() if wrapped is not None else base_model
    check_fits(config, features_of(base))
    tensors = read_tensors(config, allow_untrained=allow_untrained)
    settings = _peft_config(config, getattr(base, "name_or_path", None))
    with warnings.catch_warnings():
        # PEFT sets fan_in_fan_out itself for GPT-2's Conv1D, and warns that it did.
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
        if wrapped is None:
            model = peft.get_peft_model(base, settings, adapter_name=name)  # pyright: ignore[reportArgumentType]
        else:
            model = wrapped
            model.add_adapter(name, settings)
    assert isinstance(model, PeftModel)
    result = set_peft_model_state_dict(model, tensors, adapter_name=name)
    missing = [key for key in result.missing_keys if f".{name}" in key and "lora_" in key]
    if result.unexpected_keys or missing:
        first = [*result.unexpected_keys, *missing][0]
        raise AdapterError(f"{directory}: {first} did not find its place in the base model")
    for key, parameter in model.named_parameters():
        if "lora_" in key:
            parameter.requires_grad_(False)
    return model.eval()


def base_of(directory: Path, base: str | None = None) -> ModelConfig:
    """The base model to load for an adapter: `base` where given, else the one of its training.

    The manifest's word counts before PEFT's, which holds the path on the machine of the training.
    Raises AdapterError where neither names a base.
    """
    config, info = read_config(directory), _info(directory)
    name = base or info.get("base_model") or config.base
    if not isinstance(name, str) or not name:
        raise AdapterError(f"{directory}: does not say which base it was trained on; name it: base")
    quantization = info.get("quantization", "int8")
    if quantization not in typing.get_args(Quantization):
        raise AdapterError(f"{directory / storage.MANIFEST}: quantization is {quantization!r}")
    return ModelConfig(
        base=name,
        revision=config.revision if name == config.base else None,
        quantization=quantization,
    )


def load(
    adapter: str, *, base: str | None = None, device: torch.device | None = None
) -> tuple[Base, PreTrainedModel | PeftModel]:
    """A base as it was in training and the model to use: with the adapter in directory `adapter`.

    `adapter` is a directory, or the word `base` for the bare base, which `base` then names; the
    device is the first GPU where there is one. Raises AdapterError where the adapter was trained
    on another base than the one that its manifest names now holds.
    """
    place = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if adapter == "base":
        loaded = load_base(ModelConfig(base=base or "demo"), device=place)
        return loaded, loaded.model
    directory = Path(adapter)
    loaded = load_base(base_of(directory, base), device=place)
    check_base(directory, loaded.fingerprint, loaded.name, is_chosen=base is not None)
    return loaded, attach(loaded.model, directory)


def encoder_for(adapter: str, base: Base) -> Encoder:
    """How prompts are put to an adapter: as in its training where its manifest says how.

    `adapter` is a directory, or the word `base`, which is prompted by its chat template.
    """
    info: Mapping[str, Any] = {} if adapter == "base" else _info(Path(adapter))
    return Encoder(
        base.tokenizer,
        template=info.get("template", "auto"),
        mask=info.get("mask", "completion"),
        max_length=info.get("max_length", 1024),
        stop_ids=special_ids.stop_ids(base.tokenizer, base.generation_eos),
    )


def check_base(directory: Path, fingerprint: str, name: str, *, is_chosen: bool) -> None:
    """Compare a base's fingerprint with the one in the adapter's manifest, where it has one.

    A base that the user chose (`is_chosen`) may differ, with a warning; else AdapterError.
    """
    trained_on = _info(directory).get("base_fingerprint")
    if trained_on is None or trained_on == fingerprint:
        return
    if not is_chosen:
        raise AdapterError(
            f"{directory}: {name} is not the model that it was trained on any more: other "
            "weights or configuration. Restore that base, or name one explicitly with base"
        )
    _log.warning("other_base=%s adapter=%s", name, directory)


def check_tokenizer(directory: Path, fingerprint: str) -> None:
    """Compare a tokenizer's fingerprint with the one in the adapter's manifest, where it has one.

    Raises AdapterError: other ids for the same text make an adapter babble.
    """
    trained_with = _info(directory).get("tokenizer_fingerprint")
    if trained_with not in (None, fingerprint):
        raise AdapterError(
            f"{directory}: it was trained with another tokenizer or chat template than this base "
            "has; restore them beside the base, or train it again"
        )


def _info(directory: Path) -> Mapping[str, Any]:
    """What our manifest says of the adapter; nothing for an adapter of another origin.

    Raises AdapterError where there is a manifest and the files are not the ones it lists.
    """
    if not (directory / storage.MANIFEST).is_file():
        return {}
    try:
        return storage.verify(directory).info
    except StorageError as error:
        raise AdapterError(f"{error}; copy the adapter again, or use a checkpoint") from None


def _peft_config(config: AdapterConfig, base: str | None) -> peft.LoraConfig:
    layers = config.layers.items()
    return peft.LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
        r=config.rank,
        lora_alpha=config.alpha,  # pyright: ignore[reportArgumentType]
        target_modules=list(config.layers),
        rank_pattern={re.escape(n): v.rank for n, v in layers if v.rank != config.rank},
        alpha_pattern={re.escape(n): v.alpha for n, v in layers if v.alpha != config.alpha},
        use_rslora=config.variant == "rslora",
        use_dora=config.variant == "dora",
        # Anything else may draw from, or write to, the shared base weights.
        init_lora_weights=False,
        inference_mode=True,
    )


Features = Mapping[str, tuple[int, int] | None]
"""Of each module, what it maps to what; None where it is no linear layer."""


def features_of(base: nn.Module) -> Features:
    """The features of all modules of a base, whether or not its layers carry adapters."""
    # In a PeftModel the linear layers that carry adapters are called `<name>.base_layer`.
    return {n.removesuffix(".base_layer"): _features(m) for n, m in base.named_modules()}


def check_fits(config: AdapterConfig, base: Features) -> None:
    """Raises AdapterError where a layer of the adapter is not in a base, or has other features."""
    for name, layer in config.layers.items():
        if name not in base:
            raise AdapterError(
                f"{config.directory}: the adapter changes {name}, which this base does not have; "
                f"it was trained on {config.base}: load that base, or another adapter"
            )
        if base[name] != (layer.in_features, layer.out_features):
            raise AdapterError(
                f"{config.directory}: the adapter's {name} maps {layer.in_features} to "
                f"{layer.out_features} features, the base's {base[name]}; it was trained on "
                f"{config.base}: load that base, or another adapter"
            )


def _features(module: nn.Module) -> tuple[int, int] | None:
    if hasattr(module, "in_features") and hasattr(module, "out_features"):
        return module.in_features, module.out_features  # pyright: ignore[reportReturnType]
    if hasattr(module, "nx") and hasattr(module, "nf"):  # GPT-2's Conv1D
        return module.nx, module.nf  # pyright: ignore[reportReturnType]
    return None


def _read_fields(directory: Path) -> dict[str, Any]:
    path = directory / CONFIG
    if not directory.is_dir():
        raise AdapterError(f"{directory}: no such directory; name a directory with {CONFIG}")
    if not path.is_file():
        raise AdapterError(f"{directory}: no {CONFIG}; is it the directory of an adapter?")
    if path.stat().st_size > _MAX_CONFIG_BYTES:
        raise AdapterError(f"{path}: larger than {_MAX_CONFIG_BYTES} bytes; not an adapter config")
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterError(f"{path}: not readable as JSON ({error}); save it again") from None
    if not isinstance(fields, dict) or fields.get("peft_type") != "LORA":
        kind = fields.get("peft_type") if isinstance(fields, dict) else type(fields).__name__
        raise AdapterError(f"{path}: peft_type is {kind!r}; only LORA adapters are supported")
    for name, value in fields.items():
        has_effect = value not in (None, False, "none", [], {})
        if name not in _READ | _WITHOUT_EFFECT and has_effect:
            raise AdapterError(
                f"{path}: {name} is {str(value)[:80]!r}, which is not supported; supported are "
                "lora, rslora and dora on linear layers: train the adapter without it"
            )
    return fields


def _read_shapes(directory: Path) -> dict[str, tuple[int, ...]]:
    """Tensor name -> shape, from the bounded header of the weights file."""
    path = directory / WEIGHTS
    if not path.is_file():
        if (directory / "adapter_model.bin").exists():
            raise AdapterError(
                f"{directory}: only a pickled adapter_model.bin, and loading a pickle can run "
                f"code; convert it to {WEIGHTS} where you trust it"
            )
        raise AdapterError(f"{directory}: no {WEIGHTS}; the adapter was not saved whole")
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(_MAX_HEADER_BYTES, max(size - 8, 0)):
            raise AdapterError(
                f"{path}: its header claims {length} bytes in a file of {size}; at most "
                f"{_MAX_HEADER_BYTES} are allowed: the file is damaged or not an adapter"
            )
        raw = file.read(length)
    try:
        header = json.loads(raw)
        header.pop("__metadata__", None)
        shapes = {name: tuple(entry["shape"]) for name, entry in header.items()}
        dtypes = {name: entry["dtype"] for name, entry in header.items()}
        with safe_open(path, framework="pt"):  # checks the offsets against the file's size
            pass
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError) as error:
        raise AdapterError(f"{path}: damaged ({error}); save or copy it again") from None
    except SafetensorError as error:
        raise AdapterError(f"{path}: damaged ({error}); save or copy it again") from None
    if not shapes:
        raise AdapterError(
            f"{path}: holds no tensors ({size} bytes); the training that wrote it saved an empty "
            "adapter: save it again from a checkpoint"
        )
    for name, dtype in dtypes.items():
        if dtype not in _DTYPES:
            allowed = ", ".join(_DTYPES)
            raise AdapterError(f"{path}: {name} is {dtype}; allowed: {allowed}")
    return shapes


def _by_module(
    directory: Path, shapes: Mapping[str, tuple[int, ...]], is_dora: bool
) -> dict[str, dict[str, tuple[int, ...]]]:
    path = directory / WEIGHTS
    modules: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        match = _KEY.fullmatch(name)
        if match is None:
            raise AdapterError(
                f"{path}: unexpected tensor {name!r}; allowed: base_model.model.<layer>.lora_A "
                "and lora_B of linear layers (no embeddings, biases or fully trained weights)"
            )
        modules.setdefault(match["module"], {})[match["factor"] or "magnitude"] = shape
    wanted = {"A", "B", "magnitude"} if is_dora else {"A", "B"}
    for module, parts in modules.items():
        if set(parts) != wanted or len(parts["A"]) != 2 or len(parts["B"]) != 2:
            raise AdapterError(
                f"{path}: {module} has the parts {parts}; expected are matrices A and B"
                + (" and a magnitude" if is_dora else " (use_dora is not set)")
            )
        magnitude = parts.get("magnitude")
        if magnitude is not None and math.prod(magnitude) != parts["B"][0]:
            raise AdapterError(
                f"{path}: {module} has a magnitude of shape {magnitude}; expected "
                f"{parts['B'][0]} values"
            )
    return modules


def _number(
    fields: Mapping[str, Any], name: str, where: Path, low: float, high: float, *, default: int
) -> Any:
    value = fields.get(name, default)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    is_whole = name == "lora_alpha" or isinstance(value, int)
    if not is_number or not is_whole or not math.isfinite(value) or not low <= value <= high:
        raise AdapterError(f"{where}: {name} is {str(value)[:80]}; allowed: {low} to {high:g}")
    return value


def _pattern(
    fields: Mapping[str, Any], name: str, where: Path, high: float
) -> dict[re.Pattern[str], float]:
    """The patterns of a rank_pattern or alpha_pattern, compiled as PEFT matches them."""
    table = fields.get(name) or {}
    kinds = int if name == "rank_pattern" else (int, float)
    # Names and escapes only: a stranger's regular expression could take for ever to match.
    is_sane = isinstance(table, dict) and all(
        re.fullmatch(r"\^?(?:[\w-]|\\?\.)+", key)
        and isinstance(value, kinds)
        and not isinstance(value, bool)
        and (1 if name == "rank_pattern" else 0) <= value <= high
        for key, value in table.items()
    )
    if not is_sane:
        raise AdapterError(
            f"{where}: {name} is {str(table)[:80]}; allowed: layer names with numbers to {high:g}"
        )
    return {re.compile(rf"(?:.*\.)?(?:{key})$"): value for key, value in table.items()}


def _matching(patterns: Mapping[re.Pattern[str], float], module: str, default: float) -> float:
    return next((v for pattern, v in patterns.items() if pattern.match(module)), default)
