"""The training loop: accumulate, scale, clip, check, step, evaluate, checkpoint, report.

Exactness is the point. The loss of a step is the sum over the supervised tokens of the whole
global batch divided by their number, however the batch is cut into micro-batches or spread over
workers. The order of the data, the learning rate and dropout are functions of (seed, step), so a
resumed run is bitwise the uninterrupted one on the same kind of machine. A loss or gradient that
is not finite is seen before the optimiser moves.
"""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import bitsandbytes as bnb
import torch
from peft import PeftModel
from torch import Tensor
from torch.optim import AdamW, Optimizer

from cluster.errors import TrainingError
from training import checkpoint, packing
from training.checkpoint import State
from training.config import OptimConfig, TrainRecipe
from training.events import EventLog
from training.memory import MemoryPlan
from training.model import ADAPTER, Base, trainable
from training.objective import Objective
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
class Job:
    """Everything a run is made of on one worker."""

    recipe: TrainRecipe
    run_dir: Path
    attempt: int
    base: Base
    model: PeftModel
    router: Router
    objective: Objective
    batches: Batches
    eval_examples: Sequence[Encoded]
    memory: MemoryPlan
    workers: Workers
    events: EventLog | None
    """Only the first worker writes."""
    info: Mapping[str, Any]
    """What manifests say about where the adapter comes from."""
    clock: Callable[[], float] = time.perf_counter

    def report(self, kind: str, **fields: Any) -> None:
        """Write an event, if this worker is the one that does."""
        if self.events is not None:
            self.events.write(kind, **fields)


def fit(job: Job) -> State:
    """Train to the end, from the newest valid checkpoint where there is one; returns the end state.

    Raises TrainingError where a loss or gradient is not finite or a layer does not learn.
    """
    optimizer = make_optimizer(job.model, job.recipe.optim)
    scaler = torch.amp.GradScaler(job.base.device.type, enabled=job.base.precision == "fp16")
    initial = {n: p.detach().clone() for n, p in trainable(job.model).items()}
    state = _restore(job, optimizer, scaler)
    job.report(
        "started",
        attempt=job.attempt,
        pid=os.getpid(),
        from_step=state.step,
        num_steps=job.batches.num_steps,
        trainable_parameters=sum(p.numel() for p in initial.values()),
        workers=job.workers.size,
        **asdict(job.memory),
    )
    while state.step < job.batches.num_steps:
        before = state.applied_steps
        state, wants_stop = _step(job, optimizer, scaler, state)
        if before == 1 and state.applied_steps == 2:
            check_alive(initial, job.model)
            initial = {}
        state = _after_step(job, optimizer, state, wants_stop=wants_stop)
        if wants_stop or _is_stale(job.recipe, state):
            break
    return state


def make_optimizer(model: PeftModel, config: OptimConfig) -> Optimizer:
    """AdamW over the adapter; the learning rate is set at each step."""
    parameters = list(trainable(model).values())
    kind = bnb.optim.AdamW8bit if config.optimizer == "adamw_8bit" else AdamW
    return kind(parameters, lr=config.learning_rate, weight_decay=config.weight_decay)


def check_alive(initial: Mapping[str, Tensor], model: PeftModel) -> None:
    """Every adapter tensor differs from `initial` after two steps.

    B moves in the first step and A, whose gradient is zero while B is, in the second. Raises
    TrainingError naming the dead ones (transformers #42489: layers that never learn when
    checkpointing detaches their input).
    """
    dead = [n for n, p in trainable(model).items() if torch.equal(p.detach(), initial[n])]
    if dead:
        names = ", ".join(dead[:5]) + (f" and {len(dead) - 5} more" if len(dead) > 5 else "")
        raise TrainingError(
            f"{len(dead)} of {len(initial)} adapter tensors have not moved after two steps: "
            f"{names}. They get no gradient, or optim.learning_rate is too small to change them; "
            "leave those layers out of lora.target_modules, or raise the learning rate"
        )


def spans(batch: packing.MicroBatch, keys: Sequence[tuple[int, ...]]) -> tuple[Span, ...]:
    """Routing spans of a micro-batch whose examples are all the run's one adapter's.

    keys: for each example that the batch was planned from, what its dropout is keyed by.
    """
    length = batch.input_ids_BL.shape[1]
    return tuple(
        Span(
            adapter=ADAPTER,
            start=s.row * length + s.start,
            stop=s.row * length + s.stop,
            key=keys[s.example],
        )
        for s in batch.segments
    )


