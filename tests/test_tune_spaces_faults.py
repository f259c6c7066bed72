"""Searches whose benches or nodes die, and searches on several nodes."""

import os
import signal
import subprocess
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import pytest
from local_cluster import local_cluster
from processes import call, finish, start, wait_until
from test_tune_spaces_search import result_of, write_search

from training.events import EventReader
from tune_spaces import actor
from tune_spaces import record as records
from tune_spaces.record import SearchRecord

SETTINGS: dict[str, Any] = {
    # Low rates: at high ones the last bits, which neighbours and threads decide, grow with time.
    "space": {
        "lora.rank": [2, 4, 8],
        "optim.learning_rate_at_rank_16": {"log_uniform": [3e-4, 3e-3]},
    },
    "optim": {"max_steps": 32, "global_batch_size": 4},
    "search": {"scheduler": "fifo", "trials": 4, "seats": 2, "fill_window_s": 40, "test": None},
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Path:
    """The directory of a search on one bench that nothing disturbed."""
    directory = tmp_path_factory.mktemp("whole")
    path = write(directory, tiny_base, "whole")
    status, _, err = call(["tune_spaces", path.name], directory)
    assert status == 0, err
    return directory / "runs" / "whole"


def write(directory: Path, base: Path, name: str) -> Path:
    """Not quantized: int8 rounds activations, which makes much of neighbours' last bits."""
    model = {"base": str(base), "quantization": "none"}
    return write_search(directory, base, name, model=model, **SETTINGS)


def actor_of(process: "subprocess.Popen[str]", kind: str) -> psutil.Process:
    """The living actor of a class, of a driver with a private Ray."""
    found: list[psutil.Process] = []

    def find() -> bool:
        for child in psutil.Process(process.pid).children(recursive=True):
            try:
                is_it = child.name().startswith(f"ray::{kind}"[:15])
            except psutil.NoSuchProcess:
                continue
            if is_it:
                found.append(child)
        return bool(found)

    wait_until(find, process)
    return found[0]


def reports(directory: Path, *, may_fail: bool = False) -> dict[str, list[tuple[float, ...]]]:
    """(supervised tokens, training loss, metric) of every report, by trial, in their order.

    may_fail: whether Tune may have had to start a trial's process again.
    """
    found: dict[str, list[tuple[float, ...]]] = {}
    for event in EventReader(directory / "events.jsonl").read():
        assert may_fail or event.kind != "trial_failed", event.text("message")
        if event.kind == "result":
            row = tuple(event.number(n) for n in ("supervised_tokens", "train_loss", "value"))
            found.setdefault(str(event.fields["params"]), []).append(row)
    return found


def assert_same(found: SearchRecord, undisturbed: SearchRecord) -> None:
    """Whatever happened on the way, trials and finalists have ended alike."""
    ends = {str(trial.params): trial for trial in undisturbed.trials}
    assert len(found.trials) == len(ends)
    for trial in found.trials:
        end = ends[str(trial.params)]
        assert (trial.state, trial.tokens) == ("finished", end.tokens)
        assert trial.value == pytest.approx(end.value, rel=1e-6)
    seeds = [
        [sorted((one.seed, one.value) for one in finalist.seeds) for finalist in record.finalists]
        for record in (found, undisturbed)
    ]
    for one, other in zip(*seeds, strict=True):
        assert [seed for seed, _ in one] == [seed for seed, _ in other]
        values = [value for _, value in other]
        assert [value for _, value in one] == pytest.approx(values, rel=1e-6)


def assert_same_reports(
    found: Sequence[tuple[float, ...]], undisturbed: Sequence[tuple[float, ...]]
) -> None:
    assert [row[0] for row in found] == [row[0] for row in undisturbed]
    for one, other in zip(found, undisturbed, strict=True):
        assert one == pytest.approx(other, rel=1e-5)


@pytest.mark.ray
@pytest.mark.chaos
def test_a_bench_that_is_killed_comes_back_and_every_trial_goes_on_from_its_last_report(
    tmp_path: Path, tiny_base: Path, whole: Path
) -> None:
    path = write(tmp_path, tiny_base, "killed")
    directory = tmp_path / "runs" / "killed"
    process = start(["tune_spaces", path.name, "--json"], tmp_path)
    kills: list[Callable[[], bool]] = [
        lambda: len(list(directory.glob("trials/*/checkpoints/step-*"))) >= 3,
        lambda: len(list(directory.glob("trials/*-seed1/attempt"))) >= 1,
    ]
    for is_time in kills:
        wait_until(is_time, process)
        os.kill(actor_of(process, "BenchActor").pid, signal.SIGKILL)
    status, out, err = finish(process)
    assert status == 0, err
    record = records.read(directory)
    assert_same(record, records.read(whole))
    found, expected = reports(directory), reports(whole)
    for params, rows in expected.items():  # each report once, and the same
        assert_same_reports(found[params], rows)
    assert max(taken for _, taken in record.seats_filled) <= 2
    assert result_of(out)["peak_rss_bytes"] > 0


@pytest.mark.ray
@pytest.mark.chaos
def test_the_process_of_all_trials_is_killed_and_they_go_on_from_their_last_reports(
    tmp_path: Path, tiny_base: Path, whole: Path
) -> None:
    path = write(tmp_path, tiny_base, "orphaned")
    directory = tmp_path / "runs" / "orphaned"
    process = start(["tune_spaces", path.name], tmp_path)
    for saved in (1, 5):

        def is_time(saved: int = saved) -> bool:
            return len(list(directory.glob("trials/*/checkpoints/step-*"))) >= saved

        wait_until(is_time, process)
        os.kill(actor_of(process, "TrialHost").pid, signal.SIGKILL)
    status, _, err = finish(process)
    assert status == 0, err
    assert_same(records.read(directory), records.read(whole))


@pytest.mark.ray
def test_trials_and_finalists_spread_over_the_benches_of_two_nodes(
    tmp_path: Path, tiny_base: Path, whole: Path
) -> None:
    path = write(tmp_path, tiny_base, "spread")
    directory = tmp_path / "runs" / "spread"
    with local_cluster(num_cpus=1, has_two_nodes=True) as cluster:
        extra = {name: value for name, value in cluster.credentials.items() if value is not None}
        words = ["tune_spaces", path.name, "--address", cluster.gcs_address]
        status, _, err = call(words, tmp_path, extra)
    assert status == 0, err
    record = records.read(directory)
    assert_same(record, records.read(whole))
    assert Counter(trial.bench for trial in record.trials) == {"bench0": 2, "bench1": 2}
    rows = EventReader(directory / "events.jsonl").read()
    seen = {(event.text("trial"), event.text("bench")) for event in rows if event.kind == "result"}
    assert len(seen) == 4, "a trial has moved"
    # Two trials, then a finalist and its second seed, sat on each bench, and all left.
    for name in ("bench0", "bench1"):
        events = EventReader(actor.occupancy_file(directory, name)).read()
        taken = [int(event.number("taken")) for event in events]
        assert sum(after > before for before, after in pairwise(taken)) == 4
        assert taken[-1] == 0


@pytest.mark.ray
@pytest.mark.chaos
def test_trials_of_a_node_that_dies_go_on_at_the_other(
    tmp_path: Path, tiny_base: Path, whole: Path
) -> None:
    path = write(tmp_path, tiny_base, "halved")
    directory = tmp_path / "runs" / "halved"
    with local_cluster(num_cpus=1, has_two_nodes=True) as cluster:
        assert cluster.second is not None
        extra = {name: value for name, value in cluster.credentials.items() if value is not None}
        words = ["tune_spaces", path.name, "--address", cluster.gcs_address]
        process = start(words, tmp_path, extra)

        def is_time() -> bool:
            saved = directory.glob("trials/*/checkpoints/step-*")
            return {(p.parent.parent / "bench").read_text() for p in saved} == {"bench0", "bench1"}

        wait_until(is_time, process)
        for child in psutil.Process(cluster.second.pid).children(recursive=True):
            child.kill()
        status, _, err = finish(process)
    assert status == 0, err
    assert_same(records.read(directory), records.read(whole))
    found, expected = reports(directory, may_fail=True), reports(whole)
    for params, rows in expected.items():
        by_tokens = {row[0]: row for row in found[params]}
        assert_same_reports([*by_tokens.values()], rows)
        for row in found[params]:  # what Tune had to be told twice is the same
            assert row == pytest.approx(by_tokens[row[0]], rel=1e-5)
    rows = [e for e in EventReader(directory / "events.jsonl").read() if e.kind == "result"]
    assert {event.text("bench") for event in rows} == {"bench0", "bench1"}
    assert len({event.text("bench") for event in rows if event.fields["is_finished"]}) == 1
