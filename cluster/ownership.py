"""Who may write into a run's directory: one process at a time, and only the newest attempt.

The driver holds a lock; the first worker of each attempt counts the attempt up, which fences every
earlier one off, should it still be alive somewhere.
"""

import json
import os
import socket
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

from filelock import FileLock
from filelock import Timeout as LockTimeout

from cluster import storage
from cluster.errors import RunInUseError, StorageError

_LOCK_TIMEOUT_S = 30.0


class RunLock:
    """The right to work in a run directory, held by one process at a time: `with RunLock(run):`.

    It is a lock of the operating system (flock on `<run>/.lock`), which ends with its process,
    however that ends. `<run>/.lock-owner` only tells people who holds it. Entering raises
    RunInUseError, at once, where another owner is alive, and StorageError where the file system
    has no flock (mount NFS as version 4, Lustre with `-o flock`).
    """

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._owner = run_dir / ".lock-owner"
        # Without flock, filelock would use a marker file, which survives a killed owner.
        self._lock = FileLock(run_dir / ".lock", blocking=False, fallback_to_soft=False)

    def __enter__(self) -> Self:
        storage.make_directory(self._run_dir)
        try:
            self._lock.acquire()
        except LockTimeout:
            raise RunInUseError(
                f"{self._run_dir} is in use by {self._describe_owner()}; wait until it ends or "
                "stop it, or choose another name for this run"
            ) from None
        except OSError as error:
            raise StorageError(
                f"{self._run_dir / '.lock'} cannot be locked ({error}); use a file system with "
                "flock (local, NFS 4, Lustre with -o flock) that you may write to"
            ) from None
        started = datetime.now(UTC).isoformat(timespec="seconds")
        owner = {"pid": os.getpid(), "host": socket.gethostname(), "started": started}
        try:
            storage.write_file(self._owner, json.dumps(owner).encode())
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._owner.unlink(missing_ok=True)
        self._lock.release()

    def _describe_owner(self) -> str:
        try:
            owner = json.loads(self._owner.read_bytes())
            return f"process {owner['pid']} on {owner['host']}, which started {owner['started']}"
        except (OSError, ValueError, KeyError, TypeError):
            return "another process"


def next_attempt(run_dir: Path) -> int:
    """Start a new attempt of a run: increment `<run>/attempt` and return it, 1 for the first.

    From then on every earlier attempt is fenced off. Raises StorageError where the file cannot be
    read or written, or another process holds its lock for 30 s.
    """
    storage.make_directory(run_dir)
    lock = FileLock(run_dir / ".attempt.lock", timeout=_LOCK_TIMEOUT_S)
    try:
        with lock:
            attempt = (_stored_attempt(run_dir) or 0) + 1
            storage.write_file(run_dir / "attempt", f"{attempt}\n".encode())
            return attempt
    except LockTimeout:
        raise StorageError(
            f"{run_dir / '.attempt.lock'} is held by another process for {_LOCK_TIMEOUT_S:.0f} s; "
            "look for a hung process or a hung mount, then try again"
        ) from None


def is_current_attempt(run_dir: Path, attempt: int) -> bool:
    """Whether no newer attempt of the run was started; False too where the run is gone."""
    return _stored_attempt(run_dir) == attempt


def _stored_attempt(run_dir: Path) -> int | None:
    path = run_dir / "attempt"
    try:
        return int(path.read_text(encoding="ascii"))
    except FileNotFoundError:
        return None
    except ValueError:
        raise StorageError(
            f"{path} does not hold a number; write into it one that is above every attempt number "
            f"in {run_dir}"
        ) from None
    except OSError as error:
        raise StorageError(f"{path} cannot be read ({error})") from None
