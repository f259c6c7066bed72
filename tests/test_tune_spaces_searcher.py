"""What Optuna is told about trials, and that a search goes on where a killed one stopped."""

import itertools
import json
import math
from pathlib import Path
from typing import Any, Literal

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState
from ray import cloudpickle, tune
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search import ConcurrencyLimiter, Searcher, SearchGenerator
from ray.tune.search.optuna import OptunaSearch

from cluster.errors import ConfigError, StorageError
from cluster.session import connect
from tune_spaces.searcher import TUNE_TRIAL_ID, ListSearcher, OptunaSearcher

RANK, RATE = "lora.rank", "optim.learning_rate_at_rank_16"


def space(trial: optuna.trial.Trial) -> dict[str, Any]:
    return {
        RANK: trial.suggest_categorical(RANK, [8, 16, 32, 64]),
        RATE: trial.suggest_float(RATE, 2e-5, 2e-3, log=True),
    }


def make(directory: Path, **changes: Any) -> OptunaSearcher:
    directory.mkdir(exist_ok=True)
    options: dict[str, Any] = {
        "suggest": space, "metric": "loss", "mode": "min", "seed": 7, "num_trials": 20,
        "journal": directory / "optuna.log", "study_name": "tickets", "sampler": "tpe",
    }  # fmt: skip
    return OptunaSearcher(**{**options, **changes})


def trials_of(directory: Path) -> list[FrozenTrial]:
    storage = JournalStorage(JournalFileBackend(str(directory / "optuna.log")))
    return optuna.load_study(study_name="tickets", storage=storage).trials


def result(tokens: int, loss: float, *, is_finished: bool = False) -> dict[str, Any]:
    return {"loss": loss, "supervised_tokens": tokens, "is_finished": is_finished}


def params_of(suggestion: dict[str, Any] | None) -> dict[str, Any]:
    assert isinstance(suggestion, dict)
    return suggestion["params"]


def loss_of(params: dict[str, Any]) -> float:
    return abs(math.log10(params[RATE]) + 3.5) + abs(math.log2(params[RANK] / 32)) / 10


def finish(searcher: Searcher, trial_id: str, params: dict[str, Any]) -> None:
    """Two reports and the end at the whole budget, as Tune hands them on."""
    searcher.on_trial_result(trial_id, result(100, loss_of(params) + 1))
    searcher.on_trial_complete(trial_id, result(200, loss_of(params), is_finished=True))


def search(searcher: Searcher, ids: range) -> list[dict[str, Any]]:
    """Finish trials one by one; returns their parameters."""
    drawn = []
    for number in ids:
        drawn.append(params_of(searcher.suggest(f"t{number}")))
        finish(searcher, f"t{number}", drawn[-1])
    return drawn


def test_a_trial_with_its_whole_budget_is_complete_with_its_curve(tmp_path: Path) -> None:
    searcher = make(tmp_path)
    params = params_of(searcher.suggest("a"))
    finish(searcher, "a", params)
    (trial,) = trials_of(tmp_path)
    assert trial.state == TrialState.COMPLETE
    assert trial.value == loss_of(params)
    assert trial.intermediate_values == {100: loss_of(params) + 1, 200: loss_of(params)}
    assert trial.params == params
    assert trial.user_attrs == {TUNE_TRIAL_ID: "a"}


def test_a_stopped_trial_is_pruned_where_rays_own_searcher_calls_it_complete(
    tmp_path: Path,
) -> None:
    ours = make(tmp_path)
    rays = OptunaSearch(
        space={RATE: optuna.distributions.FloatDistribution(2e-5, 2e-3)},
        metric="loss",
        mode="min",
        storage=JournalStorage(JournalFileBackend(str(tmp_path / "rays.log"))),
        study_name="rays",
        sampler=optuna.samplers.RandomSampler(seed=0),
    )
    for searcher in (ours, rays):
        searcher.suggest("a")
        searcher.on_trial_result("a", {**result(100, 3.0), "training_iteration": 1})
        searcher.on_trial_complete("a", {**result(200, 2.5), "training_iteration": 2})
    storage = JournalStorage(JournalFileBackend(str(tmp_path / "rays.log")))
    (trap,) = optuna.load_study(study_name="rays", storage=storage).trials
    assert (trap.state, trap.value) == (TrialState.COMPLETE, 2.5)
    (trial,) = trials_of(tmp_path)
    assert trial.state == TrialState.PRUNED
    assert trial.intermediate_values == {100: 3.0, 200: 2.5}


def test_a_trial_stopped_while_paused_is_pruned_with_the_values_it_had(tmp_path: Path) -> None:
    searcher = make(tmp_path)
    searcher.suggest("a")
    searcher.on_trial_result("a", result(100, 3.0))
    searcher.on_trial_complete("a", None)
    (trial,) = trials_of(tmp_path)
    assert (trial.state, trial.value) == (TrialState.PRUNED, 3.0)


