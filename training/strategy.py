"""One process or several: what differs between them, and which settings go together.

Gradients are sums over supervised tokens, so spreading a global batch over workers is one
all-reduce of one flat buffer a step; no wrapper around the model is needed, and the same loop runs
with one worker or many.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from cluster.errors import ConfigError
from training.config import TrainRecipe

_DEEPSPEED = "DeepSpeed ZeRO is not part of this release"


@dataclass(frozen=True, kw_only=True, slots=True)
class Refusal:
    """A combination of settings that is refused, the reason, and what to use instead."""

    settings: Mapping[str, str]
    reason: str
    instead: str


SUPPORT: tuple[Refusal, ...] = (
    Refusal(
        settings={"model.quantization": "int8", "scale.strategy": "zero3"},
        reason="ZeRO-3 shards parameters as floating point, which int8 weights are not: the loss "
        "is wrong from the first step (bitsandbytes #1451)",
        instead="ddp with int8; or a base that is not int8 (nf4, none) once ZeRO-3 is there",
    ),
    Refusal(settings={"scale.strategy": "zero1"}, reason=_DEEPSPEED, instead="ddp"),
    Refusal(settings={"scale.strategy": "zero2"}, reason=_DEEPSPEED, instead="ddp"),
    Refusal(settings={"scale.strategy": "zero3"}, reason=_DEEPSPEED, instead="ddp"),
)
"""Everything that is refused; what is not listed is supported."""


def check(recipe: TrainRecipe) -> str:
    """The strategy that a recipe asks for, `single` or `ddp`.

    Raises ConfigError with the reason for a combination that `SUPPORT` refuses.
    """
    for refusal in SUPPORT:
        if all(_setting(recipe, name) == value for name, value in refusal.settings.items()):
            given = ", ".join(f"{name}: {value}" for name, value in refusal.settings.items())
            raise ConfigError(f"{given}: {refusal.reason}. Use instead: {refusal.instead}")
    if recipe.scale.strategy == "auto":
        return "single" if recipe.scale.workers == 1 else "ddp"
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

    def wait(self) -> None:
        """Return when every worker has come here."""
        if self.size > 1:
            dist.barrier()


def _setting(recipe: TrainRecipe, name: str) -> object:
    section, field = name.split(".")
    return getattr(getattr(recipe, section), field)