def eval_loss(job: Job) -> float:
    """Mean loss of a supervised token of the evaluation set, over all workers."""
    mine = share(job.eval_examples, job.workers.rank, job.workers.size)
    totals = torch.zeros(2, dtype=torch.float64, device=job.base.device)
    job.model.eval()
    with torch.no_grad(), job.base.autocast():
        for batch in _plan(job, mine):
            totals[0] += job.objective.loss_sum(batch).item()
            totals[1] += batch.num_supervised_tokens
    job.model.train()
    job.workers.sum_([totals])
    return float(totals[0] / totals[1])


def _step(
    job: Job, optimizer: Optimizer, scaler: torch.amp.GradScaler, state: State
) -> tuple[State, bool]:
    """One optimiser step: the state after it, and whether the run was asked to stop."""
    started = job.clock()
    rate = learning_rate(job.recipe.optim, step=state.step, num_steps=job.batches.num_steps)
    batch = job.batches.batch(state.step)
    job.model.train()
    loss_sum = _accumulate(job, batch, scaler, state.step)
    supervised = sum(e.num_supervised for _, e in batch)
    parameters = list(trainable(job.model).values())
    asked = job.workers.is_first and stop_file(job.run_dir).exists()
    stop = torch.tensor([float(asked)], device=job.base.device)
    _reduce(job.workers, parameters, loss_sum, stop)
    loss = loss_sum.item()
    scale = scaler.get_scale()
    norm, is_applied = _apply(job, optimizer, scaler, rate, loss, [e.id for _, e in batch], state)
    seconds = job.clock() - started
    real = sum(len(e.input_ids) for _, e in batch)
    state = replace(
        state,
        step=state.step + 1,
        applied_steps=state.applied_steps + is_applied,
        real_tokens=state.real_tokens + real,
        supervised_tokens=state.supervised_tokens + supervised,
        train_s=state.train_s + seconds,
        first_loss=loss if state.first_loss is None else state.first_loss,
        last_loss=loss,
        scaler=scaler.state_dict(),
    )
    job.report(
        "step",
        step=state.step,
        num_steps=job.batches.num_steps,
        loss=loss,
        lr=rate,
        grad_norm=norm,
        real_tokens=real,
        supervised_tokens=supervised,
        step_s=round(seconds, 4),
    )
    if not is_applied:
        job.report(
            "warning",
            step=state.step,
            message=f"fp16 overflow at loss scale {scale:g}: "
            "the step was skipped and the scale halved",
        )
    return state, bool(stop.item())


def _accumulate(
    job: Job, batch: Sequence[tuple[int, Encoded]], scaler: torch.amp.GradScaler, step: int
) -> Tensor:
    """Add up this worker's share of the gradients; returns its share of the mean loss, (1,)."""
    mine = share(batch, job.workers.rank, job.workers.size)
    supervised = sum(e.num_supervised for _, e in batch)
    seed = job.recipe.optim.seed
    keys = [(seed, step, number) for number, _ in mine]
    # Only DoRA's dropout, which is PEFT's, draws from the global generator.
    torch.manual_seed(hash((seed, step, job.workers.rank)) % (1 << 63))
    loss_sum = torch.zeros(1, dtype=torch.float32, device=job.base.device)
    for micro in _plan(job, [e for _, e in mine]):
        with job.router.use(spans(micro, keys)):
            with job.base.autocast():
                loss = job.objective.loss_sum(micro) / supervised
            scaler.scale(loss).backward()
        loss_sum += loss.detach()
    return loss_sum


def _reduce(workers: Workers, parameters: Sequence[Tensor], loss: Tensor, stop: Tensor) -> None:
    """One all-reduce of all gradients, the loss and the wish to stop."""
    for parameter in parameters:
        if parameter.grad is None:  # a worker whose share was empty, or a dead layer
            parameter.grad = torch.zeros_like(parameter)
    workers.sum_([*(p.grad for p in parameters if p.grad is not None), loss, stop])


