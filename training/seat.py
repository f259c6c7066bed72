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
from torch import Tensor, nn

from cluster.errors import TrainingError
from training import checkpoint, packing, preference
from training.checkpoint import State
from training.config import TrainRecipe
from training.optimizer import Optimizer, Replicated, loss_scaler
from training.preference import Rewards
from training.routing import Span
from training.sampler import share
from training.schedule import learning_rate
from training.strategy import Workers
from training.tokens import Encoded
from training.trunk import Piece, Trunk, layout, spans_of
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
    token_accuracy: float
    """Share of the supervised tokens (of dpo: of preferred answers) that were the likeliest."""
    rewards: Rewards | None
    """For dpo."""


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
    _sums: Tensor = field(init=False)
    """(5,) this worker's part of the current step: the mean loss, tokens that were the likeliest,
    and `preference.sums`."""
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
        self._sums = torch.zeros(5, dtype=torch.float32, device=base.device)

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

    @property
    def is_dpo(self) -> bool:
        """Whether it learns from preferences."""
        return self.recipe.objective.kind == "dpo"

    @property
    def num_pairs(self) -> int:
        """Preferences in the current step's global batch."""
        return len(self._batch) // 2

    @property
    def _num_measured(self) -> int:
        """Tokens that `token_accuracy` is of."""
        measured = self._batch[::2] if self.is_dpo else self._batch
        return sum(e.num_supervised for _, e in measured)

    def start_step(self) -> None:
        """Lay out the next global batch, or the current one afresh where it had been begun."""
        step, seed = self.state.step, self.recipe.optim.seed
        self.optimizer.zero_grad()
        self._sums.zero_()
        self._batch = self._batch or self.batches.batch(step)  # which a stream gives once
        together = self.recipe.objective.num_sequences
        mine = share(self._batch, self.workers.rank, self.workers.size, together=together)
        keys = [(seed, step, number) for number, _ in mine]
        plan = layout(self.trunk, [e for _, e in mine], together=together)
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
        self.optimizer.reduce(self._sums, *also)
        rate = learning_rate(
            self.recipe.optim, step=self.state.step, num_steps=self.batches.num_steps
        )
        scaler = self.optimizer.scaler
        loss, hits, *rewards = self._sums.tolist()
        scale = scaler.get_scale()
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
            token_accuracy=hits / self._num_measured,
            rewards=preference.means(rewards, self.num_pairs) if self.is_dpo else None,
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
        self._sums[0] += loss

    def add_hits(self, hits: Tensor) -> None:
        """Note how many tokens of a part of the current step were the likeliest."""
        self._sums[1] += hits

    def add_rewards(self, sums: Tensor) -> None:
        """Note `preference.sums` of a part of the current step."""
        self._sums[2:] += sums

    def _idle_piece(self) -> Piece:
        """Work that adds nothing, for a worker whose share is laid out in fewer micro-batches."""
        together = self.recipe.objective.num_sequences
        firsts = range(0, len(self._batch), together)
        units = [self._batch[first : first + together] for first in firsts]
        shortest = min(units, key=lambda unit: sum(len(e.input_ids) for _, e in unit))
        keys = [(self.recipe.optim.seed, self.state.step, number) for number, _ in shortest]
        plan = layout(self.trunk, [e for _, e in shortest], together=together)
        return Piece(batch=plan[0], keys=keys, weight=0.0)

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

    Each seat's loss is the sum over its own tokens divided by its own count, times its own scale;
    or, for dpo, the sum over its own pairs divided by their number.
    """
    batch = packing.join([piece.batch for _, piece in pieces], pad_id=trunk.memory.pad_id)
    length = batch.input_ids_BL.shape[1]
    spans: list[Span] = []
    first_row = 0
    for seat, piece in pieces:
        spans += spans_of(piece, seat.adapter, length, first_row)
        first_row += len(piece.batch.input_ids_BL)
    trunk.model.train()
    reference_N = None
    if any(seat.is_dpo for seat, _ in pieces):
        reference_N = preference.reference_losses(trunk, batch)
    with trunk.router.use(tuple(spans)):
        with trunk.base.autocast():
            loss_N, hit_N = trunk.objective.measure(batch)
        counts = [piece.batch.num_supervised_tokens for _, piece in pieces]
        scaled: list[Tensor] = []
        bases_N = (loss_N if reference_N is None else reference_N).split(counts)
        parts = zip(pieces, loss_N.split(counts), hit_N.split(counts), bases_N, strict=True)
        for (seat, piece), part_N, hits_N, base_N in parts:
            if seat.is_dpo:
                loss = _preference_loss(seat, piece, part_N, hits_N, base_N)
            else:
                loss = part_N.sum() * piece.weight / seat.num_supervised
                seat.add_hits(hits_N.sum() * piece.weight)
            seat.add_loss(loss.detach())
            scaled.append(seat.optimizer.scaled(loss))
        torch.stack(scaled).sum().backward()


def _preference_loss(
    seat: Seat, piece: Piece, loss_N: Tensor, hit_N: Tensor, reference_N: Tensor
) -> Tensor:
    """A piece's part of the mean loss of the step's pairs; notes what else there is to tell."""
    segments = piece.batch.segments
    beta = seat.recipe.objective.beta
    chosen_P, rejected_P = preference.rewards(loss_N, reference_N, segments, beta=beta)
    seat.add_rewards(preference.sums(chosen_P, rejected_P) * piece.weight)
    seat.add_hits(preference.chosen_hits(hit_N, segments) * piece.weight)
    return preference.losses(chosen_P, rejected_P).sum() * piece.weight / seat.num_pairs
