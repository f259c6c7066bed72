"""What the trials of a search have told, kept in its events.jsonl, and put together at the end."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any, cast

from ray.tune import Callback

from cluster import __version__
from training.evaluate import Estimate
from training.events import Event, EventLog
from tune_spaces import finals
from tune_spaces import record as records
from tune_spaces.config import Search
from tune_spaces.hall import AnyHall, mean_filled
from tune_spaces.record import SearchRecord
from tune_spaces.schedulers import TOKENS, mode_of, rungs
from tune_spaces.trial import Spec

Watcher = Callable[[Event], None]
"""Told each result of each trial."""
_KEPT = (
    TOKENS, "train_loss", "eval_loss", "train_s", "rank", "learning_rate", "bench",
    "learning_rate_at_rank_16", "is_finished", "reason", "step", "num_steps", "real_tokens",
    "kept_step", "measured",
)  # fmt: skip
"""What is remembered of a result, beside its metric."""
_LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "ray", "optuna")


@dataclass(kw_only=True, slots=True)
class Trials:
    """What the trials have told so far, by trial."""

    last: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Newest result of each."""
    params: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    history: dict[str, list[tuple[int, float | None, float | None, float]]] = field(
        default_factory=dict
    )
    """(supervised tokens, training loss, metric, seconds since the start) of each report."""
    errors: dict[str, str] = field(default_factory=dict)

    @property
    def real_tokens(self) -> int:
        """Of all trials together."""
        return int(sum(result.get("real_tokens", 0) for result in self.last.values()))

    def note(self, event: Event) -> None:
        """Take in one event of the search: a result, or a trial's failure."""
        fields = event.fields
        trial = event.text("trial")
        if event.kind == "trial_failed":
            self.errors[trial] = event.text("message")
        if event.kind == "stopped":
            self.last[trial]["reason"] = event.text("reason")
        if event.kind != "result":
            return
        self.errors.pop(trial, None)
        self.params[trial] = cast(Mapping[str, Any], fields["params"])
        self.last[trial] = fields
        tokens = int(event.number(TOKENS))
        # What was run again after a crash replaces what was lost with it.
        kept = [point for point in self.history.get(trial, []) if point[0] < tokens]
        loss = _finite(fields["train_loss"])
        value = _finite(fields.get("measured", fields["value"]))
        self.history[trial] = [*kept, (tokens, loss, value, event.number("at_s"))]


class Recorder(Callback):
    """Writes every result of a trial to the search's events.jsonl, which is the memory of it."""

    def __init__(
        self, events: EventLog, told: Callable[[], None], *, metric: str, scheduler: str
    ) -> None:
        self._events: EventLog | None = events
        self._metric = metric
        self._scheduler = scheduler
        self._told = told
        self._started = time.perf_counter()

    def __getstate__(self) -> dict[str, Any]:
        """Tune (2.60) pickles callbacks for a restore; there, a new one takes this one's place."""
        return {"_events": None}

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """Keep one result; the metric's value stands under `value`."""
        assert self._events is not None
        fields = {name: result[name] for name in _KEPT if name in result}
        self._events.write(
            "result",
            trial=trial.trial_id,
            params=trial.config["params"],
            value=result[self._metric],
            at_s=round(time.perf_counter() - self._started, 3),
            **fields,
        )
        self._told()

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Keep why a trial ended before its time."""
        assert self._events is not None
        last: Mapping[str, Any] = trial.last_result
        if last.get("is_finished") or last.get("reason") or TOKENS not in last:
            return
        reason = f"by {self._scheduler}, after {last[TOKENS]} supervised tokens"
        self._events.write("stopped", trial=trial.trial_id, reason=reason)
        self._told()

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Keep why a trial's process failed."""
        assert self._events is not None
        reason = str(trial.get_error() or "its process died").strip().splitlines()[-1]
        self._events.write("trial_failed", trial=trial.trial_id, message=reason)
        self._told()


def record_of(
    chosen: Search,
    hall: AnyHall,
    spec: Spec,
    budget: int,
    base: Estimate | None,
    trials: Trials,
    outcome: finals.Outcome | None,
    filled: Sequence[tuple[float, int]],
    tuned_s: float | None,
    started: float,
) -> SearchRecord:
    """Everything that a search has found, as search.json and trials.jsonl hold it.

    budget: supervised tokens of a whole trial. filled: seats taken over time. tuned_s: seconds of
    the trials, None where an earlier driver ran some of them. started: on time.perf_counter.
    """
    own = outcome.estimates if outcome is not None else {}
    dimensions = chosen.space.every_dimension()
    return SearchRecord(
        name=chosen.recipe.name,
        metric=chosen.search.metric,
        mode=mode_of(chosen.search.metric),
        space=records.Space(
            name=chosen.space.name, dimensions={d.path: str(d.domain) for d in dimensions}
        ),
        wall_s=round(time.perf_counter() - started, 3),
        isolation="exact",  # rows are independent everywhere, see training/int8.py
        seats=hall.seats,
        seats_filled=tuple(filled),
        mean_seats_filled=round(mean_filled(filled), 3),
        base=records.Estimate(value=base.value, low=base.low, high=base.high, n=base.n)
        if base is not None
        else None,
        winner=outcome.winner if outcome is not None else None,
        rungs=rungs(chosen.search, budget=budget, report=spec.report_every),
        finalists=outcome.finalists if outcome is not None else (),
        cost=_cost(hall, trials, tuned_s),
        versions={"loray": __version__, **{name: version(name) for name in _LIBRARIES}},
        started=datetime.now(UTC).isoformat(timespec="seconds"),
        trials=tuple(_trial(name, trials, own.get(name)) for name in trials.last),
    )


def _cost(hall: AnyHall, trials: Trials, tuned_s: float | None) -> records.Cost | None:
    """Against the same trials one after another, by what the benches' probe has measured."""
    alone = [each.speeds["1"] for each in hall.capacities if each.speeds]
    if tuned_s is None or not alone:
        return None
    load_s = max(each.load_s for each in hall.capacities)
    one_by_one_s = len(trials.last) * load_s + trials.real_tokens / sum(alone)
    return records.Cost(
        measured_s=round(load_s + tuned_s, 1),
        one_process_per_trial_s=round(one_by_one_s, 1),
        how=(
            f"Both by this search's own clock, without finals: its probe saw {alone[0]:.0f} real "
            f"tokens/s with one seat on a bench, and loading base and data took {load_s:.1f} s, "
            "which a process for each trial would do each time; evaluation and process starts are "
            "counted against this search only."
        ),
    )


def _trial(name: str, trials: Trials, estimate: Estimate | None) -> records.Trial:
    result = trials.last[name]
    reason = trials.errors.get(name) or result["reason"]
    state = "failed" if name in trials.errors else "stopped"
    if result["is_finished"]:
        state = "finished"
    elif not reason:
        reason = f"at the search's time limit, after {result[TOKENS]} supervised tokens"
    return records.Trial(
        trial=name,
        state=state,
        reason=reason,
        params=dict(trials.params[name]),
        rank=result["rank"],
        learning_rate=result["learning_rate"],
        learning_rate_at_rank_16=result["learning_rate_at_rank_16"],
        value=_finite(result["value"]),
        low=estimate.low if estimate is not None else None,
        high=estimate.high if estimate is not None else None,
        tokens=int(result[TOKENS]),
        train_s=round(_finite(result["train_s"]) or 0.0, 3),
        bench=result["bench"],
        history=tuple(trials.history[name]),
    )


def _finite(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
