"""The rows of a stream, tokenised by several workers: the batches of one, bit by bit."""

import json
import multiprocessing
import queue
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from runs import make_recipe
from tiny import byte_tokenizer

from cluster.errors import DataError
from training import dataset
from training.config import TrainRecipe
from training.examples import BadRow, Example
from training.special_ids import stop_ids
from training.strategy import Workers
from training.tokens import Encoded, Encoder

DEADLINE_S = 90


class Counting(Encoder):
    """Counts the rows that this process encodes."""

    num_rows = 0

    def try_encode(self, example: Example) -> Encoded | BadRow:
        Counting.num_rows += 1
        return super().try_encode(example)


def told(recipe: TrainRecipe, workers: Workers, start: int) -> tuple[list[Any], int]:
    """All that the batches from step `start` on hold, and how many rows were encoded for them."""
    tokenizer = byte_tokenizer()
    encoder = Counting(tokenizer, max_length=64, stop_ids=stop_ids(tokenizer, None))
    batches = dataset.StreamBatches(recipe, encoder, workers=workers)
    found = [
        (number, e.id, e.input_ids.tolist(), e.labels.tolist(), e.is_truncated, e.has_end)
        for step in range(start, batches.num_steps)
        for number, e in batches.batch(step)
    ]
    return found, Counting.num_rows


def worker(
    rank: int, size: int, meeting: str, recipe: TrainRecipe, start: int, answers: Any
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=meeting, rank=rank, world_size=size, timeout=timedelta(seconds=60)
    )
    try:
        answers.put((rank, *told(recipe, Workers(rank=rank, size=size), start)))
    except DataError as error:
        answers.put((rank, str(error), 0))
    finally:
        dist.destroy_process_group()


def together(recipes: list[TrainRecipe], directory: Path, start: int = 0) -> list[tuple[Any, int]]:
    """What each of several processes is told, by rank."""
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    meeting = f"file://{directory}/meeting"
    processes = [
        context.Process(target=worker, args=(rank, len(recipes), meeting, recipe, start, answers))
        for rank, recipe in enumerate(recipes)
    ]
    for process in processes:
        process.start()
    try:
        found = [answers.get(timeout=DEADLINE_S) for _ in processes]
    except queue.Empty:
        pytest.fail(f"no answer; exit codes {[process.exitcode for process in processes]}")
    finally:
        for process in processes:
            process.join(10)
            process.kill()
    return [(rest[0], rest[1]) for _, *rest in sorted(found, key=lambda answer: answer[0])]


def stream_recipe(directory: Path, change: Callable[[int], object] = lambda _: None) -> TrainRecipe:
    """1,300 rows, which are two blocks; every 90th is too long to learn from, some are broken."""
    directory.mkdir(exist_ok=True)
    with (directory / "train.jsonl").open("w") as file:
        for i in range(1300):
            prompt = "x" * 100 if i % 90 == 5 else f"question {i}"
            row = change(i) or {"prompt": prompt, "completion": "y" * (1 + i % 40)}
            file.write(json.dumps(row) + "\n" if i % 100 else "{broken\n")
    return make_recipe(
        directory,
        directory,
        data={"streaming": True, "on_bad_row": "skip"},
        optim={"max_steps": 100, "global_batch_size": 16},
    )


@pytest.mark.parametrize(("size", "start"), [(2, 0), (3, 70)])
def test_several_workers_get_the_batches_of_one_and_encode_their_part(
    tmp_path: Path, size: int, start: int
) -> None:
    recipe = stream_recipe(tmp_path)
    Counting.num_rows = 0
    alone, num_rows = told(recipe, Workers(), start)
    assert len(alone) == (100 - start) * 16
    assert len({number for number, *_ in alone}) == len(alone)
    for found, num_there in together([recipe] * size, tmp_path, start):
        assert found == alone
        # Beside its part, each looks at the rows that cannot be used, for the reason.
        assert num_there < num_rows / size + 40


def test_workers_that_read_other_rows_are_told(tmp_path: Path) -> None:
    same = stream_recipe(tmp_path / "a")
    other = stream_recipe(
        tmp_path / "b",
        lambda i: {"prompt": "another", "completion": "row"} if i == 1201 else None,
    )
    for found, _ in together([same, other], tmp_path):
        assert "put the data where all nodes read the same files" in found
