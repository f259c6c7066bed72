"""What each Ray Train worker runs; plain Python, so that tests and `--local` run it without Ray."""

import hashlib
import json
import logging
import platform
import resource
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel

from cluster import __version__, config, ownership, storage
from cluster.errors import DataError, FencedError, LorayError, ResourceError, StorageError
from cluster.remote import is_url
from training import (
    checkpoint,
    dataset,
    loop,
    memory,
    model,
    objective,
    special_ids,
    strategy,
)
from training.checkpoint import State
from training.config import TrainRecipe
from training.events import EventLog
from training.memory import MemoryPlan
from training.mirror import Mirror
from training.model import Base
from training.strategy import Workers
from training.trunk import Trunk
from training.zero import Sharded

if TYPE_CHECKING:  # it is needed at the end only
    from training.evaluate import Estimate

log = logging.getLogger(__name__)


def run(
    recipe: TrainRecipe,
    run_dir: Path,
    *,
    workers: Workers,
    device: torch.device,
    workers_here: int,
    seen: dataset.Seen | None = None,
    is_held: bool = False,
    is_told_to_end: Callable[[], bool] = lambda: False,
) -> None:
    """Train a recipe whose paths are absolute into `run_dir`; the result is its last event.

    Where its storage is an object store, `run_dir` is that of its mirror.

    workers_here: how many workers share this machine's memory. seen: the data as the driver saw it;
    None takes it as it is. is_held, is_told_to_end: see loop.Job. Raises LorayError, the reason
    being in the run's events by then if they can be written, and loop.ToldToEnd.
    """
    mirror = Mirror.of(recipe)
    events = EventLog(run_dir / "events.jsonl") if workers.is_first else None
    try:
        _run(
            recipe,
            run_dir,
            workers,
            device,
            workers_here,
            seen,
            events,
            mirror,
            is_held,
            is_told_to_end,
        )
    except FencedError:
        raise  # the run has not failed: it goes on elsewhere, and its story is told there
    except LorayError as error:
        if events is not None:
            with suppress(StorageError):  # a full disk has no room for saying so
                events.write("failed", sync=True, code=error.code, message=str(error))
        raise
    finally:
        if events is not None:
            events.close()
        if mirror is not None:
            mirror.close()


def _run(
    recipe: TrainRecipe,
    run_dir: Path,
    workers: Workers,
    device: torch.device,
    workers_here: int,
    seen: dataset.Seen | None,
    events: EventLog | None,
    mirror: Mirror | None,
    is_held: bool,
    is_told_to_end: Callable[[], bool],
) -> None:
    started = time.perf_counter()
    attempt = _begin(run_dir, mirror) if workers.is_first else 0
    _require_memory(recipe, device, workers_here)
    base = model.load_base(recipe.model, device=device)
    peft_model, router = model.attach_lora(base, recipe.lora, seed=recipe.optim.seed)
    vocab_size = base.model.config.get_text_config().vocab_size
    data = dataset.load(
        recipe, base.tokenizer, base.generation_eos, vocab_size=vocab_size, seen=seen
    )
    if seen is not None and seen.fingerprint != data.fingerprint:
        raise DataError(
            "the training examples on this worker are not those that the driver saw: a file was "
            "changed meanwhile, or this node holds another copy; put the data where all nodes "
            "read the same files"
        )
    special_ids.check_special_ids(base.tokenizer, base.model.config, base.generation_eos)
    pad_id = special_ids.choose_pad_id(base.tokenizer, vocab_size=vocab_size)
    chosen = objective.probe(
        peft_model, memory.random_probe(vocab_size, pad_id).to(device), base.autocast
    )
    plan = _agree_on_memory(
        recipe, run_dir, base, chosen, data, pad_id, workers, workers_here, mirror, events
    )
    memory.set_checkpointing(chosen, is_on=plan.gradient_checkpointing)
    trained = sum(p.numel() for p in model.trainable(peft_model).values())
    sharded = _sharded(recipe, base, peft_model, chosen, workers)
    storage.require_free(
        run_dir, 12 * trained * (recipe.checkpoint.keep + 2), purpose="checkpoints of the adapter"
    )
    batches = (
        dataset.SetBatches(data.train, recipe)
        if data.train is not None
        else dataset.StreamBatches(recipe, data.encoder, workers=workers, device=device)
    )

    def scores() -> dict[str, float]:
        return {n: e.value for n, e in _generated(recipe, base, peft_model, data).items()}

    job = loop.Job(
        recipe=recipe,
        run_dir=run_dir,
        attempt=attempt,
        trunk=Trunk(
            base=base,
            objective=sharded.objective if sharded is not None else chosen,
            router=router,
            memory=plan,
        ),
        batches=batches,
        eval_examples=data.eval if data.eval is not None else (),
        workers=workers,
        events=events,
        info=provenance(recipe, base, data),
        mirror=mirror,
        is_held=is_held,
        is_told_to_end=is_told_to_end,
        sharded=sharded,
        scores=scores if recipe.evaluation.metrics_during_run else dict,
    )
    state = loop.fit(job)
    if workers.is_first:
        was_stopped = state.step < batches.num_steps and loop.stop_file(run_dir).exists()
        _finish(job, data, state, started, was_stopped=was_stopped)
    workers.wait()


