"""One adapter in training: its data cursor, optimiser, schedule, loss scale and state.

A seat cannot tell whether others share its base. What it draws, counts, clips and steps is its own,
and `turn` gives each seat its own rows of one forward and backward pass. A run of one adapter is a
seat that sits alone, so a trial of a search and `loray train` are the same code.

What is not covered: DoRA beside other adapters, whose layers PEFT computes for all tokens alike.
"""

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import bitsandbytes as bnb
import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from cluster.errors import TrainingError
from training import checkpoint, packing
from training.checkpoint import State
from training.config import OptimConfig, TrainRecipe
from training.memory import MemoryPlan
from training.model import ADAPTER, Base
from training.objective import Objective
from training.packing import MicroBatch
from training.routing import Router, Span
from training.sampler import share
from training.schedule import learning_rate
from training.strategy import Workers
from training.tokens import Encoded

_MIN_SCALE = 1.0
"""A GradScaler below this has halved its scale too often: the gradients themselves overflow."""


class Batches(Protocol):
    """Where the examples of a step come from: a token set in memory, or a stream."""

    num_steps: int

    def batch(self, step: int) -> Sequence[tuple[int, Encoded]]:
        """The global batch of 0-based `step`: (number that names the example, its tokens)."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Trunk:
    """What all seats share and none of them changes: the frozen base with its routed layers."""

    base: Base
    objective: Objective
    router: Router
    memory: MemoryPlan

    @property
    def model(self) -> PeftModel:
        """The base with every seat's adapter."""
        return self.objective.model


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """A micro-batch of one seat, on its device."""

    batch: MicroBatch
    keys: Sequence[tuple[int, ...]]
    """For each example that the batch was planned from, what its dropout is keyed by."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """What one optimiser step was."""

    loss: float
    rate: float
    grad_norm: float
    is_applied: bool
    """False where fp16 overflowed and the step was skipped."""
    scale: float
    """Loss scale, 1 unless training in fp16."""
    real_tokens: int
    supervised_tokens: int


@dataclass(kw_only=True, slots=True)
class Seat:
    """The changing state of one adapter's training; everything else of it is in the recipe."""

    adapter: str
    """Its name inside the PeftModel."""
    recipe: TrainRecipe
    batches: Batches
    parameters: Mapping[str, nn.Parameter]
    """As `model.adapter_parameters` names them."""
    trunk: Trunk
    workers: Workers = field(default_factory=Workers)
    state: State = field(default_factory=State)
    optimizer: Optimizer = field(init=False)
    scaler: torch.amp.GradScaler = field(init=False)
    pending: deque[Piece] = field(init=False, default_factory=deque)
    """What is left to do of the current step."""
    _batch: Sequence[tuple[int, Encoded]] = field(init=False, default=())
    _loss_sum: Tensor = field(init=False)
    _initial: dict[str, int] = field(init=False)

    def __post_init__(self) -> None:
        self.optimizer = make_optimizer(list(self.parameters.values()), self.recipe.optim)
        base = self.trunk.base
        self.scaler = torch.amp.GradScaler(base.device.type, enabled=base.precision == "fp16")
        self._initial = _fingerprints(self.parameters)
        self._loss_sum = torch.zeros(1, dtype=torch.float32, device=base.device)

    @property
    def is_done(self) -> bool:
        """Whether every step has been taken, of its schedule or up to `optim.stop_after`."""
        last = self.recipe.optim.stop_after
        num_steps = self.batches.num_steps
        return self.state.step >= (num_steps if last is None else min(last, num_steps))

    @property
    def num_supervised(self) -> int:
        """Supervised tokens of the current step's global batch, over all workers."""
        return sum(e.num_supervised for _, e in self._batch)

    def start_step(self) -> None:
        """Lay out the next global batch, or the current one afresh where it had been begun."""
        step, seed = self.state.step, self.recipe.optim.seed
        self.optimizer.zero_grad(set_to_none=True)
        self._loss_sum.zero_()
        self._batch = self.batches.batch(step)
        mine = share(self._batch, self.workers.rank, self.workers.size)
        keys = [(seed, step, number) for number, _ in mine]
        plan = layout(self.trunk, [e for _, e in mine])
        self.pending = deque(Piece(batch=batch, keys=keys) for batch in plan)
        # Only DoRA's dropout, which is PEFT's, draws from the global generator.
        torch.manual_seed(hash((seed, step, self.workers.rank)) % (1 << 63))

    def finish_step(self, *also: Tensor) -> Step:
        """Reduce over the workers, `also` with it, check, clip and step.

        Raises TrainingError where the loss or a gradient is not finite, before the optimiser moves,
        and where a layer has not moved after two steps.
        """
        assert self._batch, "finish_step before start_step"
        assert not self.pending, "finish_step in the middle of a step"
        self._reduce(*also)
        rate = learning_rate(
            self.recipe.optim, step=self.state.step, num_steps=self.batches.num_steps
        )
        loss, scale = self._loss_sum.item(), self.scaler.get_scale()
        norm, is_applied = self._apply(rate, loss)
        step = Step(
            loss=loss,
            rate=rate,
            grad_norm=norm,
            is_applied=is_applied,
            scale=scale,
            real_tokens=sum(len(e.input_ids) for _, e in self._batch),
            supervised_tokens=self.num_supervised,
        )
        self.state = replace(
            self.state,
            step=self.state.step + 1,
            applied_steps=self.state.applied_steps + is_applied,
            real_tokens=self.state.real_tokens + step.real_tokens,
            supervised_tokens=self.state.supervised_tokens + step.supervised_tokens,
            first_loss=loss if self.state.first_loss is None else self.state.first_loss,
            last_loss=loss,
            scaler=self.scaler.state_dict(),
        )
        self._batch = ()
        if self.state.applied_steps >= 2 and self._initial:
            if is_applied and self.state.applied_steps == 2:
                check_alive(self._initial, self.parameters)
            self._initial = {}
        return step

    def resume_from(self, path: Path) -> None:
        """Take the place where a verified checkpoint of the same recipe left off."""
        model = self.trunk.model
        self.state = checkpoint.restore(path, model, self.optimizer, adapter=self.adapter)
        self._initial = _fingerprints(self.parameters)
        if self.state.scaler:
            self.scaler.load_state_dict(dict(self.state.scaler))

    def add_loss(self, loss: Tensor) -> None:
        """Note a part of the current step's mean loss."""
        self._loss_sum += loss

    def _reduce(self, *also: Tensor) -> None:
        """One all-reduce of all gradients, the loss and `also`."""
        for parameter in self.parameters.values():
            if parameter.grad is None:  # a worker whose share was empty, or a dead layer
                parameter.grad = torch.zeros_like(parameter)
        grads = [p.grad for p in self.parameters.values() if p.grad is not None]
        self.workers.sum_([*grads, self._loss_sum, *also])

    def _apply(self, rate: float, loss: float) -> tuple[float, bool]:
        """Unscale, check, clip, step: the gradient's norm, and whether the optimiser moved."""
        self.scaler.unscale_(self.optimizer)
        grads = [p.grad for p in self.parameters.values() if p.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(grads))
        is_finite = math.isfinite(norm)
        overflowed = (
            not is_finite and self.scaler.is_enabled() and self.scaler.get_scale() > _MIN_SCALE
        )
        if not math.isfinite(loss) or not (is_finite or overflowed):
            raise self._not_finite(loss, norm)
        limit = self.recipe.optim.max_grad_norm
        if is_finite and limit:
            torch.nn.utils.clip_grads_with_norm_(
                self.parameters.values(), limit, torch.tensor(norm)
            )
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.scaler.step(self.optimizer)  # passes over a step whose gradients are not finite
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return norm, is_finite

    def _not_finite(self, loss: float, norm: float) -> TrainingError:
        ids = [e.id for _, e in self._batch]
        shown = ", ".join(ids[:8]) + (f" and {len(ids) - 8} more" if len(ids) > 8 else "")
        return TrainingError(
            f"step {self.state.step + 1}: loss {loss}, gradient norm {norm}; the optimiser did not "
            f"step, and the last checkpoint is good. Examples of the batch: {shown}. Lower "
            "optim.learning_rate, set optim.max_grad_norm, prefer model.precision bf16 or fp32 to "
            "fp16, and look at those examples"
        )


