"""Dispatchers of plain processes: `python dispatcher_process.py DIRECTORY ADAPTER URL NUMBER`.

So many at once, each a child that is made anew when it has ended. What they import takes seconds,
which those that are killed all the time do not have.
"""

import os
import sys
import threading
import time
from pathlib import Path

from process_runs import ProcessRuns

from cluster.registry import database
from serving.dispatcher import Dispatcher
from serving.shelf import FileLimits, Shelf
from serving.tuning_config import TuningConfig
from training.config import ModelConfig

JOBS_AT_ONCE = 3
_PAUSE_S = 0.2


def main(directory: Path, adapter: Path, url: str, number: int) -> None:
    living = set[int]()
    while True:
        while len(living) < number:
            pid = os.fork()
            if not pid:
                dispatch(directory, adapter, url)
            living.add(pid)
        living.discard(os.wait()[0])
        time.sleep(_PAUSE_S)  # without its database one ends at once


def dispatch(directory: Path, adapter: Path, url: str) -> None:
    """Until it is killed; its name is its process id."""
    opened = database.open_(url)
    tuning = TuningConfig(storage=str(directory / "runs"), jobs_at_once=JOBS_AT_ONCE, attempts=100)
    dispatcher = Dispatcher(
        database=opened,
        shelf=Shelf(opened, directory / "runs", FileLimits(), time.time),
        runner=ProcessRuns(directory / "processes", adapter, step_s=0.1),
        tuning=tuning,
        model=ModelConfig(base="tiny"),
        holder=str(os.getpid()),
        lease_s=1.0,
        rest_s=0.1,
    )
    dispatcher.run(threading.Event())


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
