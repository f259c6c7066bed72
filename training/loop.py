"""The training loop of a run: step, evaluate, checkpoint, report, on one worker or many.

Exactness is the point. The loss of a step is the sum over the supervised tokens of the whole
global batch divided by their number, however the batch is cut into micro-batches or spread over
workers. The order of the data, the learning rate and dropout are functions of (seed, step), so a
resumed run is bitwise the uninterrupted one on the same kind of machine. A loss or gradient that
is not finite is seen before the optimiser moves. What one step is, is in `training.seat`.
"""

import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from cluster import ownership, storage
from training import checkpoint, memory
from training.checkpoint import State
from training.config import TrainRecipe
from training.events import EventLog
from training.mirror import Mirror
from training.model import ADAPTER, adapter_parameters
from training.scoring import Score, score, score_pairs
from training.seat import Batches, Seat, Step, turn
from training.strategy import Workers
from training.tokens import Encoded
from training.trunk import Trunk
from training.zero import Sharded

log = logging.getLogger(__name__)

_HOLD_TIMEOUT_S = 900.0
_HOLD_POLL_S = 0.02


class ToldToEnd(Exception):
    """A worker is to be taken away; the checkpoint of this step is committed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """Everything a run is made of on one worker."""

    recipe: TrainRecipe
    run_dir: Path
    attempt: int
    trunk: Trunk
    batches: Batches
    eval_examples: Sequence[Encoded]
    workers: Workers
    events: EventLog | None
    """Only the first worker writes."""
    info: Mapping[str, Any]
    """What manifests say about where the adapter comes from."""
    scores: Callable[[], Mapping[str, float]] = dict
    """What else an evaluation measures, by metric; asked on the first worker only."""
    mirror: Mirror | None = None
    """Of a run whose storage is an object store."""
    is_held: bool = False
    """Wait after each due checkpoint until `let_pass`, for whoever judges the run."""
    is_told_to_end: Callable[[], bool] = lambda: False
    """Whether this worker is to be taken away soon; asked once a step."""
    sharded: Sharded | None = None
    """Steps the parameters where workers share their state."""
    clock: Callable[[], float] = time.perf_counter

    def report(self, kind: str, **fields: Any) -> None:
        """Write an event, if this worker is the one that does."""
        if self.events is not None:
            self.events.write(kind, **fields)


def fit(job: Job) -> State:
    """Train to the end, from the newest valid checkpoint where there is one; returns the end state.

    Raises TrainingError where a loss or gradient is not finite or a layer does not learn,
    ResourceError where memory does not suffice for one example, and ToldToEnd.
    """
    seat = Seat(
        adapter=ADAPTER,
        recipe=job.recipe,
        batches=job.batches,
        parameters=adapter_parameters(job.trunk.model),
        trunk=job.trunk,
        workers=job.workers,
        sharded=job.sharded,
    )
    _restore(job, seat)
    job.report(
        "started",
        attempt=job.attempt,
        pid=os.getpid(),
        from_step=seat.state.step,
        num_steps=job.batches.num_steps,
        **_totals(seat.state),
        trainable_parameters=sum(p.numel() for p in seat.parameters.values()),
        workers=job.workers.size,
        **asdict(job.trunk.memory),
    )
    while not seat.is_done and not _is_held_back(job, seat):
        wants_stop, is_told = _step(job, seat)
        _after_step(job, seat, wants_stop=wants_stop or is_told)
        if wants_stop or _is_stale(seat):
            break
        if is_told and not seat.is_done:
            raise ToldToEnd(f"checkpoint of step {seat.state.step}")
    return seat.state


def _step(job: Job, seat: Seat) -> tuple[bool, bool]:
    """One optimiser step; whether the run was asked to stop, and whether a worker was to end."""
    started = job.clock()
    is_short = _accumulate(job, seat)
    asked = job.workers.is_first and stop_file(job.run_dir).exists()
    told = torch.tensor(
        [float(asked), float(job.is_told_to_end()), float(is_short)], device=job.trunk.base.device
    )
    step = seat.finish_step(told)
    seconds = job.clock() - started
    seat.state = replace(seat.state, train_s=seat.state.train_s + seconds)
    _report_step(job, seat.state.step, step, seconds)
    wants_stop, num_told, num_short = told.tolist()
    if num_short:
        job.report(
            "warning",
            step=seat.state.step,
            message=f"memory did not suffice on {num_short:g} of {job.workers.size} workers: the "
            "step was begun again with smaller micro-batches (here of "
            f"{seat.trunk.memory.micro_batch_tokens} tokens) of the same global batch",
        )
    return bool(wants_stop), bool(num_told)


def _accumulate(job: Job, seat: Seat) -> bool:
    """Add up this worker's part of a step, begun again in smaller pieces as memory asks for it.

    Returns whether it did. Gradients are sums over tokens, so the cut of a batch does not change
    them beyond rounding, and workers need not agree on it. A later attempt starts with the run's
    stored plan again. Where workers share their state and pass together (ZeRO), the error goes on,
    and the next attempt of all has smaller micro-batches.
    """
    is_short = False
    while True:
        seat.start_step()
        tokens = 0
        try:
            while seat.pending:
                piece = seat.pending.popleft()
                is_divisible = len(piece.batch.segments) > job.recipe.objective.num_sequences
                tokens = piece.batch.input_ids_BL.numel() if is_divisible else 1
                turn(seat.trunk, [(seat, piece)])
            return is_short
        except (MemoryError, RuntimeError) as error:
            if not _can_begin_again(job, error):
                raise
            reason = str(error).strip().partition("\n")[0]
        is_short = True  # outside of the except block, which holds what the error's frames hold
        _halve(job, seat, tokens, reason)


def _can_begin_again(job: Job, error: BaseException) -> bool:
    if not memory.is_short(error):
        return False
    if job.sharded is not None:
        memory.note_kill(job.run_dir)
    return job.sharded is None


def _halve(job: Job, seat: Seat, tokens: int, reason: str) -> None:
    """Make this worker's micro-batches half as large as the one of `tokens` that did not fit."""
    log.warning("out_of_memory=%s tokens=%d reason=%r", job.run_dir.name, tokens, reason)
    seat.pending.clear()
    seat.trunk = replace(seat.trunk, memory=memory.halved(seat.trunk.memory, tokens))
    if job.trunk.base.device.type == "cuda":
        torch.cuda.empty_cache()


