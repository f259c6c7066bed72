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

import torch
from peft import PeftModel
from torch import Tensor, nn

from cluster.errors import TrainingError
from training import checkpoint, packing
from training.checkpoint import State
from training.config import TrainRecipe
from training.memory import MemoryPlan
from training.model import ADAPTER, Base
from training.objective import Objective
from training.optimizer import Optimizer, Replicated, loss_scaler
from training.packing import MicroBatch
from training.routing import Router, Span
from training.sampler import share
from training.schedule import learning_rate
from training.strategy import Workers
from training.tokens import Encoded
from training.zero import Sharded

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
    weight: float = 1.0
    """0 where it only keeps step with the other workers."""


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
    sharded: Sharded | None = None
    """Steps the parameters where workers share their state."""
    optimizer: Optimizer = field(init=False)
    pending: deque[Piece] = field(init=False, default_factory=deque)
    """What is left to do of the current step."""
    _batch: Sequence[tuple[int, Encoded]] = field(init=False, default=())
    _loss_sum: Tensor = field(init=False)
    _initial: dict[str, int] = field(init=False)

    def __post_init__(self) -> None:
        base = self.trunk.base
        self.optimizer = self.sharded or Replicated(
            self.parameters,
            self.recipe.optim,
            scaler=loss_scaler(base),
            workers=self.workers,
        )
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
        self.optimizer.zero_grad()
        self._loss_sum.zero_()
        self._batch = self._batch or self.batches.batch(step)  # which a stream gives once
        mine = share(self._batch, self.workers.rank, self.workers.size)
        keys = [(seed, step, number) for number, _ in mine]
        plan = layout(self.trunk, [e for _, e in mine])
        self.pending = deque(Piece(batch=batch, keys=keys) for batch in plan)
        if self.sharded is not None and self.sharded.passes_alike:
            missing = self.workers.most(len(plan)) - len(plan)
            self.pending.extend([self._idle_piece()] * missing)
        # Only DoRA's dropout, which is PEFT's, draws from the global generator.
        torch.manual_seed(hash((seed, step, self.workers.rank)) % (1 << 63))

    def finish_step(self, *also: Tensor) -> Step:
        """Reduce over the workers, `also` with it, check, clip and step.

        Raises TrainingError where the loss or a gradient is not finite, before the optimiser moves,
        and where a layer has not moved after two steps.
        """
        assert self._batch, "finish_step before start_step"
        assert not self.pending, "finish_step in the middle of a step"
        self.optimizer.reduce(self._loss_sum, *also)
        rate = learning_rate(
            self.recipe.optim, step=self.state.step, num_steps=self.batches.num_steps
        )
        scaler = self.optimizer.scaler
        loss, scale = self._loss_sum.item(), scaler.get_scale()
        if not math.isfinite(loss):
            raise self._not_finite(f"loss {loss}")
        norm, is_applied = self.optimizer.step(rate)
        if not is_applied and not (scaler.is_enabled() and scale > _MIN_SCALE):
            raise self._not_finite(f"loss {loss}, gradient norm {norm}")
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
            scaler=scaler.state_dict(),
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
        self.state, packed = checkpoint.restore(path, model, adapter=self.adapter)
        self.optimizer.load(packed)
        self._initial = _fingerprints(self.parameters)
        if self.state.scaler:
            self.optimizer.scaler.load_state_dict(dict(self.state.scaler))

    def add_loss(self, loss: Tensor) -> None:
        """Note a part of the current step's mean loss."""
        self._loss_sum += loss

    def _idle_piece(self) -> Piece:
        """Work that adds nothing, for a worker whose share is laid out in fewer micro-batches."""
        number, shortest = min(self._batch, key=lambda entry: len(entry[1].input_ids))
        keys = [(self.recipe.optim.seed, self.state.step, number)]
        return Piece(batch=layout(self.trunk, [shortest])[0], keys=keys, weight=0.0)

    def _not_finite(self, what: str) -> TrainingError:
        ids = [e.id for _, e in self._batch]
        shown = ", ".join(ids[:8]) + (f" and {len(ids) - 8} more" if len(ids) > 8 else "")
        return TrainingError(
            f"step {self.state.step + 1}: {what}; the optimiser did not step, "
            f" and the last checkpoint is good. Examples of the batch: {shown}. Lower "
            "optim.learning_rate, set optim.max_grad_norm, prefer model.precision bf16 or fp32 to "
            "fp16, and look at those examples"
        )


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
        for (seat, piece), part_N in zip(pieces, loss_N.split(counts), strict=True):
            loss = part_N.sum() * piece.weight / seat.num_supervised
            seat.add_loss(loss.detach())
            scaled.append(seat.optimizer.scaled(loss))
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
    if trunk.objective.engine is not None:  # every pass is one of all workers
        num_passes = len(layout(trunk, mine))
        for _ in range(workers.most(num_passes) - num_passes):
            example_losses(trunk, examples[:1], adapter=adapter)
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
