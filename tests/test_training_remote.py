"""Runs kept in an object store: the same adapter, whatever is lost on the way."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from local_cluster import local_cluster
from processes import ROOT, call, finish, start, wait_until
from runs import adapter_bytes, events_of, make_recipe, run_dir_of, train

from cluster import config, storage
from cluster.errors import ConfigError, RunInUseError, StorageError
from training import run
from training.checkpoint import WEIGHTS
from training.config import TrainRecipe
from training.mirror import Mirror
from training.segments import SegmentReader

if TYPE_CHECKING:
    from s3_server import Request, S3Server

URL = "s3://bucket/runs"
LONG: dict[str, Any] = {
    "optim": {"learning_rate": 1e-2, "max_steps": 150, "global_batch_size": 6},
    "lora": {"rank": 4, "dropout": 0.1},
    "checkpoint": {"every_steps": 5},
}


def published(s3: "S3Server", recipe: TrainRecipe) -> bytes:
    return s3.get(f"runs/{recipe.name}/adapter/{WEIGHTS}")


def kinds(recipe: TrainRecipe) -> list[str]:
    """Of the events in the store."""
    return [e.kind for e in SegmentReader(Mirror(URL, recipe.name).remote).read()]


def test_a_run_in_a_store_learns_what_a_local_one_does(
    s3: "S3Server", tmp_path: Path, tiny_base: Path
) -> None:
    local = make_recipe(tmp_path, tiny_base, name="local")
    train(local)
    recipe = make_recipe(tmp_path, tiny_base, storage=URL)
    assert train(recipe).kind == "finished"
    assert published(s3, recipe) == adapter_bytes(local)
    assert kinds(recipe) == [e.kind for e in events_of(local)]
    elsewhere = tmp_path / "adapter"
    assert Mirror(URL, "run").remote.fetch("adapter", elsewhere) is None
    info = storage.verify(elsewhere).info
    assert info["step"] == 6


@pytest.mark.chaos
@pytest.mark.parametrize("fails_at", ["step-000004", "adapter/", "memory.json"])
def test_a_run_that_the_store_stopped_goes_on_on_another_machine(
    s3: "S3Server",
    tmp_path: Path,
    tiny_base: Path,
    monkeypatch: pytest.MonkeyPatch,
    fails_at: str,
) -> None:
    local = make_recipe(tmp_path, tiny_base, name="local")
    train(local)
    recipe = make_recipe(tmp_path, tiny_base, storage=URL)

    def refuse(request: "Request") -> int | None:
        return 403 if request.method == "PUT" and fails_at in request.key else None

    s3.fault = refuse
    with pytest.raises(StorageError, match="the store refuses"):
        train(recipe)
    assert kinds(recipe)[-1] == "failed"
    s3.fault = None
    monkeypatch.setenv("LORAY_CACHE", str(tmp_path / "another machine"))
    assert train(recipe).kind == "finished"
    at = {"step-000004": 2, "adapter/": 6, "memory.json": 0}[fails_at]
    assert events_of(recipe, "started")[-1].number("from_step") == at
    assert published(s3, recipe) == adapter_bytes(local)


def test_the_best_checkpoint_is_fetched_where_the_run_ends_elsewhere(
    s3: "S3Server", tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rate that is much too high makes the first checkpoint the best one."""
    settings: Mapping[str, Any] = {
        "data": {"eval": str(tmp_path / "train.jsonl")},
        "optim": {
            "learning_rate": 0.3,
            "schedule": "constant",
            "warmup": 0.0,
            "max_steps": 2,
            "global_batch_size": 4,
        },
        "evaluation": {"every_steps": 1},
    }
    local = make_recipe(tmp_path, tiny_base, name="local", **settings)
    ended = train(local)
    assert ended.number("adapter_step") == 1
    recipe = make_recipe(tmp_path, tiny_base, storage=URL, **settings)
    s3.fault = lambda r: 403 if r.method == "PUT" and "adapter/" in r.key else None
    with pytest.raises(StorageError):
        train(recipe)
    s3.fault = None
    monkeypatch.setenv("LORAY_CACHE", str(tmp_path / "another machine"))
    assert train(recipe).number("adapter_step") == ended.number("adapter_step")
    assert published(s3, recipe) == adapter_bytes(local)