def _scored(job: Job, seat: Seat) -> Score:
    while True:
        try:
            if not seat.is_dpo:
                return score(seat.trunk, job.eval_examples, workers=job.workers)
            beta = job.recipe.objective.beta
            return score_pairs(seat.trunk, job.eval_examples, beta=beta, workers=job.workers)
        except (MemoryError, RuntimeError) as error:
            if not _can_begin_again(job, error):
                raise
            reason = str(error).strip().partition("\n")[0]
        _halve(job, seat, seat.trunk.memory.micro_batch_tokens, reason)


def _report_step(job: Job, number: int, step: Step, seconds: float) -> None:
    job.report(
        "step",
        step=number,
        num_steps=job.batches.num_steps,
        loss=step.loss,
        lr=step.rate,
        grad_norm=step.grad_norm,
        real_tokens=step.real_tokens,
        supervised_tokens=step.supervised_tokens,
        train_mean_token_accuracy=step.token_accuracy,
        **(step.rewards.fields() if step.rewards is not None else {}),
        step_s=round(seconds, 4),
    )
    if not step.is_applied:
        job.report(
            "warning",
            step=number,
            message=f"fp16 overflow at loss scale {step.scale:g}: "
            "the step was skipped and the scale halved",
        )


def _after_step(job: Job, seat: Seat, *, wants_stop: bool) -> None:
    """Evaluate and checkpoint where this step is due for it."""
    every = job.recipe.evaluation.every_steps
    step = seat.state.step
    is_best = False
    if len(job.eval_examples) and (seat.is_done or (every and step % every == 0)):
        found = _scored(job, seat)
        loss = found.loss
        is_best = seat.state.best_loss is None or loss < seat.state.best_loss
        scores = job.scores() if job.workers.is_first else {}
        job.report(
            "eval",
            step=step,
            loss=loss,
            is_best=is_best,
            valid_mean_token_accuracy=found.token_accuracy,
            **(found.rewards.fields() if found.rewards is not None else {}),
            **scores,
        )
        seat.state = replace(
            seat.state,
            best_loss=loss if is_best else seat.state.best_loss,
            best_step=step if is_best else seat.state.best_step,
            evals_without_gain=0 if is_best else seat.state.evals_without_gain + 1,
        )
    is_due = seat.is_done or wants_stop or step % job.recipe.checkpoint.every_steps == 0
    if is_due or is_best or _is_stale(seat):
        _save(job, seat)


