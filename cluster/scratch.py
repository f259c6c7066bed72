"""Temporary directories that end with their process: with its own hands, or swept by the next one.

A process that is killed cannot clean up. It held a lock, though, which ended with it.
"""

import fcntl
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

_PREFIX = "loray-"
_OWNER = ".owner"


class Scratch:
    """A fresh directory `loray-*` of this process, mode 0700, until `remove`.

    Making one removes those of processes that are gone.
    """

    def __init__(self, root: Path | None = None) -> None:
        """root: where; by default the system's place for temporary files."""
        root = root or Path(tempfile.gettempdir())
        _sweep(root)
        self.path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=root))
        draft = self.path / f"{_OWNER}-draft"
        self._lock = os.open(draft, os.O_CREAT | os.O_RDWR, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        draft.rename(self.path / _OWNER)  # locked before a sweep can find it

    def remove(self) -> None:
        """Remove the directory with all that is in it."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)


def _sweep(root: Path) -> None:
    for owner in root.glob(f"{_PREFIX}*/{_OWNER}"):
        with suppress(OSError):  # it is somebody else's, or just being removed
            lock = os.open(owner, os.O_RDWR)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(owner.parent, ignore_errors=True)
            finally:
                os.close(lock)
