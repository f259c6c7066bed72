"""What tests that break things share: how often they try, small disks, what must not be left.

`LORAY_CHAOS=full` has every fault tried as often as RELIABILITY.md says (about an hour); without it
each is tried a few times.
"""

import os
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

IS_FULL = os.environ.get("LORAY_CHAOS") == "full"
full = pytest.mark.skipif(not IS_FULL, reason="takes minutes; LORAY_CHAOS=full runs it")
"""Marks a test that runs with LORAY_CHAOS=full only."""
_MARK = "LORAY_CHAOS_MARK"
_END_S = 30.0


def times(few: int, many: int) -> int:
    """How often to try: `few` times, `many` with LORAY_CHAOS=full."""
    return many if IS_FULL else few


@contextmanager
def nothing_left() -> Iterator[Path]:
    """What is started inside the block leaves no process and no temporary file behind.

    Yields the temporary directory of the block. What belongs to it is told by its environment, so
    that others may use Ray on the same machine.
    """
    with tempfile.TemporaryDirectory(prefix="lr-", dir="/tmp") as scratch:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(_MARK, scratch)
            patch.setenv("TMPDIR", scratch)
            yield Path(scratch)
        deadline = time.monotonic() + _END_S
        while left := _processes_of(scratch):
            assert time.monotonic() < deadline, f"processes are left: {left}"
            time.sleep(0.2)
        files = sorted(path.name for path in Path(scratch).iterdir())
        assert not files, f"temporary files are left: {files}"


def _processes_of(mark: str) -> list[str]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and process.environ().get(_MARK) == mark:
                found.append(f"{process.pid} {process.name()} {process.status()}")
        except psutil.Error:
            continue
    return [line for line in found if not line.endswith(psutil.STATUS_ZOMBIE)]


@contextmanager
def small_disk(mount: Path, num_bytes: int) -> Iterator[Path]:
    """A file system of so many bytes, which is gone after the block; skips where root is needed."""
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={num_bytes}", "tmpfs", str(mount)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except OSError as error:
        pytest.skip(f"mount cannot run: {error}")
    if done.returncode:
        pytest.skip(f"a tmpfs cannot be mounted here: {done.stderr.strip()}")
    try:
        yield mount
    finally:
        subprocess.run(["umount", "-l", str(mount)], check=True, timeout=20)


def fill(disk: Path, *, leave: int = 0) -> Path:
    """Write a file that leaves `leave` bytes, in whole blocks, on a small disk."""
    path = disk / "filler"
    size = os.statvfs(disk)
    room = size.f_bavail * size.f_frsize - leave
    with suppress(OSError), path.open("wb", buffering=0) as file:  # others may write, too
        while room > 0:
            room -= file.write(bytes(min(room, size.f_frsize)))
    return path
