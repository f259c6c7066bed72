"""The driver of a run: check, lock, start the Ray Train workers, watch, collect the result.

A run's directory is its only state. The same command on the same directory takes up where the
newest valid checkpoint is; Ray's own state is thrown away with the session.
"""

import json
import logging
import os
import platform
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from cluster import __version__, config, errors, ownership, session, storage
from cluster.errors import ClusterError, ConfigError, LorayError, ResourceError
from training import dataset, loop, model, sinks, special_ids, strategy, worker
from training.config import TrainRecipe
from training.dataset import Dataset
from training.events import Event, EventReader

log = logging.getLogger(__name__)

Watcher = Callable[[Event], None]
_POLL_S = 0.2
_GROUP_TIMEOUT_S = 1800
"""Longest wait of a worker for the others, which may be evaluating by generation."""
_CHANGEABLE = ("storage", "scale.max_failures", "checkpoint.", "log.")
"""Settings that a resumed run may change, since they do not change what is learned."""
_LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "ray")


def train(
    recipe: TrainRecipe,
    *,
    say: Callable[[str], None],
    watch: Watcher,
    address: str | None = None,
) -> dict[str, Any]:
    """Run a recipe to its end on Ray, resuming where it was run before; returns its result.

    say: told what a person should read before training starts. watch: told each event.
    address: of a Ray cluster; None uses RAY_ADDRESS, or starts a private one on this machine.
    Raises LorayError. The first Ctrl-C stops after the current step with a checkpoint, the second
    at once (KeyboardInterrupt).
    """
    started = time.perf_counter()
    strategy.check(recipe)
    root = session.storage_root(recipe.storage)
    run_dir = root / recipe.name
    recipe = worker.with_absolute_paths(replace(recipe, storage=str(root)))
    _require_writable(run_dir)
    with ownership.RunLock(run_dir):
        _clean(run_dir)
        data = inspect(recipe, say)
        _claim(run_dir, recipe, data.fingerprint)
        done = _finished(run_dir)
        if done is not None:
            say(f"{run_dir} is finished; nothing to train. Another run wants another name")
            return _result(run_dir, done, resumed_from=None, started=started)
        reader = EventReader(run_dir / "events.jsonl", offset=_size(run_dir / "events.jsonl"))
        last: dict[str, Event] = {}
        with (
            session.connect(address) as ray_session,
            sinks.opened(recipe.log.to, run_dir) as tell_sinks,
        ):
            say(f"run directory {run_dir}")
            outcome = _fit_in_background(recipe, run_dir, data.fingerprint, ray_session)
            for event in _follow(outcome, reader, run_dir, say):
                last.setdefault(f"first {event.kind}", event)
                last[event.kind] = event
                watch(event)
                tell_sinks(event)
        _raise_failure(run_dir, outcome)
        if "finished" not in last:
            raise ClusterError(f"the workers ended without a result; see {run_dir}/events.jsonl")
        from_step = int(last["first started"].number("from_step"))
        return _result(run_dir, last["finished"], resumed_from=from_step, started=started)


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


def _fit_in_background(
    recipe: TrainRecipe, run_dir: Path, data_fingerprint: str, ray_session: session.Session
) -> "_Outcome":
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    cpus, gpus = _share_out(recipe, ray_session)
    spec = {
        "recipe": config.plain(recipe),
        "run_dir": str(run_dir),
        "data_fingerprint": data_fingerprint,
        "threads": cpus,
    }
    # Ray's state of the run is not used: our checkpoints are the truth, so it gets a throw-away
    # place (a truncated checkpoint_manager_snapshot.json makes a run of Ray 2.60 unresumable).
    scratch = tempfile.TemporaryDirectory(prefix="loray-train-", ignore_cleanup_errors=True)
    trainer = TorchTrainer(
        worker.ray_worker,
        train_loop_config=spec,
        torch_config=TorchConfig(timeout_s=_GROUP_TIMEOUT_S),
        scaling_config=ScalingConfig(
            num_workers=recipe.scale.workers,
            use_gpu=gpus > 0,
            resources_per_worker={"CPU": cpus, **({"GPU": gpus} if gpus else {})},
        ),
        run_config=RunConfig(
            name=recipe.name,
            storage_path=scratch.name,
            failure_config=FailureConfig(max_failures=recipe.scale.max_failures),
        ),
    )
    return _Outcome(trainer.fit, scratch)


