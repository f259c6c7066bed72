"""Trials and the driver on real benches, over a wire that loses calls, answers and benches."""

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray.exceptions
import torch
from ray.exceptions import ActorUnavailableError, ActorUnschedulableError, RayTaskError
from runs import make_recipe

from cluster import config
from cluster.errors import ClusterError
from training import seat
from training.config import TrainRecipe
from tune_spaces import hall, trial
from tune_spaces.actor import BenchActor
from tune_spaces.bench import BASE, SeatLost, SeatShed
from tune_spaces.capacity import Capacity
from tune_spaces.hall import Hall
from tune_spaces.trial import SeatTrial, Spec

SEATS = 2
LOST = ActorUnavailableError("connection lost", None)


class Wire:
    """Benches in this process, behind what Ray would be: named handles and `ray.get`."""

    def __init__(self, recipe: TrainRecipe, directory: Path, num_benches: int = 1) -> None:
        self.recipe = recipe
        self.directory = directory
        self.names = tuple(f"bench{number}" for number in range(num_benches))
        self.benches = {name: self._start(name) for name in self.names}
        self.turns = threading.Lock()
        """For what draws from torch's generator, which benches share only here."""
        self.calls: list[tuple[str, str]] = []
        self.fault: Callable[[str, str, bool], None] = lambda name, method, is_done: None
        """Called before (False) and after (True) a method of a bench; what it raises comes out."""

    def _start(self, name: str) -> BenchActor:
        plain = config.plain(self.recipe)
        settings: dict[str, Any] = {"threads": 1, "fill_window_s": 0, "name": name}
        return BenchActor(
            plain, str(self.directory), largest=plain, seats=SEATS, most=SEATS, **settings
        )

    def restart(self, name: str) -> None:
        self.end(name)
        with self.turns:
            self.benches[name] = self._start(name)
            self.benches[name].ready()  # its base is loaded in its own thread

    def end(self, name: str) -> None:
        actor = self.benches.pop(name)
        actor._desk.close()
        actor._log.close()

    def get_actor(self, name: str, *, namespace: str) -> Any:
        if name not in self.benches:
            raise ValueError(f"Failed to look up actor with name '{name}'")
        return self.handle(name)

    def handle(self, name: str) -> Any:
        return _Handle(self, name)

    def get(self, calls: Any, *, timeout: float) -> Any:
        return calls()

    def run(self, name: str, method: str, arguments: Sequence[Any]) -> Any:
        self.calls.append((name, method))
        self.fault(name, method, False)
        is_alone = len(self.names) > 1 and method in ("join", "train")
        with self.turns if is_alone else nullcontext():
            actor = self.benches.get(name)
            if actor is None:
                raise ActorUnschedulableError("its node is dead")
            try:
                answer = getattr(actor, method)(*arguments)
            except Exception as error:
                if actor is not self.benches.get(name):
                    raise LOST from error
                raise RayTaskError(method, "", error) from error
        self.fault(name, method, True)
        return answer


class _Handle:
    def __init__(self, wire: Wire, name: str) -> None:
        self._wire = wire
        self._name = name

    def __getattr__(self, method: str) -> Any:
        wire, name = self._wire, self._name
        return SimpleNamespace(remote=lambda *arguments: lambda: wire.run(name, method, arguments))


@pytest.fixture
def recipe(tmp_path: Path, tiny_base: Path) -> TrainRecipe:
    return make_recipe(
        tmp_path,
        tiny_base,
        name="shared",
        data={"eval": str(tmp_path / "train.jsonl"), "max_length": 128},
        optim={"max_steps": 12, "global_batch_size": 4},
    )


@pytest.fixture
def lay(
    tmp_path: Path, recipe: TrainRecipe, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[int], Wire]]:
    wires: list[Wire] = []

    def make(num_benches: int) -> Wire:
        wire = Wire(recipe, tmp_path, num_benches)
        wires.append(wire)
        fake = SimpleNamespace(get=wire.get, get_actor=wire.get_actor, exceptions=ray.exceptions)
        for module in (trial, hall):
            monkeypatch.setattr(module, "ray", fake)
        spec = Spec(
            recipe=config.plain(recipe),
            directory=str(tmp_path / "trials"),
            namespace="n",
            benches=wire.names,
            metric="eval_loss",
            is_lr_scaled=True,
            report_every=120,
            budget=None,
            tokens_per_example=10.0,
            base_loss=None,
        )
        (tmp_path / "spec.json").write_text(json.dumps(asdict(spec)))
        return wire

    yield make
    for wire in wires:
        for name in list(wire.benches):
            wire.end(name)


