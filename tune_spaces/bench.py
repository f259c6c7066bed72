"""A bench: one frozen base on one device, and the seats of the trials that train on it together.

A turn takes a piece of as many seats as fill the device and sends them through the base in one
forward and backward pass; rows belong to one seat each, so that neither attention nor a broken
number crosses from one to another. Seats join and leave between turns. Plain Python: `actor.py`
runs it under Ray.

What is not covered: DoRA (its layers compute all tokens alike) and bases that span devices; a
search of those runs each trial as a training job (`search.mode: solo`).
"""

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from cluster import ownership, storage
from cluster.errors import ConfigError, TrainingError
from training import (
    checkpoint,
    dataset,
    memory,
    model,
    objective,
    scoring,
    seat,
    special_ids,
    worker,
)
from training.config import LoraConfig, TrainRecipe
from training.memory import MemoryPlan
from training.seat import Seat
from training.trunk import Piece, Trunk

log = logging.getLogger(__name__)

BASE = "base"
"""The adapter that every bench hangs up first: rank 1, never trained; the base answers under it."""
_TOLD = "train_loss"
"""In the manifest of a checkpoint."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """Where a trial stands when it has reached what it was asked for."""

    trial: str
    step: int
    num_steps: int
    real_tokens: int
    supervised_tokens: int
    train_loss: float
    """Mean over the supervised tokens since the last report."""
    eval_loss: float | None
    """None without evaluation data."""
    learning_rate: float
    """Of the last step."""
    train_s: float
    """Seconds of the device, shared out by tokens."""
    is_finished: bool
    """Every step of the schedule has been taken."""


class SeatLost(TrainingError):
    """A seat was taken away, and why; its neighbours go on."""

    code = "seat_lost"


class SeatShed(SeatLost):
    """A seat was taken away to make room: joining again helps once a neighbour has left."""

    code = "seat_shed"


class NoSeat(TrainingError):
    """A trial that has no seat here, maybe since the bench was restarted: joining again helps."""

    code = "no_seat"


@dataclass(kw_only=True, slots=True)
class _Place:
    seat: Seat
    run_dir: Path
    attempt: int
    target: int = 0
    """Supervised tokens up to which it trains."""
    rate: float = 0.0
    loss_sum: float = 0.0
    loss_tokens: int = 0
    train_loss: float | None = None
    """As the last report told it."""
    error: SeatLost | None = None

    @property
    def wants_turn(self) -> bool:
        state = self.seat.state
        return (
            self.error is None and not self.seat.is_done and state.supervised_tokens < self.target
        )


class _Places(dict[str, _Place]):
    def __missing__(self, trial: str) -> _Place:
        raise NoSeat(f"trial {trial} has no seat on this bench, which has {len(self)}; join again")


@dataclass(kw_only=True, slots=True)
class Bench:
    """The base of a recipe, loaded once; `join`, `ask`, `turn`, `collect`, `leave`."""

    recipe: TrainRecipe
    """What all trials have in common: base, data, precision."""
    directory: Path
    """Where the memory plan of the search is kept, so that a resumed one sums in the same order."""
    device: torch.device
    clock: Callable[[], float] = time.perf_counter
    trunk: Trunk = field(init=False)
    data: dataset.Dataset = field(init=False)
    load_s: float = field(init=False)
    """Seconds that base and data took to load."""
    _places: _Places = field(init=False, default_factory=_Places)
    _names: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        started = self.clock()
        base = model.load_base(self.recipe.model, device=self.device)
        peft_model, router = model.attach_lora(base, LoraConfig(rank=1), seed=0, adapter=BASE)
        vocab_size = base.model.config.get_text_config().vocab_size
        self.data = dataset.load(
            self.recipe, base.tokenizer, base.generation_eos, vocab_size=vocab_size
        )
        special_ids.check_special_ids(base.tokenizer, base.model.config, base.generation_eos)
        pad_id = special_ids.choose_pad_id(base.tokenizer, vocab_size=vocab_size)
        probe = memory.random_probe(vocab_size, pad_id).to(self.device)
        chosen = objective.probe(peft_model, probe, base.autocast)
        plan = self._plan(base, chosen, pad_id)
        memory.set_checkpointing(chosen, is_on=plan.gradient_checkpointing)
        self.trunk = Trunk(base=base, objective=chosen, router=router, memory=plan)
        self.load_s = self.clock() - started

    @property
    def trials(self) -> tuple[str, ...]:
        """The trials that have a seat."""
        return tuple(self._places)

    @property
    def has_work(self) -> bool:
        """Whether some seat has not reached what it was asked for."""
        return any(place.wants_turn for place in self._places.values())

    def join(self, trial: str, recipe: TrainRecipe, run_dir: Path) -> int:
        """Give a trial a seat; the supervised tokens that its newest checkpoint has seen, or 0.

        Any older seat of the same run directory, on whatever bench, is fenced off; one on this
        bench is taken away. Raises ConfigError where the recipe cannot share this base.
        """
        _require_shareable(recipe, self.recipe)
        if trial in self._places:  # of a process of the trial that has died since
            self.leave(trial)
        assert self.data.train is not None
        self._names += 1
        adapter = f"seat{self._names}"  # never reused: PEFT remembers names
        attempt = ownership.next_attempt(run_dir)
        model.add_lora(
            self.trunk.model,
            self.trunk.router,
            self.trunk.base,
            recipe.lora,
            seed=recipe.optim.seed,
            adapter=adapter,
        )
        taken = Seat(
            adapter=adapter,
            recipe=recipe,
            batches=dataset.SetBatches(self.data.train, recipe),
            parameters=model.adapter_parameters(self.trunk.model, adapter),
            trunk=self.trunk,
        )
        place = _Place(seat=taken, run_dir=run_dir, attempt=attempt)
        found = checkpoint.find_latest_valid(run_dir)
        if found is not None:
            taken.resume_from(found)
            place.train_loss = _told(found)
        self._places[trial] = place
        return taken.state.supervised_tokens

    def leave(self, trial: str) -> None:
        """Take a trial's seat away; what it has not saved is lost."""
        place = self._places.pop(trial)
        self.trunk.model.delete_adapter(place.seat.adapter)

    def ask(self, trial: str, *, supervised_tokens: int) -> None:
        """Let a trial train until it has seen that many supervised tokens, or its schedule ends."""
        self._places[trial].target = supervised_tokens

    def turn(self) -> int:
        """One forward and backward pass over pieces of the seats that are furthest behind.

        Returns its real tokens, 0 where no seat wants a turn or memory ran out.
        """
        pieces = self._choose()
        if not pieces:
            return 0
        started = self.clock()
        try:
            seat.turn(self.trunk, [(place.seat, piece) for place, piece in pieces])
        except (MemoryError, RuntimeError) as error:
            if not memory.is_short(error):
                raise
            self._shed([place for place, _ in pieces])
            return 0
        for place, _ in pieces:
            if not place.seat.pending:
                self._finish_step(place)
        seconds = self.clock() - started
        tokens = sum(piece.batch.num_real_tokens for _, piece in pieces)
        for place, piece in pieces:
            part_s = seconds * piece.batch.num_real_tokens / tokens
            state = place.seat.state
            place.seat.state = replace(state, train_s=state.train_s + part_s)
        return tokens

    def is_ready(self, trial: str) -> bool:
        """Whether `collect` has something to tell."""
        place = self._places[trial]
        return not place.wants_turn

    def collect(self, trial: str) -> Progress:
        """Evaluate a trial that has reached what it was asked for.

        Raises SeatLost where the seat had to be taken away meanwhile: leave, and maybe join again.
        """
        place = self._places[trial]
        if place.error is not None:
            raise place.error
        state = place.seat.state
        if place.loss_tokens:
            place.train_loss = place.loss_sum / place.loss_tokens
        place.loss_sum, place.loss_tokens = 0.0, 0
        return Progress(
            trial=trial,
            step=state.step,
            num_steps=place.seat.batches.num_steps,
            real_tokens=state.real_tokens,
            supervised_tokens=state.supervised_tokens,
            train_loss=math.nan if place.train_loss is None else place.train_loss,
            eval_loss=self.eval_loss(place.seat.adapter),
            learning_rate=place.rate,
            train_s=state.train_s,
            is_finished=place.seat.is_done,
        )

    def eval_loss(self, adapter: str = BASE) -> float | None:
        """Mean loss of a supervised token of the evaluation data; of the bare base by default."""
        if self.data.eval is None:
            return None
        return scoring.score(self.trunk, self.data.eval, adapter=adapter).loss

    def num_parameters(self, trial: str) -> int:
        """Numbers that a trial trains."""
        return sum(p.numel() for p in self._places[trial].seat.parameters.values())

    def adapter_of(self, trial: str) -> str:
        """What a trial's adapter, or the bare base's, is called on this bench."""
        return BASE if trial == BASE else self._places[trial].seat.adapter

    def attempt_of(self, trial: str) -> int:
        """Which of a trial's seats, over all benches and times, it has now."""
        return self._places[trial].attempt

    def save(self, trial: str, *, best_step: int | None = None) -> Path:
        """Commit a checkpoint of the trial's last whole step; the directory.

        The one of `best_step` is kept beside the newest. Raises StorageError on a full disk,
        FencedError where a newer seat of the trial exists.
        """
        place = self._places[trial]
        path = checkpoint.save(
            place.run_dir,
            self.trunk.model,
            place.seat.optimizer.pack(),
            place.seat.state,
            attempt=place.attempt,
            # Whoever joins here has the same report to tell, if nobody has heard it yet.
            info={**self._info(place), _TOLD: None if place.loss_tokens else place.train_loss},
            adapter=place.seat.adapter,
        )
        keep = place.seat.recipe.checkpoint.keep
        checkpoint.prune(place.run_dir, keep=keep, best_step=best_step)
        return path

    def rewind(self, trial: str, step: int) -> Path:
        """Take a trial back to a checkpoint of its own, and export that; the adapter's directory.

        Raises StorageError where it is missing or damaged.
        """
        place = self._places[trial]
        place.seat.resume_from(checkpoint.rewind(place.run_dir, step=step))
        place.target = 0  # it has been where it was asked to go
        return self.export(trial)

    def export(self, trial: str) -> Path:
        """Commit `<run>/adapter`, the adapter to use, as the trial stands now."""
        place = self._places[trial]
        final, source = place.run_dir / "adapter", self.save(trial)
        if checkpoint.is_export_of(final, source):
            return final
        checkpoint.export(
            source,
            final,
            self.trunk.base.tokenizer,
            attempt=place.attempt,
            info={**self._info(place), "step": place.seat.state.step},
            is_fenced=lambda: not ownership.is_current_attempt(place.run_dir, place.attempt),
        )
        return final

    def _info(self, place: _Place) -> dict[str, Any]:
        return worker.provenance(place.seat.recipe, self.trunk.base, self.data)

    def _plan(self, base: model.Base, chosen: objective.Objective, pad_id: int) -> MemoryPlan:
        plan = memory.stored(self.directory)
        if plan is None:
            sets = [s for s in (self.data.train, self.data.eval) if s is not None]
            plan = memory.decide(
                self.recipe,
                base,
                chosen,
                longest_tokens=max(int(s.lengths.max()) for s in sets),
                pad_id=pad_id,
                workers_here=1,
            )
            memory.store(self.directory, plan)
        return plan

    def _choose(self) -> list[tuple[_Place, Piece]]:
        """Pieces of the seats that are furthest behind, as many as one pass has room for."""
        waiting = [place for place in self._places.values() if place.wants_turn]
        waiting.sort(key=lambda place: place.seat.state.real_tokens)
        room = max(
            memory.TARGET_TOKENS.get(self.device.type, 0), self.trunk.memory.micro_batch_tokens
        )
        chosen: list[tuple[_Place, Piece]] = []
        rows = width = 0
        for place in waiting:
            if not place.seat.pending:
                place.seat.start_step()
            shape = place.seat.pending[0].batch.input_ids_BL.shape
            wider = max(width, shape[1])
            if chosen and (rows + shape[0]) * wider > room:
                continue
            rows, width = rows + shape[0], wider
            chosen.append((place, place.seat.pending.popleft()))
        return chosen

    def _finish_step(self, place: _Place) -> None:
        try:
            step = place.seat.finish_step()
        except TrainingError as error:
            place.error = SeatLost(str(error))
            log.warning("seat_lost=%s reason=%r", place.run_dir.name, str(error))
            return
        place.rate = step.rate
        place.loss_sum += step.loss * step.supervised_tokens
        place.loss_tokens += step.supervised_tokens

    def _shed(self, places: Sequence[_Place]) -> None:
        """Out of memory: the newest seat loses its place, the others begin their step again."""
        newest = list(self._places.values())[-1]
        if len(self._places) == 1:
            newest.error = SeatLost(
                "out of memory with one seat alone; lower memory.micro_batch_tokens or "
                "data.max_length, or set memory.gradient_checkpointing: on"
            )
            return
        newest.error = SeatShed("out of memory: the newest seat was taken away")
        for place in {id(p): p for p in (*places, newest)}.values():
            place.seat.pending.clear()
            place.seat.optimizer.zero_grad()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        log.warning("seat_lost=%s reason=out_of_memory", newest.run_dir.name)


def _told(path: Path) -> float | None:
    told = storage.read_manifest(path).info.get(_TOLD)
    return told if isinstance(told, float) else None


def _require_shareable(recipe: TrainRecipe, shared: TrainRecipe) -> None:
    if recipe.lora.variant == "dora":
        raise ConfigError(
            "lora.variant: dora cannot sit beside other trials; set search.mode: solo, or use lora"
        )
    if recipe.data.streaming:
        raise ConfigError("data.streaming cannot be shared by trials; set search.mode: solo")
    for section in ("model", "data", "memory"):
        if getattr(recipe, section) != getattr(shared, section):
            raise ConfigError(
                f"{section} of this trial differs from the bench's, which all trials share; "
                "search it with search.mode: solo"
            )