def make_optimizer(parameters: Sequence[nn.Parameter], config: OptimConfig) -> Optimizer:
    """AdamW over an adapter; the learning rate is set at each step."""
    kind = bnb.optim.AdamW8bit if config.optimizer == "adamw_8bit" else AdamW
    return kind(parameters, lr=config.learning_rate, weight_decay=config.weight_decay)


def check_alive(initial: Mapping[str, int], parameters: Mapping[str, Tensor]) -> None:
    """Every adapter tensor has changed since the fingerprints `initial`, two steps ago.

    B moves in the first step and A, whose gradient is zero while B is, in the second. Raises
    TrainingError naming the dead ones (transformers #42489: layers that never learn when
    checkpointing detaches their input).
    """
    now = _fingerprints(parameters)
    dead = [name for name, before in initial.items() if now[name] == before]
    if dead:
        names = ", ".join(dead[:5]) + (f" and {len(dead) - 5} more" if len(dead) > 5 else "")
        raise TrainingError(
            f"{len(dead)} of {len(initial)} adapter tensors have not moved after two steps: "
            f"{names}. They get no gradient, or optim.learning_rate is too small to change them; "
            "leave those layers out of lora.target_modules, or raise the learning rate"
        )


def _fingerprints(parameters: Mapping[str, Tensor]) -> dict[str, int]:
    """A hash of each tensor's bytes, good in this process; copies would cost a fifth of a seat."""
    return {
        name: hash(tensor.detach().cpu().view(torch.uint8).numpy().tobytes())
        for name, tensor in parameters.items()
    }


