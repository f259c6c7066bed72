"""Looks into files for fine-tuning, one at a time, in a process of its own.

What a file holds is a stranger's: the process has little memory and time, the lowest priority, and
takes nothing with it when it dies. Files that nobody has looked into are found in the registry, so
that those of a server that died are looked into by the next one.
"""

import json
import logging
import os
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from cluster.registry.tables import File
from serving import incoming
from serving.finding import Finding
from serving.shelf import Shelf

_LOOK_S = 5.0
"""Between two looks for files that others have left."""
_CLEAN_S = 60.0
_MAX_ANSWER_BYTES = 64 << 10
_MAX_TRIES = 2
_ROOT = Path(__file__).resolve().parents[1]
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckLimits:
    """What looking into one file may take."""

    time_s: float = 900.0
    memory_bytes: int = 2 << 30
    """Address space of the process."""


class Checking:
    """A thread that looks into a shelf's files: `with Checking(shelf) as checking:`."""

    def __init__(
        self, shelf: Shelf, *, limits: CheckLimits | None = None, look_s: float = _LOOK_S
    ) -> None:
        self._shelf = shelf
        self._limits = limits or CheckLimits()
        self._look_s = look_s
        self._wake = threading.Event()
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._is_closed = False
        self._tries: dict[str, int] = {}
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "Checking":
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="checking", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._is_closed = True
            if self._process is not None:
                self._process.kill()
        self._wake.set()
        if self._thread is not None:
            self._thread.join(30)

    def wake(self) -> None:
        """A file has come."""
        self._wake.set()

    def _run(self) -> None:
        looks_to_clean = 0
        while not self._is_closed:
            try:
                if looks_to_clean == 0:
                    self._shelf.expire()
                    self._shelf.clean()
                for file in self._shelf.unchecked():
                    if not self._is_closed:
                        self._look_into(file)
            except Exception as error:  # the registry or the disk, mostly; there is a next time
                _log.warning("event=files_not_checked error=%s", type(error).__name__)
            looks_to_clean = (looks_to_clean + 1) % max(1, round(_CLEAN_S / self._look_s))
            self._wake.wait(self._look_s)
            self._wake.clear()

    def _look_into(self, file: File) -> None:
        path = self._shelf.path(file)
        with incoming.locked(path) as is_ours:
            if not is_ours:  # another replica looks into it, or it has just been deleted
                return
            try:
                found = self._ask(path)
            except _Failed as error:
                self._tries[file.id] = self._tries.get(file.id, 0) + 1
                if self._is_closed or self._tries[file.id] < _MAX_TRIES:
                    return
                _log.warning("event=file_not_checked file=%s reason=%r", file.id, str(error))
                found = Finding(examples=0, details=f"The file could not be checked: {error}.")
            self._tries.pop(file.id, None)
            self._shelf.judge(file.id, found)

    def _ask(self, path: Path) -> Finding:
        """Raises _Failed where the process gives no answer."""
        one_thread = dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"), "1")
        inherited = os.environ.get("PYTHONPATH")
        paths = os.pathsep.join([str(_ROOT), *([inherited] if inherited else [])])
        module, memory = Finding.__module__, str(self._limits.memory_bytes)
        with self._lock:
            if self._is_closed:
                raise _Failed("the server stops")
            process = self._process = subprocess.Popen(  # noqa: S603  (our own interpreter)
                [sys.executable, "-m", module, str(path), memory],
                stdin=subprocess.PIPE,  # the process ends when this one does
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={**os.environ, **one_thread, "PYTHONPATH": paths},
            )
        try:
            return _answer(process, self._limits.time_s)
        finally:
            with self._lock:
                self._process = None
            process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    stream.close()


class _Failed(Exception):
    """Why there is no answer."""


def _answer(process: subprocess.Popen[bytes], time_s: float) -> Finding:
    assert process.stdout is not None
    started = time.monotonic()
    timer = threading.Timer(time_s, process.kill)
    timer.start()
    try:
        answer = process.stdout.read(_MAX_ANSWER_BYTES)
        status = process.wait()
    finally:
        timer.cancel()
    try:
        return Finding(**json.loads(answer))
    except (ValueError, TypeError):
        if time.monotonic() - started >= time_s:
            raise _Failed(f"it took more than {time_s:g} s") from None
        raise _Failed(f"the check ended with status {status}") from None
