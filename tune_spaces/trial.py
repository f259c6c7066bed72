"""A trial as Ray Tune sees it, and the packed one: a process that asks a bench to train.

Everything that a trial learns is in its own directory, committed at every report, so what Tune
keeps as its checkpoint is only a note of where that is. This module imports no torch: a search
starts many of these processes.
"""

import json
import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import ray
import ray.exceptions
from ray.exceptions import RayTaskError
from ray.tune import Trainable

from cluster import config
from cluster.errors import ClusterError, LorayError
from training.config import EvaluationConfig, TrainRecipe
from tune_spaces import spaces
from tune_spaces.spaces import Mode

log = logging.getLogger(__name__)

Actor: TypeAlias = Any
"""A Ray handle of a BenchActor, whose methods Ray makes at run time."""

NOTE = "seat.json"
"""In Tune's checkpoint of a trial: where the trial's own are."""
_SEAT_TIMEOUT_S = 600.0
_SEAT_POLL_S = 0.2
_CALL_TIMEOUT_S = 24 * 3600.0
_MAX_REQUEUES = 3
_DIVERGED = 1.5
"""Times the bare base's loss."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Spec:
    """What all trials of a search have in common; plain data, in a file of the search."""

    recipe: Mapping[str, Any]
    """The training recipe, its paths absolute."""
    directory: str
    """Where each trial has a directory."""
    namespace: str
    benches: Sequence[str]
    """Names of the bench actors."""
    metric: str
    is_lr_scaled: bool
    report_every: int
    """Supervised tokens between two reports."""
    budget: int | None
    """Supervised tokens of a trial, None as the recipe's schedule says."""
    tokens_per_example: float
    """Supervised tokens of an example, on average."""
    base_loss: float | None
    """Of the bare base, on the evaluation data."""
    mode: Mode = "packed"
    """Of the search."""
    seats: int = 1
    """Trials at once."""


def recipe_of(spec: Spec, trial: str, params: Mapping[str, Any]) -> TrainRecipe:
    """A trial's own recipe, whose schedule ends at the budget."""
    shared = config.build(TrainRecipe, spec.recipe, where="search")
    recipe = spaces.recipe_for(shared, params, is_lr_scaled=spec.is_lr_scaled, mode=spec.mode)
    per_example = spec.tokens_per_example
    if _has_own_data(params):
        from training import run

        per_example = run.tokens_per_example(recipe)
    a_step = per_example * recipe.optim.global_batch_size
    if spec.budget is not None:
        steps = max(2, round(spec.budget / a_step))
        recipe = replace(recipe, optim=replace(recipe.optim, max_steps=steps))
    if spec.mode == "solo":
        recipe = _reporting(
            recipe, spec.metric, steps=max(1, math.ceil(spec.report_every / a_step))
        )
    return replace(recipe, name=trial, storage=spec.directory)


def _has_own_data(params: Mapping[str, Any]) -> bool:
    """Whether a trial's examples, as tokens, are not those that the search counted."""
    return any(path.startswith(("data.", "model.")) for path in params)


def _reporting(recipe: TrainRecipe, metric: str, *, steps: int) -> TrainRecipe:
    """An ordinary run that reports every `steps`, and whose adapter is what it reported last."""
    generated = () if metric.endswith("_loss") else (metric,)
    settings = {
        "every_steps": steps if recipe.data.eval else None,
        "metrics": ("loss", *generated),
        "metrics_during_run": bool(generated),
        "best": "last",
    }
    evaluation = config.build(EvaluationConfig, settings, where="search")
    kept = replace(recipe.checkpoint, every_steps=steps)
    return replace(recipe, evaluation=evaluation, checkpoint=kept)


