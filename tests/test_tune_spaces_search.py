"""Whole searches on a tiny base, through real Ray Tune."""

import csv
import json
import os
import signal
import sqlite3
import time
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import yaml
from processes import call, finish, start, wait_until
from runs import write_rows
from safetensors.numpy import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cluster import storage
from tune_spaces import record as records
from tune_spaces.__main__ import main


def write_search(directory: Path, base: Path, name: str = "found", **settings: Any) -> Path:
    """A search of few small trials; `search` and `space` in settings win over the defaults."""
    data = directory / "train.jsonl"
    if not data.exists():
        write_rows(data)
        write_rows(directory / "eval.jsonl", 12)
        write_rows(directory / "test.jsonl", 9)
    tree: dict[str, Any] = {
        "name": name,
        "storage": str(directory / "runs"),
        "model": {"base": str(base), "quantization": "int8"},
        "data": {"train": str(data), "eval": str(directory / "eval.jsonl"), "max_length": 128},
        "optim": {"max_steps": 16, "global_batch_size": 4},
        "space": {
            "lora.rank": [2, 4, 8],
            "optim.learning_rate_at_rank_16": {"log_uniform": [1e-3, 3e-2]},
        },
        **settings,
    }
    tree["search"] = {
        "trials": 6,
        "seats": 3,
        "scheduler": "asha",
        "searcher": "random",
        "finalists": 2,
        "seeds": 2,
        "test": str(directory / "test.jsonl"),
        "fill_window_s": 5,
        **settings.get("search", {}),
    }
    path = directory / f"{name}.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


def result_of(out: str) -> Mapping[str, Any]:
    return json.loads(out.strip().splitlines()[-1])


