"""A trial as Ray Tune sees it, and the packed one: a process that asks a bench to train.

Everything that a trial learns is in its own directory, committed at every report, so what Tune
keeps as its checkpoint is only a note of where that is. This module imports no torch: a search
starts many of these processes.
"""

import json
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, TypeVar

import ray
from ray.exceptions import ActorUnschedulableError, RayActorError, RayTaskError
from ray.tune import Trainable

from cluster import config, storage
from cluster.errors import ClusterError, LorayError
from training.config import EvaluationConfig, TrainRecipe
from training.schedule import warmup_steps
from tune_spaces import guards, spaces
from tune_spaces.guards import Guards, Report
from tune_spaces.spaces import Mode

T = TypeVar("T")

log = logging.getLogger(__name__)

GONE = (RayActorError, ActorUnschedulableError)
"""What a call raises whose bench died: it may be restarting, or its node is dead (Ray 2.60)."""
Actor: TypeAlias = Any
"""A Ray handle of a BenchActor, whose methods Ray makes at run time."""

NOTE = "seat.json"
"""In Tune's checkpoint of a trial: where the trial's own are."""
_BENCH = "bench"
"""In a trial's directory: the bench that it sat on last."""
_REPORTS = "reports.json"
"""In a trial's directory: what its guards have seen so far."""
_SEAT_TIMEOUT_S = 600.0
"""How long a trial waits while no bench answers at all."""
_SEAT_POLL_S = 0.2
_CALL_TIMEOUT_S = 24 * 3600.0
_MAX_REQUEUES = 3
_JOIN_AGAIN = ("seat_shed", "no_seat")


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
    guards: Mapping[str, Any] = field(default_factory=dict)
    """Fields of a Guards."""


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
        """A report as Tune gets it, with what the guards say to it."""
        result = {**progress, **self._about(), "reason": "", "done": progress["is_finished"]}
        metric = self._spec.metric
        report = Report(
            step=result["step"],
            tokens=self._tokens,
            train_loss=result["train_loss"],
            eval_loss=result["eval_loss"],
            value=result[metric],
        )
        verdict = guards.judge(
            Guards(**self._spec.guards),
            self._history(report),
            metric=metric,
            warmup_steps=warmup_steps(self._recipe.optim, result["num_steps"]),
            base_loss=None if _has_own_data(self._params) else self._spec.base_loss,
        )
        if verdict is None or (verdict.kept is not None and result["is_finished"]):
            return result
        kept = verdict.kept
        result |= {"reason": verdict.reason, "done": True, "is_finished": kept is not None}
        if kept is not None:
            self._go_back(kept.step)
            result |= {metric: kept.value, "measured": report.value, "kept_step": kept.step}
        return result

    def _history(self, report: Report) -> list[Report]:
        """What the guards judge by; one report alone can only be a divergence."""
        return [report]

    def _go_back(self, step: int) -> None:
        """Make a report of this trial's past its last."""
        raise NotImplementedError("a trial without a history has no past")

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


class _Room(NamedTuple):
    bench: Actor
    taken: int
    """Seats that other trials have."""
    seats: int
    """In all."""