class _Outcome:
    """A call in a thread: Ctrl-C must reach the main thread, not Ray's own handler."""

    def __init__(self, call: Callable[[], object], scratch: tempfile.TemporaryDirectory[str]):
        self.error: BaseException | None = None
        self._call = call
        self._scratch = scratch
        self._ended = threading.Event()
        threading.Thread(target=self._run, name="ray-train-fit", daemon=True).start()

    def _run(self) -> None:
        try:
            self._call()
        except BaseException as error:  # handed over to the main thread
            self.error = error
        finally:
            self._scratch.cleanup()
            self._ended.set()

    def is_over(self, timeout_s: float) -> bool:
        """Wait up to `timeout_s`; whether the call has ended."""
        # Not Thread.join: interrupted, it takes the thread for stopped (bpo-45274, Python 3.11).
        return self._ended.wait(timeout_s)


def _follow(
    outcome: _Outcome, reader: EventReader, run_dir: Path, say: Callable[[str], None]
) -> Iterator[Event]:
    interrupts = 0
    is_over = False
    while not is_over:
        try:
            is_over = outcome.is_over(_POLL_S)
            yield from reader.read()
        except KeyboardInterrupt:
            interrupts += 1
            if interrupts > 1:
                raise
            say("stopping after this step, with a checkpoint; Ctrl-C again stops at once")
            loop.stop_file(run_dir).touch()


def _share_out(recipe: TrainRecipe, ray_session: session.Session) -> tuple[int, int]:
    """CPUs and GPUs of each worker."""
    workers = recipe.scale.workers
    gpus = recipe.scale.gpus_per_worker
    if gpus == "auto":
        gpus = 1 if ray_session.num_gpus >= workers else 0
    cpus = recipe.scale.cpus_per_worker
    if cpus == "auto":
        cpus = max(1, int(ray_session.num_cpus) // workers)
    for name, wanted, there in (
        ("CPUs", cpus * workers, ray_session.num_cpus),
        ("GPUs", gpus * workers, ray_session.num_gpus),
    ):
        if wanted > there:
            raise ResourceError(
                f"scale asks for {wanted} {name} ({workers} workers), the cluster has {there:g}; "
                f"lower scale.workers or scale.{name[:-1].lower()}s_per_worker, or add nodes"
            )
    return cpus, gpus


def _claim(run_dir: Path, recipe: TrainRecipe, data_fingerprint: str) -> None:
    """Write recipe.json for a new run; compare with it for one that is resumed."""
    path = run_dir / "recipe.json"
    plain = config.plain(recipe)
    if path.exists():
        stored = json.loads(path.read_text(encoding="utf-8"))
        lines = [
            line
            for line in config.difference(stored["recipe"], plain)
            if not line.startswith(_CHANGEABLE)
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


def _finished(run_dir: Path) -> Event | None:
    """The event of a run that reached its end and whose adapter still verifies."""
    ended = None
    for event in EventReader(run_dir / "events.jsonl").read():
        if event.kind in ("started", "finished", "failed"):
            ended = event
    if ended is None or ended.kind != "finished" or ended.fields.get("was_stopped"):
        return None
    try:
        storage.verify(run_dir / "adapter")
    except errors.StorageError as error:
        log.warning("adapter=damaged reason=%s", error)
        return None
    return ended


def _result(
    run_dir: Path, finished: Event, *, resumed_from: int | None, started: float
) -> dict[str, Any]:
    names = (
        "adapter", "steps", "num_steps", "was_stopped", "first_loss", "final_loss", "eval",
        "real_tokens", "supervised_tokens", "real_tokens_per_s", "train_wall_s", "peak_rss_bytes",
    )  # fmt: skip
    return {
        "run_dir": str(run_dir),
        **{name: finished.fields.get(name) for name in names},
        "wall_s": round(time.perf_counter() - started, 3),
        "resumed_from": resumed_from or None,
    }


def _raise_failure(run_dir: Path, outcome: _Outcome) -> None:
    """Raise what a worker left behind, or what Ray said."""
    for path in sorted(run_dir.glob("failure-*.json")):
        record: Mapping[str, str] = json.loads(path.read_text(encoding="utf-8"))
        kind = getattr(errors, record["kind"], LorayError)
        raise kind(record["message"])
    if isinstance(outcome.error, LorayError):
        raise outcome.error
    if outcome.error is not None:
        raise ClusterError(
            f"Ray Train gave up: {str(outcome.error).strip()[-2000:]}\nThe run's checkpoints are "
            f"kept in {run_dir}; the same command resumes it"
        ) from outcome.error


def _clean(run_dir: Path) -> None:
    for directory in (run_dir, run_dir / "checkpoints"):
        if directory.is_dir():
            storage.clean_leftovers(directory)
    for path in [loop.stop_file(run_dir), *run_dir.glob("failure-*.json")]:
        path.unlink(missing_ok=True)


def _require_writable(run_dir: Path) -> None:
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise errors.StorageError(
            f"storage: cannot create {run_dir} ({error.strerror}); name a directory that you may "
            "write to, by storage=..."
        ) from None
    if not os.access(run_dir, os.W_OK):
        raise errors.StorageError(f"storage: {run_dir} is not writable; choose another by storage=")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