WORKER = """
import os, sys, torch
import torch.distributed as dist
from pathlib import Path
from cluster import config
from cluster.errors import LorayError
from training import worker
from training.config import TrainRecipe
from training.mirror import Mirror
from training.strategy import Workers
rank = int(sys.argv[3])
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
recipe = config.load(TrainRecipe, Path(sys.argv[1]))
try:
    worker.run(recipe, Mirror.of(recipe).run_dir, workers=Workers(rank=rank, size=2),
               device=torch.device("cpu"), workers_here=1)
except (LorayError, RuntimeError) as error:
    print(type(error).__name__, error, flush=True)
    os._exit(3)
"""


def run_two(tmp_path: Path, recipe: TrainRecipe, caches: tuple[str, str]) -> list[int]:
    """Two workers with these cache directories, without Ray; their exit statuses."""
    path = tmp_path / f"{recipe.name}.yaml"
    path.write_text(yaml.safe_dump(config.plain(recipe)), encoding="utf-8")
    meeting = tmp_path / f"meeting-{len(list(tmp_path.glob('meeting-*')))}"
    workers = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", WORKER, str(path), str(meeting), str(rank)],
            cwd=ROOT,
            env={**os.environ, "LORAY_CACHE": str(tmp_path / cache), "PYTHONPATH": str(ROOT)},
        )
        for rank, cache in enumerate(caches)
    ]
    try:
        return [worker.wait(120) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()


@pytest.mark.chaos
def test_workers_that_share_only_the_store_resume_from_the_same_checkpoint(
    s3: "S3Server", tmp_path: Path, tiny_base: Path
) -> None:
    whole = make_recipe(tmp_path, tiny_base, name="whole", storage=URL)
    assert run_two(tmp_path, whole, ("a", "b")) == [0, 0]
    recipe = make_recipe(tmp_path, tiny_base, storage=URL)
    s3.fault = lambda r: 403 if r.method == "PUT" and "step-000006" in r.key else None
    assert run_two(tmp_path, recipe, ("a", "b")) == [3, 3]
    s3.fault = None
    # The first worker on the machine of the second, which has seen no checkpoint; the second on
    # that of the first, which has one of step 6 that was never published.
    assert run_two(tmp_path, recipe, ("b", "a")) == [0, 0]
    events = list(SegmentReader(Mirror(URL, "run").remote).read())
    starts = [event.number("from_step") for event in events if event.kind == "started"]
    assert starts == [0, 4]
    assert published(s3, recipe) == published(s3, whole)


def write_recipe(recipe: TrainRecipe, path: Path) -> Path:
    path.write_text(yaml.safe_dump(config.plain(recipe)), encoding="utf-8")
    return path


@pytest.mark.ray
@pytest.mark.chaos
@pytest.mark.parametrize(("workers", "how"), [(2, signal.SIGKILL), (1, signal.SIGINT)])
def test_a_run_ended_midway_goes_on_from_the_store_to_the_same_bits(
    s3: "S3Server",
    tmp_path: Path,
    tiny_base: Path,
    monkeypatch: pytest.MonkeyPatch,
    workers: int,
    how: signal.Signals,
) -> None:
    settings = {**LONG, "scale": {"workers": workers, "cpus_per_worker": 1}}
    recipe = make_recipe(tmp_path, tiny_base, storage=URL, **settings)
    words = ["training", str(write_recipe(recipe, tmp_path / "run.yaml")), "--json"]
    process = start(words, tmp_path)
    reader = SegmentReader(Mirror(URL, "run").remote)
    seen: list[str] = []

    def has_checkpoint() -> bool:
        seen.extend(event.kind for event in reader.read())
        return seen.count("checkpoint") >= 2

    wait_until(has_checkpoint, process)
    here = os.environ["LORAY_CACHE"]
    monkeypatch.setenv("LORAY_CACHE", str(tmp_path / "elsewhere"))
    with pytest.raises(RunInUseError, match="was renewed"):
        run.train(recipe, say=lambda _: None, watch=lambda _: None)
    monkeypatch.setenv("LORAY_CACHE", here)
    os.kill(process.pid, how)
    status, out, err = finish(process)
    if how == signal.SIGKILL:
        assert s3.objects("runs/run/leases") == ["runs/run/leases/000001"]
        s3.delete("runs/run/leases/000001")  # as if a minute had passed
    else:
        assert status == 130, err
        assert json.loads(out.splitlines()[-1])["steps"] < 150
    shutil.rmtree(run_dir_of(recipe))
    status, out, err = call(words, tmp_path)
    assert status == 0, err
    result = json.loads(out.splitlines()[-1])
    assert result["steps"] == 150
    assert result["resumed_from"] >= 10
    assert result["adapter_url"] == f"{URL}/run/adapter"
    whole = make_recipe(tmp_path, tiny_base, name="whole", **settings)
    if workers == 1:
        train(whole)
    else:
        place = f"storage=file://{tmp_path}/runs"
        status, _, err = call(
            ["training", str(write_recipe(whole, tmp_path / "whole.yaml")), place], tmp_path
        )
        assert status == 0, err
    assert (Path(result["adapter"]) / WEIGHTS).read_bytes() == adapter_bytes(whole)
    assert published(s3, recipe) == adapter_bytes(whole)
    assert events_of(recipe)[-1].kind == "finished"
    assert not s3.objects("runs/run/leases")
    monkeypatch.setenv("LORAY_CACHE", str(tmp_path / "elsewhere"))
    said: list[str] = []
    again = run.train(recipe, say=said.append, watch=lambda _: None)
    assert "nothing to train" in said[-1]
    assert again["steps"] == 150
    storage.verify(Path(again["adapter"]))
    changed = make_recipe(tmp_path, tiny_base, storage=URL, **{**settings, "lora": {"rank": 8}})
    with pytest.raises(ConfigError, match=r"lora\.rank: 4 -> 8"):
        run.train(changed, say=said.append, watch=lambda _: None)


def test_a_stop_that_was_asked_for_is_forgotten_by_the_next(
    s3: "S3Server", tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORAY_CACHE", str(tmp_path / "driver"))
    driver = Mirror(URL, "run")
    storage.make_directory(driver.run_dir)
    driver.request_stop()
    assert [name for name in s3.objects() if "stop" in name]
    with driver.held():
        assert not [name for name in s3.objects() if "stop" in name]


@pytest.mark.ray
def test_workers_of_a_cluster_get_the_drivers_access_and_share_only_the_store_with_it(
    s3: "S3Server", tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    access = s3.environment
    for name in access:
        monkeypatch.delenv(name)
    monkeypatch.setenv("LORAY_CACHE", str(tmp_path / "node"))
    recipe = make_recipe(tmp_path, tiny_base, storage=URL, scale={"cpus_per_worker": 1})
    words = ["training", str(write_recipe(recipe, tmp_path / "run.yaml")), "--json"]
    with local_cluster() as cluster:
        credentials = {k: v for k, v in cluster.credentials.items() if v is not None}
        status, out, err = call(
            [*words, "--address", cluster.gcs_address],
            tmp_path,
            {**credentials, **access, "LORAY_CACHE": str(tmp_path / "driver")},
        )
        assert status == 0, err
    result = json.loads(out.splitlines()[-1])
    adapter = Path(result["adapter"])
    assert adapter.is_relative_to(tmp_path / "driver")
    assert list((tmp_path / "node").rglob(WEIGHTS))
    storage.verify(adapter)
    assert (adapter / WEIGHTS).read_bytes() == published(s3, recipe)
    kept = (Path(result["run_dir"]) / "events.jsonl").read_text().splitlines()
    assert json.loads(kept[-1])["event"] == "finished"


def test_doctor_says_whether_the_store_can_be_used(
    s3: "S3Server", tmp_path: Path, tiny_base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import loray

    path = write_recipe(make_recipe(tmp_path, tiny_base, storage=URL), tmp_path / "run.yaml")
    loray.doctor(path)
    assert f"storage {URL}/run can be written and leased" in capsys.readouterr().out
    assert s3.objects() == []
    with pytest.raises(StorageError, match="the bucket does not exist"):
        loray.doctor(path, ["storage=s3://nowhere/runs"])


def test_a_search_in_a_store_is_refused_by_name(
    tmp_path: Path, tiny_base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tune_spaces.__main__ import main

    recipe = make_recipe(tmp_path, tiny_base, storage=URL, data={"eval": f"{tmp_path}/train.jsonl"})
    tree = {**config.plain(recipe), "space": "rank_lr"}
    path = tmp_path / "search.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    assert main([str(path)]) == 1
    assert f"storage is '{URL}'; object stores hold training runs only" in capsys.readouterr().err