def _apply(
    job: Job,
    optimizer: Optimizer,
    scaler: torch.amp.GradScaler,
    rate: float,
    loss: float,
    ids: Sequence[str],
    state: State,
) -> tuple[float, bool]:
    """Unscale, check, clip, step: the gradient's norm, and whether the optimiser moved."""
    scaler.unscale_(optimizer)
    grads = [p.grad for p in trainable(job.model).values() if p.grad is not None]
    norm = float(torch.nn.utils.get_total_norm(grads))
    is_finite = norm < float("inf")  # false for NaN too
    overflowed = not is_finite and scaler.is_enabled() and scaler.get_scale() > _MIN_SCALE
    if loss != loss or abs(loss) == float("inf") or not (is_finite or overflowed):
        raise _not_finite(state, loss, norm, ids)
    limit = job.recipe.optim.max_grad_norm
    if is_finite and limit:
        torch.nn.utils.clip_grads_with_norm_(
            trainable(job.model).values(), limit, torch.tensor(norm)
        )
    for group in optimizer.param_groups:
        group["lr"] = rate
    scaler.step(optimizer)  # passes over a step whose gradients are not finite
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return norm, is_finite


def _not_finite(state: State, loss: float, norm: float, ids: Sequence[str]) -> TrainingError:
    shown = ", ".join(ids[:8]) + (f" and {len(ids) - 8} more" if len(ids) > 8 else "")
    return TrainingError(
        f"step {state.step + 1}: loss {loss}, gradient norm {norm}; the optimiser did not step, "
        f"and the last checkpoint is good. Examples of the batch: {shown}. Lower "
        "optim.learning_rate, set optim.max_grad_norm, prefer model.precision bf16 or fp32 to "
        "fp16, and look at those examples"
    )


def _after_step(job: Job, optimizer: Optimizer, state: State, *, wants_stop: bool) -> State:
    """Evaluate and checkpoint where this step is due for it."""
    is_last = state.step == job.batches.num_steps
    every = job.recipe.evaluation.every_steps
    is_best = False
    if len(job.eval_examples) and (is_last or (every and state.step % every == 0)):
        loss = eval_loss(job)
        is_best = state.best_loss is None or loss < state.best_loss
        job.report("eval", step=state.step, loss=loss, is_best=is_best)
        state = replace(
            state,
            best_loss=loss if is_best else state.best_loss,
            best_step=state.step if is_best else state.best_step,
            evals_without_gain=0 if is_best else state.evals_without_gain + 1,
        )
    is_due = is_last or wants_stop or state.step % job.recipe.checkpoint.every_steps == 0
    if is_due or is_best or _is_stale(job.recipe, state):
        _save(job, optimizer, state)
    return state


def _save(job: Job, optimizer: Optimizer, state: State) -> None:
    if job.workers.is_first:
        path = checkpoint.save(
            job.run_dir, job.model, optimizer, state, attempt=job.attempt, info=job.info
        )
        keep = job.recipe.checkpoint.keep
        checkpoint.prune(job.run_dir, keep=keep, best_step=state.best_step)
        job.report("checkpoint", step=state.step, path=path.name)
    job.workers.wait()


def _restore(job: Job, optimizer: Optimizer, scaler: torch.amp.GradScaler) -> State:
    if not job.workers.is_first:
        job.workers.wait()  # what is broken is quarantined once, by the first worker
    path = checkpoint.find_latest_valid(
        job.run_dir, on_broken=lambda message: job.report("warning", message=message)
    )
    if job.workers.is_first:
        job.workers.wait()
    if path is None:
        return State()
    state = checkpoint.restore(path, job.model, optimizer)
    if state.scaler:
        scaler.load_state_dict(dict(state.scaler))
    return state


def _is_stale(recipe: TrainRecipe, state: State) -> bool:
    patience = recipe.evaluation.early_stopping
    return patience is not None and state.evals_without_gain >= patience


def _plan(job: Job, examples: Sequence[Encoded]) -> list[packing.MicroBatch]:
    batches = packing.plan(
        examples,
        micro_batch_tokens=job.memory.micro_batch_tokens,
        is_packed=job.memory.is_packed,
        pad_id=job.memory.pad_id,
    )
    return [b.to(job.base.device) for b in batches]


def stop_file(run_dir: Path) -> Path:
    """Whoever creates this file asks the run to checkpoint after the current step and end."""
    return run_dir / "stop-requested"
