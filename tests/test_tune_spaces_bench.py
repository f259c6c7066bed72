"""A seat cannot tell that it has neighbours: the equivalence contract, on a tiny base in fp32."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from runs import adapter_bytes, events_of, make_recipe, run_dir_of, train
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

from cluster.errors import ConfigError, FencedError
from training import checkpoint
from training.config import TrainRecipe
from training.seat import Seat
from tune_spaces.bench import BASE, Bench, SeatLost

STEPS = 20
ALL_TOKENS = 10**9


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def trial(directory: Path, base: Path, name: str, **sections: Mapping[str, Any]) -> TrainRecipe:
    """One trial's recipe; every trial of a test has its own name."""
    optim = {"learning_rate": 1e-2, "max_steps": STEPS, "global_batch_size": 4}
    lora = {"rank": 4}
    return make_recipe(
        directory,
        base,
        name=name,
        data={"eval": str(directory / "train.jsonl"), "max_length": 128},
        optim=optim | dict(sections.pop("optim", {})),
        lora=lora | dict(sections.pop("lora", {})),
        **sections,
    )


def different_trials(directory: Path, base: Path, prefix: str) -> list[TrainRecipe]:
    """Ranks, rates, batch sizes, targets, dropout, clipping, schedules and seeds all differ."""
    return [
        trial(directory, base, f"{prefix}-a"),
        trial(
            directory,
            base,
            f"{prefix}-b",
            lora={"rank": 16, "dropout": 0.2},
            optim={"learning_rate": 3e-3, "global_batch_size": 7, "schedule": "cosine"},
        ),
        trial(
            directory,
            base,
            f"{prefix}-c",
            lora={"rank": 2, "alpha": 8, "target_modules": ["q_proj", "v_proj"], "dropout": 0.1},
            optim={"max_grad_norm": 0.05, "weight_decay": 0.1, "seed": 5, "warmup": 4},
        ),
        trial(
            directory,
            base,
            f"{prefix}-d",
            lora={"rank": 8, "variant": "rslora"},
            optim={"global_batch_size": 24, "schedule": "constant", "optimizer": "adamw_8bit"},
        ),
    ]


def make_bench(directory: Path, recipe: TrainRecipe) -> Bench:
    directory.mkdir(parents=True, exist_ok=True)
    return Bench(recipe=recipe, directory=directory, device=torch.device("cpu"))


def join(bench: Bench, recipe: TrainRecipe) -> int:
    run_dir_of(recipe).mkdir(parents=True, exist_ok=True)
    return bench.join(recipe.name, recipe, run_dir_of(recipe))


def run(
    bench: Bench, recipes: Sequence[TrainRecipe], on_turn: Callable[[int], None] = lambda _: None
) -> None:
    """Seat the trials, train them to their ends, export them."""
    for recipe in recipes:
        join(bench, recipe)
        bench.ask(recipe.name, supervised_tokens=ALL_TOKENS)
    turns = 0
    while bench.has_work:
        bench.turn()
        turns += 1
        on_turn(turns)
    for recipe in recipes:
        if recipe.name in bench.trials and bench._places[recipe.name].error is None:
            bench.collect(recipe.name)
            bench.export(recipe.name)


def weights(recipe: TrainRecipe) -> dict[str, np.ndarray]:
    return load_file(run_dir_of(recipe) / "adapter" / "adapter_model.safetensors")


def assert_same(packed: TrainRecipe, alone: TrainRecipe) -> None:
    ours, theirs = weights(packed), weights(alone)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.shape == theirs[name].shape
        assert np.abs(tensor - theirs[name]).max() < 1e-4, name


