"""A decade of learning rates is not given up before one of its trials has had a fair part.

A high learning rate looks bad early and may be best at the end, a low one is slow: a scheduler that
compares trials at the same tokens can clear a whole decade in its first rungs. `DecadeKeeper`
stands before a scheduler of Tune, which runs unmodified, and lets the last trial of a decade go on.

What is not covered: hyperband, which drops a trial from its own books before it says stop, and
stops paused ones without being asked; what a guard of the trial itself ends.
"""

import math
from collections.abc import Mapping
from typing import Any

from ray.tune.experiment import Trial
from ray.tune.schedulers import AsyncHyperBandScheduler, MedianStoppingRule, TrialScheduler

from training.config import TrainRecipe
from tune_spaces import spaces
from tune_spaces.spaces import AT_RANK_16, LEARNING_RATE, Mode, Space

_FAIR_SHARE = 1 / 3
"""Of the budget."""


class DecadeKeeper(TrialScheduler):
    """Tune's scheduler `base`, which cannot stop the last representative of a decade at first.

    A trial represents the decade of its learning rate at rank 16 while it waits or runs, and for
    good once it has seen a third of the budget.
    """

    def __init__(
        self,
        base: AsyncHyperBandScheduler | MedianStoppingRule,
        recipe: TrainRecipe,
        *,
        is_lr_scaled: bool,
        mode: Mode,
        time_attr: str,
        budget: int,
    ) -> None:
        """mode: of the search. budget: of a whole trial, in units of `time_attr`."""
        super().__init__()
        self._base = base
        self._recipe = recipe
        self._is_lr_scaled = is_lr_scaled
        self._mode: Mode = mode
        self._time_attr = time_attr
        self._fair = budget * _FAIR_SHARE
        self._stopped: set[str] = set()

    @property
    def metric(self) -> str | None:
        return self._base.metric

    @property
    def supports_buffered_results(self) -> bool:
        return self._base.supports_buffered_results

    def set_search_properties(self, metric: str | None, mode: str | None, **spec: Any) -> bool:
        return self._base.set_search_properties(metric, mode, **spec)

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        self._base.on_trial_add(tune_controller, trial)

    def on_trial_error(self, tune_controller: Any, trial: Trial) -> None:
        self._base.on_trial_error(tune_controller, trial)

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        """What the scheduler says, but not STOP for the last of a decade."""
        decision = self._base.on_trial_result(tune_controller, trial, result)
        if decision != TrialScheduler.STOP:
            return decision
        if result[self._time_attr] >= self._fair or self._is_represented(tune_controller, trial):
            self._stopped.add(trial.trial_id)  # it runs on for a while, until it has been saved
            return decision
        if isinstance(self._base, MedianStoppingRule):
            # It asserts that a trial it has stopped does not come back (private name, Ray 2.60).
            self._base._stopped_trials.discard(trial)
        return TrialScheduler.CONTINUE

    def on_trial_complete(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> None:
        self._base.on_trial_complete(tune_controller, trial, result)

    def on_trial_remove(self, tune_controller: Any, trial: Trial) -> None:
        self._base.on_trial_remove(tune_controller, trial)

    def choose_trial_to_run(self, tune_controller: Any) -> Trial | None:
        return self._base.choose_trial_to_run(tune_controller)

    def debug_string(self) -> str:
        return self._base.debug_string()

    def _is_represented(self, tune_controller: Any, trial: Trial) -> bool:
        """Whether another trial stands for the decade of this one."""
        decade = self._decade(trial)
        others = (t for t in tune_controller.get_trials() if t.trial_id != trial.trial_id)
        return any(self._represents(other) and self._decade(other) == decade for other in others)

    def _represents(self, trial: Trial) -> bool:
        last: Mapping[str, Any] = trial.last_result or {}
        is_fair = trial.status != Trial.ERROR and last.get(self._time_attr, 0) >= self._fair
        return is_fair or not (trial.is_finished() or trial.trial_id in self._stopped)

    def _decade(self, trial: Trial) -> int:
        params = trial.config["params"]
        at_16, _ = spaces.learning_rates(
            self._recipe, params, is_lr_scaled=self._is_lr_scaled, mode=self._mode
        )
        return math.floor(math.log10(at_16))


def keep_decades(
    scheduler: TrialScheduler,
    space: Space,
    recipe: TrainRecipe,
    *,
    mode: Mode,
    time_attr: str,
    budget: int,
) -> TrialScheduler:
    """The scheduler behind a DecadeKeeper, where that helps: see there."""
    has_rates = {AT_RANK_16, LEARNING_RATE} & {d.path for d in space.every_dimension()}
    if has_rates and isinstance(scheduler, AsyncHyperBandScheduler | MedianStoppingRule):
        return DecadeKeeper(
            scheduler,
            recipe,
            is_lr_scaled=space.is_lr_scaled,
            mode=mode,
            time_attr=time_attr,
            budget=budget,
        )
    return scheduler