class Trial(Trainable):
    """What a trial is in either mode: its recipe, its directory, and how its results look."""

    _where = ""
    """The bench that it sits on, or `solo`."""
    _tokens = 0
    """Supervised tokens that it has reported."""

    def setup(self, config: dict[str, Any]) -> None:
        """Begin. config: `spec`, the file of the Spec, and `params`, which were chosen."""
        self._spec = Spec(**json.loads(Path(config["spec"]).read_text(encoding="utf-8")))
        self._begin(config)

    def _begin(self, config: Mapping[str, Any]) -> None:
        self._name = str(self.trial_id)
        self._params = dict(config["params"])
        self._recipe = recipe_of(self._spec, self._name, self._params)
        self._run_dir = Path(self._spec.directory) / self._name
        self._run_dir.mkdir(parents=True, exist_ok=True)

    def _write_note(self, directory: str, **also: int) -> None:
        note = {"trial": self._name, "run_dir": str(self._run_dir), **also}
        (Path(directory) / NOTE).write_text(json.dumps(note), encoding="utf-8")

    def _result(self, progress: Mapping[str, Any]) -> dict[str, Any]:
        """A report as Tune gets it; a trial that is far worse than the bare base ends here."""
        result = {**progress, **self._about()}
        loss = progress["eval_loss"]
        base = None if _has_own_data(self._params) else self._spec.base_loss
        reason = ""
        if base is not None and loss is not None and loss > _DIVERGED * base:
            reason = f"diverged: eval loss {loss:.3f}, the base model's is {base:.3f}"
        result |= {"reason": reason, "done": progress["is_finished"] or bool(reason)}
        result["is_finished"] = progress["is_finished"] and not reason
        return result

    def _ended(self, reason: str) -> dict[str, Any]:
        """The last result of a trial that cannot go on."""
        return {
            **self._about(),
            self._spec.metric: math.nan,
            "supervised_tokens": self._tokens,
            "train_loss": math.nan,
            "eval_loss": math.nan,
            "train_s": 0.0,
            "is_finished": False,
            "reason": reason,
            "done": True,
        }

    def _about(self) -> dict[str, Any]:
        at_16, actual = spaces.learning_rates(
            config.build(TrainRecipe, self._spec.recipe, where="search"),
            self._params,
            is_lr_scaled=self._spec.is_lr_scaled,
            mode=self._spec.mode,
        )
        return {
            "rank": self._recipe.lora.rank,
            "learning_rate": actual,
            "learning_rate_at_rank_16": at_16,
            "bench": self._where,
        }


class SeatTrial(Trial):
    """A trial on a bench: `step` trains up to the next report."""

    _bench: Actor

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Tune hands this process to another trial."""
        self._leave()
        self._begin(new_config)
        return True

    def step(self) -> dict[str, Any]:
        """Train to the next report, commit, and say where the trial stands."""
        for _ in range(_MAX_REQUEUES):
            try:
                return self._step()
            except RayTaskError as error:
                lost = _lost(error)
                if lost is None:
                    raise
                if "out of memory: the newest" not in lost:
                    return self._ended(lost)
                log.warning("trial=%s requeued=%r", self._name, lost)
                self._leave()
                self._take_seat()
        return self._ended(f"out of memory {_MAX_REQUEUES} times")

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Note where the trial's own checkpoints are."""
        self._write_note(checkpoint_dir)

    def load_checkpoint(self, checkpoint: str | dict[str, Any] | None) -> None:
        """Go on from a note; another trial's (PBT) is copied over this trial's own."""
        note = json.loads((Path(str(checkpoint)) / NOTE).read_text(encoding="utf-8"))
        if note["trial"] != self._name:
            self._leave()
            self._call("adopt", note["run_dir"], str(self._run_dir))
            self._take_seat()

    def cleanup(self) -> None:
        """Give the seat back."""
        self._leave()

    def _begin(self, config: Mapping[str, Any]) -> None:
        super()._begin(config)
        self._take_seat()

    def _take_seat(self) -> None:
        """Join whichever bench has a free seat; one is free soon, since Tune counts them too."""
        deadline = time.monotonic() + _SEAT_TIMEOUT_S
        while time.monotonic() < deadline:
            for name in self._spec.benches:
                self._bench = ray.get_actor(name, namespace=self._spec.namespace)
                recipe = config.plain(self._recipe)
                seat = self._call("join", self._name, recipe, str(self._run_dir))
                if seat is not None:
                    self._tokens, self._attempt = seat
                    self._where = name
                    return
            time.sleep(_SEAT_POLL_S)
        raise ClusterError(f"trial {self._name} found no free seat in {_SEAT_TIMEOUT_S:.0f} s")

    def _step(self) -> dict[str, Any]:
        target = (self._tokens // self._spec.report_every + 1) * self._spec.report_every
        progress = self._call("train", self._name, target)
        self._tokens = progress["supervised_tokens"]
        if progress["is_finished"]:
            self._call("export", self._name)
        else:
            self._call("save", self._name)
        metric = self._spec.metric
        if metric not in ("eval_loss", "train_loss"):
            scores = self._call("scores", [self._name], metric, None)[self._name]["values"]
            progress[metric] = sum(scores) / len(scores)
        return self._result(progress)

    def _leave(self) -> None:
        try:
            self._call("leave", self._name, self._attempt)
        except ray.exceptions.RayActorError:  # the bench is gone, and the seat with it
            log.warning("trial=%s bench=%s is gone", self._name, self._where)

    def _call(self, method: str, *arguments: Any) -> Any:
        return ray.get(getattr(self._bench, method).remote(*arguments), timeout=_CALL_TIMEOUT_S)


def _lost(error: RayTaskError) -> str | None:
    """Why a bench took the seat away; None where it is another error."""
    cause = error.cause
    is_lost = isinstance(cause, LorayError) and cause.code == "seat_lost"
    return str(cause) if is_lost else None
