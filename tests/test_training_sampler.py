"""The order of examples: every epoch a permutation, whoever asks and whenever."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import byte_tokenizer

from cluster.errors import DataError
from training.sampler import Order, StreamOrder, permutation, share
from training.special_ids import stop_ids
from training.tokens import Encoder

SIZES = st.integers(1, 40)


def all_batches(order: Order) -> list[list[int]]:
    return [order.batch(step) for step in range(order.num_steps)]


@settings(max_examples=60, deadline=None)
@given(num_examples=SIZES, batch_size=SIZES, seed=st.integers(0, 2**31 - 1))
def test_every_epoch_is_a_permutation(num_examples: int, batch_size: int, seed: int) -> None:
    order = Order(num_examples, batch_size, seed, epochs=3, max_steps=None)
    seen = [index for batch in all_batches(order) for index in batch]
    assert len(seen) == order.num_seen == 3 * num_examples
    for epoch in range(3):
        part = seen[epoch * num_examples : (epoch + 1) * num_examples]
        assert sorted(part) == list(range(num_examples))


@settings(max_examples=60, deadline=None)
@given(batch=st.lists(st.integers(), max_size=30), world_size=st.integers(1, 9))
def test_shares_partition_the_batch_evenly(batch: list[int], world_size: int) -> None:
    shares = [share(batch, rank, world_size) for rank in range(world_size)]
    assert sorted(item for part in shares for item in part) == sorted(batch)
    sizes = [len(part) for part in shares]
    assert max(sizes) - min(sizes) <= 1


@settings(max_examples=30, deadline=None)
@given(num_examples=SIZES, batch_size=SIZES, epochs=st.floats(0.01, 4))
def test_fractions_of_an_epoch_see_that_many_examples(
    num_examples: int, batch_size: int, epochs: float
) -> None:
    order = Order(num_examples, batch_size, 0, epochs=epochs, max_steps=None)
    sizes = [len(batch) for batch in all_batches(order)]
    assert sum(sizes) == max(1, round(epochs * num_examples))
    assert all(size == batch_size for size in sizes[:-1])


def test_max_steps_gives_that_many_full_batches() -> None:
    order = Order(5, 4, 0, epochs=1, max_steps=7)
    assert [len(batch) for batch in all_batches(order)] == [4] * 7


def test_a_step_does_not_depend_on_the_steps_asked_for_before() -> None:
    order = Order(50, 8, 3, epochs=4, max_steps=None)
    forward = all_batches(order)
    backward = [order.batch(step) for step in reversed(range(order.num_steps))][::-1]
    fresh = [
        Order(50, 8, 3, epochs=4, max_steps=None).batch(step) for step in range(order.num_steps)
    ]
    assert forward == backward == fresh


def test_epochs_and_seeds_differ() -> None:
    orders = {tuple(permutation(100, seed, epoch)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


RECORDED_0_0 = [0, 2, 9, 1, 8, 5, 4, 3, 6, 7]
RECORDED_7_2 = [6, 7, 8, 4, 0, 1, 5, 3, 9, 2]


def test_the_order_is_the_one_that_was_recorded() -> None:
    assert permutation(10, 0, 0).tolist() == RECORDED_0_0
    assert permutation(10, 7, 2).tolist() == RECORDED_7_2


def write(path: Path, num_rows: int) -> str:
    rows = [{"prompt": f"question {i}", "completion": f"answer {i}"} for i in range(num_rows)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def stream_order(
    source: str, *, max_steps: int = 6, seed: int = 0, skip: bool = False
) -> StreamOrder:
    tokenizer = byte_tokenizer()
    encoder = Encoder(tokenizer, stop_ids=stop_ids(tokenizer, None))
    return StreamOrder(
        source,
        lambda rows: [encoder.try_encode(row) for row in rows],
        global_batch_size=4,
        seed=seed,
        max_steps=max_steps,
        on_bad_row="skip" if skip else "error",
        block_size=5,
    )


def names(order: StreamOrder) -> list[list[str]]:
    return [[encoded.id for encoded in batch] for batch in order]


def test_a_stream_gives_every_row_once_an_epoch_and_starts_again(tmp_path: Path) -> None:
    batches = names(stream_order(write(tmp_path / "train.jsonl", 12)))
    assert [len(batch) for batch in batches] == [4] * 6
    seen = [name for batch in batches for name in batch]
    every = {f"train.jsonl:{line}" for line in range(1, 13)}
    assert set(seen[:12]) == set(seen[12:]) == every
    assert seen[:12] != seen[12:]


def test_a_stream_is_shuffled_within_blocks_by_its_seed(tmp_path: Path) -> None:
    source = write(tmp_path / "train.jsonl", 12)
    first = [name for batch in names(stream_order(source)) for name in batch]
    assert set(first[:5]) == {f"train.jsonl:{line}" for line in range(1, 6)}
    assert names(stream_order(source)) == names(stream_order(source))
    assert names(stream_order(source)) != names(stream_order(source, seed=1))


@pytest.mark.parametrize("step", [0, 1, 4, 6])
def test_a_stream_resumes_exactly(tmp_path: Path, step: int) -> None:
    source = write(tmp_path / "train.jsonl", 11)
    whole = names(stream_order(source))
    resumed = stream_order(source)
    resumed.skip(step)
    assert names(resumed) == whole[step:]
    resumed.skip(1)  # Back again.
    assert names(resumed) == whole[1:]


def test_a_bad_row_stops_a_stream_with_its_place(tmp_path: Path) -> None:
    source = write(tmp_path / "train.jsonl", 3)
    Path(source).write_text(Path(source).read_text() + "{broken\n")
    with pytest.raises(DataError, match=r"train.jsonl:4: broken JSON.*on_bad_row: skip"):
        names(stream_order(source))


def test_skipped_rows_of_a_stream_are_counted(tmp_path: Path) -> None:
    source = write(tmp_path / "train.jsonl", 8)
    Path(source).write_text("{broken\n" + Path(source).read_text())
    order = stream_order(source, max_steps=2, skip=True)
    assert len(names(order)) == 2
    assert order.num_bad == 1


def test_a_stream_without_usable_rows_is_an_error_not_an_endless_loop(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text("{broken\n{broken\n")
    with pytest.raises(DataError, match="none of the 2 rows can be used"):
        names(stream_order(str(path), skip=True))
