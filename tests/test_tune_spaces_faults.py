"""Searches whose benches or nodes die, and searches on several nodes."""

import os
import signal
import subprocess
from collections import Counter
from collections.abc import Callable
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
    "search": {"scheduler": "fifo", "trials": 4, "seats": 2, "fill_window_s": 0, "test": None},
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


def bench_of(process: "subprocess.Popen[str]") -> psutil.Process:
    """The living bench of a driver with a private Ray."""
    found: list[psutil.Process] = []

    def find() -> bool:
        for child in psutil.Process(process.pid).children(recursive=True):
            try:
                is_bench = child.name().startswith("ray::BenchActor")
            except psutil.NoSuchProcess:
                continue
            if is_bench:
                found.append(child)
        return bool(found)

    wait_until(find, process)
    return found[0]


def reports(directory: Path) -> dict[str, list[tuple[float, float, float]]]:
    """(supervised tokens, training loss, metric) of every report, by trial, in their order."""
    found: dict[str, list[tuple[float, float, float]]] = {}
    for event in EventReader(directory / "events.jsonl").read():
        assert event.kind != "failed", event.text("message")
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
        os.kill(bench_of(process).pid, signal.SIGKILL)
    status, out, err = finish(process)
    assert status == 0, err
    record = records.read(directory)
    assert_same(record, records.read(whole))
    found, expected = reports(directory), reports(whole)
    for params, rows in expected.items():  # each report once, and the same
        assert [tokens for tokens, _, _ in found[params]] == [tokens for tokens, _, _ in rows]
        for one, other in zip(found[params], rows, strict=True):
            assert one == pytest.approx(other, rel=1e-5)
    assert max(taken for _, taken in record.seats_filled) <= 2
    assert result_of(out)["peak_rss_bytes"] > 0


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