def _sharded(
    recipe: TrainRecipe,
    base: Base,
    peft_model: PeftModel,
    chosen: objective.Objective,
    workers: Workers,
) -> Sharded | None:
    """What steps the adapter where the recipe asks for ZeRO."""
    kind = strategy.check(recipe)
    if kind not in strategy.ZERO:
        return None
    return Sharded(
        model.adapter_parameters(peft_model),
        recipe,
        stage=strategy.ZERO.index(kind) + 1,
        base=base,
        objective=chosen,
        workers=workers,
    )


def _begin(run_dir: Path, mirror: Mirror | None) -> int:
    """Fence earlier attempts off, and clean up after one that was killed while it saved."""
    attempt = ownership.next_attempt(run_dir) if mirror is None else mirror.begin()
    checkpoint.clean(run_dir)
    return attempt


def provenance(recipe: TrainRecipe, base: Base, data: dataset.Dataset) -> dict[str, Any]:
    """What an adapter's manifest says of where it comes from."""
    body = json.dumps(config.plain(recipe), sort_keys=True)
    return {
        "loray_version": __version__,
        "base_model": base.name,
        "base_fingerprint": base.fingerprint,
        "tokenizer_fingerprint": model.tokenizer_fingerprint(base.tokenizer),
        "quantization": base.quantization,
        "precision": base.precision,
        "recipe_sha256": hashlib.sha256(body.encode()).hexdigest(),
        "data_fingerprint": data.fingerprint,
        "template": data.encoder.template_name,
        "mask": data.encoder.mask,
        "max_length": data.encoder.max_length,
    }


def _finish(
    job: loop.Job, data: dataset.Dataset, state: State, started: float, *, was_stopped: bool
) -> None:
    """Commit `<run>/adapter` from the chosen checkpoint, evaluate it, write the last event."""
    step, source = _chosen(job, state)
    checkpoint.load_adapter(source, job.trunk.model)
    scores = _evaluate(job, data, state)
    final = job.run_dir / "adapter"
    checkpoint.export(
        source,
        final,
        job.trunk.base.tokenizer,
        attempt=job.attempt,
        info={**job.info, "step": step, "eval": scores},
        is_fenced=lambda: not ownership.is_current_attempt(job.run_dir, job.attempt),
    )
    if job.mirror is not None:
        job.mirror.publish_adapter()
    seconds = state.train_s
    job.report(
        "finished",
        was_stopped=was_stopped,
        adapter=str(final),
        adapter_step=step,
        steps=state.step,
        num_steps=job.batches.num_steps,
        skipped_steps=state.step - state.applied_steps,
        first_loss=state.first_loss,
        final_loss=state.last_loss,
        eval=scores,
        real_tokens=state.real_tokens,
        supervised_tokens=state.supervised_tokens,
        real_tokens_per_s=round(state.real_tokens / seconds, 2) if seconds else None,
        train_wall_s=round(seconds, 3),
        worker_wall_s=round(time.perf_counter() - started, 3),
        peak_rss_bytes=peak_rss_bytes(),
    )
    if job.mirror is not None:
        job.mirror.flush()


def _chosen(job: loop.Job, state: State) -> tuple[int, Path]:
    """The checkpoint that becomes the adapter: the best, or the last where that one is damaged.

    Raises StorageError where the last is damaged too; the run then goes on from the one before.
    """
    wants_best = job.recipe.evaluation.best == "loss" and state.best_step is not None
    steps = [state.best_step, state.step] if wants_best else [state.step]
    reason = ""
    for step in steps:
        assert step is not None
        source = checkpoint.directory(job.run_dir, step)
        try:
            if job.mirror is not None:
                job.mirror.fetch_step(step)  # this machine may not have seen the best one
            storage.verify(source)
        except StorageError as error:
            reason = str(error)
            if source.exists():
                storage.quarantine(source, reason)
            job.report("warning", step=step, message=f"checkpoint {source.name}: {reason}")
        else:
            return step, source
    raise StorageError(
        f"the checkpoint that was to become the adapter is damaged ({reason}) and was set aside; "
        "the same command goes on from the one before"
    )


def _evaluate(job: loop.Job, data: dataset.Dataset, state: State) -> dict[str, Any]:
    """The recipe's metrics of the loaded adapter, as the manifest and the last event carry them."""
    if data.eval is None or not job.recipe.data.eval:
        return {}
    generated = _generated(job.recipe, job.trunk.base, job.trunk.model, data)
    return {"loss": state.best_loss, **{n: config.plain(e) for n, e in generated.items()}}


