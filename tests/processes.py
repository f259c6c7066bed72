"""The doors, run as processes of their own, with a deadline."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DEADLINE_S = 180


def start(
    words: Sequence[str], cwd: Path, extra: Mapping[str, str] | None = None
) -> "subprocess.Popen[str]":
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    environment.pop("RAY_ADDRESS", None)
    environment |= extra or {}
    return subprocess.Popen(
        [sys.executable, "-m", *words],
        cwd=cwd,
        env=environment,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def finish(process: "subprocess.Popen[str]", answers: str = "") -> tuple[int, str, str]:
    try:
        out, err = process.communicate(answers, timeout=DEADLINE_S)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, out, err


def call(
    words: Sequence[str], cwd: Path, extra: Mapping[str, str] | None = None
) -> tuple[int, str, str]:
    return finish(start(words, cwd, extra))


def wait_until(
    condition: Callable[[], bool], process: "subprocess.Popen[str] | None" = None
) -> None:
    """Wait, while the process lives where one is given."""
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert process is None or process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, "nothing happened in time"
        time.sleep(0.05)
