"""The step of an adapter's parameters where every worker holds all of them and their AdamW state.

Gradients are sums over supervised tokens, so spreading a global batch over workers is one
all-reduce of one flat buffer a step. `training.zero` is the same for workers that share the state.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import bitsandbytes as bnb
import torch
from torch import Tensor, nn
from torch.optim import AdamW

from training.config import OptimConfig
from training.model import Base
from training.strategy import Workers


class Packed(NamedTuple):
    """An optimiser's state as a checkpoint holds it, however it was spread over workers."""

    tensors: Mapping[str, Tensor]
    """`<parameter>/<key>`, on the CPU, each the size of the whole parameter or a scalar."""
    numbers: Mapping[str, Mapping[str, float]]
    """What is not a tensor, by parameter and key."""


class Optimizer(Protocol):
    """What a seat asks of either kind."""

    scaler: torch.amp.GradScaler

    def zero_grad(self) -> None:
        """Forget the gradients of a step that is begun afresh."""
        ...

    def scaled(self, loss: Tensor) -> Tensor:
        """What `backward` is called on for a micro-batch's part of the step's loss."""
        ...

    def reduce(self, *sums: Tensor) -> None:
        """Replace fp32 tensors by their sums over all workers, on every worker."""
        ...

    def step(self, rate: float) -> tuple[float, bool]:
        """Check, clip and step: the gradient's norm, and whether the parameters moved.

        They do not where the norm is not finite.
        """
        ...

    def pack(self) -> Packed:
        """The state; every worker must call it."""
        ...

    def load(self, packed: Packed) -> None:
        """Take over a state, and the parameters as they are now; every worker must call it."""
        ...


class Replicated:
    """AdamW, whole on every worker."""

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        config: OptimConfig,
        *,
        scaler: torch.amp.GradScaler,
        workers: Workers,
    ) -> None:
        """The learning rate is set at each step."""
        kind = bnb.optim.AdamW8bit if config.optimizer == "adamw_8bit" else AdamW
        self.scaler = scaler
        self._parameters = parameters
        self._max_norm = config.max_grad_norm
        self._workers = workers
        self._optimizer = kind(
            list(parameters.values()), lr=config.learning_rate, weight_decay=config.weight_decay
        )

    def zero_grad(self) -> None:
        """See Optimizer."""
        self._optimizer.zero_grad(set_to_none=True)

    def scaled(self, loss: Tensor) -> Tensor:
        """See Optimizer."""
        return self.scaler.scale(loss)

    def reduce(self, *sums: Tensor) -> None:
        """See Optimizer; the gradients go with them, in one all-reduce."""
        self._workers.sum_([*gradients(self._parameters), *sums])

    def step(self, rate: float) -> tuple[float, bool]:
        """See Optimizer."""
        self.scaler.unscale_(self._optimizer)
        norm = float(torch.nn.utils.get_total_norm(gradients(self._parameters)))
        is_finite = math.isfinite(norm)
        if is_finite and self._max_norm:
            torch.nn.utils.clip_grads_with_norm_(
                self._parameters.values(), self._max_norm, torch.tensor(norm)
            )
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        if is_finite or self.scaler.is_enabled():
            self.scaler.step(self._optimizer)  # passes over gradients that are not finite
            self.scaler.update()
        self.zero_grad()
        return norm, is_finite

    def pack(self) -> Packed:
        """See Optimizer."""
        tensors: dict[str, Tensor] = {}
        numbers: dict[str, dict[str, float]] = {}
        for name, parameter in self._parameters.items():
            for key, value in self._optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    tensors[f"{name}/{key}"] = value.detach().cpu().clone().contiguous()
                else:
                    numbers.setdefault(name, {})[key] = value
        return Packed(tensors, numbers)

    def load(self, packed: Packed) -> None:
        """See Optimizer."""
        for name, parameter in self._parameters.items():
            state: dict[str, Any] = dict(packed.numbers.get(name, {}))
            prefix = f"{name}/"
            for key, tensor in packed.tensors.items():
                if key.startswith(prefix):
                    # AdamW keeps its step count on the CPU unless it is fused or capturable.
                    is_scalar = tensor.ndim == 0
                    state[key[len(prefix) :]] = tensor if is_scalar else tensor.to(parameter.device)
            if state:
                self._optimizer.state[parameter] = state


def loss_scaler(base: Base) -> torch.amp.GradScaler:
    """Scales the loss of a base that computes in fp16, and does nothing for others."""
    return torch.amp.GradScaler(base.device.type, enabled=base.precision == "fp16")


def gradients(parameters: Mapping[str, nn.Parameter]) -> list[Tensor]:
    """All gradients; zeros for a worker whose share was empty, or a dead layer."""
    found: list[Tensor] = []
    for parameter in parameters.values():
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        found.append(parameter.grad)
    return found
