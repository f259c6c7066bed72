"""Load a frozen base model and hang one LoRA adapter on it, with every dtype where it belongs.

Norms are fp32. Embeddings and head are in the compute type (half on CUDA, fp32 on CPU, where half
products crawl), never upcast wholesale as PEFT's `prepare_model_for_kbit_training` does. Every
trainable parameter is fp32. Placement is explicit. The base's own dropout is off: a frozen base
has nothing to regularise, and a run that is resumed or repacked must not see other noise.
"""

import contextlib
import hashlib
import json
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import peft
import torch
from peft import PeftModel
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from cluster.config import nearest
from cluster.errors import ConfigError, LorayError, ModelError
from training import demo_model, int8, routing
from training.config import LoraConfig, ModelConfig

ADAPTER = "default"
"""The name of a run's one adapter inside its PeftModel."""
_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
_HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Base:
    """A loaded, frozen base model."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    """As the user wrote it: `demo`, a directory or a hub id."""
    directory: Path
    """The local directory it was read from."""
    fingerprint: str
    """sha256 over its configuration and the headers of its weight files."""
    device: torch.device
    precision: str
    """fp16, bf16 or fp32."""
    quantization: str

    @contextlib.contextmanager
    def autocast(self) -> Iterator[None]:
        """Compute in the base's precision inside the block; nothing to do in fp32."""
        if self.precision == "fp32":
            yield
        else:
            with torch.autocast(self.device.type, _DTYPES[self.precision]):
                yield

    @property
    def generation_eos(self) -> int | list[int] | None:
        """The token ids at which generation stops, as the model declares them."""
        declared = self.model.generation_config
        return declared.eos_token_id if declared is not None else None


def resolve(name: str, revision: str | None = None) -> Path:
    """The local directory of a base: the demo model, a directory, or a hub download.

    Raises ModelError where there are no safetensors weights: pickled weights are not loaded.
    """
    if name == "demo":
        return demo_model.ensure()
    directory = Path(name).expanduser()
    if not directory.is_dir():
        looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1
        if looks_local:
            raise ModelError(
                f"model.base is {name!r}: no such directory; give a directory with config.json "
                "and *.safetensors, a hub id such as org/model, or demo"
            )
        directory = _download(name, revision)
    if not (directory / "config.json").is_file():
        raise ModelError(f"model.base: {directory} has no config.json; is it a model directory?")
    if not list(directory.glob("*.safetensors")):
        pickled = [p.name for p in directory.iterdir() if p.suffix in (".bin", ".pt", ".pth")]
        found = f"only pickled weights ({', '.join(pickled)})" if pickled else "no weights"
        raise ModelError(
            f"model.base: {directory} holds {found}; loading a pickle can run code, so only "
            "*.safetensors are read: convert them with save_pretrained, or choose another revision"
        )
    return directory.resolve()


def load_base(config: ModelConfig, *, device: torch.device) -> Base:
    """Load, quantise and freeze the base of a recipe on `device`.

    Raises ModelError for an unknown architecture, missing or damaged weights.
    """
    directory = resolve(config.base, config.revision)
    precision = config.precision
    if precision == "auto":
        precision = "fp16" if device.type == "cuda" else "fp32"
    dtype = _DTYPES[precision]
    remote = config.trust_remote_code
    shows_progress = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        settings = AutoConfig.from_pretrained(directory, trust_remote_code=remote)
        _drop_dropout(settings)
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=remote)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            directory,
            config=settings,
            dtype=dtype,
            quantization_config=_quantization(config.quantization, dtype),
            device_map={"": device},
            use_safetensors=True,
            trust_remote_code=remote,
            output_loading_info=True,
        )
        model, problems = loaded
    except LorayError:
        raise
    except Exception as error:  # transformers raises many kinds for one and the same cause
        raise unloadable(config.base, directory, error) from error
    finally:
        if shows_progress:
            logging.enable_progress_bar()
    missing = sorted(problems["missing_keys"])
    if missing:
        raise ModelError(
            f"model.base {config.base!r}: {len(missing)} weights are missing from {directory}, "
            f"the first is {missing[0]!r}; the download is incomplete or of another model"
        )
    model.requires_grad_(False)
    model.eval()
    _norms_to_fp32(model)
    if config.quantization != "none":
        _quantise_subclasses(model, config.quantization, dtype, device)
        int8.adopt(model)
        for module in model.modules():
            if isinstance(module, bnb.nn.Linear4bit):
                # bitsandbytes 0.50.2 repacks the weight on CPUs with AVX512-BF16 once it sees an
                # inference, rounds to bf16 and refuses widths that are no multiple of 64.
                module.support_avx512bf16_for_cpu = False
    return Base(
        model=model,
        tokenizer=tokenizer,
        name=config.base,
        directory=directory,
        fingerprint=fingerprint(directory),
        device=device,
        precision=precision,
        quantization=config.quantization,
    )