def _save(job: Job, seat: Seat) -> None:
    packed = seat.optimizer.pack()
    if job.workers.is_first:
        path = checkpoint.save(
            job.run_dir,
            job.trunk.model,
            packed,
            seat.state,
            attempt=job.attempt,
            info=job.info,
        )
        if job.recipe.checkpoint.keep_adapters:
            _keep_adapter(job, path, seat.state.step)
        keep = job.recipe.checkpoint.keep
        checkpoint.prune(job.run_dir, keep=keep, best_step=seat.state.best_step)
        if job.mirror is not None:
            job.mirror.publish_checkpoint(path, keep=keep, best_step=seat.state.best_step)
        job.report("checkpoint", step=seat.state.step, path=path.name, **_totals(seat.state))
        if job.mirror is not None:
            job.mirror.flush()
    job.workers.wait()


def _keep_adapter(job: Job, path: Path, step: int) -> None:
    final = checkpoint.adapter_directory(job.run_dir, step)
    if not checkpoint.is_export_of(final, path):
        checkpoint.export(
            path,
            final,
            job.trunk.base.tokenizer,
            attempt=job.attempt,
            info={**job.info, "step": step},
            is_fenced=lambda: not ownership.is_current_attempt(job.run_dir, job.attempt),
        )


def _totals(state: State) -> dict[str, float]:
    return {
        "total_real_tokens": state.real_tokens,
        "total_supervised_tokens": state.supervised_tokens,
        "total_train_s": round(state.train_s, 3),
    }


def _is_held_back(job: Job, seat: Seat) -> bool:
    """Wait here if the run is held; whether it was asked to stop meanwhile."""
    if not job.is_held or seat.state.step % job.recipe.checkpoint.every_steps:
        return False
    asked = job.workers.is_first and not _may_pass(job.run_dir, seat.state.step)
    stop = torch.tensor([float(asked)], device=job.trunk.base.device)
    job.workers.sum_([stop])
    return bool(stop.item())


def _may_pass(run_dir: Path, step: int) -> bool:
    """Wait for `let_pass`; False where the run was asked to stop, or nobody came in time."""
    deadline = time.monotonic() + _HOLD_TIMEOUT_S
    while not stop_file(run_dir).exists():
        with suppress(FileNotFoundError):
            if int(_pass_file(run_dir).read_text(encoding="ascii")) >= step:
                return True
        if time.monotonic() > deadline:
            stop_file(run_dir).touch()
        time.sleep(_HOLD_POLL_S)
    return False


def _restore(job: Job, seat: Seat) -> None:
    """Resume from the checkpoint that the first worker finds; the others take the same."""
    path = _latest(job) if job.workers.is_first else None
    number = 0 if path is None else 1 + checkpoint.step_of(path)
    agreed = torch.tensor([float(number)], dtype=torch.float64, device=job.trunk.base.device)
    job.workers.sum_([agreed])  # the others have nothing to add
    if path is None and agreed.item():
        path = _same(job, int(agreed.item()) - 1)
    if path is not None:
        seat.resume_from(path)
        if job.workers.is_first and job.recipe.checkpoint.keep_adapters:
            _keep_adapter(job, path, seat.state.step)  # which was killed before it had


def _latest(job: Job) -> Path | None:
    def warn(message: str) -> None:
        job.report("warning", message=message)

    if job.mirror is not None:
        return job.mirror.fetch_latest(warn)
    return checkpoint.find_latest_valid(job.run_dir, on_broken=warn)


def _same(job: Job, step: int) -> Path:
    """The checkpoint of a step that another worker has chosen."""
    if job.mirror is not None:
        return job.mirror.fetch_step(step)
    path = checkpoint.directory(job.run_dir, step)
    storage.verify(path)
    return path


def _is_stale(seat: Seat) -> bool:
    patience = seat.recipe.evaluation.early_stopping
    return patience is not None and seat.state.evals_without_gain >= patience


def stop_file(run_dir: Path) -> Path:
    """Whoever creates this file asks the run to checkpoint after the current step and end."""
    return run_dir / "stop-requested"


def let_pass(run_dir: Path, step: int) -> None:
    """Let a run that is held go on after its checkpoint of `step`, up to the next one."""
    storage.write_file(_pass_file(run_dir), str(step).encode())


def _pass_file(run_dir: Path) -> Path:
    return run_dir / "may-pass"
