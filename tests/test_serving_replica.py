"""A replica's engine, and the threads beside it."""

import threading
from typing import Any

import torch

from serving import replica
from serving.adapters import leave_the_cores


def test_an_engine_keeps_its_threads_when_others_leave_the_cores() -> None:
    went, found = threading.Event(), []

    class Idle:
        def run(self) -> None:
            went.wait()
            torch.ones(300, 300) @ torch.ones(300, 300)
            found.append(torch.get_num_threads())

    engine: Any = Idle()
    before = torch.get_num_threads()
    try:
        thread = replica.start(engine, threads=3)
        leave_the_cores()
        went.set()
        thread.join()
    finally:
        torch.set_num_threads(before)
    assert found == [3]