def sit(directory: Path, name: str, rank: int = 4) -> SeatTrial:
    info = SimpleNamespace(trial_id=name, trial_name=name, trial_resources=None)
    params = {"lora.rank": rank, "optim.learning_rate": 3e-3}
    return SeatTrial(
        config={"__trial_info__": info, "spec": str(directory / "spec.json"), "params": params}
    )


def run(one: SeatTrial) -> list[dict[str, Any]]:
    results = [one.step()]
    while not results[-1]["done"]:
        results.append(one.step())
    return results


def told(results: Sequence[dict[str, Any]]) -> list[Any]:
    names = ("supervised_tokens", "step", "train_loss", "eval_loss", "is_finished")
    return [tuple(result[name] for name in names) for result in results]


@pytest.mark.parametrize("is_done", [False, True])
@pytest.mark.parametrize(("method", "number"), [("train", 2), ("save", 2), ("export", 1)])
def test_a_bench_that_dies_at_any_call_changes_no_report(
    tmp_path: Path, lay: Callable[[int], Wire], method: str, number: int, is_done: bool
) -> None:
    wire = lay(1)
    expected = run(sit(tmp_path, "whole"))
    left = [number]

    def fault(name: str, called: str, after: bool) -> None:
        if (called, after) == (method, is_done):
            left[0] -= 1
            if left[0] == 0:
                wire.restart(name)
                raise LOST

    wire.fault = fault
    results = run(sit(tmp_path, "disturbed"))
    assert left[0] <= 0
    assert len(results) > 3
    assert told(results) == told(expected)


def test_a_process_that_dies_between_its_checkpoint_and_its_report_makes_the_report_again(
    tmp_path: Path, lay: Callable[[int], Wire]
) -> None:
    lay(1)
    expected = told(run(sit(tmp_path, "whole")))
    first = sit(tmp_path, "moved")
    results = [first.step()]
    first.save_checkpoint(str(tmp_path))
    first.step()  # committed, but Tune never hears of it
    second = sit(tmp_path, "moved")
    second.load_checkpoint(str(tmp_path))
    assert told([*results, *run(second)]) == expected


def test_calls_that_a_bench_dies_of_every_time_end_in_an_error(
    tmp_path: Path, lay: Callable[[int], Wire]
) -> None:
    wire = lay(1)
    one = sit(tmp_path, "a")

    def fault(name: str, called: str, after: bool) -> None:
        if called == "train":
            raise LOST

    wire.fault = fault
    with pytest.raises(ActorUnavailableError):
        one.step()
    assert wire.calls.count(("bench0", "train")) == 4


@pytest.mark.parametrize(
    ("error", "reason", "times"),
    [
        (SeatShed("out of memory: the newest seat was taken away"), "4 times", 4),
        (SeatLost("loss nan at step 3"), "loss nan", 1),
    ],
)
def test_attempts_at_a_seat_are_counted_and_a_lost_one_ends_the_trial(
    tmp_path: Path, lay: Callable[[int], Wire], error: SeatLost, reason: str, times: int
) -> None:
    wire = lay(1)
    one = sit(tmp_path, "a")

    def fault(name: str, called: str, after: bool) -> None:
        if called == "train":
            raise RayTaskError(called, "", error)

    wire.fault = fault
    result = one.step()
    assert reason in result["reason"]
    assert (result["done"], result["is_finished"]) == (True, False)
    assert wire.calls.count(("bench0", "train")) == times


def test_a_trial_that_memory_has_no_room_for_waits_for_a_neighbour_and_ends_as_alone(
    tmp_path: Path, lay: Callable[[int], Wire], monkeypatch: pytest.MonkeyPatch
) -> None:
    wire = lay(1)
    expected = {rank: told(run(sit(tmp_path, f"alone{rank}", rank))) for rank in (2, 4)}
    real = seat.turn

    def crowded(trunk: Any, pieces: Sequence[Any]) -> None:
        if len(pieces) > 1:
            raise torch.OutOfMemoryError("no room for two")
        real(trunk, pieces)

    def run_and_leave(one: SeatTrial) -> list[dict[str, Any]]:
        results = run(one)
        one.cleanup()
        return results

    for name in ("alone2", "alone4"):
        wire.benches["bench0"].leave(name)
    monkeypatch.setattr(seat, "turn", crowded)
    both = [sit(tmp_path, f"both{rank}", rank) for rank in (2, 4)]
    with ThreadPoolExecutor() as pool:
        found = list(pool.map(run_and_leave, both))
    for rank, results in zip((2, 4), found, strict=True):
        assert [row[0] for row in told(results)] == [row[0] for row in expected[rank]]
        assert results[-1]["eval_loss"] == pytest.approx(expected[rank][-1][3], rel=1e-5)
    assert wire.benches["bench0"].room("nobody") == (0, 1)


