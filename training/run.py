"""The driver of a run: check, lock, start the Ray Train workers, watch, collect the result.

A run's directory is its only state. The same command on the same directory takes up where the
newest valid checkpoint is; Ray's own state is thrown away with the session.
"""

import json
import logging
import os
import platform
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster import __version__, config, ownership, session, storage
from cluster.errors import (
    ClusterError,
    ConfigError,
    ResourceError,
    StorageError,
)
from cluster.lease import Lease
from training import checkpoint, dataset, loop, memory, model, sinks, special_ids, strategy, worker
from training.config import ScaleConfig, TrainRecipe
from training.dataset import Dataset
from training.events import Event, EventReader, telling_of_failure
from training.mirror import Mirror
from training.segments import SegmentReader

if TYPE_CHECKING:  # Ray Train takes seconds to import, which an error in the data must not cost
    from training.trainer import Outcome

log = logging.getLogger(__name__)

Watcher = Callable[[Event], None]
_POLL_S = 0.2
_REMOTE_POLL_S = 1.0
_CHANGEABLE = ("storage", "scale.max_failures", "checkpoint.", "log.")
"""Settings that a resumed run may change, since they do not change what is learned."""
_LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "ray")


def train(
    recipe: TrainRecipe,
    *,
    say: Callable[[str], None],
    watch: Watcher,
    address: str | None = None,
    scale: ScaleConfig | None = None,
    is_held: bool = False,
) -> dict[str, Any]:
    """Run a recipe to its end on Ray, resuming where it was run before; returns its result.

    say: told what a person should read before training starts. watch: told each event.
    address: of a Ray cluster; None uses RAY_ADDRESS, or starts a private one on this machine.
    scale: what the recipe's `scale` comes to where several runs share the cluster. is_held: the run
    waits after each checkpoint until `loop.let_pass`.
    Raises LorayError. The first Ctrl-C or SIGTERM stops after the current step with a checkpoint,
    the second at once (KeyboardInterrupt).
    """
    started = time.perf_counter()
    strategy.check(recipe)
    recipe, run_dir, mirror = _locate(recipe)
    place = mirror.url if mirror else str(run_dir)
    with (
        ownership.RunLock(run_dir),
        mirror.held() if mirror else nullcontext() as lease,
        nullcontext() if mirror else telling_of_failure(run_dir / "events.jsonl"),
    ):
        _clean(run_dir)
        if mirror is not None:
            reader = mirror.follow()
        else:
            reader = EventReader(run_dir / "events.jsonl", offset=_size(run_dir / "events.jsonl"))
        data = inspect(recipe, say)
        _claim(run_dir, recipe, data.fingerprint)
        if mirror is not None:
            mirror.push("recipe.json")
        done = _finished(run_dir, mirror)
        if done is not None:
            say(f"{place} is finished; nothing to train. Another run wants another name")
            return _result(run_dir, mirror, done, resumed_from=None, started=started)
        last: dict[str, Event] = {}
        with (
            session.connect(address) as ray_session,
            sinks.opened(recipe.log.to, run_dir) as tell_sinks,
            _sigterm_as_interrupt(),
        ):
            from training import trainer

            say(f"run directory {place}" + (f", copied to {run_dir}" if mirror else ""))
            here = replace(recipe, scale=scale or recipe.scale)
            outcome = trainer.start(here, run_dir, data.seen, ray_session, is_held=is_held)
            for event in _follow(outcome, reader, run_dir, say, mirror, lease):
                last.setdefault(f"first {event.kind}", event)
                last[event.kind] = event
                watch(event)
                tell_sinks(event)
        if mirror is not None:
            mirror.follow()
        _raise_failure(run_dir, place, outcome)
        if "finished" not in last:
            raise ClusterError(f"the workers ended without a result; see {run_dir}/events.jsonl")
        if mirror is not None:
            mirror.fetch_adapter()
        from_step = int(last["first started"].number("from_step"))
        return _result(run_dir, mirror, last["finished"], resumed_from=from_step, started=started)


def _locate(recipe: TrainRecipe) -> tuple[TrainRecipe, Path, Mirror | None]:
    """The recipe with absolute paths; the run's directory here; its mirror if it is in a store."""
    mirror = Mirror.of(recipe)
    if mirror is None:
        root = session.storage_root(recipe.storage)
        run_dir = root / recipe.name
        recipe = replace(recipe, storage=str(root))
    else:
        mirror.check()
        run_dir = mirror.run_dir
    _require_writable(run_dir)
    return worker.with_absolute_paths(recipe), run_dir, mirror


def inspect(recipe: TrainRecipe, say: Callable[[str], None]) -> Dataset:
    """Read and tokenise a recipe's data, say what it looks like, refuse what cannot be trained.

    Loads the base's tokenizer and configuration, not its weights.
    """
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    directory = model.resolve(recipe.model.base, recipe.model.revision)
    remote = recipe.model.trust_remote_code
    try:
        settings = AutoConfig.from_pretrained(directory, trust_remote_code=remote)
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=remote)
    except Exception as error:  # transformers raises many kinds
        raise model.unloadable(recipe.model.base, directory, error) from error
    eos = settings.eos_token_id
    if (directory / "generation_config.json").exists():
        eos = GenerationConfig.from_pretrained(directory).eos_token_id or eos
    special_ids.check_special_ids(tokenizer, settings, eos)
    vocab_size = settings.get_text_config().vocab_size
    data = dataset.load(recipe, tokenizer, eos, vocab_size=vocab_size)
    for line in data.report.lines():
        say(line)
    return data


def tokens_per_example(recipe: TrainRecipe) -> float:
    """Supervised tokens of a training example, on average; of a stream's first rows."""
    report = inspect(recipe, lambda _: None).report
    return report.num_supervised / report.num_examples


