"""The desk: many callers, one bench, everybody gets an answer."""

import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from runs import make_recipe, run_dir_of

from cluster import config
from cluster.errors import LorayError
from training import generation
from training.config import TrainRecipe
from tune_spaces.actor import BenchActor
from tune_spaces.bench import Bench, NoSeat
from tune_spaces.desk import Desk

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
def taken() -> list[int]:
    """Seats taken at the desk, each time that changed."""
    return []


@pytest.fixture
def desk(tmp_path: Path, recipe: TrainRecipe, taken: list[int]) -> Iterator[Desk]:
    made = Desk(
        lambda: Bench(recipe=recipe, directory=tmp_path, device=torch.device("cpu")),
        seats=2,
        fill_window_s=0,
        told=taken.append,
    )
    yield made
    made.close()
    assert "bench" not in {thread.name for thread in threading.enumerate()}


def test_callers_train_at_the_same_time_and_each_gets_its_own_answer(
    tmp_path: Path, tiny_base: Path, desk: Desk, taken: list[int]
) -> None:
    recipes = [trial(tmp_path, tiny_base, name, seed) for seed, name in enumerate("ab")]
    for one in recipes:
        assert desk.join(one.name, one, run_dir_of(one)) == (0, 1)
    with ThreadPoolExecutor() as pool:
        found = list(pool.map(lambda one: desk.train(one.name, ALL_TOKENS), recipes))
    assert [progress.trial for progress in found] == ["a", "b"]
    assert all(progress.is_finished and progress.step == 8 for progress in found)
    assert taken == [1, 2]


def test_a_full_bench_says_so_and_a_seat_given_back_can_be_taken(
    tmp_path: Path, tiny_base: Path, desk: Desk
) -> None:
    recipes = [trial(tmp_path, tiny_base, name) for name in "abc"]
    joined = [desk.join(one.name, one, run_dir_of(one)) for one in recipes]
    assert joined == [(0, 1), (0, 1), None]
    desk.leave("a")
    desk.leave("a")  # twice does no harm
    assert desk.join("c", recipes[2], run_dir_of(recipes[2])) == (0, 1)


def test_a_dead_process_cannot_take_its_successor_s_seat_away(
    desk: Desk, recipe: TrainRecipe
) -> None:
    assert desk.join("a", recipe, run_dir_of(recipe)) == (0, 1)
    assert desk.join("a", recipe, run_dir_of(recipe)) == (0, 2)  # the first one died
    desk.leave("a", 1)
    assert desk.train("a", 1).step == 1
    desk.leave("a", 2)
    assert desk.order(lambda bench: bench.trials) == ()


def test_errors_of_an_order_come_back_to_who_gave_it(desk: Desk, recipe: TrainRecipe) -> None:
    with pytest.raises(NoSeat, match="nobody has no seat"):
        desk.train("nobody", 10)
    assert desk.join(recipe.name, recipe, run_dir_of(recipe)) == (0, 1)
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
    recipes = [
        trial(tmp_path, tiny_base, name, seed, steps=60, rate=0.1) for seed, name in enumerate("ab")
    ]
    actor = BenchActor(
        config.plain(recipes[0]),
        str(tmp_path),
        largest=config.plain(recipes[0]),
        seats=2,
        most=2,
        threads=1,
        fill_window_s=0,
        name="x",
    )
    try:
        assert actor.ready()["seats"] == 2
        assert actor.size()[0] == 24
        for one in recipes:
            actor.join(one.name, config.plain(one), str(run_dir_of(one)))
            actor.train(one.name, ALL_TOKENS)
        names = ["base", "a", "b"]
        together = actor.scores(names, "eval_loss", None)
        for name in names:
            alone = actor.scores([name], "eval_loss", None)[name]["values"]
            assert together[name]["values"] == pytest.approx(alone, abs=1e-5)
        assert together["a"]["values"] != together["base"]["values"]
        assert len(actor.scores(names, "rouge_l", None)["b"]["values"]) == 24
        mixed = actor._desk.order(lambda bench: answers(bench, names))
        separate = [actor._desk.order(lambda bench, n=n: answers(bench, [n])) for n in names]
        assert mixed == [text for texts in separate for text in texts]
        assert len({tuple(texts) for texts in separate}) == 3
    finally:
        actor._desk.close()
        actor._log.close()


def answers(bench: Bench, names: Sequence[str]) -> list[str]:
    """Greedy answers of each trial to two prompts, all in one batch."""
    adapters = [bench.adapter_of(name) for name in names for _ in range(2)]
    return generation.generate(
        bench.trunk.model,
        bench.trunk.base.tokenizer,
        [list(prompt) for _ in names for prompt in (b"Say red", b"Say blue please")],
        max_new_tokens=12,
        stop_ids={257},
        batch_size=len(adapters),
        pad_id=258,
        route=lambda numbers: bench.trunk.router.by_row([adapters[n] for n in numbers]),
    )


def test_a_trials_process_needs_no_torch() -> None:
    """Eight of them run beside a bench; a handle of an actor loads the module of its class."""
    code = (
        "import sys, tune_spaces.trial, tune_spaces.actor;"
        "sys.exit(', '.join({'torch', 'transformers', 'optuna'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