def test_trials_go_to_the_emptiest_bench_and_back_to_their_last_one(
    tmp_path: Path, lay: Callable[[int], Wire]
) -> None:
    wire = lay(2)
    trials = [sit(tmp_path, name) for name in "abcd"]
    assert [one.step()["bench"] for one in trials] == ["bench0", "bench1", "bench0", "bench1"]
    for one in trials[1:]:
        one.cleanup()
    again = sit(tmp_path, "d")  # by now bench0 has one seat taken and bench1 none
    assert again.step()["bench"] == "bench1"
    for _ in range(2):
        assert sit(tmp_path, "a").step()["bench"] == "bench0"  # its process died, its seat is left
    wire.end("bench1")
    assert again.step()["bench"] == "bench0"


def test_without_any_bench_left_a_trial_ends_at_once_with_what_to_do(
    tmp_path: Path, lay: Callable[[int], Wire]
) -> None:
    wire = lay(2)
    one = sit(tmp_path, "a")
    for name in wire.names:
        wire.end(name)
    with pytest.raises(ClusterError, match=r"none of the 2 benches is left.*--resume"):
        one.step()
    one.cleanup()


def make_hall(wire: Wire) -> Hall:
    actors = tuple(wire.handle(name) for name in wire.names)
    capacities = tuple(Capacity(**actor.ready.remote()()) for actor in actors)
    return Hall(
        namespace="n",
        names=wire.names,
        capacities=capacities,
        actors=actors,
        directory=wire.directory,
    )


def finalists(directory: Path, recipe: TrainRecipe, storage: str) -> dict[str, TrainRecipe]:
    found = {
        name: replace(
            recipe,
            name=name,
            storage=str(directory / storage),
            optim=replace(recipe.optim, seed=seed),
        )
        for seed, name in enumerate(("a", "b", "c", "d", "e"))
    }
    return {**found, BASE: recipe}


@pytest.mark.parametrize("comes_back", [False, True])
def test_scores_are_dealt_to_all_benches_and_outlive_one_that_dies(
    tmp_path: Path, lay: Callable[[int], Wire], recipe: TrainRecipe, comes_back: bool
) -> None:
    wire = lay(2)
    driver = make_hall(wire)
    entries = finalists(tmp_path, recipe, "whole")
    expected = driver.scores(entries, "eval_loss")
    sat = {name for name, method in wire.calls if method == "join"}
    assert sat == {"bench0", "bench1"}

    def fault(name: str, called: str, after: bool) -> None:
        if (name, called) == ("bench1", "export"):
            wire.fault = lambda name, called, after: None
            if comes_back:
                wire.restart(name)
            else:
                wire.end(name)
            raise LOST

    wire.fault = fault
    found = driver.scores(finalists(tmp_path, recipe, "disturbed"), "eval_loss")
    assert found.keys() == entries.keys()
    for name in entries:
        assert found[name]["values"] == pytest.approx(expected[name]["values"], rel=1e-5)
    driver.clear()
    steps = driver.occupancy()
    assert max(taken for _, taken in steps) <= 2 * SEATS
    assert steps[-1][1] == 0
    assert driver.peak_rss_bytes() > 0


def test_a_driver_without_benches_says_what_to_do(tmp_path: Path, lay: Any) -> None:
    wire = lay(1)
    driver = make_hall(wire)

    def fault(name: str, called: str, after: bool) -> None:
        if called == "size":
            raise LOST

    wire.fault = fault
    with pytest.raises(ClusterError, match=r"died 3 times while answering size.*--resume"):
        driver.size()
    wire.end("bench0")
    with pytest.raises(ClusterError, match=r"none of the 1 benches answers.*--resume"):
        driver.base_loss()