def _follow(
    outcome: "Outcome",
    reader: EventReader | SegmentReader,
    run_dir: Path,
    say: Callable[[str], None],
    mirror: Mirror | None,
    lease: Lease | None,
) -> Iterator[Event]:
    interrupts = 0
    is_over = False
    while not is_over:
        try:
            is_over = outcome.is_over(_POLL_S if mirror is None else _REMOTE_POLL_S)
            if lease is not None:
                lease.require()
            yield from reader.read()
        except KeyboardInterrupt:
            interrupts += 1
            if interrupts > 1:
                raise
            say(
                "stopping after this step, with a checkpoint; Ctrl-C or SIGTERM again stops at once"
            )
            if mirror is None:
                loop.stop_file(run_dir).touch()
            else:
                mirror.request_stop()


@contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    """SIGTERM is a notice: `ray job stop`, SLURM and Kubernetes send it ahead of SIGKILL."""
    if threading.current_thread() is not threading.main_thread():
        yield  # of a search, which has a process of its own for signals
        return

    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _claim(run_dir: Path, recipe: TrainRecipe, data_fingerprint: str) -> None:
    """Write recipe.json for a new run; compare with it for one that is resumed."""
    path = run_dir / "recipe.json"
    plain = config.plain(recipe)
    if path.exists():
        stored = json.loads(path.read_text(encoding="utf-8"))
        # Of an earlier version, which lacks what has been added since.
        before = config.plain(config.build(TrainRecipe, stored["recipe"], where=str(path)))
        lines = [
            line for line in config.difference(before, plain) if not line.startswith(_CHANGEABLE)
        ]
        if stored["data_fingerprint"] != data_fingerprint:
            lines.append("the training examples themselves (files, template or tokenizer)")
        if lines:
            changes = "\n  ".join(lines)
            raise ConfigError(
                f"{run_dir} was started with another recipe:\n  {changes}\n"
                "Undo the change, or give the run another name"
            )
    body = {
        "recipe": plain,
        "data_fingerprint": data_fingerprint,
        "seed": recipe.optim.seed,
        "versions": {
            "loray": __version__,
            "python": platform.python_version(),
            **{name: version(name) for name in _LIBRARIES},
        },
    }
    storage.write_file(path, json.dumps(body, indent=1).encode())


def _finished(run_dir: Path, mirror: Mirror | None) -> Event | None:
    """The event of a run that reached its end and whose adapter still verifies."""
    ended = None
    for event in EventReader(run_dir / "events.jsonl").read():
        if event.kind in ("started", "finished", "failed"):
            ended = event
    if ended is None or ended.kind != "finished" or ended.fields.get("was_stopped"):
        return None
    if mirror is not None:
        mirror.fetch_adapter()
    try:
        storage.verify(run_dir / "adapter")
    except StorageError as error:
        log.warning("adapter=damaged reason=%s", error)
        return None
    return ended


def _result(
    run_dir: Path,
    mirror: Mirror | None,
    finished: Event,
    *,
    resumed_from: int | None,
    started: float,
) -> dict[str, Any]:
    names = (
        "adapter", "steps", "num_steps", "was_stopped", "first_loss", "final_loss", "eval",
        "real_tokens", "supervised_tokens", "real_tokens_per_s", "train_wall_s", "peak_rss_bytes",
    )  # fmt: skip
    return {
        "run_dir": str(run_dir),
        **{name: finished.fields.get(name) for name in names},
        **({"adapter": str(run_dir / "adapter")} if mirror else {}),  # not the worker's machine's
        "adapter_url": f"{mirror.url}/adapter" if mirror else None,
        "wall_s": round(time.perf_counter() - started, 3),
        "resumed_from": resumed_from or None,
    }


def _raise_failure(run_dir: Path, place: str, outcome: "Outcome") -> None:
    """Raise what a worker said, or what Ray did."""
    from training import failures

    reason = failures.reason(outcome.error)
    if reason is not None:
        raise reason
    if outcome.error is not None and memory.was_killed(run_dir):
        raise ResourceError(
            f"workers were killed for memory until scale.max_failures was used up, the last time "
            f"with micro-batches of {_micro_batch_tokens(run_dir)} tokens. The same command goes "
            "on with half of that, where a micro-batch still holds more than one example; else "
            "lower data.max_length or scale.workers, set memory.gradient_checkpointing: on or "
            f"model.quantization: nf4, or use a larger machine. Checkpoints are kept in {place}"
        )
    if outcome.error is not None and failures.is_of_low_memory(outcome.error):
        raise ResourceError(
            "Ray killed workers before they trained, since their node was low on memory. End what "
            "else runs there, lower scale.workers or model.base, set model.quantization: nf4, or "
            f"use a larger machine. Checkpoints are kept in {place}"
        )
    if outcome.error is not None:
        raise ClusterError(
            f"Ray Train gave up: {str(outcome.error).strip()[-2000:]}\nThe run's checkpoints are "
            f"kept in {place}; the same command resumes it"
        ) from outcome.error


def _clean(run_dir: Path) -> None:
    checkpoint.clean(run_dir)
    loop.stop_file(run_dir).unlink(missing_ok=True)


def _micro_batch_tokens(run_dir: Path) -> int | str:
    plan = memory.stored(run_dir)
    return "unknown" if plan is None else plan.micro_batch_tokens


def _require_writable(run_dir: Path) -> None:
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(
            f"storage: cannot create {run_dir} ({error.strerror}); name a directory that you may "
            "write to, by storage=..."
        ) from None
    if not os.access(run_dir, os.W_OK):
        raise StorageError(f"storage: {run_dir} is not writable; choose another by storage=")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
