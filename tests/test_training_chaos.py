"""Runs through real Ray whose workers, driver or disk are taken away; LORAY_CHAOS=full for all."""

import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import Any

import chaos
import psutil
import pytest
from processes import ROOT, call, finish, start, wait_until
from runs import adapter_bytes, events_of, make_recipe, run_dir_of
from test_training_run import write_recipe

from cluster import ownership
from training import checkpoint
from training.config import TrainRecipe
from training.events import Event

pytestmark = [pytest.mark.ray, pytest.mark.chaos, pytest.mark.usefixtures("nothing_left")]

EVERY = 5
SETTINGS: dict[str, Any] = {
    "optim": {"learning_rate": 1e-2, "max_steps": 400, "global_batch_size": 6},
    "lora": {"rank": 4, "dropout": 0.1},
    "checkpoint": {"every_steps": EVERY},
    "scale": {"workers": 2, "cpus_per_worker": 1},
}
HUNG = "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"

_STALLS = """
import os, time
name, seconds, once = os.environ["CHAOS_STALL"].split("|")
real = os.fsync
def fsync(descriptor):
    path = os.readlink(f"/proc/self/fd/{descriptor}")
    if name in path and path.endswith("state.json"):
        try:
            os.close(os.open(once, os.O_CREAT | os.O_EXCL))
            time.sleep(float(seconds))
        except FileExistsError:
            pass
    return real(descriptor)
os.fsync = fsync
"""
"""sitecustomize of all processes of a run: storage that stands still in one fsync."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> bytes:
    """The adapter of a run that nothing disturbed."""
    directory = tmp_path_factory.mktemp("whole")
    recipe, words = prepare(directory, tiny_base, "whole")
    status, _, err = call(words, directory)
    assert status == 0, err
    return adapter_bytes(recipe)


def prepare(
    directory: Path, base: Path, name: str, **sections: Any
) -> tuple[TrainRecipe, list[str]]:
    recipe = make_recipe(directory, base, name=name, **{**SETTINGS, **sections})
    return recipe, ["training", str(write_recipe(recipe, directory / f"{name}.yaml")), "--json"]


def workers_of(
    process: "subprocess.Popen[str]", without: Collection[int] = ()
) -> list[psutil.Process]:
    """The two training workers of a driver with a private Ray, but for some pids."""

    def find() -> list[psutil.Process]:
        found = []
        for child in psutil.Process(process.pid).children(recursive=True):
            try:
                if child.name().startswith("ray::RayTrainWo") and child.pid not in without:
                    found.append(child)
            except psutil.Error:
                continue
        return found

    wait_until(lambda: len(find()) == 2, process)
    return sorted(find(), key=lambda child: child.pid)


def wait_for_step(recipe: TrainRecipe, step: int, process: "subprocess.Popen[str]") -> None:
    def is_there() -> bool:
        steps = [event.number("step") for event in events_of(recipe, "step")[-1:]]
        return bool(steps) and steps[0] >= step

    wait_until(is_there, process)


def lost_steps(recipe: TrainRecipe) -> list[float]:
    """For each resume, the steps that were taken and had to be taken again."""
    lost: list[float] = []
    taken = 0.0
    for event in events_of(recipe):
        if event.kind == "step":
            taken = event.number("step")
        elif event.kind == "started" and (taken or lost):
            lost.append(taken - event.number("from_step"))
    return lost


def attempts(recipe: TrainRecipe) -> list[Event]:
    return events_of(recipe, "started")


def assert_free(recipe: TrainRecipe) -> None:
    with ownership.RunLock(run_dir_of(recipe)):
        pass
    assert not list((run_dir_of(recipe) / "checkpoints").glob(".tmp-*"))


def hit(victim: psutil.Process, number: signal.Signals) -> float:
    """Send a signal; the seconds until the process is gone."""
    sent = time.monotonic()
    os.kill(victim.pid, number)
    deadline = sent + 120
    with suppress(psutil.NoSuchProcess):
        while victim.status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < deadline, f"{victim} outlives {number.name}"
            time.sleep(0.1)
    return time.monotonic() - sent


@chaos.full
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_workers_killed_or_stopped_at_random_steps_cost_at_most_one_interval(
    tmp_path: Path, tiny_base: Path, whole: bytes, number: signal.Signals
) -> None:
    """20 runs: 15 are killed, 5 are stopped, which is noticed by the setting that is shipped."""
    is_stop = number == signal.SIGSTOP
    dice = random.Random(number)
    figures: list[tuple[float, float, float]] = []
    for run in range(5 if is_stop else 15):
        recipe, words = prepare(tmp_path, tiny_base, f"run{run}")
        process = start(words, tmp_path)
        wait_for_step(recipe, dice.randrange(10, 200), process)
        sent = time.time()
        gone_s = hit(dice.choice(workers_of(process)), number)
        status, out, err = finish(process)
        assert status == 0, err
        assert json.loads(out.splitlines()[-1])["steps"] == 400
        assert adapter_bytes(recipe) == whole
        assert len(attempts(recipe)) == 2
        (lost,) = lost_steps(recipe)
        assert 0 <= lost <= EVERY
        assert gone_s <= (70 if is_stop else 10)
        assert_free(recipe)
        figures.append((gone_s, attempts(recipe)[1].time_s - sent, lost))
    gone, back, lost = (max(column) for column in zip(*figures, strict=True))
    print(
        f"figure {number.name}: {len(figures)} runs finished and equal, at most {gone:.1f} s until "
        f"the process was gone, {back:.1f} s until training again, {lost:g} steps lost"
    )


@pytest.mark.timeout(600)
def test_workers_killed_before_they_train_are_started_again(
    tmp_path: Path, tiny_base: Path, whole: bytes
) -> None:
    """Alone, in the middle of joining each other, and as they load the base."""
    recipe, words = prepare(
        tmp_path, tiny_base, "run", scale={"workers": 2, "cpus_per_worker": 1, "max_failures": 9}
    )
    process = start(words, tmp_path)
    gone: set[int] = set()
    for delay_s in (0.0, 0.3, 1.0, 2.0, 3.0) if chaos.IS_FULL else (0.0, 1.0):
        workers = workers_of(process, gone)
        time.sleep(delay_s)
        assert not events_of(recipe, "step")
        gone |= {worker.pid for worker in workers}
        hit(workers[len(gone) % 2], signal.SIGKILL)
    status, _, err = finish(process)
    assert status == 0, err
    assert adapter_bytes(recipe) == whole
    assert_free(recipe)


@pytest.mark.timeout(900)
def test_a_stall_is_no_hang_and_a_kill_a_stop_and_lost_ray_state_cost_one_interval(
    tmp_path: Path, tiny_base: Path, whole: bytes, nothing_left: None
) -> None:
    """In one run. A worker in a stalled fsync answers its health check, a stopped one does not."""
    stall_s, limit_s = (75, 60) if chaos.IS_FULL else (12, 6)
    (tmp_path / "inject").mkdir()
    (tmp_path / "inject" / "sitecustomize.py").write_text(_STALLS)
    extra = {
        "PYTHONPATH": f"{tmp_path / 'inject'}:{ROOT}",
        "CHAOS_STALL": f"step-{10:06d}|{stall_s}|{tmp_path / 'once'}",
        **({} if chaos.IS_FULL else {HUNG: str(limit_s)}),
    }
    recipe, words = prepare(tmp_path, tiny_base, "run")
    process = start(words, tmp_path, extra)
    wait_until((tmp_path / "once").exists, process)
    stalled = time.monotonic()
    wait_for_step(recipe, 15, process)
    assert time.monotonic() - stalled > stall_s - 2
    assert len(attempts(recipe)) == 1
    for step, damage, number, limit in (
        (40, empty, signal.SIGKILL, 10),
        (120, lose, signal.SIGSTOP, limit_s + 10),
    ):
        wait_for_step(recipe, step, process)
        (directory,) = Path(os.environ["TMPDIR"]).glob("loray-*/run")
        damage(directory)
        assert hit(workers_of(process)[0], number) <= limit
    status, _, err = finish(process)
    assert status == 0, err
    assert adapter_bytes(recipe) == whole
    assert len(attempts(recipe)) == 3
    assert max(lost_steps(recipe)) <= EVERY
    assert_free(recipe)


def empty(directory: Path) -> None:
    """What a crash leaves of files that Ray Train writes in place."""
    snapshot = directory / "checkpoint_manager_snapshot.json"
    snapshot.write_text('{"checkpoint_resu')
    for path in directory.rglob("*"):
        if path.is_file() and path != snapshot:
            path.write_bytes(b"")


def lose(directory: Path) -> None:
    shutil.rmtree(directory)


@pytest.mark.timeout(600)
def test_a_worker_and_a_driver_that_are_told_to_end_lose_no_step(
    tmp_path: Path, tiny_base: Path, whole: bytes
) -> None:
    """SIGTERM to a worker: a checkpoint, then a new group, and no retry is used up by it.

    SIGTERM to the driver: a checkpoint, then the end; the same command goes on.
    """
    recipe, words = prepare(
        tmp_path, tiny_base, "run", scale={**SETTINGS["scale"], "max_failures": 0}
    )
    process = start(words, tmp_path)
    wait_for_step(recipe, 30, process)
    os.kill(workers_of(process)[-1].pid, signal.SIGTERM)
    wait_until(lambda: len(attempts(recipe)) == 2, process)
    wait_for_step(recipe, int(attempts(recipe)[-1].number("from_step")) + 12, process)
    sent = time.monotonic()
    os.kill(process.pid, signal.SIGTERM)
    wait_until(lambda: bool(events_of(recipe, "finished")), process)
    stopped_s = time.monotonic() - sent
    status, out, err = finish(process)
    assert status == 130, err
    assert "stopping after this step, with a checkpoint" in err
    status, resumed, err = call(words, tmp_path)
    assert status == 0, err
    stopped_at, resumed_from = (
        json.loads(text.splitlines()[-1])[name]
        for text, name in ((out, "steps"), (resumed, "resumed_from"))
    )
    assert stopped_at == resumed_from < 400
    assert lost_steps(recipe) == [0, 0]
    assert adapter_bytes(recipe) == whole
    print(f"figure SIGTERM of the driver: checkpoint and end of training after {stopped_s:.1f} s")


@pytest.mark.timeout(600)
def test_a_killed_driver_leaves_nothing_that_the_next_does_not_clean_up(
    tmp_path: Path, tiny_base: Path, whole: bytes
) -> None:
    recipe, words = prepare(tmp_path, tiny_base, "run")
    process = start(words, tmp_path)
    wait_for_step(recipe, 33, process)
    os.kill(process.pid, signal.SIGKILL)
    finish(process)
    status, _, err = call(words, tmp_path)
    assert status == 0, err
    assert adapter_bytes(recipe) == whole
    (lost,) = lost_steps(recipe)
    assert lost <= EVERY


@pytest.mark.timeout(600)
def test_a_disk_that_fills_up_ends_the_run_once_and_it_goes_on_when_there_is_room(
    tmp_path: Path, tiny_base: Path, whole: bytes
) -> None:
    with chaos.small_disk(tmp_path / "disk", 16 << 20) as disk:
        recipe, words = prepare(
            tmp_path, tiny_base, "run", storage=str(disk), log={"to": ["tensorboard"]}
        )
        process = start(words, tmp_path)
        wait_for_step(recipe, 20, process)
        filler = chaos.fill(disk)
        status, _, err = finish(process)
        assert status == 1, err
        assert "error [storage_error]: the disk or quota is full" in err
        assert len(attempts(recipe)) == 1
        kept = checkpoint.find_latest_valid(run_dir_of(recipe))
        assert kept is not None
        filler.unlink()
        status, _, err = call(words, tmp_path)
        assert status == 0, err
        assert attempts(recipe)[-1].number("from_step") == checkpoint.step_of(kept)
        assert adapter_bytes(recipe) == whole


@chaos.full
@pytest.mark.timeout(900)
def test_workers_that_ray_kills_for_memory_end_with_an_error_that_says_so(
    tmp_path: Path, tiny_base: Path
) -> None:
    _, words = prepare(tmp_path, tiny_base, "run", memory={"micro_batch_tokens": 65536})
    status, _, err = call(words, tmp_path, {"RAY_memory_usage_threshold": "0.01"})
    assert status == 1, err
    assert "error [insufficient_resources]" in err
    assert "memory" in err.splitlines()[-1]
