"""The doors of a run, through real Ray: same result, same status, same answer to a fault."""

import json
import os
import signal
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest
import yaml
from local_cluster import local_cluster
from processes import call, finish, start, wait_until
from ray.job_submission import JobSubmissionClient
from runs import adapter_bytes, events_of, make_recipe, run_dir_of, train

from cluster import config, ownership
from training.config import TrainRecipe

ROOT = Path(__file__).resolve().parent.parent


def write_recipe(recipe: TrainRecipe, path: Path) -> Path:
    path.write_text(yaml.safe_dump(config.plain(recipe)), encoding="utf-8")
    return path


@pytest.mark.ray
def test_the_doors_train_the_same_adapter_as_the_bare_loop(tmp_path: Path, tiny_base: Path) -> None:
    alone = make_recipe(tmp_path, tiny_base, name="alone", scale={"cpus_per_worker": 1})
    train(alone)
    for name, words in (("module", ["training"]), ("command", ["loray", "train"])):
        recipe = make_recipe(tmp_path, tiny_base, name=name, scale={"cpus_per_worker": 1})
        path = write_recipe(recipe, tmp_path / f"{name}.yaml")
        status, out, err = call([*words, path.name, "optim.max_steps=6", "--json"], tmp_path)
        assert status == 0, err
        result = json.loads(out.splitlines()[-1])
        assert set(result) >= {
            "run_dir", "adapter", "steps", "first_loss", "final_loss", "eval", "real_tokens",
            "supervised_tokens", "real_tokens_per_s", "train_wall_s", "wall_s", "peak_rss_bytes",
            "resumed_from",
        }  # fmt: skip
        assert result["steps"] == 6
        assert result["resumed_from"] is None
        assert adapter_bytes(recipe) == adapter_bytes(alone)
        assert "supervised between" in err
    again = call(["training", path.name, "--json"], tmp_path)
    assert again[0] == 0
    assert "nothing to train" in again[2]


@pytest.mark.ray
def test_ray_jobs_train_the_same_adapter_as_the_bare_loop(tmp_path: Path, tiny_base: Path) -> None:
    alone = make_recipe(tmp_path, tiny_base, name="alone", scale={"cpus_per_worker": 1})
    train(alone)
    recipes = {
        name: make_recipe(tmp_path, tiny_base, name=name, scale={"cpus_per_worker": 1})
        for name in ("job", "submit", "wrong", "long")
    }
    paths = {
        name: str(write_recipe(recipe, tmp_path / f"{name}.yaml"))
        for name, recipe in recipes.items()
    }
    with local_cluster() as cluster:
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": cluster.token}
        address = ["--address", cluster.jobs_address]
        ray = ["ray.scripts.scripts", "job", "submit", *address, "--working-dir", "."]
        words = [*ray, "--", "python", "-m", "training", paths["job"], "--json"]
        status, out, err = call(words, ROOT, token)
        assert status == 0, out + err
        assert '"run_dir"' in out
        words = ["loray", "train", "--submit", *address, paths["submit"], "--json"]
        status, out, err = call(words, tmp_path, token)
        assert status == 0, out + err
        assert json.loads(out.strip().splitlines()[-1])["steps"] == 6
        words = ["loray", "train", "--submit", *address, paths["wrong"], "model.base=./nowhere"]
        status, out, err = call(words, tmp_path, token)
        assert status == 1, out + err
        assert "no such directory" in out
        job = start_submitted(cluster.jobs_address, paths["long"], tmp_path, token)
        wait_until(lambda: bool(events_of(recipes["long"], "step")), job)
        os.kill(job.pid, signal.SIGINT)
        status, out, err = finish(job, answers="y\n")
        assert status == 130, out + err
        assert "stop job raysubmit_" in err
        client = JobSubmissionClient(cluster.jobs_address, headers=cluster.headers)
        assert sorted(str(job.status) for job in client.list_jobs()) == [
            "FAILED", "STOPPED", "SUCCEEDED", "SUCCEEDED",
        ]  # fmt: skip
    for name in ("job", "submit"):
        assert adapter_bytes(recipes[name]) == adapter_bytes(alone)


def start_submitted(
    address: str, path: str, cwd: Path, token: Mapping[str, str]
) -> "subprocess.Popen[str]":
    words = ["loray", "train", "--submit", "--address", address, path, "optim.max_steps=100000"]
    return start(words, cwd, token)


