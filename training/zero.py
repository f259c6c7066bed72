"""DeepSpeed ZeRO: workers that share an adapter's optimiser state, gradients, or the base itself.

ZeRO-1 shards AdamW's state, ZeRO-2 the gradients too, ZeRO-3 the base's weights as well
(Rajbhandari et al., arXiv 1910.02054). The forward pass, the loss and the order of the data stay
ours, so a run gives what one worker gives, and a checkpoint is the same files: any strategy and any
number of workers takes it up.

ZeRO-2 reduces gradients after every micro-batch, and ZeRO-3 gathers weights in every forward pass,
so all workers take equally many (`passes_alike`); ZeRO-1 reduces once a step. Adapters stay whole
on every worker: they are small, and an adapter's layers read them directly.

The private names of DeepSpeed (0.19) that this takes are all in this file.
"""

import logging
import os
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import SGD, AdamW

from cluster.errors import ConfigError
from training.config import TrainRecipe
from training.model import Base
from training.objective import Objective
from training.optimizer import Packed, gradients, loss_scaler
from training.packing import MicroBatch
from training.strategy import Workers

_MOMENTS = ("exp_avg", "exp_avg_sq")
_MOST_BUCKET = 500_000_000
"""Elements that are reduced at a time, DeepSpeed's own bound."""


class Sharded:
    """AdamW over an adapter, its state shared out by DeepSpeed; see `training.optimizer`."""

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        recipe: TrainRecipe,
        *,
        stage: int,
        base: Base,
        objective: Objective,
        workers: Workers,
    ) -> None:
        """Every worker must construct it, in a process group of them all.

        At stage 3 the base, loaded whole, is cut up; only `self.objective` computes with it from
        then on.
        """
        self.scaler = loss_scaler(base)
        self.stage = stage
        self.objective = objective
        self._parameters = parameters
        self._workers = workers
        self._bookkeeper = nn.Parameter(torch.zeros(1, device=base.device))
        self._tells_scaler = SGD([self._bookkeeper], lr=0.0)
        deepspeed = _imported(base.device)
        settings = _settings(parameters, recipe, stage, objective)
        module: nn.Module = _Holder(parameters)
        if stage == 3:
            module = _Losses(base, objective)
            model: Any = objective.model.get_base_model()
            # A layer none of whose inputs has a gradient would lose its weights half-way back.
            model.enable_input_require_grads()
            deepspeed.zero.Init(module=module, config_dict_or_path=settings)
        optimizer = AdamW(
            list(parameters.values()),
            lr=recipe.optim.learning_rate,
            weight_decay=recipe.optim.weight_decay,
        )
        self._engine: Any = deepspeed.initialize(
            model=module, optimizer=optimizer, config=settings, dist_init_required=False
        )[0]
        if stage == 3:
            self.objective = objective.through(self._engine)
            self._make_whole()  # DeepSpeed would wait for the first pass

    @property
    def passes_alike(self) -> bool:
        """Whether every worker must take as many forward and backward passes as every other."""
        return self.stage > 1

    def zero_grad(self) -> None:
        """See Optimizer. A step whose gradients are shared already cannot be begun afresh."""
        self._engine.zero_grad()

    def scaled(self, loss: Tensor) -> Tensor:
        """See Optimizer."""
        loss = loss * self._workers.size  # DeepSpeed takes the mean over workers
        if self.scaler.is_enabled():
            self._engine.optimizer.override_loss_scale(self.scaler.get_scale())
        return self._engine.scale(loss if self.stage == 3 else self._engine(loss))

    def reduce(self, *sums: Tensor) -> None:
        """See Optimizer; DeepSpeed reduces the gradients itself, in `step` at the latest."""
        self._workers.sum_(sums)

    def step(self, rate: float) -> tuple[float, bool]:
        """See Optimizer."""
        if self.stage == 1:
            gradients(self._parameters)
        for group in self._engine.optimizer.param_groups:
            group["lr"] = rate
        self._engine.step()
        is_applied = self._engine.was_step_applied()
        norm = float(self._engine.get_global_grad_norm())
        if self.scaler.is_enabled():
            self._bookkeeper.grad = torch.full_like(
                self._bookkeeper, 0.0 if is_applied else torch.inf
            )
            self.scaler.scale(self._bookkeeper)  # which makes its counters on first use
            self.scaler.unscale_(self._tells_scaler)
            self.scaler.update()
        return norm, is_applied

    def pack(self) -> Packed:
        """See Optimizer."""
        from deepspeed.utils import safe_get_full_optimizer_state

        self._make_whole()
        tensors: dict[str, Tensor] = {}
        steps = [state["step"] for state in self._states() if state]
        for name, parameter in self._parameters.items() if steps else ():
            for key in _MOMENTS:
                whole: Any = safe_get_full_optimizer_state(parameter, key)
                tensors[f"{name}/{key}"] = whole.detach().cpu().clone().contiguous()
            tensors[f"{name}/step"] = steps[0].detach().cpu().clone()
        return Packed(tensors, {})

    def load(self, packed: Packed) -> None:
        """See Optimizer."""
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        for parameter in self._parameters.values():
            safe_set_full_fp32_param(parameter, parameter.detach().clone())
        if self.stage == 3:
            changed: list[Any] = list(self._parameters.values())
            changed[0].partition(param_list=changed, has_been_updated=True)
            self._make_whole()
        if not packed.tensors:
            return
        inner = self._engine.optimizer.optimizer
        step = next(t for name, t in packed.tensors.items() if name.endswith("/step"))
        for flat in self._flats():
            inner.state[flat] = {key: torch.zeros_like(flat.data) for key in _MOMENTS}
            inner.state[flat]["step"] = step.clone()
        if self.stage < 3:
            self._engine.optimizer._lazy_init_hp_params_optimizer_state()
        for name, parameter in self._parameters.items():
            for key in _MOMENTS:
                whole = packed.tensors[f"{name}/{key}"].to(parameter.device)
                safe_set_full_optimizer_state(parameter, whole, key)

    def _make_whole(self) -> None:
        """Adapters are whole between steps, but not after one that was skipped."""
        if self.stage == 3:
            parameters: list[Any] = list(self._parameters.values())
            parameters[0].all_gather(parameters)

    def _flats(self) -> list[Tensor]:
        """This worker's shares of the parameters, as the inner AdamW has them."""
        optimizer = self._engine.optimizer
        if self.stage == 3:
            return optimizer.fp32_partitioned_groups_flat
        return optimizer.single_partition_of_fp32_groups

    def _states(self) -> list[dict[str, Any]]:
        inner = self._engine.optimizer.optimizer
        return [inner.state.get(flat, {}) for flat in self._flats()]


