"""The last trial of a decade of learning rates, before schedulers of Ray Tune as they are."""

import pickle
from types import SimpleNamespace
from typing import Any

import pytest
from ray.tune.experiment import Trial
from ray.tune.schedulers import AsyncHyperBandScheduler, TrialScheduler

from tune_spaces import config, spaces
from tune_spaces.config import SearchConfig
from tune_spaces.decades import DecadeKeeper, keep_decades
from tune_spaces.schedulers import TOKENS, make_scheduler
from tune_spaces.spaces import AT_RANK_16, Space

BUDGET = 900


class FakeTrial:
    """As much of a Tune trial as a scheduler looks at."""

    def __init__(self, trial_id: str, params: dict[str, Any]) -> None:
        self.trial_id = trial_id
        self.config = {"params": params}
        self.status = Trial.RUNNING
        self.last_result: dict[str, Any] = {}

    def is_finished(self) -> bool:
        return self.status in (Trial.TERMINATED, Trial.ERROR)


class Population:
    """Trials behind a scheduler, which report in the order in which they are told to."""

    def __init__(
        self, rates: dict[str, float], scheduler: str = "asha", space: Space | None = None
    ) -> None:
        self.trials = {name: FakeTrial(name, {AT_RANK_16: rate}) for name, rate in rates.items()}
        self.controller = SimpleNamespace(
            get_trials=lambda: list(self.trials.values()),
            get_live_trials=lambda: [t for t in self.trials.values() if not t.is_finished()],
        )
        search = SearchConfig(scheduler=scheduler)  # pyright: ignore[reportArgumentType]
        space = space or spaces.rank_lr()
        made = make_scheduler(search, space, budget=BUDGET, report=100)
        self.scheduler: Any = keep_decades(
            made, space, spaces.BARE, mode="packed", time_attr=TOKENS, budget=BUDGET
        )
        self.scheduler.set_search_properties("eval_loss", "min")
        for trial in self.trials.values():
            self.scheduler.on_trial_add(self.controller, trial)

    def report(self, name: str, tokens: int, loss: float) -> str:
        trial = self.trials[name]
        result = {TOKENS: tokens, "eval_loss": loss}
        decision = self.scheduler.on_trial_result(self.controller, trial, result)
        trial.last_result = result
        if decision == TrialScheduler.STOP:
            self.scheduler.on_trial_complete(self.controller, trial, result)
            trial.status = Trial.TERMINATED
        return decision


def test_asha_cannot_clear_a_decade_before_a_third_of_the_budget() -> None:
    rates = {"best": 3e-4, "fast": 2e-3, "slow": 2e-5}
    found = Population(rates)
    assert found.report("best", 100, 1.0) == TrialScheduler.CONTINUE
    assert found.report("slow", 100, 3.0) == TrialScheduler.CONTINUE
    assert found.report("fast", 100, 4.0) == TrialScheduler.CONTINUE
    alone = Population(rates, space=config.parse({"lora.rank": [8, 16]}))
    assert type(alone.scheduler) is AsyncHyperBandScheduler
    assert [alone.report(*r) for r in (("best", 100, 1.0), ("slow", 100, 3.0))][-1] == (
        TrialScheduler.STOP
    )
    assert found.report("best", 300, 0.5) == TrialScheduler.CONTINUE
    assert found.report("slow", 300, 2.5) == TrialScheduler.STOP  # it has had its third


def test_a_decade_with_others_in_it_is_open_to_the_scheduler_until_one_is_left() -> None:
    found = Population({"best": 3e-4, "a": 2e-3, "b": 9e-3, "c": 1.1e-3})
    found.report("best", 100, 1.0)
    assert found.report("a", 100, 4.0) == TrialScheduler.STOP
    found.trials["a"].status = Trial.RUNNING  # it is still being saved
    assert found.report("b", 100, 4.1) == TrialScheduler.STOP
    assert found.report("c", 100, 4.2) == TrialScheduler.CONTINUE


@pytest.mark.parametrize(
    ("status", "tokens", "is_protected"),
    [
        (Trial.PENDING, 0, False),
        (Trial.PAUSED, 100, False),
        (Trial.TERMINATED, 100, True),
        (Trial.TERMINATED, 300, False),
        (Trial.ERROR, 300, True),
    ],
)
def test_who_waits_or_has_had_its_third_represents_a_decade(
    status: str, tokens: int, is_protected: bool
) -> None:
    found = Population({"best": 3e-4, "other": 2e-3, "judged": 3e-3})
    found.report("best", 100, 1.0)
    other = found.trials["other"]
    other.status, other.last_result = status, {TOKENS: tokens}
    stops = found.report("judged", 100, 9.0) == TrialScheduler.STOP
    assert stops is not is_protected


def test_the_median_rule_takes_a_trial_back_that_it_had_stopped() -> None:
    """MedianStoppingRule (Ray 2.60) asserts otherwise, by the private name that is undone here."""
    found = Population({"a": 3e-4, "b": 4e-4, "c": 5e-4, "last": 2e-3}, "median")
    for tokens in (100, 200):
        for name in ("a", "b", "c"):
            assert found.report(name, tokens, 1.0) == TrialScheduler.CONTINUE
        assert found.report("last", tokens, 5.0) == TrialScheduler.CONTINUE
    for name in ("a", "b", "c"):
        found.report(name, 300, 1.0)
    assert found.report("last", 300, 5.0) == TrialScheduler.STOP


def test_schedulers_that_keep_their_own_books_are_left_alone() -> None:
    space = spaces.rank_lr()
    for name, searcher in (("hyperband", "optuna"), ("fifo", "optuna"), ("pbt", "random")):
        search = SearchConfig(scheduler=name, searcher=searcher)  # pyright: ignore
        made = make_scheduler(search, space, budget=BUDGET, report=100)
        assert (
            keep_decades(made, space, spaces.BARE, mode="packed", time_attr=TOKENS, budget=BUDGET)
            is made
        )


def test_it_goes_through_pickle_with_the_scheduler_that_it_keeps() -> None:
    found = Population({"best": 3e-4, "last": 2e-3}, "asha")
    found.report("best", 100, 1.0)
    found.scheduler = pickle.loads(pickle.dumps(found.scheduler))
    assert isinstance(found.scheduler, DecadeKeeper)
    assert isinstance(found.scheduler._base, AsyncHyperBandScheduler)
    assert found.scheduler.metric == "eval_loss"
    assert found.scheduler.supports_buffered_results
    assert "AsyncHyperBand" in found.scheduler.debug_string()
    assert found.report("last", 100, 4.0) == TrialScheduler.CONTINUE