class SeatTrial(Trial):
    """A trial on a bench: `step` trains up to the next report."""

    _bench: Actor

    def step(self) -> dict[str, Any]:
        """Train to the next report, commit, and say where the trial stands."""
        try:
            return self._seated(self._step)
        except RayTaskError as error:
            if _code(error) == "seat_shed":
                return self._ended(f"{error.cause}, {_MAX_REQUEUES + 1} times")
            if _code(error) == "seat_lost":
                return self._ended(str(error.cause))
            raise

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Note where the trial's own checkpoints are."""
        self._write_note(checkpoint_dir, tokens=self._reported)

    def load_checkpoint(self, checkpoint: str | dict[str, Any] | None) -> None:
        """Go on from a note; another trial's (PBT) is copied over this trial's own."""
        note = json.loads((Path(str(checkpoint)) / NOTE).read_text(encoding="utf-8"))
        if note["trial"] == self._name:  # its seat may be one report ahead, which Tune never got
            self._reported = note.get("tokens", self._tokens)
            return

        def adopt() -> None:
            self._leave()
            self._call("adopt", note["run_dir"], str(self._run_dir))
            self._keep_reports([])  # they are of weights that are gone
            self._take_seat()

        self._seated(adopt)
        self._reported = self._tokens

    def cleanup(self) -> None:
        """Give the seat back."""
        self._leave()

    def _begin(self, config: Mapping[str, Any]) -> None:
        super()._begin(config)
        self._reported = 0
        self._take_seat()

    def _seated(self, do: Callable[[], T]) -> T:
        """Do something, and again from another seat where the bench dies or memory runs out."""
        for _ in range(_MAX_REQUEUES):
            try:
                return do()
            except GONE as error:
                log.warning("trial=%s bench=%s died=%r", self._name, self._where, str(error))
            except RayTaskError as error:
                if _code(error) not in _JOIN_AGAIN:
                    raise
                log.warning("trial=%s requeued=%r", self._name, str(error.cause))
                self._leave()
            self._take_seat()
        return do()

    def _take_seat(self) -> None:
        """Join the bench where this trial sat last, else the one with the fewest seats taken.

        Tune counts seats too, so that one is free soon; where a bench has died for good, its trials
        wait for those of others to end.
        """
        started = heard = time.monotonic()
        while True:
            rooms = self._rooms()
            now = time.monotonic()
            heard = now if rooms else heard
            if self._join(rooms):
                return
            if now - heard > _SEAT_TIMEOUT_S or now - started > _CALL_TIMEOUT_S:
                raise ClusterError(
                    f"trial {self._name} got no seat in {now - started:.0f} s: "
                    f"{len(rooms)} of {len(self._spec.benches)} benches answer. Look into Ray's "
                    "logs of the actors named bench0, bench1, ..., then go on by --resume"
                )
            time.sleep(_SEAT_POLL_S)

    def _rooms(self) -> dict[str, _Room]:
        """Of each bench that answers."""
        rooms: dict[str, _Room] = {}
        living = 0
        for name in self._spec.benches:
            try:
                bench = ray.get_actor(name, namespace=self._spec.namespace)
            except ValueError:  # it will not come back (Ray 2.60): its node is dead
                continue
            living += 1
            try:
                rooms[name] = _Room(bench, *_ask(bench, "room", self._name))
            except GONE as error:
                log.info("trial=%s bench=%s does_not_answer=%r", self._name, name, str(error))
        if not living:
            raise ClusterError(
                f"none of the {len(self._spec.benches)} benches is left: their nodes are dead. "
                "Start nodes, then go on by --resume"
            )
        return rooms

    def _join(self, rooms: Mapping[str, _Room]) -> bool:
        free = {name: room for name, room in rooms.items() if room.taken < room.seats}
        if not free:
            return False
        kept = self._run_dir / _BENCH
        last = kept.read_text(encoding="utf-8") if kept.exists() else ""
        name = min(free, key=lambda name: (name != last, free[name].taken, name))
        bench, taken, _ = free[name]
        recipe = config.plain(self._recipe)
        try:
            seat = _ask(bench, "join", self._name, recipe, str(self._run_dir), taken)
        except GONE as error:
            log.warning("trial=%s bench=%s died=%r", self._name, name, str(error))
            return False
        if seat is None:  # another trial was faster
            return False
        self._bench, (self._tokens, self._attempt) = bench, seat
        self._where = name
        self._reports = self._kept_reports()
        storage.write_file(kept, name.encode())
        return True

    def _step(self) -> dict[str, Any]:
        target = (self._reported // self._spec.report_every + 1) * self._spec.report_every
        progress = self._call("train", self._name, target)
        self._tokens = progress["supervised_tokens"]
        if progress["is_finished"]:
            self._call("export", self._name)
        else:
            best = guards.best(self._reports, guards.mode_of(self._spec.metric))
            self._call("save", self._name, best.step if best is not None else None)
        metric = self._spec.metric
        if metric not in ("eval_loss", "train_loss"):
            scores = self._call("scores", [self._name], metric, None)[self._name]["values"]
            progress[metric] = sum(scores) / len(scores)
        result = self._result(progress)
        self._reported = self._tokens
        return result

    def _history(self, report: Report) -> list[Report]:
        """All its reports; they are on disk, for a process that takes the trial over."""
        earlier = [one for one in self._reports if one.tokens < report.tokens]
        self._keep_reports([*earlier, report])
        return self._reports

    def _go_back(self, step: int) -> None:
        self._call("rewind", self._name, step)

    def _kept_reports(self) -> list[Report]:
        """Up to the checkpoint that the trial goes on from; what is lost comes again."""
        path = self._run_dir / _REPORTS
        rows = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
        return [Report(**row) for row in rows if row["tokens"] <= self._tokens]

    def _keep_reports(self, reports: Sequence[Report]) -> None:
        self._reports = list(reports)
        rows = [asdict(report) for report in reports]
        storage.write_file(self._run_dir / _REPORTS, json.dumps(rows).encode())

    def _leave(self) -> None:
        try:
            self._call("leave", self._name, self._attempt)
        except GONE:  # the bench is gone, and the seat with it
            log.warning("trial=%s bench=%s is gone", self._name, self._where)

    def _call(self, method: str, *arguments: Any) -> Any:
        return _ask(self._bench, method, *arguments)


def _ask(bench: Actor, method: str, *arguments: Any) -> Any:
    return ray.get(getattr(bench, method).remote(*arguments), timeout=_CALL_TIMEOUT_S)


def _code(error: RayTaskError) -> str:
    """Of the error of ours that a bench has raised; empty where it is another's."""
    return error.cause.code if isinstance(error.cause, LorayError) else ""
