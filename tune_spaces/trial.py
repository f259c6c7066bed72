"""A trial as Ray Tune sees it: a thin process that sits on a bench and asks it to train.

Everything that a trial learns is in its own directory, committed at every report, so what Tune
keeps as its checkpoint is only a note of where that is. This module imports no torch: a search
starts many of these processes.
"""

import json
import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

import ray
import ray.exceptions
from ray.exceptions import RayTaskError
from ray.tune import Trainable

from cluster import config, storage
from cluster.errors import ClusterError, LorayError
from training.config import TrainRecipe
from training.schedule import warmup_steps
from tune_spaces import guards, spaces
from tune_spaces.guards import Guards, Report

log = logging.getLogger(__name__)

Actor: TypeAlias = Any
"""A Ray handle of a BenchActor, whose methods Ray makes at run time."""

_NOTE = "seat.json"
_REPORTS = "reports.json"
"""In a trial's directory: what its guards have seen so far."""
_SEAT_TIMEOUT_S = 600.0
_SEAT_POLL_S = 0.2
_CALL_TIMEOUT_S = 24 * 3600.0
_MAX_REQUEUES = 3


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
    guards: Mapping[str, Any] = field(default_factory=dict)
    """Fields of a Guards."""


def recipe_of(spec: Spec, trial: str, params: Mapping[str, Any]) -> TrainRecipe:
    """A trial's own recipe, whose schedule ends at the budget."""
    shared = config.build(TrainRecipe, spec.recipe, where="search")
    recipe = spaces.recipe_for(shared, params, is_lr_scaled=spec.is_lr_scaled)
    if spec.budget is not None:
        a_step = spec.tokens_per_example * recipe.optim.global_batch_size
        steps = max(2, round(spec.budget / a_step))
        recipe = replace(recipe, optim=replace(recipe.optim, max_steps=steps))
    return replace(recipe, name=trial, storage=spec.directory)


class SeatTrial(Trainable):
    """One trial: `step` trains up to the next report."""

    _bench: Actor

    def setup(self, config: dict[str, Any]) -> None:
        """Take a seat. config: `spec`, the file of the Spec, and `params`, which were chosen."""
        self._spec = Spec(**json.loads(Path(config["spec"]).read_text(encoding="utf-8")))
        self._sit(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Tune hands this process to another trial."""
        self._leave()
        self._sit(new_config)
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
        note = {"trial": self._name, "run_dir": str(self._run_dir)}
        (Path(checkpoint_dir) / _NOTE).write_text(json.dumps(note), encoding="utf-8")

    def load_checkpoint(self, checkpoint: str | dict[str, Any] | None) -> None:
        """Go on from a note; another trial's (PBT) is copied over this trial's own."""
        note = json.loads((Path(str(checkpoint)) / _NOTE).read_text(encoding="utf-8"))
        if note["trial"] != self._name:
            self._leave()
            self._call("adopt", note["run_dir"], str(self._run_dir))
            self._keep_reports([])  # they are of weights that are gone
            self._take_seat()

    def cleanup(self) -> None:
        """Give the seat back."""
        self._leave()

    def _sit(self, config: Mapping[str, Any]) -> None:
        self._name = str(self.trial_id)
        self._params = dict(config["params"])
        self._recipe = recipe_of(self._spec, self._name, self._params)
        self._run_dir = Path(self._spec.directory) / self._name
        self._run_dir.mkdir(parents=True, exist_ok=True)
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
                    self._reports = self._kept_reports()
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
            best = guards.best(self._reports, guards.mode_of(self._spec.metric))
            self._call("save", self._name, best.step if best is not None else None)
        result = {**progress, **self._about(), "reason": "", "done": progress["is_finished"]}
        metric = self._spec.metric
        if metric not in ("eval_loss", "train_loss"):
            scores = self._call("scores", [self._name], metric, None)[self._name]["values"]
            result[metric] = sum(scores) / len(scores)
        return result | self._judged(result)

    def _judged(self, result: Mapping[str, Any]) -> dict[str, Any]:
        """What the guards change of a result, which is kept for them first."""
        metric = self._spec.metric
        report = Report(
            step=result["step"],
            tokens=self._tokens,
            train_loss=result["train_loss"],
            eval_loss=result["eval_loss"],
            value=result[metric],
        )
        earlier = [one for one in self._reports if one.tokens < report.tokens]
        self._keep_reports([*earlier, report])
        verdict = guards.judge(
            Guards(**self._spec.guards),
            self._reports,
            metric=metric,
            warmup_steps=warmup_steps(self._recipe.optim, result["num_steps"]),
            base_loss=self._spec.base_loss,
        )
        if verdict is None or (verdict.kept is not None and result["is_finished"]):
            return {}
        ended = {"reason": verdict.reason, "done": True, "is_finished": verdict.kept is not None}
        if verdict.kept is None:
            return ended
        self._call("rewind", self._name, verdict.kept.step)
        return {
            **ended,
            metric: verdict.kept.value,
            "measured": report.value,
            "kept_step": verdict.kept.step,
        }

    def _kept_reports(self) -> list[Report]:
        """Up to the checkpoint that the trial goes on from; what is lost comes again."""
        path = self._run_dir / _REPORTS
        rows = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
        return [Report(**row) for row in rows if row["tokens"] <= self._tokens]

    def _keep_reports(self, reports: Sequence[Report]) -> None:
        self._reports = list(reports)
        rows = [asdict(report) for report in reports]
        storage.write_file(self._run_dir / _REPORTS, json.dumps(rows).encode())

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
        )
        return {
            "rank": self._recipe.lora.rank,
            "learning_rate": actual,
            "learning_rate_at_rank_16": at_16,
            "bench": self._where,
        }

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
