"""How many seats a bench gets: by speed, by memory, and the same again after a restart."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from runs import make_recipe

from cluster.errors import ResourceError
from training import memory
from training.config import TrainRecipe
from tune_spaces import capacity
from tune_spaces.bench import Bench
from tune_spaces.capacity import Capacity


@pytest.mark.parametrize(
    ("speeds", "most", "seats", "tried"),
    [
        ({1: 100, 2: 180, 4: 300, 8: 310}, 16, 4, [1, 2, 4, 8]),
        ({1: 100, 2: 102}, 16, 1, [1, 2]),
        ({1: 100, 2: 90}, 16, 1, [1, 2]),
        ({1: 100, 2: 190, 4: 370, 6: 500}, 6, 6, [1, 2, 4, 6]),
        ({1: 100}, 1, 1, [1]),
    ],
)
def test_the_knee_is_where_twice_the_seats_bring_nothing(
    speeds: Mapping[int, float], most: int, seats: int, tried: list[int]
) -> None:
    found, measured = capacity.knee(lambda count: speeds[count], most=most)
    assert found == seats
    assert list(measured) == tried


@pytest.fixture
def recipe(tmp_path: Path, tiny_base: Path) -> TrainRecipe:
    return make_recipe(
        tmp_path, tiny_base, data={"eval": str(tmp_path / "train.jsonl"), "max_length": 128}
    )


@pytest.fixture
def bench(tmp_path: Path, recipe: TrainRecipe) -> Bench:
    return Bench(recipe=recipe, directory=tmp_path, device=torch.device("cpu"))


def test_a_probe_measures_leaves_no_seat_behind_and_is_kept(
    tmp_path: Path, bench: Bench, recipe: TrainRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = tmp_path / "seats.json"
    found = capacity.find(bench, recipe, "auto", most=3, kept=kept)
    assert 1 <= found.seats <= 3
    assert next(iter(found.speeds)) == "1"
    assert all(speed > 0 for speed in found.speeds.values())
    assert bench.trials == ()
    assert not bench.has_work
    monkeypatch.setattr(capacity, "knee", None)  # nothing is measured again
    assert capacity.find(bench, recipe, "auto", most=3, kept=kept) == found


def test_seats_that_were_asked_for_are_checked_against_memory(
    tmp_path: Path, bench: Bench, recipe: TrainRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    roomy = capacity.find(bench, recipe, 2, most=8, kept=tmp_path / "a.json")
    assert roomy.seats == 2
    assert not roomy.speeds
    numbers = sum(p.numel() for n, p in bench.trunk.model.named_parameters() if ".base." in n)
    assert roomy.seat_bytes == 16 * 4 * numbers  # rank 4; the base's own adapter has rank 1
    few = bench.trunk.memory.activation_bytes + 2.1 * roomy.seat_bytes / 0.6
    monkeypatch.setattr(memory, "free_bytes", lambda _: few)
    assert capacity.find(bench, recipe, 2, most=8, kept=tmp_path / "b.json").fitting == 2
    with pytest.raises(ResourceError, match=r"search.seats is 3, but .* holds 2 seats.* rank 4"):
        capacity.find(bench, recipe, 3, most=8, kept=tmp_path / "c.json")
    assert not (tmp_path / "c.json").exists()
    assert bench.trials == ()
    monkeypatch.setattr(memory, "free_bytes", lambda _: 1.0)
    with pytest.raises(ResourceError, match="not even one seat fits"):
        capacity.find(bench, recipe, "auto", most=8, kept=tmp_path / "d.json")


def test_what_a_person_reads() -> None:
    many = Capacity(seats=4, fitting=90, seat_bytes=2_000_000, speeds={"1": 9.0, "4": 30.0})
    assert str(many) == (
        "4 seats, all that trials or memory have use for (real tokens/s by seats: 1: 9, 4: 30; "
        "memory holds 90, of 2 MB each)"
    )
    one = Capacity(seats=1, fitting=90, seat_bytes=2_000_000, speeds={"1": 30.0, "2": 30.1})
    assert "one seat saturates the device" in str(one)
    given = Capacity(seats=8, fitting=90, seat_bytes=2_000_000)
    assert str(given) == "8 seats (memory holds 90, of 2 MB each)"
