"""A number of workers that follows the nodes: the same steps, whoever takes them."""

import itertools
import json
import os
from pathlib import Path

import numpy as np
import psutil
import pytest
from local_cluster import local_cluster
from processes import finish, start, wait_until
from runs import events_of, make_recipe, run_dir_of, train

from cluster import config
from cluster.errors import ConfigError
from training import loop, sampler
from training.config import ScaleConfig, TrainRecipe

_NOTES_IDS = """
import builtins, json, os, sys
real_import = builtins.__import__
def hooked(name, *args, **kwargs):
    module = real_import(name, *args, **kwargs)
    seat = sys.modules.get("training.seat")
    if seat is not None and hasattr(seat, "Seat"):
        builtins.__import__ = real_import
        real = seat.Seat.start_step
        def start_step(self):
            real(self)
            whole = self.pending[0].keys if self.pending else []  # each piece has those of all
            ids = [number for _, _, number in whole]
            note = [self.state.step, self.workers.rank, self.workers.size, ids]
            with open(f"{os.environ['IDS']}/{os.getpid()}", "a") as file:
                file.write(json.dumps(note) + "\\n")
        seat.Seat.start_step = start_step
    return module
builtins.__import__ = hooked
"""
"""sitecustomize of all workers: of each step, which examples each worker takes."""


@pytest.mark.parametrize("workers", [0, 5000, [2], [3, 2], [2, 2], [0, 2], [1, 2, 3], []])
def test_workers_are_a_number_or_least_and_most(workers: object) -> None:
    with pytest.raises(ConfigError, match=r"scale.workers.*\[least, most\]"):
        config.build(ScaleConfig, {"workers": workers}, where="test")


def test_the_most_workers_must_each_have_an_example(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="global_batch_size is 4 for 8 workers"):
        make_recipe(tmp_path, tmp_path, scale={"workers": [2, 8]})


@pytest.mark.ray
@pytest.mark.chaos
@pytest.mark.timeout(600)
def test_a_node_that_leaves_and_one_that_joins_change_nothing_that_is_learned(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("ids", "inject"):
        (tmp_path / name).mkdir()
    (tmp_path / "inject" / "sitecustomize.py").write_text(_NOTES_IDS)
    paths = [str(tmp_path / "inject"), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    monkeypatch.setenv("IDS", str(tmp_path / "ids"))
    recipe = make_recipe(
        tmp_path,
        tiny_base,
        name="elastic",
        optim={"max_steps": 100_000, "learning_rate": 1e-3, "global_batch_size": 4},
        scale={"workers": [1, 2], "cpus_per_worker": 1},
        checkpoint={"every_steps": 20},
    )
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(config.plain(recipe)), encoding="utf-8")

    def sizes() -> list[float]:
        return [event.number("workers") for event in events_of(recipe, "started")]

    with local_cluster(num_cpus=1, has_two_nodes=True) as cluster:
        assert cluster.second is not None
        extra = {name: value for name, value in cluster.credentials.items() if value is not None}
        words = ["training", path.name, "--address", cluster.gcs_address]
        process = start(words, tmp_path, extra)
        wait_until(lambda: sizes() == [2] and len(events_of(recipe, "step")) > 30, process)
        for child in psutil.Process(cluster.second.pid).children(recursive=True):
            child.kill()
        wait_until(lambda: sizes() == [2, 1], process)
        cluster.join()
        wait_until(lambda: sizes() == [2, 1, 2], process)
        seen = len(events_of(recipe, "step"))
        wait_until(lambda: len(events_of(recipe, "step")) > seen + 30, process)
        loop.stop_file(run_dir_of(recipe)).touch()
        status, _, err = finish(process)
    assert status == 130, err  # stopped before its end
    found = last_losses(recipe)
    assert list(found) == list(range(1, len(found) + 1))
    order = sampler.Order(
        24, 4, recipe.optim.seed, epochs=recipe.optim.epochs, max_steps=recipe.optim.max_steps
    )
    taken = examples_taken(tmp_path / "ids")
    for step in range(len(found)):  # none is skipped, none comes twice
        assert sorted(taken[step]) == sorted(order.batch(step)), step
    alone = make_recipe(
        tmp_path,
        tiny_base,
        name="alone",
        optim={"max_steps": 100_000, "learning_rate": 1e-3, "stop_after": len(found)},
        checkpoint={"every_steps": 10_000},
    )
    train(alone)
    assert np.allclose(list(found.values()), list(last_losses(alone).values()), rtol=1e-4, atol=0)
    for before, after in itertools.pairwise(events_of(recipe, "started")):
        steps = [e for e in events_of(recipe, "step") if before.time_s < e.time_s < after.time_s]
        assert steps[-1].number("step") - after.number("from_step") <= 20  # one checkpoint's worth


def examples_taken(directory: Path) -> dict[int, list[int]]:
    """By step, the examples that all workers of its last attempt took."""
    files = sorted(directory.iterdir(), key=lambda path: path.stat().st_mtime_ns)
    last: dict[tuple[int, int], tuple[int, list[int]]] = {}
    for path in files:  # of earlier attempts first: their workers wrote last before
        for line in path.read_text().splitlines():
            step, rank, size, ids = json.loads(line)
            last[step, rank] = size, ids
    taken: dict[int, list[int]] = {}
    for step, rank in sorted(last):
        if rank < last[step, 0][0]:
            taken.setdefault(step, []).extend(last[step, rank][1])
    return taken


def last_losses(recipe: TrainRecipe) -> dict[int, float]:
    """Of each step the loss that counts: the last that was reported."""
    rows = {int(e.number("step")): e.number("loss") for e in events_of(recipe, "step")}
    return dict(sorted(rows.items()))
