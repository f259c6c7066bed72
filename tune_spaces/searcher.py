"""Searchers for Ray Tune: Optuna that is told the truth, and a list drawn in advance.

Ray's own OptunaSearch (2.60) reports a trial that a scheduler stopped as COMPLETE with its early
loss, so the sampler compares losses at a tenth of the budget with losses at the whole of it. Here
such a trial is PRUNED and keeps its curve, over supervised tokens.

The study lives in a journal file, which `optuna-dashboard JOURNAL` opens. A suggestion depends on
the seed, the number of the trial and what the journal holds, and on nothing in memory: a search
that was killed goes on as if it had not been.

Every result of a trial carries the metric, `supervised_tokens` and `is_finished`, which is true
only where the trial has reached its whole budget.

What is not covered: several drivers on one study, trials that were enqueued by somebody else, a
journal that moved between a crash and `Tuner.restore` (Tune restores the searcher with its path).
"""

import json
import logging
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import BaseSampler, GPSampler, TPESampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState
from ray.tune.search import Searcher

from cluster import storage
from cluster.errors import ConfigError, StorageError

TUNE_TRIAL_ID = "tune_trial_id"
"""User attribute of an Optuna trial: the id of the Tune trial that it is."""

_FINISHED = cast(dict[str, Any], Searcher.FINISHED)
"""The word that ends a search; Ray (2.60) types a suggestion as a dict."""

_log = logging.getLogger(__name__)


class _JsonSearcher(Searcher):
    """Saves and restores its state as JSON, where Ray's searchers pickle themselves."""

    CKPT_FILE_TMPL = "searcher-state-{}.json"

    def save(self, checkpoint_path: str) -> None:
        """Write the state; Tune calls it together with each snapshot of its own."""
        storage.write_file(Path(checkpoint_path), json.dumps(self.get_state()).encode())

    def restore(self, checkpoint_path: str) -> None:
        """Go on from a saved state. Raises StorageError where it cannot be read."""
        try:
            state = json.loads(Path(checkpoint_path).read_bytes())
        except (OSError, ValueError) as error:
            raise StorageError(
                f"{checkpoint_path}: the saved state of the searcher cannot be read ({error}); "
                "this search cannot be resumed, start it again under another name"
            ) from None
        self.set_state(state)


class OptunaSearcher(_JsonSearcher):
    """Optuna's TPE or GP sampler over a define-by-run space, as a Tune searcher.

    A trial ends COMPLETE where it reached its budget with a finite metric, FAIL on an error or
    where it ended before any report, and PRUNED otherwise. A metric that is not finite is kept in
    the curve as NaN: TPE ranks a trial that ends so below all others with as many tokens.

    GP (Optuna 5.0) learns from COMPLETE trials alone; TPE learns from PRUNED ones too.
    """

    def __init__(
        self,
        *,
        suggest: Callable[[optuna.trial.Trial], dict[str, Any]],
        metric: str,
        mode: Literal["min", "max"],
        seed: int,
        num_trials: int,
        journal: Path,
        study_name: str,
        sampler: Literal["tpe", "gp"] = "tpe",
    ) -> None:
        """Open study `study_name` of `journal`, or start it. `seed` is 0 or more.

        `suggest` returns the parameters of a trial, path -> value. It is pickled with the Tuner.
        Raises ConfigError where the study has the other mode.
        """
        super().__init__(metric=metric, mode=mode)
        self._draw = suggest
        self._seed = seed
        self._num_trials = num_trials
        self._journal = journal.absolute()
        self._study_name = study_name
        self._kind: Literal["tpe", "gp"] = sampler
        self._numbers: dict[str, int] = {}  # Tune trial id -> number of the Optuna trial
        self._study = _open(self._journal, study_name, mode)

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        """`{"params": {path: value}}` for a new trial, or FINISHED after `num_trials` of them.

        Trials of the journal that Tune does not know, because the driver died after its last
        snapshot, come first, with the parameters they had.
        """
        if len(self._numbers) >= self._num_trials:
            return _FINISHED
        trials = self._study.get_trials(deepcopy=False)
        number = min({*range(len(trials) + 1)} - {*self._numbers.values()})
        self._study.sampler = _sampler(self._kind, self._seed, number)
        is_new = number == len(trials)
        trial = self._study.ask() if is_new else self._reopen(trials[number])
        if is_new or not trials[number].state.is_finished():
            trial.set_user_attr(TUNE_TRIAL_ID, trial_id)
        self._numbers[trial_id] = number
        return {"params": self._draw(trial)}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Keep one value per number of supervised tokens; after a resume they come again."""
        trial = self._unfinished(trial_id)
        if trial is not None:
            self._report(trial, result)

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Tell Optuna how the trial ended. A trial that has ended already is left as it is.

        The result that makes a scheduler stop a trial arrives here only.
        """
        trial = self._unfinished(trial_id)
        if trial is None:
            return
        value = math.nan
        if result:
            value = self._report(trial, result)
            trial = self._study.get_trials(deepcopy=False)[trial.number]
        is_finished = bool(result and result["is_finished"])
        if is_finished and math.isfinite(value) and not error:
            self._study.tell(trial.number, value, state=TrialState.COMPLETE)
        else:
            self._stop(trial, TrialState.FAIL if error else TrialState.PRUNED)

    def close(self) -> None:
        """End what still runs in the study, when the search is over for good.

        Tune (2.60) says nothing about the trials it stops all at once, at a time limit.
        """
        for trial in self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            self._stop(trial, TrialState.PRUNED)

    def get_state(self) -> dict[str, Any]:
        """Which Optuna trial each Tune trial is; all else is in the journal."""
        return {"numbers": dict(self._numbers)}

    def set_state(self, state: dict[str, Any]) -> None:
        """Tie the Tune trials of a snapshot to those of the journal, which is read again.

        Raises StorageError where the journal has fewer trials.
        """
        self._numbers = dict(state["numbers"])
        num_known = max(self._numbers.values(), default=-1) + 1
        num_found = 0
        if self._journal.exists():
            self._study = _open(self._journal, self._study_name, cast(Any, self.mode))
            num_found = len(self._study.get_trials(deepcopy=False))
        if num_found < num_known:
            raise StorageError(
                f"{self._journal}: study {self._study_name!r} has {num_found} trials, the search "
                f"to be resumed has {num_known}; put the search's own journal back, or start the "
                "search again under another name"
            )

    def _unfinished(self, trial_id: str) -> FrozenTrial | None:
        """The Optuna trial of a Tune trial; None where it has ended or nobody knows it."""
        trials = self._study.get_trials(deepcopy=False)
        if trial_id not in self._numbers:  # Tune's part of a snapshot can be newer than ours.
            same = [t.number for t in trials if t.user_attrs.get(TUNE_TRIAL_ID) == trial_id]
            if not same:
                _log.warning("unknown_trial=%s study=%s", trial_id, self._study_name)
                return None
            self._numbers[trial_id] = same[0]
        trial = trials[self._numbers[trial_id]]
        return None if trial.state.is_finished() else trial

    def _report(self, trial: FrozenTrial, result: Mapping[str, Any]) -> float:
        value, step = float(result[self.metric]), int(result["supervised_tokens"])
        if step not in trial.intermediate_values:
            self._reopen(trial).report(value if math.isfinite(value) else math.nan, step)
        return value

    def _stop(self, trial: FrozenTrial, state: TrialState) -> None:
        self._study.tell(
            trial.number, state=state if trial.intermediate_values else TrialState.FAIL
        )

    def _reopen(self, trial: FrozenTrial) -> optuna.trial.Trial:
        return optuna.trial.Trial(self._study, trial._trial_id)


