"""What every door shares: run a typer app, turn errors into one message and an exit status."""

import logging
import shlex
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import typer

from cluster import jobs
from cluster.errors import LorayError

_JOBS_API = "http://127.0.0.1:8265"


def run(app: typer.Typer, argv: Sequence[str] | None = None) -> int:
    """Run a command line; 0 on success, 1 on a LorayError, 2 on bad usage."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s %(message)s")
    # Noise of libraries: bitsandbytes 0.50.2 warns at import of a 4-bit kernel that we do not use,
    # peft 0.21.2 asks transformers 5.23 by an old name.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
    try:
        app(list(argv) if argv is not None else None, standalone_mode=True)
    except LorayError as error:
        print(f"error [{error.code}]: {error}", file=sys.stderr)
        return 1
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    return 0


def submit(words: Sequence[str], *, address: str | None) -> int:
    """Run `python -m <words>` on a cluster as a Ray job and follow its log; the exit status.

    address: of the Jobs API, by default that of a cluster on this machine. Ctrl-C asks whether to
    stop the job, and leaves the log.
    """
    entrypoint = ["python", "-m", *words]
    where = address or _JOBS_API
    job_id = jobs.submit(entrypoint, address=where, working_dir=Path.cwd())
    say(f"job {job_id} on {where}: {shlex.join(entrypoint)}")
    try:
        return jobs.follow(job_id, address=where)
    except KeyboardInterrupt:
        if typer.confirm(f"stop job {job_id}? (no leaves it running)", default=True, err=True):
            jobs.stop(job_id, address=where)
        return 130


def say(line: str) -> None:
    """One line for people, on stderr."""
    print(line, file=sys.stderr, flush=True)
