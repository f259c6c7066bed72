"""Processes below this one: none outlives it, and what is orphaned falls to it (Linux).

What is not covered: other systems than Linux have no orphans' guardian, so there only processes
whose parents live are found.
"""

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import IO

import psutil

_PR_SET_CHILD_SUBREAPER = 36
_POLL_S = 0.05
_KILL_S = 10.0
_DIE_WITH_PARENT = """
import ctypes, os, signal, sys
parent = int(sys.argv[1])
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGTERM, 0, 0, 0)  # PR_SET_PDEATHSIG
if os.getppid() != parent:
    sys.exit(1)
os.execv(sys.argv[2], sys.argv[2:])
"""


def adopt_orphans() -> None:
    """From now on, a process below this one that loses its parent becomes a child of this one."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def ended_with_parent(words: Sequence[str]) -> list[str]:
    """The command whose process gets SIGTERM when this one ends; its program by its whole path."""
    return [sys.executable, "-S", "-E", "-c", _DIE_WITH_PARENT, str(os.getpid()), *words]


def start(
    words: Sequence[str], env: Mapping[str, str], output: IO[bytes]
) -> "subprocess.Popen[bytes]":
    """Start a child that gets SIGTERM when this process ends, however it ends.

    It has a process group of its own, so that Ctrl-C reaches this process alone.
    """
    return subprocess.Popen(  # noqa: S603  (words of our own)
        ended_with_parent(words),
        env=dict(env),
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        process_group=0,
    )


def living() -> list[psutil.Process]:
    """Every process below this one that still runs."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def bury(*, spare: int) -> None:
    """Take note of adopted children that have ended; `spare` is the pid of one to leave alone."""
    with suppress(ChildProcessError):
        while ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            if ended.si_pid == spare:
                return  # what hides behind it comes next time
            os.waitpid(ended.si_pid, os.WNOHANG)


def find(name: str) -> psutil.Process | None:
    """The process below this one that has this name."""
    for process in living():
        with suppress(psutil.Error):
            if process.name() == name:
                return process
    return None


def end(child: "subprocess.Popen[bytes]", *, grace_s: float, hurry: threading.Event) -> list[int]:
    """Ask `child` to end, wait `grace_s`, kill all that is below this process; pids that are left.

    hurry: ends the waiting, once set. Waits at most 10 s for what was killed: a process in an
    uninterruptible wait stays.
    """
    deadline = time.monotonic() + grace_s
    if grace_s > 0:
        child.terminate()
    while child.poll() is None and time.monotonic() < deadline and not hurry.wait(_POLL_S):
        bury(spare=child.pid)
    deadline = time.monotonic() + _KILL_S
    while left := living():
        if time.monotonic() > deadline:
            break
        for process in left:
            with suppress(psutil.Error):
                process.send_signal(signal.SIGKILL)
        child.poll()
        bury(spare=child.pid)
        time.sleep(_POLL_S)
    child.poll()
    bury(spare=child.pid)
    return [process.pid for process in left]