def unloadable(name: str, directory: Path, error: Exception) -> ModelError:
    """What to tell a user whose base transformers refuses."""
    text = str(error).strip().splitlines() or [""]
    return ModelError(
        f"model.base {name!r} cannot be loaded from {directory}: {type(error).__name__}: "
        f"{text[0][:300]}. Check that the directory is whole, that transformers knows the "
        "architecture, and, for one with code of its own, model.trust_remote_code"
    )


def attach_lora(
    base: Base, config: LoraConfig, *, seed: int, adapter: str = ADAPTER
) -> tuple[PeftModel, routing.Router]:
    """Hang a fresh adapter on `base`; B is zero, A is drawn from `seed` alone.

    Raises ConfigError where target names match no linear layer.
    """
    with _drawing_from(base, seed):
        model = peft.get_peft_model(base.model, _peft_config(base, config), adapter_name=adapter)
    router = routing.Router()
    _make_ready(model, router)
    return model, router


def add_lora(
    model: PeftModel,
    router: routing.Router,
    base: Base,
    config: LoraConfig,
    *,
    seed: int,
    adapter: str,
) -> None:
    """Hang one more adapter on a model of `attach_lora`: drawn as it would be on the bare base.

    Raises ConfigError where target names match no linear layer.
    """
    with _drawing_from(base, seed):
        model.add_adapter(adapter, _peft_config(base, config))
    _make_ready(model, router)


def _peft_config(base: Base, config: LoraConfig) -> peft.LoraConfig:
    return peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=config.rank,
        lora_alpha=config.alpha or config.rank,  # pyright: ignore[reportArgumentType]
        lora_dropout=config.dropout,
        target_modules=_targets(base.model, config),
        bias="none",
        use_rslora=config.variant == "rslora",
        use_dora=config.variant == "dora",
        base_model_name_or_path=base.name,
    )


@contextlib.contextmanager
def _drawing_from(base: Base, seed: int) -> Iterator[None]:
    devices = [base.device] if base.device.type == "cuda" else []
    with torch.random.fork_rng(devices), warnings.catch_warnings():
        # PEFT sets fan_in_fan_out itself for GPT-2's Conv1D, and warns that it did.
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
        torch.manual_seed(seed)
        yield


def _make_ready(model: PeftModel, router: routing.Router) -> None:
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.requires_grad_(True)  # PEFT freezes all adapters but the active one
            parameter.data = parameter.data.float()
    routing.attach(model, router)
    check_dtypes(model)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trainable parameters by name, in the model's order."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def adapter_parameters(model: nn.Module, adapter: str = ADAPTER) -> dict[str, nn.Parameter]:
    """The trainable parameters of one adapter, by the names that they have where it is alone."""
    ending = f".{adapter}.weight"
    return {
        f"{name.removesuffix(ending)}.{ADAPTER}.weight": parameter
        for name, parameter in trainable(model).items()
        if name.endswith(ending)
    }


def check_dtypes(model: nn.Module) -> None:
    """Every trainable parameter is fp32 and belongs to an adapter.

    Raises ModelError: GradScaler refuses half gradients ("Attempting to unscale FP16 gradients"),
    and half-precision updates vanish.
    """
    parameters = trainable(model)
    if not parameters:
        raise ModelError("no parameter is trainable: the adapter was not attached")
    for name, parameter in parameters.items():
        if parameter.dtype != torch.float32:
            raise ModelError(f"trainable {name} is {parameter.dtype}; it must be torch.float32")
        if "lora_" not in name:
            raise ModelError(f"{name} of the base is trainable; only the adapter may be")


