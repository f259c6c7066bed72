"""Tokenising in one process or several: the same blocks, and no process left behind."""

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
import pytest
from tiny import byte_tokenizer

from cluster import offspring
from training import encoding
from training.examples import BadRow, Example, Message
from training.special_ids import stop_ids
from training.tokens import Encoder


def rows(num_rows: int) -> Iterator[Example | BadRow]:
    for i in range(num_rows):
        turns = (
            Message(role="user", content=f"question {i}"),
            Message(role="assistant", content="x" * (i % 90)),
        )
        example = Example(id=f"a:{i}", messages=turns)
        yield BadRow(where=f"a:{i}", reason="broken") if i % 50 == 7 else example


class Deadly(Encoder):
    """Kills every other process that it is sent to."""

    def __reduce__(self) -> tuple[object, ...]:
        return os._exit, (3,)


class Stay(Encoder):
    """Cannot be sent."""

    def __reduce__(self) -> tuple[object, ...]:
        raise TypeError("it stays here")


def encoder(kind: type[Encoder] = Encoder) -> Encoder:
    tokenizer = byte_tokenizer()
    return kind(tokenizer, max_length=110, stop_ids=stop_ids(tokenizer, None))


def told(
    num_rows: int, num_processes: int, kind: type[Encoder] = Encoder
) -> tuple[list[int], list[bytes], list[BadRow]]:
    """Ids, names and bad rows of all blocks."""
    ids: list[int] = []
    names: list[bytes] = []
    bad: list[BadRow] = []
    for block in encoding.blocks(
        rows(num_rows), encoder(kind), num_processes=num_processes, alone_rows=512
    ):
        assert len(block.names) + len(block.bad) <= encoding.BLOCK_ROWS
        assert block.lengths.sum() == len(block.ids) == len(block.labels)
        assert np.count_nonzero(block.labels >= 0) == block.supervised.sum()
        ids += block.ids.tolist()
        names += block.names
        bad += block.bad
    return ids, names, bad


@pytest.mark.parametrize("num_rows", [0, 1, 256, 512, 700, 2500])
def test_two_processes_give_the_blocks_of_one(num_rows: int) -> None:
    alone = told(num_rows, 1)
    assert len(alone[1]) + len(alone[2]) == num_rows
    assert told(num_rows, 2) == alone
    titles = []
    for child in offspring.living():
        with suppress(psutil.NoSuchProcess):  # a Ray of another test may come and go
            titles.append(" ".join(child.cmdline()))
    assert not [title for title in titles if "spawn_main" in title]


@pytest.mark.parametrize("kind", [Deadly, Stay])
def test_processes_that_cannot_help_cost_only_their_speed(
    kind: type[Encoder], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert told(2500, 2, kind) == told(2500, 1)
    assert "tokenising_processes=" in caplog.text


def test_no_more_rows_are_read_than_there_is_work_under_way() -> None:
    taken = 0

    def counted() -> Iterator[Example | BadRow]:
        nonlocal taken
        for row in rows(100_000):
            taken += 1
            yield row

    found = encoding.blocks(counted(), encoder(), num_processes=2, alone_rows=256)
    for _ in range(3):
        next(found)
    assert taken <= (3 + 2 * 2 + 1) * encoding.BLOCK_ROWS
    found.close()


LONG = """
import test_training_encoding as room
from cluster import offspring
from training import encoding
if __name__ == "__main__":
    for block in encoding.blocks(room.rows(10**9), room.encoder(), num_processes=2, alone_rows=256):
        print(len(block.ids), flush=True)
"""


@pytest.mark.chaos
def test_processes_end_with_the_one_that_started_them(tmp_path: Path) -> None:
    script = tmp_path / "long.py"
    script.write_text(LONG)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env=environment
    )
    guard = threading.Timer(60, process.kill)
    guard.start()
    try:
        assert process.stdout is not None
        for _ in range(12):
            process.stdout.readline()
        children = psutil.Process(process.pid).children(recursive=True)
        assert len(children) >= 2
        process.send_signal(signal.SIGKILL)
        process.wait(10)
        deadline = time.monotonic() + 20
        while any(child.is_running() and child.status() != "zombie" for child in children):
            assert time.monotonic() < deadline, children
            time.sleep(0.05)
    finally:
        guard.cancel()
        process.kill()
        process.wait()
        process.stdout.close()
