"""Processes that are workers of one process group, kept for many small runs, without Ray."""

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from training.strategy import Workers

DEADLINE_S = 240
_GROUP_TIMEOUT = timedelta(seconds=60)


class Gang:
    """Asks all workers to call the same function; see `gang`."""

    def __init__(self, pipes: list[Connection], processes: list[SpawnProcess]) -> None:
        self.size = len(pipes)
        self._pipes = pipes
        self._processes = processes
        self._num_calls = 0

    def call(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """`function(workers, *arguments)` of each worker, by rank; raises what a worker raised."""
        self._num_calls += 1
        for pipe in self._pipes:
            pipe.send((self._num_calls, function, arguments))
        answers: dict[int, Any] = {}
        sentinels = [process.sentinel for process in self._processes]
        while len(answers) < self.size:
            waited = [pipe for rank, pipe in enumerate(self._pipes) if rank not in answers]
            ready = wait([*waited, *sentinels], DEADLINE_S)
            assert not set(ready) <= set(sentinels), "workers do not answer, or one has died"
            for pipe in set(ready) & set(waited):
                number, answer = pipe.recv()
                if number < self._num_calls:  # of a call that another worker has ended
                    continue
                answers[self._pipes.index(pipe)] = answer
                if isinstance(answer, BaseException):  # the others may wait for it for ever
                    raise answer
        return [answers[rank] for rank in range(self.size)]


@contextmanager
def gang(size: int) -> Iterator[Gang]:
    """So many processes of one thread each, in a gloo group; killed at the end."""
    context = multiprocessing.get_context("spawn")
    pairs = [context.Pipe() for _ in range(size)]
    with tempfile.TemporaryDirectory() as directory:
        store = str(Path(directory) / "store")
        processes = [
            context.Process(target=_work, args=(pair[1], rank, size, store), daemon=True)
            for rank, pair in enumerate(pairs)
        ]
        for process in processes:
            process.start()
        try:
            yield Gang([pair[0] for pair in pairs], processes)
        finally:
            for process in processes:
                process.kill()
                process.join()


def _work(pipe: Connection, rank: int, size: int, store: str) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", store=dist.FileStore(store, size), rank=rank, world_size=size,
        timeout=_GROUP_TIMEOUT,
    )  # fmt: skip
    workers = Workers(rank=rank, size=size)
    while True:
        number, function, arguments = pipe.recv()
        try:
            answer: Any = function(workers, *arguments)
        except BaseException as error:
            error.add_note(traceback.format_exc())
            answer = error
        pipe.send((number, answer))