def linear_layers(model: nn.Module) -> list[str]:
    """Full names of the linear layers that can carry an adapter, the head excluded."""
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    return [
        name.removesuffix(".base_layer")
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head and ".lora_" not in name
    ]


def fingerprint(directory: Path) -> str:
    """sha256 over config.json and each weight file's name, size and safetensors header.

    Whole files are not hashed: a 70B base would take minutes at every start.
    """
    digest = hashlib.sha256((directory / "config.json").read_bytes())
    for path in sorted(directory.glob("*.safetensors")):
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = file.read(min(length, 1 << 26))
        digest.update(f"{path.name}:{path.stat().st_size}:".encode() + header)
    return digest.hexdigest()


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 over the vocabulary, the merges, the special tokens and the chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    body = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab())
    special = json.dumps(tokenizer.special_tokens_map, sort_keys=True, default=str)
    text = "\0".join([body, special, str(getattr(tokenizer, "chat_template", None))])
    return hashlib.sha256(text.encode()).hexdigest()


def _targets(model: PreTrainedModel, config: LoraConfig) -> str | list[str]:
    if config.target_modules == "all-linear":
        return "all-linear"
    names = config.target_modules
    wanted = [names] if isinstance(names, str) else list(names)
    existing = sorted({name.rsplit(".", 1)[-1] for name in linear_layers(model)})
    for name in wanted:
        if not any(f".{layer}".endswith(f".{name}") for layer in linear_layers(model)):
            raise ConfigError(
                f"lora.target_modules: {name!r} matches no linear layer of this "
                f"{model.config.model_type} model.{nearest(name, existing)} "
                f"Existing: {', '.join(existing)}; or all-linear"
            )
    return wanted


def _quantization(kind: str, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    if kind == "nf4":
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    return None


def _quantise_subclasses(
    model: PreTrainedModel, kind: str, dtype: torch.dtype, device: torch.device
) -> None:
    """Quantise linear layers of classes of their own, which transformers 5.23 passes over.

    It replaces `type(module) is nn.Linear` only, and leaves Falcon's FalconLinear as it is.
    """
    modules: Any = bnb.nn
    for name in linear_layers(model):
        layer = model.get_submodule(name)
        if not isinstance(layer, nn.Linear) or type(layer).__module__.startswith("bitsandbytes"):
            continue
        has_bias = layer.bias is not None
        if kind == "int8":
            new = modules.Linear8bitLt(
                layer.in_features, layer.out_features, has_bias, has_fp16_weights=False
            )
            weight = modules.Int8Params(layer.weight.data.cpu(), requires_grad=False)
        else:
            new = modules.Linear4bit(
                layer.in_features, layer.out_features, has_bias, dtype, quant_type="nf4"
            )
            weight = modules.Params4bit(
                layer.weight.data.cpu(), requires_grad=False, quant_type="nf4"
            )
        new.weight, new.bias = weight.to(device), layer.bias
        model.set_submodule(name, new)


def _norms_to_fp32(model: nn.Module) -> None:
    for module in model.modules():
        if "norm" in type(module).__name__.lower():
            module.to(torch.float32)
            if isinstance(module, nn.LayerNorm):
                # Unlike the RMS norms of transformers, LayerNorm wants its input in its own type.
                module.register_forward_pre_hook(lambda _, args: (args[0].float(), *args[1:]))


def _drop_dropout(settings: Any) -> None:
    for name, value in list(vars(settings).items()):
        if ("drop" in name or "pdrop" in name) and isinstance(value, float):
            setattr(settings, name, 0.0)


def _download(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=_HUB_FILES))
    except Exception as error:  # the hub client raises a dozen kinds
        raise ModelError(
            f"model.base is {name!r}: not a local directory, and it cannot be fetched from the hub "
            f"({type(error).__name__}: {str(error).strip().splitlines()[0][:200]}); "
            "check the name, your network and, for gated models, `hf auth login`"
        ) from error