def turn(trunk: Trunk, pieces: Sequence[tuple[Seat, Piece]]) -> None:
    """One forward and backward pass over a piece of each seat; gradients add up in their adapters.

    Each seat's loss is the sum over its own tokens divided by its own count, times its own scale.
    """
    batch = packing.join([piece.batch for _, piece in pieces], pad_id=trunk.memory.pad_id)
    length = batch.input_ids_BL.shape[1]
    spans: list[Span] = []
    first_row = 0
    for seat, piece in pieces:
        spans += _spans(piece, seat.adapter, length, first_row)
        first_row += len(piece.batch.input_ids_BL)
    trunk.model.train()
    with trunk.router.use(tuple(spans)):
        with trunk.base.autocast():
            loss_N = trunk.objective.losses(batch)
        counts = [piece.batch.num_supervised_tokens for _, piece in pieces]
        scaled: list[Tensor] = []
        for (seat, _), part_N in zip(pieces, loss_N.split(counts), strict=True):
            loss = part_N.sum() / seat.num_supervised
            seat.add_loss(loss.detach())
            scaled.append(seat.scaler.scale(loss))
        torch.stack(scaled).sum().backward()


def eval_loss(
    trunk: Trunk,
    examples: Sequence[Encoded],
    *,
    adapter: str = ADAPTER,
    workers: Workers | None = None,
) -> float:
    """Mean loss of a supervised token of `examples` under an adapter, over all workers."""
    workers = workers or Workers()
    mine = share(examples, workers.rank, workers.size)
    sums, counts = example_losses(trunk, mine, adapter=adapter)
    totals = torch.tensor([math.fsum(sums), float(sum(counts))], dtype=torch.float64)
    totals = totals.to(trunk.base.device)
    workers.sum_([totals])
    return float(totals[0] / totals[1])


def example_losses(
    trunk: Trunk, examples: Sequence[Encoded], *, adapter: str = ADAPTER
) -> tuple[list[float], list[int]]:
    """For each example, the sum of its tokens' cross entropies and the number of those tokens."""
    sums = [0.0] * len(examples)
    counts = [example.num_supervised for example in examples]
    trunk.model.eval()
    for batch in layout(trunk, examples):
        piece = Piece(batch=batch, keys=[()] * len(examples))
        spans = _spans(piece, adapter, batch.input_ids_BL.shape[1], 0)
        with torch.no_grad(), trunk.router.use(spans), trunk.base.autocast():
            loss_N = trunk.objective.losses(batch)
        numbers = [segment.example for segment in batch.segments]
        parts = loss_N.double().split([counts[number] for number in numbers])
        for number, part_N in zip(numbers, parts, strict=True):
            sums[number] = part_N.sum().item()
    trunk.model.train()
    return sums, counts


def layout(trunk: Trunk, examples: Sequence[Encoded]) -> list[MicroBatch]:
    """Examples as micro-batches on the trunk's device."""
    batches = packing.plan(
        examples,
        micro_batch_tokens=trunk.memory.micro_batch_tokens,
        is_packed=trunk.memory.is_packed,
        pad_id=trunk.memory.pad_id,
    )
    return [batch.to(trunk.base.device) for batch in batches]


def _spans(piece: Piece, adapter: str, length: int, first_row: int) -> tuple[Span, ...]:
    """Where the examples of a piece lie in a batch whose rows are `length` wide."""
    return tuple(
        Span(
            adapter=adapter,
            start=(first_row + s.row) * length + s.start,
            stop=(first_row + s.row) * length + s.stop,
            key=piece.keys[s.example],
        )
        for s in piece.batch.segments
    )
