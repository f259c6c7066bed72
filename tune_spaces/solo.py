"""A trial that is an ordinary training run, with Ray Train workers and a device of its own.

The run is held at each report until Tune has judged it, so a trial has trained exactly the tokens
that it has reported. What it reports is read out of the run's events.jsonl, from the start: a
process that takes a trial over knows what its predecessor did.
"""

import json
import logging
import math
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import ray

from cluster.errors import ClusterError, ResourceError, StorageError, TrainingError
from training import checkpoint, loop, run
from training.config import LogConfig, ScaleConfig, TrainRecipe
from training.evaluate import METRICS
from training.events import Event, EventLog, EventReader
from tune_spaces.trial import NOTE, Trial

log = logging.getLogger(__name__)

_POLL_S = 0.1
_REPORT_TIMEOUT_S = 24 * 3600.0
_STOP_TIMEOUT_S = 120.0
"""For a run that was asked to stop to finish its step and leave an adapter."""
_ADOPT_TRIES = 3
SEATED, LEFT = "seated", "left"
"""Events: a process of Tune has taken a trial up, or given it back."""
_ADOPTED = "adopted"
"""The event after which a trial's earlier steps are not its own any more."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Node:
    """What a node of the cluster has."""

    cpus: int
    gpus: int


def nodes() -> list[Node]:
    """The nodes that are alive."""
    return [
        Node(cpus=int(n["Resources"].get("CPU", 0)), gpus=int(n["Resources"].get("GPU", 0)))
        for n in ray.nodes()
        if n["Alive"]
    ]


def runs_at_once(scale: ScaleConfig, there: list[Node], wanted: int | None) -> int:
    """How many runs of this scale fit beside each other, `wanted` where that is given.

    Where the CPUs of a worker are `auto`, None is a run for each GPU that the workers need, and
    without GPUs one run on all CPUs of a node. Raises ResourceError where `wanted`, or one run,
    does not fit.
    """
    gpus = _gpus(scale, there)
    least = 1 if scale.cpus_per_worker == "auto" else scale.cpus_per_worker
    limit = _places(there, least, gpus) // scale.least_workers
    if limit < (wanted or 1):
        raise ResourceError(
            f"search.seats is {wanted or 'auto'}: {wanted or 1} runs at once, each of "
            f"{scale.least_workers} workers with {least} CPUs and {gpus} GPUs, but the cluster has "
            f"room for {limit}; lower search.seats or scale, or add nodes"
        )
    if wanted is not None:
        return wanted
    if gpus or scale.cpus_per_worker != "auto":
        return limit
    return max(1, _places(there, _cpus(scale, there, gpus, 1), gpus) // scale.least_workers)


def scale_of(scale: ScaleConfig, there: list[Node], runs: int) -> ScaleConfig:
    """What `auto` comes to for each of so many runs at once."""
    gpus = _gpus(scale, there)
    cpus = _cpus(scale, there, gpus, runs)
    return replace(scale, workers=scale.least_workers, cpus_per_worker=cpus, gpus_per_worker=gpus)


def _gpus(scale: ScaleConfig, there: list[Node]) -> int:
    if scale.gpus_per_worker != "auto":
        return scale.gpus_per_worker
    return int(sum(node.gpus for node in there) >= scale.least_workers)


def _cpus(scale: ScaleConfig, there: list[Node], gpus: int, runs: int) -> int:
    """As many CPUs for each worker as leave room for all runs."""
    if scale.cpus_per_worker != "auto":
        return scale.cpus_per_worker
    most = max((node.cpus for node in there), default=1)
    fitting = (
        c for c in range(most, 1, -1) if _places(there, c, gpus) >= runs * scale.least_workers
    )
    return next(fitting, 1)


def _places(there: list[Node], cpus: int, gpus: int) -> int:
    """Workers of that size that the nodes have room for."""
    return sum(min(n.cpus // cpus, n.gpus // gpus if gpus else n.cpus) for n in there)


def train(recipe: TrainRecipe, scale: ScaleConfig, *, is_held: bool = False) -> None:
    """`loray train` without a terminal, on the Ray that this process is connected to."""
    run.train(
        replace(recipe, log=LogConfig(to=())),
        say=lambda _: None,
        watch=lambda _: None,
        scale=scale,
        is_held=is_held,
    )


class Run:
    """A training run in a thread of this process."""

    def __init__(self, train: Callable[[], None], run_dir: Path) -> None:
        self._train = train
        self._run_dir = run_dir
        self._future: Future[None] = Future()
        threading.Thread(target=self._work, name=f"run-{run_dir.name}", daemon=True).start()

    def _work(self) -> None:
        try:
            self._train()
        except BaseException as error:  # it belongs to whoever waits
            self._future.set_exception(error)
        else:
            self._future.set_result(None)

    @property
    def is_over(self) -> bool:
        """Whether the run has ended, well or not."""
        return self._future.done()

    def result(self) -> None:
        """Wait for the end; what the run raised comes through."""
        while not self.is_over:  # not one long wait: Ctrl-C must get through
            time.sleep(_POLL_S)
        self._future.result()

    def error(self) -> BaseException | None:
        """What a run that is over has raised."""
        return self._future.exception()

    def stop(self, timeout_s: float) -> bool:
        """Ask the run to end after its step, and wait; whether it has ended."""
        deadline = time.monotonic() + timeout_s
        while not self.is_over and time.monotonic() < deadline:
            loop.stop_file(self._run_dir).touch()  # again: a run that is starting removes it
            time.sleep(_POLL_S)
        return self.is_over


@dataclass(kw_only=True, slots=True)
class Reports:
    """Where a run stood at each of its reports, out of its events."""

    run_dir: Path
    every: int
    """Steps between two reports; the last step is one too."""
    is_evaluated: bool
    """Whether a report waits for an evaluation."""
    after: int = 0
    """Step of the last report that was taken."""
    _reader: EventReader = field(init=False)
    _steps: dict[int, Event] = field(init=False, default_factory=dict)
    _evals: dict[int, Event] = field(init=False, default_factory=dict)
    _ready: deque[dict[str, Any]] = field(init=False, default_factory=deque)
    _seen: int = field(init=False)

    def __post_init__(self) -> None:
        self._reader = EventReader(self.run_dir / "events.jsonl")
        self._seen = self.after

    def take(self) -> dict[str, Any] | None:
        """The next report, as Tune gets it but for what the trial itself adds; None as yet."""
        for event in self._reader.read():
            self._note(event)
        if not self._ready:
            return None
        report = self._ready.popleft()
        self.after = report["step"]
        return report

    def _note(self, event: Event) -> None:
        if event.kind == _ADOPTED:
            self._steps.clear()
            self._evals.clear()
            self._ready.clear()
            self._seen = self.after
        elif event.kind == "step":
            self._steps[int(event.number("step"))] = event
        elif event.kind == "eval":
            self._evals[int(event.number("step"))] = event
        elif event.kind == "checkpoint":
            self._report(int(event.number("step")), event)
        elif event.kind == "started":  # from a checkpoint whose own event may have been lost
            self._report(int(event.number("from_step")), event)

    def _report(self, step: int, event: Event) -> None:
        """A report, if this checkpoint is one: the run may have been stopped between two."""
        last = self._steps.get(step)
        if step <= self._seen or last is None:
            return
        num_steps = int(last.number("num_steps"))
        is_due = step % self.every == 0 or step == num_steps
        if not is_due or (self.is_evaluated and step not in self._evals):
            return
        since = [e for number, e in self._steps.items() if self._seen < number <= step]
        tokens = [e.number("supervised_tokens") for e in since]
        losses = [e.number("loss") * n for e, n in zip(since, tokens, strict=True)]
        evaluated = self._evals[step] if self.is_evaluated else None
        scores = evaluated.fields if evaluated is not None else {}
        self._ready.append(
            {
                **{name: value for name, value in scores.items() if name in METRICS},
                "step": step,
                "num_steps": num_steps,
                "real_tokens": int(event.number("total_real_tokens")),
                "supervised_tokens": int(event.number("total_supervised_tokens")),
                "train_s": event.number("total_train_s"),
                "train_loss": math.fsum(losses) / math.fsum(tokens),
                "eval_loss": evaluated.number("loss") if evaluated is not None else None,
                "is_finished": step == num_steps,
            }
        )
        self._seen = step


class SoloTrial(Trial):
    """A trial on its own: `step` lets its run train up to the next report."""

    _where = "solo"
    _run: Run | None = None

    def step(self) -> dict[str, Any]:
        """Wait for the run's next report, and say where the trial stands."""
        loop.let_pass(self._run_dir, self._reports.after)
        if self._run is None:
            self._run = self._start()
        deadline = time.monotonic() + _REPORT_TIMEOUT_S
        report = None
        while True:
            is_over = self._run.is_over  # before reading, so that nothing is missed
            report = report or self._reports.take()
            # A whole run is reported when its adapter is there.
            is_good = is_over and self._run.error() is None
            if report is not None and (is_good or not report["is_finished"]):
                self._tokens = report["supervised_tokens"]
                return self._result(report)
            if is_over:
                return self._broken(self._run.error())
            if time.monotonic() > deadline:
                raise ClusterError(f"trial {self._name}: no report in {_REPORT_TIMEOUT_S:.0f} s")
            time.sleep(_POLL_S)

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Note where the trial's own checkpoints are, and which one it has reported."""
        self._write_note(checkpoint_dir, step=self._reports.after, tokens=self._tokens)

    def load_checkpoint(self, checkpoint: str | dict[str, Any] | None) -> None:
        """Go on from a note; another trial's (PBT) is copied over this trial's own."""
        note = json.loads((Path(str(checkpoint)) / NOTE).read_text(encoding="utf-8"))
        self._stop()
        self._tokens, step = note["tokens"], note["step"]
        if note["trial"] != self._name:
            step = self._adopt(Path(note["run_dir"]), step)
        self._reports = self._read_from(step)

    def cleanup(self) -> None:
        """End the run, with a checkpoint."""
        self._stop()
        self._tell(LEFT)

    def _begin(self, config: Mapping[str, Any]) -> None:
        super()._begin(config)
        self._tell(SEATED)
        self._reports = self._read_from(0)  # nothing runs yet: a note may come before `step`

    def _read_from(self, step: int) -> Reports:
        return Reports(
            run_dir=self._run_dir,
            every=self._recipe.checkpoint.every_steps,
            is_evaluated=self._recipe.data.eval is not None,
            after=step,
        )

    def _start(self) -> Run:
        """The run of this trial; it takes up where its newest valid checkpoint is."""
        scale = scale_of(self._recipe.scale, nodes(), self._spec.seats)
        return Run(lambda: train(self._recipe, scale, is_held=True), self._run_dir)

    def _stop(self) -> None:
        if self._run is not None and not self._run.stop(_STOP_TIMEOUT_S):
            log.warning("trial=%s run=killed after_s=%.0f", self._name, _STOP_TIMEOUT_S)
            _end_workers(self._name)  # on a shared cluster they end with this process
        self._run = None

    def _adopt(self, source: Path, step: int) -> int:
        """Become what another trial was at that step, or is now; the step."""
        for attempt in range(1, _ADOPT_TRIES + 1):
            try:
                step = checkpoint.adopt(source, self._run_dir, step=step)
                break
            except (OSError, StorageError):  # the other trial goes on, and prunes meanwhile
                if attempt == _ADOPT_TRIES:
                    raise
                log.warning("trial=%s adopt=%s retry=%d", self._name, source, attempt)
        # What it was before is not its own any more.
        shutil.rmtree(self._run_dir / "adapter", ignore_errors=True)
        with suppress(FileNotFoundError):
            (self._run_dir / "recipe.json").unlink()
        self._tell(_ADOPTED, source=source.name, step=step)
        return step

    def _tell(self, kind: str, **fields: object) -> None:
        """Add to the run's events, while the run itself is not there."""
        with closing(EventLog(self._run_dir / "events.jsonl")) as events:
            events.write(kind, sync=True, **fields)

    def _broken(self, error: BaseException | None) -> dict[str, Any]:
        """The last result of a run that ended before its time; or raise, for Tune to try again."""
        if isinstance(error, TrainingError):
            return self._ended(str(error))
        self._run = None
        raise error or ClusterError(
            f"trial {self._name}: its run was stopped from outside; it goes on from its newest "
            "checkpoint"
        )


def _end_workers(name: str) -> None:
    from training import trainer  # Ray Train takes seconds to import

    trainer.end_workers([name])