@pytest.mark.ray
def test_a_search_finds_a_winner_and_leaves_everything(tmp_path: Path, tiny_base: Path) -> None:
    path = write_search(tmp_path, tiny_base, search={"log": ["tensorboard"]})
    status, out, err = call(["tune_spaces", path.name, "--json"], tmp_path)
    assert status == 0, err
    result = result_of(out)
    directory = Path(result["search_dir"])
    assert result["trials"] == 6
    assert result["finished"] + result["stopped"] == 6
    assert result["finished"] >= 1
    assert result["best_metric"] < result["base_metric"]
    assert result["isolation"] == "exact"
    record = records.read(directory)
    assert record.winner is not None
    assert record.winner.test_n == 9
    assert len(record.finalists) == min(2, result["finished"])
    assert all(len(finalist.seeds) == 2 for finalist in record.finalists)
    assert all(trial.reason for trial in record.trials if trial.state == "stopped")
    best = record.trial(result["best_trial"])
    (events,) = directory.glob(f"tune-0/SeatTrial_{best.trial}*")
    told = EventAccumulator(str(events)).Reload().Scalars("ray/tune/eval_loss")
    assert [e.value for e in told] == pytest.approx([point[2] for point in best.history])
    with (directory / "trials.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 6
    assert "won" in (directory / "report.html").read_text() or record.winner.is_tie
    storage.verify(directory / "best")
    status, out, err = call(["training", str(directory / "best.yaml"), "--json"], tmp_path)
    assert status == 0, err
    again = load_file(Path(result_of(out)["adapter"]) / "adapter_model.safetensors")
    best = load_file(directory / "best" / "adapter_model.safetensors")
    assert again.keys() == best.keys()
    assert max(float(abs(again[name] - best[name]).max()) for name in best) < 1e-4
    status, _, err = call(["tune_spaces", path.name], tmp_path)
    assert status == 1
    assert "--resume" in err


@pytest.mark.ray
@pytest.mark.parametrize("name", ["mlflow", "wandb"])
def test_others_hear_of_every_trial(tmp_path: Path, tiny_base: Path, name: str) -> None:
    pytest.importorskip(name)
    search = {"log": [name], "scheduler": "fifo", "trials": 2, "seats": 2, "seeds": 1}
    path = write_search(tmp_path, tiny_base, search=search)
    alone = {"WANDB_API_KEY": "", "MLFLOW_TRACKING_URI": ""}
    status, out, err = call(["tune_spaces", path.name, "--json"], tmp_path, alone)
    assert status == 0, err
    directory = Path(result_of(out)["search_dir"])
    record = records.read(directory)
    if name == "wandb":
        assert len(list(directory.glob("wandb/offline-run-*/run-*.wandb"))) == 2
        return
    with closing(sqlite3.connect(directory / "mlflow" / "mlflow.db")) as database:
        rows = database.execute("select value from metrics where key = 'eval_loss'").fetchall()
        values = [value for trial in record.trials for _, _, value, _ in trial.history]
        assert sorted(v for (v,) in rows) == pytest.approx(sorted(v or 0.0 for v in values))
        assert database.execute("select distinct status from runs").fetchall() == [("FINISHED",)]


@pytest.mark.ray
@pytest.mark.chaos
def test_a_killed_search_goes_on_and_nothing_runs_twice(tmp_path: Path, tiny_base: Path) -> None:
    settings = {
        "optim": {"max_steps": 60, "global_batch_size": 4},
        "search": {"scheduler": "fifo", "trials": 4, "seats": 2, "searcher": "optuna"},
    }
    path = write_search(tmp_path, tiny_base, **settings)
    directory = tmp_path / "runs" / "found"
    process = start(["loray", "search", path.name], tmp_path)
    wait_until(lambda: len(list(directory.glob("trials/*/adapter/manifest.json"))) >= 1, process)
    os.killpg(process.pid, signal.SIGKILL)
    finish(process)
    first = next(directory.glob("trials/*/adapter")).stat().st_ino
    status, _, err = call(["loray", "search", str(directory)], tmp_path)
    assert (status, "or --resume to go on" in err) == (1, True)
    status, out, err = call(["loray", "search", "--resume", str(directory), "--json"], tmp_path)
    assert status == 0, err
    result = result_of(out)
    assert (result["trials"], result["finished"]) == (4, 4)
    record = records.read(directory)
    assert {trial.history[-1][0] for trial in record.trials} == {record.trials[0].tokens}
    assert first in {path.stat().st_ino for path in directory.glob("trials/*/adapter")}
    told = (directory / "report.html").stat().st_mtime_ns
    status, out, err = call(["loray", "search", path.name, "--resume", "--json"], tmp_path)
    assert (status, result_of(out)) == (0, result)
    assert "this search is complete" in err
    assert (directory / "report.html").stat().st_mtime_ns == told


@pytest.mark.ray
@pytest.mark.parametrize("scheduler", ["hyperband", "pbt", "pb2"])
def test_schedulers_that_pause_and_copy_trials_run_unmodified(
    tmp_path: Path, tiny_base: Path, scheduler: str
) -> None:
    space = {
        "optim.learning_rate": {"log_uniform": [1e-3, 3e-2]},
        "lora.dropout": {"uniform": [0.0, 0.2]},
    }
    search = {"scheduler": scheduler, "trials": 4, "seats": 4, "seeds": 1, "test": None}
    path = write_search(tmp_path, tiny_base, space=space, search=search)
    status, out, err = call(["tune_spaces", path.name, "--json"], tmp_path)
    assert status == 0, err
    result = result_of(out)
    assert result["trials"] == 4
    assert result["failed"] == 0, err
    assert result["best_metric"] < result["base_metric"]
    if scheduler in ("pbt", "pb2"):
        lines = (Path(result["search_dir"]) / "tune-0" / "pbt_global.txt").read_text().splitlines()
        moves = [tuple(config["params"] for config in json.loads(line)[-2:]) for line in lines]
        assert any(old != new for old, new in moves)
        for _, new in moves if scheduler == "pb2" else ():
            assert 1e-3 <= new["optim.learning_rate"] <= 3e-2
            assert 0 <= new["lora.dropout"] <= 0.2


@pytest.mark.ray
def test_ctrl_c_keeps_everything_and_resume_goes_on(tmp_path: Path, tiny_base: Path) -> None:
    search = {"scheduler": "fifo", "trials": 3, "seats": 3, "finalists": 1, "seeds": 1}
    optim = {"max_steps": 400, "global_batch_size": 4}
    path = write_search(tmp_path, tiny_base, search=search, optim=optim)
    directory = tmp_path / "runs" / "found"
    process = start(["tune_spaces", path.name], tmp_path)
    wait_until(lambda: len(list(directory.glob("trials/*/checkpoints/step-*"))) >= 3, process)
    os.kill(process.pid, signal.SIGINT)
    status, _, err = finish(process)
    assert status == 130, err
    assert "--resume goes on" in err
    status, out, err = call(["tune_spaces", path.name, "--resume", "--json"], tmp_path)
    assert status == 0, err
    assert result_of(out)["finished"] == 3
    assert all(trial.history[0][0] < trial.tokens for trial in records.read(directory).trials)


@pytest.mark.ray
def test_an_overfitted_trial_can_win_with_its_best_report_and_be_trained_again(
    tmp_path: Path, tiny_base: Path
) -> None:
    for name, word in (("train", "red"), ("eval", "owl")):
        rows = [{"prompt": f"Say {n}", "completion": f"it is {word}"} for n in range(8)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    search = {"trials": 1, "seats": 2, "finalists": 1, "scheduler": "fifo", "test": None}
    guards = {"overfit_margin": 5e-4, "plateau_patience": None}
    path = write_search(
        tmp_path,
        tiny_base,
        model={"base": str(tiny_base), "quantization": "none"},
        optim={"max_steps": 400, "global_batch_size": 8},
        space={"lora.rank": [16], "optim.learning_rate": [3e-2]},
        search={**search, "report_every_tokens": 800, "guards": guards},
    )
    status, out, err = call(["tune_spaces", path.name, "--json"], tmp_path)
    assert status == 0, err
    result = result_of(out)
    assert (result["finished"], result["stopped"]) == (1, 0)
    directory = Path(result["search_dir"])
    (trial,) = records.read(directory).trials
    assert trial.reason.startswith("overfit: ")
    values = [value for _, _, value, _ in trial.history if value is not None]
    assert trial.value == min(values) < values[-1]
    assert result["best_metric"] == pytest.approx(trial.value, abs=1e-4)
    again = yaml.safe_load((directory / "best.yaml").read_text())
    assert again["optim"]["max_steps"] == 400
    assert 0 < again["optim"]["stop_after"] < 400
    (_, other) = records.read(directory).finalists[0].seeds
    assert other.value == pytest.approx(trial.value, abs=0.1)
    status, out, err = call(["training", str(directory / "best.yaml"), "--json"], tmp_path)
    assert status == 0, err
    again = load_file(Path(result_of(out)["adapter"]) / "adapter_model.safetensors")
    best = load_file(directory / "best" / "adapter_model.safetensors")
    assert max(float(abs(again[name] - best[name]).max()) for name in best) < 1e-4


@pytest.mark.ray
def test_trials_that_all_diverge_end_the_search_with_the_reason(
    tmp_path: Path, tiny_base: Path
) -> None:
    space = {"optim.learning_rate": [8.0, 9.0]}
    path = write_search(
        tmp_path, tiny_base, space=space, search={"searcher": "grid", "scheduler": "fifo"}
    )
    status, _, err = call(["tune_spaces", path.name, "optim.max_grad_norm=0"], tmp_path)
    assert status == 1
    assert "no trial finished: " in err
    assert "diverged" in err or "not step" in err
    assert (tmp_path / "runs" / "found" / "report.html").exists()


@pytest.mark.ray
def test_a_time_limit_ends_a_search_and_says_so(tmp_path: Path, tiny_base: Path) -> None:
    search = {"scheduler": "fifo", "trials": 2, "budget_minutes": 0.5, "report_every_tokens": 40}
    optim = {"max_steps": 20000, "global_batch_size": 4}
    path = write_search(tmp_path, tiny_base, search=search, optim=optim)
    status, _, err = call(["tune_spaces", path.name], tmp_path)
    assert status == 1
    assert "no trial finished: " in err
    directory = tmp_path / "runs" / "found"
    record = records.read(directory)
    for trial in record.trials:  # none on a machine so slow that none has reported
        assert trial.state == "stopped"
        assert trial.reason == f"at the search's time limit, after {trial.tokens} supervised tokens"
    assert record.wall_s < 120
    assert (directory / "report.html").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere.yaml"], "no such file"),
        (["FILE", "search.trails=4"], "Did you mean 'trials'"),
        (["FILE", "search.metric=loss"], "allowed: eval_loss"),
        (["FILE", "space=rank_l"], "Did you mean 'rank_lr'"),
        (["FILE", "data.eval=null"], "data.eval"),
        (["FILE", "lora.variant=dora"], "search.mode: solo"),
        (["FILE", "search.scheduler=pb2", "search.searcher=optuna"], "pb2 changes the parameters"),
        (["FILE", "search.log=[tensorbord]"], "tensorboard | mlflow | wandb"),
        (["FILE", "--resume"], "no search to resume"),
        (["FILE", "--address", "127.0.0.1:1"], "cannot be reached"),
    ],
)
def test_bad_input_ends_with_one_message_and_status_1(
    tmp_path: Path,
    tiny_base: Path,
    words: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    path = write_search(tmp_path, tiny_base)
    assert main([str(path) if word == "FILE" else word for word in words]) == 1
    err = capsys.readouterr().err
    assert message in err[err.rindex("error [") :]
    assert "Traceback" not in err


def test_the_stages_of_a_search_share_its_time(tmp_path: Path, tiny_base: Path) -> None:
    from tune_spaces import config, search

    path = write_search(tmp_path, tiny_base)
    unlimited, limited = config.load(path), config.load(path, ["search.budget_minutes=2"])
    assert search._in_time(unlimited, 0.0) is unlimited
    left = search._in_time(limited, time.perf_counter() - 90).search.budget_minutes
    assert left == pytest.approx(0.5, abs=0.1)
    left = search._in_time(limited, time.perf_counter() - 900).search.budget_minutes
    assert left == pytest.approx(0.01)


def test_another_search_s_directory_is_refused_with_the_difference(
    tmp_path: Path, tiny_base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tune_spaces import config, search

    path = write_search(tmp_path, tiny_base)
    directory = tmp_path / "runs" / "found"
    directory.mkdir(parents=True)
    search._claim(directory, config.load(path), resume=False)
    stored = json.loads((directory / "config.json").read_text())
    del stored["objective"]  # as a version without it has written
    (directory / "config.json").write_text(json.dumps(stored))
    search._claim(directory, config.load(path), resume=True)
    with pytest.raises(ValueError, match=r"search\.seed: 0 -> 3"):
        search._claim(directory, config.load(path, ["search.seed=3"]), resume=True)
    (directory / "config.json").unlink()
    (directory / "recipe.json").write_text("{}")
    with pytest.raises(ValueError, match="is a training run"):
        search._claim(directory, config.load(path), resume=False)