@pytest.mark.ray
@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_worker_is_replaced_and_the_end_is_bitwise_equal(
    tmp_path: Path, tiny_base: Path, workers: int
) -> None:
    settings = {
        "optim": {"learning_rate": 1e-2, "max_steps": 150, "global_batch_size": 6},
        "lora": {"rank": 4, "dropout": 0.1},
        "checkpoint": {"every_steps": 5},
        "scale": {"workers": workers, "cpus_per_worker": 1},
    }
    paths = []
    for name in ("whole", "killed"):
        recipe = make_recipe(tmp_path, tiny_base, name=name, **settings)
        paths.append(write_recipe(recipe, tmp_path / f"{name}.yaml"))
    whole = make_recipe(tmp_path, tiny_base, name="whole", **settings)
    killed = make_recipe(tmp_path, tiny_base, name="killed", **settings)
    status, _, err = call(["training", str(paths[0])], tmp_path)
    assert status == 0, err
    process = start(["training", str(paths[1]), "--json"], tmp_path)
    wait_until(lambda: len(events_of(killed, "step")) >= 12, process)
    os.kill(int(events_of(killed, "started")[-1].number("pid")), signal.SIGKILL)
    status, out, err = finish(process)
    assert status == 0, err
    starts = [event.number("from_step") for event in events_of(killed, "started")]
    assert len(starts) == 2
    assert starts[1] >= 10
    assert json.loads(out.splitlines()[-1])["steps"] == 150
    assert adapter_bytes(killed) == adapter_bytes(whole)


@pytest.mark.ray
def test_two_workers_learn_what_one_does(tmp_path: Path, tiny_base: Path) -> None:
    one = make_recipe(tmp_path, tiny_base, name="one")
    train(one)
    two = make_recipe(tmp_path, tiny_base, name="two", scale={"workers": 2, "cpus_per_worker": 1})
    path = write_recipe(two, tmp_path / "two.yaml")
    status, _, err = call(["training", str(path)], tmp_path)
    assert status == 0, err
    for first, second in zip(events_of(one, "step"), events_of(two, "step"), strict=True):
        assert first.number("loss") == pytest.approx(second.number("loss"), abs=1e-5)


@pytest.mark.ray
def test_ctrl_c_stops_with_a_checkpoint_and_the_same_command_goes_on(
    tmp_path: Path, tiny_base: Path
) -> None:
    settings = {
        "optim": {"learning_rate": 1e-2, "max_steps": 200, "global_batch_size": 4},
        "checkpoint": {"every_steps": 1000},
        "scale": {"cpus_per_worker": 1},
    }
    recipe = make_recipe(tmp_path, tiny_base, **settings)
    path = write_recipe(recipe, tmp_path / "recipe.yaml")
    process = start(["training", str(path), "--json"], tmp_path)
    wait_until(lambda: len(events_of(recipe, "step")) >= 3, process)
    os.kill(process.pid, signal.SIGINT)
    status, out, err = finish(process)
    assert status == 130, err
    stopped_at = json.loads(out.splitlines()[-1])["steps"]
    assert 3 <= stopped_at < 200
    status, out, err = call(["training", str(path), "--json"], tmp_path)
    assert status == 0, err
    result = json.loads(out.splitlines()[-1])
    assert (result["resumed_from"], result["steps"]) == (stopped_at, 200)


@pytest.mark.ray
def test_an_error_in_a_worker_is_told_once_and_burns_no_retry(
    tmp_path: Path, tiny_base: Path
) -> None:
    recipe = make_recipe(tmp_path, tiny_base, lora={"rank": 4, "target_modules": ["nope"]})
    path = write_recipe(recipe, tmp_path / "recipe.yaml")
    status, _, err = call(["training", str(path)], tmp_path)
    assert status == 1
    assert err.strip().splitlines()[-1].startswith("error [invalid_config]: lora.target_modules")
    assert len(events_of(recipe, "failed")) == 1


def test_a_changed_recipe_is_refused_with_the_difference(tmp_path: Path, tiny_base: Path) -> None:
    from training import run

    recipe = make_recipe(tmp_path, tiny_base)
    run_dir = run_dir_of(recipe)
    run_dir.mkdir(parents=True)
    run._claim(run_dir, recipe, "data")
    run._claim(run_dir, make_recipe(tmp_path, tiny_base, checkpoint={"every_steps": 9}), "data")
    changed = make_recipe(tmp_path, tiny_base, lora={"rank": 8})
    with pytest.raises(ValueError, match=r"lora\.rank: 4 -> 8"):
        run._claim(run_dir, changed, "data")
    with pytest.raises(ValueError, match="training examples themselves"):
        run._claim(run_dir, recipe, "other data")


def test_a_run_of_a_version_without_objectives_goes_on(tmp_path: Path, tiny_base: Path) -> None:
    from training import run

    recipe = make_recipe(tmp_path, tiny_base)
    run_dir = run_dir_of(recipe)
    run_dir.mkdir(parents=True)
    run._claim(run_dir, recipe, "data")
    path = run_dir / "recipe.json"
    stored = json.loads(path.read_text())
    del stored["recipe"]["objective"]
    path.write_text(json.dumps(stored))
    run._claim(run_dir, recipe, "data")
    assert json.loads(path.read_text())["recipe"]["objective"]["kind"] == "supervised"


