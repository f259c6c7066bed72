"""The desk: many callers, one bench, everybody gets an answer."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from runs import make_recipe, run_dir_of

from cluster.errors import LorayError
from training.config import TrainRecipe
from tune_spaces.actor import BenchActor, Desk
from tune_spaces.bench import Bench

ALL_TOKENS = 10**9


def trial(
    directory: Path, base: Path, name: str, seed: int = 0, *, steps: int = 8, rate: float = 1e-2
) -> TrainRecipe:
    recipe = make_recipe(
        directory,
        base,
        name=name,
        data={"eval": str(directory / "train.jsonl"), "max_length": 128},
        optim={"learning_rate": rate, "max_steps": steps, "global_batch_size": 4, "seed": seed},
    )
    run_dir_of(recipe).mkdir(parents=True, exist_ok=True)
    return recipe


@pytest.fixture
def recipe(tmp_path: Path, tiny_base: Path) -> TrainRecipe:
    return trial(tmp_path, tiny_base, "a")


@pytest.fixture
def desk(tmp_path: Path, recipe: TrainRecipe) -> Iterator[Desk]:
    made = Desk(
        lambda: Bench(recipe=recipe, directory=tmp_path, device=torch.device("cpu")),
        seats=2,
        fill_window_s=0,
    )
    yield made
    made.close()
    assert "bench" not in {thread.name for thread in threading.enumerate()}


def test_callers_train_at_the_same_time_and_each_gets_its_own_answer(
    tmp_path: Path, tiny_base: Path, desk: Desk
) -> None:
    recipes = [trial(tmp_path, tiny_base, name, seed) for seed, name in enumerate("ab")]
    for one in recipes:
        assert desk.join(one.name, one, run_dir_of(one)) == 0
    with ThreadPoolExecutor() as pool:
        found = list(pool.map(lambda one: desk.train(one.name, ALL_TOKENS), recipes))
    assert [progress.trial for progress in found] == ["a", "b"]
    assert all(progress.is_finished and progress.step == 8 for progress in found)
    assert [taken for _, taken in desk.occupancy()] == [1, 2]


def test_a_full_bench_says_so_and_a_seat_given_back_can_be_taken(
    tmp_path: Path, tiny_base: Path, desk: Desk
) -> None:
    recipes = [trial(tmp_path, tiny_base, name) for name in "abc"]
    joined = [desk.join(one.name, one, run_dir_of(one)) for one in recipes]
    assert joined == [0, 0, None]
    desk.leave("a")
    desk.leave("a")  # twice does no harm
    assert desk.join("c", recipes[2], run_dir_of(recipes[2])) == 0


def test_errors_of_an_order_come_back_to_who_gave_it(desk: Desk, recipe: TrainRecipe) -> None:
    with pytest.raises(KeyError):
        desk.train("nobody", 10)
    assert desk.join(recipe.name, recipe, run_dir_of(recipe)) == 0
    assert desk.train(recipe.name, 1).step == 1


def test_who_waits_when_the_desk_closes_is_told(desk: Desk, recipe: TrainRecipe) -> None:
    desk.join(recipe.name, recipe, run_dir_of(recipe))
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(desk.order, lambda _: desk_closer(desk))
        assert waiting.result(60) == "closing"
    with pytest.raises(LorayError, match="closed"):
        desk.order(lambda bench: bench.trials)


def desk_closer(desk: Desk) -> str:
    threading.Thread(target=desk.close).start()
    return "closing"


def test_a_base_that_cannot_be_loaded_is_what_every_order_raises(tmp_path: Path) -> None:
    def fail() -> Bench:
        raise LorayError("no such base")

    desk = Desk(fail, seats=1, fill_window_s=0)
    with pytest.raises(LorayError, match="no such base"):
        desk.order(lambda bench: bench.trials)
    desk.close()


def test_the_first_seats_wait_for_others_but_not_for_ever(
    tmp_path: Path, tiny_base: Path, recipe: TrainRecipe
) -> None:
    clock = [0.0]
    desk = Desk(
        lambda: Bench(recipe=recipe, directory=tmp_path, device=torch.device("cpu")),
        seats=2,
        fill_window_s=1000,
        clock=lambda: clock[0],
    )
    try:
        desk.join("a", recipe, run_dir_of(recipe))
        with ThreadPoolExecutor() as pool:
            waiting = pool.submit(desk.train, "a", 1)
            for _ in range(20):
                assert desk.order(lambda bench: bench.has_work)
            assert not waiting.done()
            clock[0] = 2000.0
            assert waiting.result(60).step == 1
    finally:
        desk.close()


def test_answers_of_all_trials_are_mixed_and_each_is_as_alone(
    tmp_path: Path, tiny_base: Path
) -> None:
    from cluster import config

    recipes = [
        trial(tmp_path, tiny_base, name, seed, steps=steps, rate=3e-2)
        for seed, (name, steps) in enumerate((("a", 40), ("b", 80)))
    ]
    actor = BenchActor(
        config.plain(recipes[0]), str(tmp_path), seats=2, threads=1, fill_window_s=0, name="x"
    )
    try:
        assert actor.ready() == "x"
        assert actor.size()[0] == 24
        for one in recipes:
            actor.join(one.name, config.plain(one), str(run_dir_of(one)))
            actor.train(one.name, ALL_TOKENS)
        for metric in ("eval_loss", "rouge_l"):
            together = actor.scores(["base", "a", "b"], metric, None)
            assert len(together["a"]["values"]) == 24
            for name in ("base", "a", "b"):
                alone = actor.scores([name], metric, None)[name]["values"]
                assert together[name]["values"] == pytest.approx(alone, abs=1e-5)
        assert max(together["b"]["values"]) > 0  # it has learnt to say some colours
    finally:
        actor._desk.close()
