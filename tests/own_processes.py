"""`python -m own_processes MODULE ARGS`: run a module as on a machine with processes of its own.

The machines of a test network share one process list, in which Ray (2.60) looks for the raylet
that a driver connects to. Here that list shows the processes of this network namespace alone.
"""

import os
import runpy
import sys
from contextlib import suppress

import psutil

_all_pids = psutil.pids


def _own_pids() -> list[int]:
    here = os.stat("/proc/self/ns/net").st_ino
    found = []
    for pid in _all_pids():
        with suppress(OSError):
            if os.stat(f"/proc/{pid}/ns/net").st_ino == here:
                found.append(pid)
    return found


if __name__ == "__main__":
    psutil.pids = _own_pids  # which process_iter asks, too
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
