"""A dispatcher of plain processes: `python dispatcher_process.py DIRECTORY ADAPTER HOLDER URL`."""

import sys
import threading
from pathlib import Path

from process_runs import ProcessRuns

from cluster.registry import database
from serving.dispatcher import Dispatcher
from serving.shelf import FileLimits, Shelf
from serving.tuning_config import TuningConfig
from training.config import ModelConfig

JOBS_AT_ONCE = 3


def main(directory: Path, adapter: Path, holder: str, url: str) -> None:
    import time

    opened = database.open_(url)
    tuning = TuningConfig(storage=str(directory / "runs"), jobs_at_once=JOBS_AT_ONCE, attempts=100)
    dispatcher = Dispatcher(
        database=opened,
        shelf=Shelf(opened, directory / "runs", FileLimits(), time.time),
        runner=ProcessRuns(directory / "processes", adapter, step_s=0.05),
        tuning=tuning,
        model=ModelConfig(base="tiny"),
        holder=holder,
        lease_s=1.0,
    )
    dispatcher.run(threading.Event())


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4])