class ListSearcher(_JsonSearcher):
    """Hands out parameters that were drawn in advance, in their order: random search and grids."""

    def __init__(self, params: Sequence[Mapping[str, Any]]) -> None:
        """`params` has the parameters of each trial, path -> value."""
        super().__init__()
        self._params = [dict(one) for one in params]
        self._num_suggested = 0

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        """`{"params": {path: value}}` for the next trial, or FINISHED after the last."""
        if self._num_suggested >= len(self._params):
            return _FINISHED
        self._num_suggested += 1
        return {"params": self._params[self._num_suggested - 1]}

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Nothing is learnt."""

    def get_state(self) -> dict[str, Any]:
        """How far the list has been handed out."""
        return {"num_suggested": self._num_suggested}

    def set_state(self, state: dict[str, Any]) -> None:
        """Go on behind the trials of a snapshot."""
        self._num_suggested = state["num_suggested"]


def _open(journal: Path, name: str, mode: Literal["min", "max"]) -> optuna.Study:
    if journal.exists():
        _drop_torn_line(journal)
    direction = {"min": StudyDirection.MINIMIZE, "max": StudyDirection.MAXIMIZE}[mode]
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)  # It has no level for one study.
    try:
        study = optuna.create_study(
            storage=JournalStorage(JournalFileBackend(str(journal))),
            study_name=name,
            direction=direction,
            load_if_exists=True,
        )
    finally:
        optuna.logging.set_verbosity(verbosity)
    if study.direction != direction:
        raise ConfigError(
            f"{journal}: study {name!r} was started to {study.direction.name.lower()} its metric; "
            f"mode is {mode!r} now. Start a search under another name, or keep the metric"
        )
    return study


def _drop_torn_line(journal: Path) -> None:
    """Optuna (5.0) would write on behind half a line, and never read the file again."""
    with journal.open("rb+") as stream:
        data = stream.read()
        if not data.endswith(b"\n"):
            stream.truncate(data.rfind(b"\n") + 1)


def _sampler(kind: Literal["tpe", "gp"], seed: int, number: int) -> BaseSampler:
    """A fresh sampler for one trial: its random stream needs no saving."""
    own_seed = int(np.random.SeedSequence((seed, number)).generate_state(1)[0])
    if kind == "gp":
        return GPSampler(seed=own_seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)  # `group`, since 2.8
        return TPESampler(seed=own_seed, multivariate=True, group=True, constant_liar=True)
