"""One process or several: which settings go together, and how workers talk to each other.

The same loop runs with one worker or many, and no wrapper is around the model: what differs is how
the parameters are stepped, in `training.optimizer` (whole on every worker) and `training.zero`.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from cluster.errors import ConfigError
from training.config import TrainRecipe

ZERO = ("zero1", "zero2", "zero3")
_GENERATED = ("exact_match", "json_valid", "rouge_l")


@dataclass(frozen=True, kw_only=True, slots=True)
class Refusal:
    """A combination of settings that is refused, the reason, and what to use instead."""

    settings: Mapping[str, str]
    reason: str
    instead: str

    def __str__(self) -> str:
        given = ", ".join(f"{name}: {value}" for name, value in self.settings.items())
        return f"{given}: {self.reason}. Use instead: {self.instead}"


SUPPORT: tuple[Refusal, ...] = (
    Refusal(
        settings={"model.quantization": "int8", "scale.strategy": "zero3"},
        reason="ZeRO-3 shards parameters as floating point, which int8 weights are not: the loss "
        "is wrong from the first step (bitsandbytes #1451)",
        instead="zero2 or ddp with int8; or model.quantization: nf4 or none with zero3",
    ),
    Refusal(
        settings={
            "model.quantization": "nf4",
            "lora.variant": "dora",
            "scale.strategy": "zero3",
        },
        reason="DoRA (PEFT 0.21) puts a new weight in the place of a 4-bit one in every forward "
        "pass, of which ZeRO-3 knows nothing",
        instead="lora.variant: lora or rslora, model.quantization: none, or zero2",
    ),
    *(
        Refusal(
            settings={"optim.optimizer": "adamw_8bit", "scale.strategy": stage},
            reason="ZeRO cuts the optimiser's state anywhere, 8-bit AdamW scales it in blocks of "
            "each parameter: the same recipe would give another adapter for each number of workers",
            instead="optim.optimizer: adamw with ZeRO, or ddp",
        )
        for stage in ZERO
    ),
    *(
        Refusal(
            settings={"evaluation.metrics": metric, "scale.strategy": "zero3"},
            reason="the first worker generates the answers, and has no whole base under ZeRO-3",
            instead="evaluation.metrics: [loss], and `loray evaluate` on the adapter afterwards",
        )
        for metric in _GENERATED
    ),
    Refusal(
        settings={"objective.kind": "dpo", "scale.strategy": "zero3"},
        reason="the reference is a second pass, with the adapter switched off, and ZeRO-3 fetches "
        "weights in the order that it has seen one pass need them",
        instead="zero1, zero2 or ddp, or objective.kind: supervised",
    ),
    *(
        Refusal(
            settings={"scale.offload_optimizer": "True", "scale.strategy": kind},
            reason="only DeepSpeed moves the optimiser's state to the host",
            instead="zero1, zero2 or zero3, or leave scale.offload_optimizer out",
        )
        for kind in ("auto", "single", "ddp")
    ),
)
"""Everything that is refused; what is not listed is supported."""


AXES: Mapping[str, tuple[str, ...]] = {
    "model.quantization": ("none", "int8", "nf4"),
    "scale.strategy": ("single", "ddp", *ZERO),
    "model.precision": ("fp32", "bf16", "fp16"),
    "memory.gradient_checkpointing": ("on", "off"),
    "data.packing": ("on", "off"),
    "lora.variant": ("lora", "rslora", "dora"),
}
"""Settings that could stand in each other's way. Every combination that `SUPPORT` does not refuse
is trained for three steps in tests/test_training_support.py."""


def combinations() -> Iterator[tuple[dict[str, str], Refusal | None]]:
    """Every combination of `AXES`, and why it is refused, if it is."""
    for values in itertools.product(*AXES.values()):
        settings = dict(zip(AXES, values, strict=True))
        yield (
            settings,
            next((one for one in SUPPORT if one.settings.items() <= settings.items()), None),
        )


def check(recipe: TrainRecipe) -> str:
    """The strategy that a recipe asks for: single, ddp, zero1, zero2 or zero3.

    Raises ConfigError with the reason for a combination that `SUPPORT` refuses.
    """
    for refusal in SUPPORT:
        if all(_has(recipe, name, value) for name, value in refusal.settings.items()):
            raise ConfigError(str(refusal))
    if recipe.scale.strategy == "auto":
        return "single" if recipe.scale.most_workers == 1 else "ddp"
    return recipe.scale.strategy


@dataclass(frozen=True, kw_only=True, slots=True)
class Workers:
    """The processes that train one adapter together; this one is number `rank` of `size`."""

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process writes for all of them."""
        return self.rank == 0

    def sum_(self, tensors: Iterable[Tensor]) -> None:
        """Replace fp32 tensors by their sums over all workers: one all-reduce in all."""
        if self.size == 1:
            return
        parts = list(tensors)
        flat = torch.cat([part.reshape(-1) for part in parts])
        dist.all_reduce(flat)
        offset = 0
        for part in parts:
            part.copy_(flat[offset : offset + part.numel()].view_as(part))
            offset += part.numel()

    def most(self, count: int) -> int:
        """The largest of all workers' counts."""
        if self.size == 1:
            return count
        number = torch.tensor([count], dtype=torch.int64, device=_device())
        dist.all_reduce(number, op=dist.ReduceOp.MAX)
        return int(number)

    def wait(self) -> None:
        """Return when every worker has come here."""
        if self.size > 1:
            dist.barrier()


def _has(recipe: TrainRecipe, name: str, value: str) -> bool:
    section, field = name.split(".")
    given = getattr(getattr(recipe, section), field)
    return value in given if isinstance(given, tuple) else str(given) == value


def _device() -> torch.device:
    """Where the process group wants its tensors."""
    return torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")
