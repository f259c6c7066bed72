"""When a trial ends before its budget on its own account: it diverges, overfits or stands still.

Pure functions of a trial's reports. This module imports neither torch nor Ray.

A trial that overfits or stands still is no failure: its best report is kept, with the adapter of
that report, and is what counts for it. It is a candidate like a trial that used its whole budget:
steps are one more thing that the evaluation data chose. Its other seeds are trained on the same
schedule for the same number of steps (`optim.stop_after`), and so is best.yaml.

What is not covered: trials of a solo search, which end at a divergence only; a trial that reaches
the end of its budget counts with its last report, even where an earlier one was better.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from cluster.errors import ConfigError

Mode = Literal["min", "max"]


def mode_of(metric: str) -> Mode:
    """Losses are to be small, shares of right answers large."""
    return "min" if metric.endswith("loss") else "max"


@dataclass(frozen=True, kw_only=True, slots=True)
class Guards:
    """What ends a trial early, whatever the scheduler; nothing does during warm-up."""

    divergence: float | None = 1.5
    """Diverged above so many times the bare base's evaluation loss; null never."""
    overfit_patience: int | None = 3
    """Reports in a row with a worse evaluation loss and a better training loss than where the
    first was lowest, none with the best metric, before the trial ends; null never."""
    overfit_margin: float = 0.02
    """A worse evaluation loss is one above the best by more than this share of it."""
    plateau_patience: int | None = 4
    """Reports in a row without a gain in the metric or the evaluation loss; null never."""
    plateau_gain: float = 0.001
    """A gain is one of more than this share of the best so far."""

    def __post_init__(self) -> None:
        bounds = {
            "divergence": (1.0, 1e6),
            "overfit_patience": (1, 10_000),
            "overfit_margin": (0.0, 10.0),
            "plateau_patience": (1, 10_000),
            "plateau_gain": (0.0, 1.0),
        }
        for name, (low, high) in bounds.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                never = "" if name in ("overfit_margin", "plateau_gain") else ", or null for never"
                raise ConfigError(
                    f"search.guards.{name} is {value!r}; allowed: {low:g} to {high:g}{never}"
                )


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """Where a trial stood at one of its reports."""

    step: int
    tokens: int
    """Supervised tokens trained on."""
    train_loss: float
    """Mean since the report before."""
    eval_loss: float | None
    """None without evaluation data."""
    value: float
    """The search's metric."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """Why a trial ends."""

    reason: str
    kept: Report | None
    """The report that counts for it; None where it has failed."""


def best(reports: Sequence[Report], mode: Mode) -> Report | None:
    """The report with the best metric, by evaluation loss among equals; None before any."""
    finite = [report for report in reports if math.isfinite(report.value)]
    return min(finite, key=lambda report: (_cost(report, mode), _loss(report)), default=None)


def judge(
    guards: Guards,
    reports: Sequence[Report],
    *,
    metric: str,
    warmup_steps: int,
    base_loss: float | None,
) -> Verdict | None:
    """Whether a trial ends with the last of its reports; None where it goes on.

    reports: all of the trial's, oldest first. base_loss: of the bare base, on the evaluation data.
    """
    last = reports[-1]
    if last.step <= warmup_steps:
        return None
    if guards.divergence is not None and base_loss is not None and last.eval_loss is not None:
        is_near = last.eval_loss <= guards.divergence * base_loss  # false for NaN too
        if not is_near:
            reason = (
                f"diverged: eval loss {last.eval_loss:.3f}, the base model's is {base_loss:.3f}"
            )
            return Verdict(reason=reason, kept=None)
    mode = mode_of(metric)
    kept = best(reports, mode)
    if kept is None:
        return None
    counts = f"the report at {kept.tokens} supervised tokens counts"
    warm = [report for report in reports if report.step > warmup_steps]
    lowest = min(reports, key=_loss)
    if _overfits(guards, warm, lowest, kept):
        reason = (
            f"overfit: eval loss {last.eval_loss:.3f} after {lowest.eval_loss:.3f} while the "
            f"training loss fell from {lowest.train_loss:.3f} to {last.train_loss:.3f}; {counts}"
        )
        return Verdict(reason=reason, kept=kept)
    if _stands_still(guards, reports, warm, mode):
        reason = f"plateau: no gain in {guards.plateau_patience} reports; {counts}"
        return Verdict(reason=reason, kept=kept)
    return None


def _overfits(guards: Guards, warm: Sequence[Report], lowest: Report, kept: Report) -> bool:
    """In each of the last reports the gap between evaluation and training loss is wider, from both
    sides, than at the lowest evaluation loss; and none of them has the best metric."""
    patience = guards.overfit_patience
    if patience is None or len(warm) < patience or kept in warm[-patience:]:
        return False
    return all(
        _loss(report) > _loss(lowest) * (1 + guards.overfit_margin)
        and report.train_loss < lowest.train_loss
        for report in warm[-patience:]
    )


def _stands_still(
    guards: Guards, reports: Sequence[Report], warm: Sequence[Report], mode: Mode
) -> bool:
    """None of the last reports is better than all before them by a gain worth the name."""
    patience = guards.plateau_patience
    if patience is None or len(warm) <= patience:
        return False
    costs = [(_cost(report, mode), _loss(report)) for report in reports]
    return not any(
        _gains(min(column[:-patience]), min(column[-patience:]), guards.plateau_gain)
        for column in zip(*costs, strict=True)
    )


def _gains(before: float, after: float, share: float) -> bool:
    return after < before and (math.isinf(before) or before - after > share * abs(before))


def _cost(report: Report, mode: Mode) -> float:
    """The metric, turned so that less is better; infinite where it is not finite."""
    value = report.value if mode == "min" else -report.value
    return value if math.isfinite(value) else math.inf


def _loss(report: Report) -> float:
    """Infinite where there is none."""
    loss = report.eval_loss
    return loss if loss is not None and math.isfinite(loss) else math.inf
