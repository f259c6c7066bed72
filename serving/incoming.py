"""One file on its way into storage: under a temporary name, locked by its writer, gone unless kept.

The lock tells a writer that lives from one that died: whoever can lock a file without a row may
remove it. It goes with the process, so nothing has to be remembered.
"""

import errno
import fcntl
import hashlib
import logging
import os
import secrets
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from serving import problems
from serving.problems import ApiError

TEMPORARY = ".tmp-"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_log = logging.getLogger(__name__)


class Lines:
    """Counts the lines of a file that passes in pieces, and finds the first that is too long."""

    def __init__(self, max_bytes: int) -> None:
        """max_bytes: of a line, its end not counted."""
        self._max_bytes = max_bytes
        self._number = 1
        self._length = 0
        """Of the line that is not at its end."""
        self.too_long: int | None = None
        """Number of the first line that is longer, from 1."""

    def look(self, data: bytes) -> None:
        """The next piece."""
        if self.too_long is not None:
            return
        start = 0
        while (end := data.find(b"\n", start)) >= 0:
            self._extend(end - start)
            if self.too_long is not None:
                return
            if len(data) - end <= self._max_bytes:  # none of the lines inside can be too long
                last = data.rfind(b"\n")
                self._number += data.count(b"\n", end)
                self._length, start = 0, last + 1
                break
            self._number, self._length, start = self._number + 1, 0, end + 1
        self._extend(len(data) - start)

    def _extend(self, num_bytes: int) -> None:
        self._length += num_bytes
        if self._length > self._max_bytes:
            self.too_long = self._number


class Incoming:
    """The writer. Threads may call it, one at a time; `close` may come at any time."""

    def __init__(self, folder: Path, *, max_bytes: int, max_line_bytes: int) -> None:
        """Raises ApiError (500, 507) where the folder cannot be written."""
        self._folder = folder
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._digest = hashlib.sha256()
        self.lines = Lines(max_line_bytes)
        self.num_bytes = 0
        self.is_kept = False
        """Whether the file stays when the writer closes."""
        with writing(folder):
            self._path, self._descriptor = _create(folder)

    @property
    def sha256(self) -> str:
        """Of what was written, in hex."""
        return self._digest.hexdigest()

    def write(self, data: bytes) -> None:
        """Append. Raises ApiError: 413 beyond the limit, 507 where the disk is full."""
        with self._lock:
            if self._descriptor < 0:  # its request has ended
                return
            self.num_bytes += len(data)
            if self.num_bytes > self._max_bytes:
                raise too_large(self._max_bytes)
            self._digest.update(data)
            self.lines.look(data)
            rest = memoryview(data)
            with writing(self._path):
                while rest:
                    rest = rest[os.write(self._descriptor, rest) :]

    def rename(self, name: str) -> None:
        """Give the file, which is whole, its name. Raises ApiError (500, 507)."""
        path = self._folder / name
        with self._lock, writing(path):
            os.fsync(self._descriptor)
            os.rename(self._path, path)
            self._path = path
            fsync(self._folder)

    def close(self) -> None:
        """Remove the file unless it is kept, and let the lock go."""
        with self._lock:
            if self._descriptor < 0:
                return
            if not self.is_kept:
                with suppress(OSError):
                    self._path.unlink(missing_ok=True)
            os.close(self._descriptor)
            self._descriptor = -1


def too_large(max_bytes: int) -> ApiError:
    """413: the file is beyond the limit."""
    message = f"file: larger than {max_bytes} bytes, the largest file that is taken here"
    return ApiError(message, status=413, code="file_too_large", param="file")


def full() -> ApiError:
    """507: no room. Clients learn nothing of where."""
    return ApiError(
        "The server's storage is full; nothing of the file was kept. Ask its operator for room.",
        status=507,
        code="insufficient_resources",
    )


def line_too_long(number: int, max_bytes: int) -> ApiError:
    """400: no line of training data is that long."""
    return problems.invalid("file", f"line {number} is longer than {max_bytes} bytes; split it")


@contextmanager
def locked(path: Path) -> Iterator[bool]:
    """Whether the lock of a file, if it is there, is ours inside the block."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        yield False
        return
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
        else:
            yield True
    finally:
        os.close(descriptor)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an I/O error of the block into an answer; the log says what and where."""
    try:
        yield
    except OSError as error:
        _log.warning("event=file_not_written path=%s error=%r", path, error.strerror)
        if error.errno in _FULL:
            raise full() from None
        raise ApiError("The server cannot write to its storage.", status=500) from None


def fsync(folder: Path) -> None:
    """Make the names in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _create(folder: Path) -> tuple[Path, int]:
    """A new temporary file, open and locked."""
    for _ in range(8):
        path = folder / f"{TEMPORARY}{secrets.token_hex(12)}"
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.stat().st_ino == os.fstat(descriptor).st_ino:
                return path, descriptor
        except OSError:  # a cleaner was faster than the lock
            pass
        os.close(descriptor)
    raise OSError(errno.EAGAIN, "temporary files vanish as they are made")