def test_a_trial_that_never_reported_is_failed(tmp_path: Path) -> None:
    searcher = make(tmp_path)
    for trial_id, last in (("a", None), ("b", {})):
        searcher.suggest(trial_id)
        searcher.on_trial_complete(trial_id, last)
    assert [trial.state for trial in trials_of(tmp_path)] == [TrialState.FAIL] * 2


def test_an_error_is_a_failure_even_after_reports(tmp_path: Path) -> None:
    searcher = make(tmp_path)
    searcher.suggest("a")
    searcher.on_trial_result("a", result(100, 3.0))
    searcher.on_trial_complete("a", error=True)
    (trial,) = trials_of(tmp_path)
    assert trial.state == TrialState.FAIL
    assert trial.intermediate_values == {100: 3.0}


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_is_never_complete(tmp_path: Path, loss: float) -> None:
    searcher = make(tmp_path)
    searcher.suggest("a")
    searcher.on_trial_result("a", result(100, 3.0))
    searcher.on_trial_complete("a", result(200, loss, is_finished=True))
    searcher.suggest("b")
    searcher.on_trial_complete("b", result(100, loss))
    late, early = trials_of(tmp_path)
    for trial in (late, early):
        assert (trial.state, trial.value) == (TrialState.PRUNED, None)
    assert late.intermediate_values[100] == 3.0
    assert math.isnan(late.intermediate_values[200])
    assert math.isnan(early.intermediate_values[100])


def test_suggestions_go_on_after_stopped_diverged_and_failed_trials(tmp_path: Path) -> None:
    searcher = make(tmp_path, num_trials=30)
    ends = itertools.cycle([result(100, 2.0), result(100, math.nan), None])
    for number, last in zip(range(29), ends, strict=False):
        searcher.suggest(f"t{number}")
        searcher.on_trial_complete(f"t{number}", last)
    assert set(params_of(searcher.suggest("last"))) == {RANK, RATE}


def test_tokens_that_come_again_after_a_resume_count_once(tmp_path: Path) -> None:
    searcher = make(tmp_path)
    searcher.suggest("a")
    for tokens, loss in ((100, 3.0), (200, 2.0), (100, 9.0), (200, 9.0), (300, 1.0)):
        searcher.on_trial_result("a", result(tokens, loss))
    (trial,) = trials_of(tmp_path)
    assert trial.intermediate_values == {100: 3.0, 200: 2.0, 300: 1.0}


def test_a_metric_to_maximise_has_its_best_trial_at_the_top(tmp_path: Path) -> None:
    searcher = make(tmp_path, mode="max", metric="exact_match")
    for trial_id, value in (("a", 0.2), ("b", 0.9), ("c", 0.5)):
        searcher.suggest(trial_id)
        last = {"exact_match": value, "supervised_tokens": 100, "is_finished": True}
        searcher.on_trial_complete(trial_id, last)
    storage = JournalStorage(JournalFileBackend(str(tmp_path / "optuna.log")))
    assert optuna.load_study(study_name="tickets", storage=storage).best_trial.number == 1
    with pytest.raises(ConfigError, match="was started to maximize its metric; mode is 'min'"):
        make(tmp_path)


def test_the_search_ends_after_its_number_of_trials(tmp_path: Path) -> None:
    searcher = make(tmp_path, num_trials=3)
    search(searcher, range(3))
    assert searcher.suggest("t3") == Searcher.FINISHED
    assert len(trials_of(tmp_path)) == 3


def test_a_seed_decides_every_suggestion(tmp_path: Path) -> None:
    first = search(make(tmp_path / "a"), range(14))
    assert search(make(tmp_path / "b"), range(14)) == first
    assert search(make(tmp_path / "c", seed=8), range(14)) != first


def test_tpe_finds_the_valley(tmp_path: Path) -> None:
    losses = [loss_of(params) for params in search(make(tmp_path, num_trials=40), range(40))]
    assert sum(losses[30:]) < 0.6 * sum(losses[:10])


def test_a_running_trial_pushes_the_next_one_away(tmp_path: Path) -> None:
    after: dict[str, dict[str, Any]] = {}
    for neighbour in ("running", "failed"):
        searcher = make(tmp_path / neighbour)
        search(searcher, range(12))
        searcher.suggest("neighbour")
        if neighbour == "failed":
            searcher.on_trial_complete("neighbour", error=True)
        after[neighbour] = params_of(searcher.suggest("next"))
    assert after["running"] != after["failed"]