def bad_calls(directory: Path, base: Path) -> dict[str, tuple[list[str], str]]:
    """Name -> arguments of `python -m training`, and what the message must say."""
    recipe = str(write_recipe(make_recipe(directory, base), directory / "recipe.yaml"))
    (directory / "empty.yaml").write_text("")
    (directory / "broken.yaml").write_text("name: [x\n")
    (directory / "pickled").mkdir()
    (directory / "pickled" / "config.json").write_text('{"model_type": "llama"}')
    (directory / "pickled" / "pytorch_model.bin").write_bytes(b"x")
    (directory / "strange").mkdir()
    (directory / "strange" / "config.json").write_text('{"model_type": "strange"}')
    (directory / "strange" / "model.safetensors").write_bytes(b"x")
    return {
        "missing recipe": (["nowhere.yaml"], "no such file"),
        "empty recipe": ([str(directory / "empty.yaml")], "expected a mapping"),
        "broken recipe": ([str(directory / "broken.yaml")], "not valid YAML"),
        "unknown override": ([recipe, "optim.learning_rat=1"], "Did you mean 'learning_rate'"),
        "unknown section": ([recipe, "optimm.seed=1"], "Did you mean 'optim'"),
        "rank 0": ([recipe, "lora.rank=0"], "lora.rank is 0; allowed: 1..4096"),
        "negative rank": ([recipe, "lora.rank=-4"], "allowed: 1..4096"),
        "huge rank": ([recipe, "lora.rank=100000000000"], "allowed: 1..4096"),
        "nan": ([recipe, "optim.learning_rate=.nan"], "finite number"),
        "wrong type": ([recipe, "optim.max_steps=many"], "a whole number"),
        "int8 with zero3": ([recipe, "model.quantization=int8", "scale.strategy=zero3"], "#1451"),
        "missing data": ([recipe, "data.train=none.jsonl"], "no such file"),
        "missing base": ([recipe, "model.base=./nowhere"], "no such directory"),
        "pickled base": ([recipe, f"model.base={directory}/pickled"], "only pickled weights"),
        "unknown architecture": ([recipe, f"model.base={directory}/strange"], "strange"),
        "too long": ([recipe, "data.max_length=8"], "max_length"),
        "no ray": ([recipe, "--address", "127.0.0.1:1"], "cannot be reached"),
        "unwritable": ([recipe, "storage=/proc/nowhere"], "cannot create"),
        "private storage": ([recipe, "storage=memory://runs"], "no two processes share"),
        "unknown storage": ([recipe, "storage=strange://bucket"], "Protocol not known"),
    }


def test_bad_input_ends_with_one_message_and_status_1(
    tmp_path: Path,
    tiny_base: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from training.__main__ import main

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.chdir(tmp_path)
    for name, (words, message) in bad_calls(tmp_path, tiny_base).items():
        status = main(words)
        err = capsys.readouterr().err
        assert status == 1, (name, err)
        last = err[err.rindex("error [") :]
        assert message in last, (name, last)
        assert "Traceback" not in err, name


def test_a_run_in_progress_is_not_entered(
    tmp_path: Path, tiny_base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from training.__main__ import main

    recipe = make_recipe(tmp_path, tiny_base)
    path = write_recipe(recipe, tmp_path / "recipe.yaml")
    run_dir_of(recipe).mkdir(parents=True)
    with ownership.RunLock(run_dir_of(recipe)):
        assert main([str(path)]) == 1
    assert str(os.getpid()) in capsys.readouterr().err


@pytest.mark.ray
def test_two_workers_train_on_the_stream_that_one_trains_on(
    tmp_path: Path, tiny_base: Path
) -> None:
    for name, workers in (("one", 1), ("two", 2)):
        recipe = make_recipe(
            tmp_path,
            tiny_base,
            name=name,
            data={"streaming": True},
            scale={"workers": workers, "cpus_per_worker": 1},
        )
        path = write_recipe(recipe, tmp_path / f"{name}.yaml")
        if workers == 1:
            train(recipe)
        else:
            status, _, err = call(["training", str(path)], tmp_path)
            assert status == 0, err
    one, two = (
        events_of(make_recipe(tmp_path, tiny_base, name=name), "step") for name in ("one", "two")
    )
    assert [step.fields["real_tokens"] for step in one] == [s.fields["real_tokens"] for s in two]
    for before, after in zip(one, two, strict=True):
        assert after.number("loss") == pytest.approx(before.number("loss"), abs=1e-5)