class _Holder(nn.Module):
    """What DeepSpeed may see of a model whose forward pass is ours: what is trained."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        super().__init__()
        self.trained = nn.ParameterList(parameters.values())

    def forward(self, loss: Tensor) -> Tensor:
        return loss


class _Losses(nn.Module):
    """Base, adapter and loss as one module, whose weights come and go layer by layer."""

    def __init__(self, base: Base, objective: Objective) -> None:
        super().__init__()
        self.model = objective.model
        self._autocast = base.autocast
        self._objective = objective

    def forward(self, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        with self._autocast():  # DeepSpeed turns it off around its modules
            return self._objective.measure(batch)


def _settings(
    parameters: Mapping[str, nn.Parameter], recipe: TrainRecipe, stage: int, objective: Objective
) -> dict[str, Any]:
    """DeepSpeed's configuration."""
    largest = max(p.numel() for p in parameters.values())
    total = sum(p.numel() for p in parameters.values())
    # ZeRO-2 holds as much as a bucket beside its own share of the gradients.
    bucket = total if stage == 1 else max(largest, total // 8)
    host = "cpu" if recipe.scale.offload_optimizer else "none"
    zero: dict[str, Any] = {
        "stage": stage,
        "overlap_comm": False,
        "reduce_bucket_size": min(bucket, _MOST_BUCKET),
        "offload_optimizer": {"device": host},
    }
    if stage == 3:
        zero |= {
            "stage3_param_persistence_threshold": largest + 1,
            # Gathered whole: within a layer, the backward pass of each worker has an order of
            # its own, which depends on how its examples lie in the batch.
            "leaf_module": {"classes": _layers(objective)},
        }
    return {
        "train_micro_batch_size_per_gpu": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": recipe.optim.max_grad_norm or 0.0,
        "steps_per_print": 1 << 60,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
    }


def _layers(objective: Objective) -> list[str]:
    """Full names of the classes of the base's layers."""
    base: Any = objective.model.get_base_model()
    names = set(base._no_split_modules or ())
    return sorted(
        {
            f"{type(module).__module__}.{type(module).__qualname__}"
            for module in base.modules()
            if type(module).__name__ in names
        }
    )


def _imported(device: torch.device) -> Any:
    """DeepSpeed, quiet and ready to work in torch's process group."""
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        import deepspeed
        import deepspeed.comm
        import deepspeed.ops
    except ImportError:
        raise ConfigError(
            "scale.strategy zero1, zero2 and zero3 need DeepSpeed, which is not installed; "
            "`pip install 'loray[deepspeed]'` on every node, or use ddp"
        ) from None
    deepspeed.utils.logger.setLevel(logging.WARNING)
    # Built by a compiler at first use, to save microseconds of a reduction within one machine.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed(dist_backend=dist.get_backend(), dist_init_required=False)
    return deepspeed