def test_suggestions_without_any_result_differ(tmp_path: Path) -> None:
    searcher = make(tmp_path)
    drawn = [params_of(searcher.suggest(f"t{number}"))[RATE] for number in range(4)]
    assert len(set(drawn)) == 4


def test_gp_suggests_from_a_mixed_space(tmp_path: Path) -> None:
    searcher = make(tmp_path, sampler="gp", suggest=mixed_space)
    search(searcher, range(11))
    running = params_of(searcher.suggest("running"))
    params = params_of(searcher.suggest("next"))
    assert params != running
    assert params[RANK] in (8, 16, 32, 64)
    assert 1 <= params["optim.epochs"] <= 3
    assert 2e-5 <= params[RATE] <= 2e-3


def mixed_space(trial: optuna.trial.Trial) -> dict[str, Any]:
    return {**space(trial), "optim.epochs": trial.suggest_int("optim.epochs", 1, 3)}


def test_optuna_neither_warns_nor_chats(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = optuna.logging.get_verbosity()
    for _ in range(2):
        search(make(tmp_path), range(2))
    assert capfd.readouterr().err == ""
    assert optuna.logging.get_verbosity() == before


def test_a_search_killed_in_the_middle_ends_as_an_undisturbed_one(tmp_path: Path) -> None:
    undisturbed = make(tmp_path / "calm")
    expected = search(undisturbed, range(12))
    expected += [params_of(undisturbed.suggest(trial_id)) for trial_id in ("t12", "t13")]
    finish(undisturbed, "t13", expected[13])
    finish(undisturbed, "t12", expected[12])
    expected += search(undisturbed, range(14, 20))

    killed = make(tmp_path / "killed")
    drawn = search(killed, range(12))
    drawn += [params_of(killed.suggest(trial_id)) for trial_id in ("t12", "t13")]
    killed.on_trial_result("t12", result(100, loss_of(drawn[12]) + 1))
    killed.save(str(tmp_path / "state.json"))
    restored = make(tmp_path / "killed")
    restored.restore(str(tmp_path / "state.json"))
    finish(restored, "t13", drawn[13])
    finish(restored, "t12", drawn[12])
    drawn += search(restored, range(14, 20))

    assert drawn == expected
    assert restored.suggest("t20") == Searcher.FINISHED
    calm, same = trials_of(tmp_path / "calm"), trials_of(tmp_path / "killed")
    assert [t.values for t in same] == [t.values for t in calm]
    assert [t.intermediate_values for t in same] == [t.intermediate_values for t in calm]
    assert [t.user_attrs for t in same] == [t.user_attrs for t in calm]


def test_trials_newer_than_the_snapshot_are_handed_out_again(tmp_path: Path) -> None:
    searcher = make(tmp_path)
    search(searcher, range(2))
    searcher.save(str(tmp_path / "state.json"))
    (finished,) = search(searcher, range(2, 3))
    running = params_of(searcher.suggest("t3"))

    restored = make(tmp_path)
    restored.restore(str(tmp_path / "state.json"))
    assert params_of(restored.suggest("new2")) == finished
    assert params_of(restored.suggest("new3")) == running
    restored.on_trial_result("new2", result(100, 99.0))
    restored.on_trial_complete("new2", result(200, 99.0, is_finished=True))
    finish(restored, "new3", running)
    new = params_of(restored.suggest("new4"))
    assert new not in (finished, running)
    trials = trials_of(tmp_path)
    assert len(trials) == 5
    assert trials[2].value == loss_of(finished)  # What was known stays.
    assert trials[3].value == loss_of(running)
    assert trials[3].user_attrs == {TUNE_TRIAL_ID: "new3"}


def test_a_trial_that_only_the_journal_knows_is_tied_by_its_attribute(tmp_path: Path) -> None:
    searcher = make(tmp_path)
    searcher.save(str(tmp_path / "state.json"))
    searcher.suggest("a")
    searcher.restore(str(tmp_path / "state.json"))
    searcher.on_trial_complete("a", result(200, 1.0, is_finished=True))
    searcher.on_trial_result("nobody", result(100, 1.0))
    searcher.on_trial_complete("nobody", result(200, 1.0))
    searcher.suggest("b")
    assert [trial.state for trial in trials_of(tmp_path)] == [
        TrialState.COMPLETE,
        TrialState.RUNNING,
    ]


def test_half_a_line_at_the_end_of_the_journal_is_dropped(tmp_path: Path) -> None:
    search(make(tmp_path), range(2))
    with (tmp_path / "optuna.log").open("ab") as journal:
        journal.write(b'{"op_code":4,"wor')
    reopened = make(tmp_path)
    reopened.suggest("t0")
    search(reopened, range(1, 3))
    assert len(trials_of(tmp_path)) == 3


def test_a_lost_journal_or_state_is_explained(tmp_path: Path) -> None:
    searcher = make(tmp_path)
    search(searcher, range(2))
    searcher.save(str(tmp_path / "state.json"))
    (tmp_path / "optuna.log").unlink()
    with pytest.raises(StorageError, match="has 0 trials, the search to be resumed has 2"):
        searcher.restore(str(tmp_path / "state.json"))
    (tmp_path / "state.json").write_text('{"numb')
    with pytest.raises(StorageError, match="saved state of the searcher cannot be read"):
        searcher.restore(str(tmp_path / "state.json"))


def test_closing_ends_what_tune_left_running(tmp_path: Path) -> None:
    searcher = make(tmp_path)
    search(searcher, range(1))
    searcher.suggest("stopped")
    searcher.on_trial_result("stopped", result(100, 3.0))
    searcher.suggest("never ran")
    searcher.close()
    states = [trial.state for trial in trials_of(tmp_path)]
    assert states == [TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL]


@pytest.mark.parametrize("kind", ["optuna", "list"])
def test_tune_saves_and_restores_the_searcher_inside_its_wrappers(
    tmp_path: Path, kind: Literal["optuna", "list"]
) -> None:
    listed = [{RANK: rank} for rank in (8, 16, 32, 64)]
    searcher = make(tmp_path) if kind == "optuna" else ListSearcher(listed)
    pickled = cloudpickle.dumps(searcher)  # Tuner does so before the first trial.
    algorithm = _wrapped(searcher)
    first = [algorithm.searcher.suggest(trial_id) for trial_id in ("a", "b")]
    assert algorithm.searcher.suggest("c") is None
    algorithm.save_to_dir(str(tmp_path), "now")
    state = json.loads((tmp_path / "searcher-state-now.json").read_text())
    assert state == ({"numbers": {"a": 0, "b": 1}} if kind == "optuna" else {"num_suggested": 2})

    restored = _wrapped(cloudpickle.loads(pickled))
    restored.restore_from_dir(str(tmp_path))
    assert restored.searcher.suggest("c") is None
    restored.searcher.on_trial_complete("a", result(200, 1.0, is_finished=True))
    assert restored.searcher.suggest("c") not in (None, Searcher.FINISHED, *first)


def _wrapped(searcher: Searcher) -> SearchGenerator:
    return SearchGenerator(ConcurrencyLimiter(searcher, max_concurrent=2))


def test_a_list_is_handed_out_in_order_and_ends() -> None:
    searcher = ListSearcher([{RANK: 8}, {RANK: 16, RATE: 1e-4}])
    assert searcher.suggest("a") == {"params": {RANK: 8}}
    searcher.on_trial_result("a", result(100, 1.0))
    searcher.on_trial_complete("a", error=True)
    assert searcher.suggest("b") == {"params": {RANK: 16, RATE: 1e-4}}
    assert searcher.suggest("c") == Searcher.FINISHED


@pytest.mark.ray
def test_trials_that_asha_stops_are_pruned_in_the_journal(tmp_path: Path) -> None:
    def train(config: dict[str, Any]) -> None:  # Workers cannot import this module.
        for tokens in (100, 300, 900):
            loss = 1e3 * config["params"]["optim.learning_rate_at_rank_16"] + 100 / tokens
            is_finished = tokens == 900
            tune.report({"loss": loss, "supervised_tokens": tokens, "is_finished": is_finished})

    searcher = make(tmp_path, num_trials=6)
    scheduler = ASHAScheduler(
        time_attr="supervised_tokens", grace_period=100, max_t=900, reduction_factor=3
    )
    with connect(num_cpus=2):
        tuner = tune.Tuner(
            train,
            tune_config=tune.TuneConfig(
                metric="loss",
                mode="min",
                search_alg=searcher,
                scheduler=scheduler,
                num_samples=6,
                max_concurrent_trials=2,
            ),
            run_config=tune.RunConfig(name="search", storage_path=str(tmp_path), verbose=0),
        )
        results = tuner.fit()
        again = tune.Tuner.restore(str(tmp_path / "search"), trainable=train).fit()
    assert len(again) == len(results) == 6
    trials = {trial.user_attrs[TUNE_TRIAL_ID]: trial for trial in trials_of(tmp_path)}
    assert len(trials) == 6
    for one in results:
        assert one.metrics is not None
        trial = trials[one.metrics["trial_id"]]
        is_finished = one.metrics["is_finished"]
        assert trial.state == (TrialState.COMPLETE if is_finished else TrialState.PRUNED)
        assert trial.value == one.metrics["loss"]
        assert max(trial.intermediate_values) == one.metrics["supervised_tokens"]
        assert one.config is not None
        assert trial.params == one.config["params"]
    assert {trial.state for trial in trials.values()} == {TrialState.COMPLETE, TrialState.PRUNED}