def _generated(
    recipe: TrainRecipe, base: Base, model: PeftModel, data: dataset.Dataset
) -> Mapping[str, "Estimate"]:
    """The recipe's metrics that are measured on generated text."""
    metrics = [m for m in recipe.evaluation.metrics if m != "loss"]
    if not metrics or not recipe.data.eval:
        return {}
    from training import evaluate, examples

    rows = examples.read(
        recipe.data.eval, format=recipe.row_format, on_bad_row=recipe.data.on_bad_row
    )
    return evaluate.evaluate(base, model, rows.examples, data.encoder, metrics).metrics


def _agree_on_memory(
    recipe: TrainRecipe,
    run_dir: Path,
    base: Base,
    chosen: objective.Objective,
    data: dataset.Dataset,
    pad_id: int,
    workers: Workers,
    workers_here: int,
    mirror: Mirror | None,
    events: EventLog | None,
) -> MemoryPlan:
    """The run's stored plan, decided by the first worker where there is none.

    Micro-batches are halved where the last attempt was killed for memory.
    """
    longest = (
        recipe.data.max_length
        if data.train is None
        else max(s.longest for s in (data.train, data.eval) if s is not None)
    )
    longest *= recipe.objective.num_sequences  # which are in one micro-batch
    if mirror is not None and workers.is_first:
        mirror.pull(memory.PLAN)
    plan = memory.stored(run_dir)
    if workers.is_first and plan is not None and memory.was_killed(run_dir):
        share = -(-recipe.optim.global_batch_size // workers.size)
        plan = memory.shrink(run_dir, plan, longest_tokens=longest, most_tokens=share * longest)
        if events is not None:
            events.write(
                "warning",
                message="a worker was killed for memory: from here on micro-batches have up to "
                f"{plan.micro_batch_tokens} tokens, with the same global batch",
            )
    elif workers.is_first and plan is None:
        plan = memory.decide(
            recipe,
            base,
            chosen,
            longest_tokens=longest,
            pad_id=pad_id,
            workers_here=workers_here,
        )
        memory.store(run_dir, plan)
    if mirror is not None and workers.is_first:
        mirror.push(memory.PLAN)
    workers.wait()
    if mirror is not None and not workers.is_first:
        mirror.pull(memory.PLAN)
    plan = memory.stored(run_dir)
    assert plan is not None
    return plan


def _require_memory(recipe: TrainRecipe, device: torch.device, workers_here: int) -> None:
    """Refuse before loading what would be killed while loading."""
    directory = model.resolve(recipe.model.base, recipe.model.revision)
    stored = sum(p.stat().st_size for p in directory.glob("*.safetensors"))
    factor = {"int8": 0.6, "nf4": 0.4, "none": 1.0}[recipe.model.quantization]
    if device.type == "cpu" and recipe.model.quantization == "none":
        factor = 2.0  # half-precision files, fp32 in memory
    needed, free = stored * factor, memory.free_bytes(device) / workers_here
    if needed > free:
        raise ResourceError(
            f"model.base {recipe.model.base!r} needs about {needed / 1e9:.1f} GB of {device.type} "
            f"memory as {recipe.model.quantization}, but {free / 1e9:.1f} GB are free for each of "
            f"{workers_here} workers. Use a smaller base, model.quantization: nf4, or fewer workers"
        )


def peak_rss_bytes() -> int:
    """Largest resident memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024


def ray_worker(spec: dict[str, Any]) -> None:
    """The train function of TorchTrainer: find out who we are, then `run`.

    A LorayError ends the run: see `training.failures`.
    """
    import ray.train
    import ray.train.torch

    from training import notice

    context = ray.train.get_context()
    workers = Workers(rank=context.get_world_rank(), size=context.get_world_size())
    device = ray.train.torch.get_device()
    torch.set_num_threads(spec["threads"])
    recipe = config.build(TrainRecipe, spec["recipe"], where="recipe")
    mirror = Mirror.of(recipe)
    run_dir = Path(spec["run_dir"]) if mirror is None else mirror.run_dir
    storage.make_directory(run_dir)
    run(
        recipe,
        run_dir,
        workers=workers,
        device=device,
        workers_here=context.get_local_world_size(),
        seen=dataset.Seen(**spec["seen"]),
        is_held=spec["is_held"],
        is_told_to_end=notice.has_come,
    )


def with_absolute_paths(recipe: TrainRecipe) -> TrainRecipe:
    """The recipe as it reads from any directory: workers do not run in the driver's."""

    def absolute(source: str) -> str:
        if source == "demo":
            return source
        found = Path(source).expanduser()
        is_local = found.exists() or any(mark in source for mark in "*?[")
        return str(found.absolute()) if is_local else source

    def each(source: str | tuple[str, ...] | None) -> str | tuple[str, ...] | None:
        return (
            tuple(map(absolute, source))
            if isinstance(source, tuple)
            else (absolute(source) if source is not None else None)
        )

    place = recipe.storage
    train = each(recipe.data.train)
    assert train is not None
    return replace(
        recipe,
        storage=place if is_url(place) else str(Path(place).absolute()),
        model=replace(recipe.model, base=absolute(recipe.model.base)),
        data=replace(recipe.data, train=train, eval=each(recipe.data.eval)),
    )