def losses_of(bench: Bench, names: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Note each seat's loss of each step."""
    seen: dict[str, list[float]] = {name: [] for name in names}
    real = Seat.finish_step

    def noting(self: Seat, *also: torch.Tensor) -> Any:
        step = real(self, *also)
        seen[self.recipe.name].append(step.loss)
        return step

    monkeypatch.setattr(Seat, "finish_step", noting)
    return seen


@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_trials_side_by_side_are_each_alone(
    tmp_path: Path, tiny_base: Path, quantization: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"model": {"base": str(tiny_base), "quantization": quantization}}
    alone = different_trials(tmp_path, tiny_base, "alone")
    packed = different_trials(tmp_path, tiny_base, "packed")
    alone = [make_with(recipe, tmp_path, tiny_base, settings) for recipe in alone]
    packed = [make_with(recipe, tmp_path, tiny_base, settings) for recipe in packed]
    for recipe in alone:
        train(recipe)
    bench = make_bench(tmp_path / "bench", packed[0])
    seen = losses_of(bench, [recipe.name for recipe in packed], monkeypatch)
    most = 0

    def count(_: int) -> None:
        nonlocal most
        most = max(most, len(bench.trials))

    run(bench, packed, count)
    assert most == 4
    for one, other in zip(packed, alone, strict=True):
        expected = [event.number("loss") for event in events_of(other, "step")]
        assert np.allclose(seen[one.name], expected, rtol=0, atol=1e-5)
        assert_same(one, other)


def make_with(
    recipe: TrainRecipe, directory: Path, base: Path, settings: Mapping[str, Any]
) -> TrainRecipe:
    from cluster import config

    tree = config.plain(recipe)
    return config.build(TrainRecipe, {**tree, **settings}, where="test")


def test_a_pack_of_one_is_bitwise_the_solo_run(tmp_path: Path, tiny_base: Path) -> None:
    for index, name in enumerate("abcd"):
        alone = different_trials(tmp_path, tiny_base, "alone")[index]
        packed = different_trials(tmp_path, tiny_base, "packed")[index]
        assert alone.name.endswith(name)
        train(alone)
        run(make_bench(tmp_path / f"bench-{name}", packed), [packed])
        assert adapter_bytes(packed) == adapter_bytes(alone), name
        files = [run_dir_of(r) / "adapter" / "adapter_config.json" for r in (alone, packed)]
        assert files[0].read_bytes() == files[1].read_bytes(), name


def test_the_order_of_the_seats_changes_nothing(tmp_path: Path, tiny_base: Path) -> None:
    first = different_trials(tmp_path, tiny_base, "first")
    second = different_trials(tmp_path, tiny_base, "second")
    run(make_bench(tmp_path / "one", first[0]), first)
    run(make_bench(tmp_path / "two", second[0]), second[::-1])
    for one, other in zip(first, second, strict=True):
        assert_same(one, other)


def test_neighbours_that_diverge_or_leave_harm_nobody(tmp_path: Path, tiny_base: Path) -> None:
    alone = trial(tmp_path, tiny_base, "alone", lora={"dropout": 0.1})
    train(alone)
    good = trial(tmp_path, tiny_base, "good", lora={"dropout": 0.1})
    wild = trial(
        tmp_path, tiny_base, "wild", optim={"learning_rate": 10.0, "max_grad_norm": 0, "seed": 1}
    )
    leaver = trial(tmp_path, tiny_base, "leaver", optim={"seed": 2})
    bench = make_bench(tmp_path / "bench", good)
    run(
        bench,
        [good, wild, leaver],
        lambda turns: bench.leave("leaver") if turns == 3 else None,
    )
    with pytest.raises(SeatLost, match=r"gradient norm (nan|inf)"):  # it broke on its way
        bench.collect("wild")
    assert_same(good, alone)


def test_a_seat_with_broken_numbers_is_taken_away_and_its_neighbours_go_on(
    tmp_path: Path, tiny_base: Path
) -> None:
    alone = trial(tmp_path, tiny_base, "alone")
    train(alone)
    good, bad = trial(tmp_path, tiny_base, "good"), trial(tmp_path, tiny_base, "bad")
    bench = make_bench(tmp_path / "bench", good)

    def poison(turns: int) -> None:
        if turns == 4:
            with torch.no_grad():
                next(iter(bench._places["bad"].seat.parameters.values())).fill_(float("nan"))

    run(bench, [good, bad], poison)
    with pytest.raises(SeatLost, match="loss nan"):
        bench.collect("bad")
    assert_same(good, alone)


def test_out_of_memory_takes_the_newest_seat_and_the_others_end_as_alone(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from training import seat

    alone = trial(tmp_path, tiny_base, "alone", lora={"dropout": 0.1})
    train(alone)
    good = trial(tmp_path, tiny_base, "good", lora={"dropout": 0.1})
    newest = trial(tmp_path, tiny_base, "newest", optim={"seed": 3})
    bench = make_bench(tmp_path / "bench", good)
    real = seat.turn
    calls = 0

    def crowded(trunk: Any, pieces: Any) -> None:
        nonlocal calls
        calls += 1
        real(trunk, pieces)  # what it has added to the gradients must not be counted
        if calls == 5:
            raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(seat, "turn", crowded)
    for recipe in (good, newest):
        join(bench, recipe)
        bench.ask(recipe.name, supervised_tokens=ALL_TOKENS)
    while bench.has_work:
        bench.turn()
    with pytest.raises(SeatLost, match="out of memory"):
        bench.collect("newest")
    bench.leave("newest")
    bench.export("good")
    assert_same(good, alone)


def test_leaving_and_joining_another_bench_is_bitwise_staying(
    tmp_path: Path, tiny_base: Path
) -> None:
    whole = trial(tmp_path, tiny_base, "whole", lora={"dropout": 0.1})
    train(whole)
    moved = trial(tmp_path, tiny_base, "moved", lora={"dropout": 0.1})
    first = make_bench(tmp_path / "one", moved)
    join(first, moved)
    first.ask("moved", supervised_tokens=100)
    while first.has_work:
        first.turn()
    reached = first.collect("moved").supervised_tokens
    assert 100 <= reached < 200
    first.save("moved")
    second = make_bench(tmp_path / "two", moved)
    assert join(second, moved) == reached
    with pytest.raises(FencedError, match="superseded"):
        first.export("moved")
    second.ask("moved", supervised_tokens=ALL_TOKENS)
    while second.has_work:
        second.turn()
    assert second.collect("moved").is_finished
    second.export("moved")
    assert adapter_bytes(moved) == adapter_bytes(whole)


def test_reports_are_of_the_trial_s_own_tokens(tmp_path: Path, tiny_base: Path) -> None:
    recipes = [trial(tmp_path, tiny_base, name, optim={"seed": i}) for i, name in enumerate("ab")]
    bench = make_bench(tmp_path / "bench", recipes[0])
    base_loss = bench.eval_loss()
    for recipe in recipes:
        join(bench, recipe)
    bench.ask("a", supervised_tokens=200)
    while bench.has_work:
        bench.turn()
    assert bench.is_ready("b")
    progress = bench.collect("a")
    assert 200 <= progress.supervised_tokens < 300
    assert not progress.is_finished
    assert progress.eval_loss is not None
    assert base_loss is not None
    assert progress.eval_loss < base_loss
    assert bench.collect("b").supervised_tokens == 0
    assert bench.eval_loss(BASE) == base_loss


def test_the_exported_adapter_loads_in_stock_peft_with_the_same_logits(
    tmp_path: Path, tiny_base: Path
) -> None:
    recipes = different_trials(tmp_path, tiny_base, "run")
    bench = make_bench(tmp_path / "bench", recipes[0])
    run(bench, recipes)
    ids = torch.arange(30)[None]
    for recipe in recipes:
        bare = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
        stock = PeftModel.from_pretrained(bare, str(run_dir_of(recipe) / "adapter"))
        place = bench._places[recipe.name]
        bench.trunk.model.set_adapter(place.seat.adapter)
        bench.trunk.model.eval()
        with torch.no_grad():
            ours = bench.trunk.model(input_ids=ids).logits
            torch.testing.assert_close(stock(input_ids=ids).logits, ours, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        ("lora", {"variant": "dora"}, "search.mode: solo"),
        ("model", {"quantization": "int8"}, "model of this trial differs"),
        ("data", {"max_length": 64}, "data of this trial differs"),
    ],
)
def test_what_cannot_share_a_base_is_refused(
    tmp_path: Path, tiny_base: Path, section: str, values: dict[str, Any], message: str
) -> None:
    from cluster import config

    shared = trial(tmp_path, tiny_base, "shared")
    tree = config.plain(shared)
    other = config.build(
        TrainRecipe, {**tree, "name": "other", section: {**tree[section], **values}}, where="test"
    )
    bench = make_bench(tmp_path / "bench", shared)
    with pytest.raises(ConfigError, match=message):
        join(bench, other)
    assert checkpoint.find_latest_valid(run_dir_of(other)) is None
    assert bench.trials == ()
