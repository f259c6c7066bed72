"""The events of a run whose storage is an object store, which cannot append.

The first worker of an attempt copies its events.jsonl into `events/<attempt>-<number>.jsonl`: it
writes the newest segment again while that grows, and begins the next when it is large. Nobody but
that attempt writes under its number, so that what is written again is what was written, and more.
Read in the order of their names, the segments are the run's events.jsonl.

What is lost when a worker is killed: the events of its last second or two. Those up to its last
checkpoint are there, and the steps after that are run again.
"""

from collections.abc import Iterator
from pathlib import Path

from cluster.remote import Remote
from training.events import Event, parse

_FOLDER = "events"
_SEGMENT_BYTES = 256 << 10


class SegmentWriter:
    """Copies what is appended to a local events.jsonl from now on; whole lines only."""

    def __init__(self, remote: Remote, path: Path, *, attempt: int) -> None:
        self._remote = remote
        self._path = path
        self._attempt = attempt
        self._number = 1
        self._start = path.stat().st_size if path.exists() else 0
        """Of the current segment in the file."""
        self._sent_bytes = 0

    def flush(self) -> None:
        """Upload what is new. Raises StorageError; the next call makes up for it."""
        with self._path.open("rb") as file:
            file.seek(self._start)
            block = file.read()
        block = block[: block.rfind(b"\n") + 1]
        if len(block) == self._sent_bytes:
            return
        name = f"{_FOLDER}/{self._attempt:06d}-{self._number:06d}.jsonl"
        self._remote.write(name, block)
        self._sent_bytes = len(block)
        if self._sent_bytes >= _SEGMENT_BYTES:
            self._start += self._sent_bytes
            self._number += 1
            self._sent_bytes = 0


class SegmentReader:
    """Reads the events of a run in order, each once; keeps its place between calls.

    When an attempt has written, those before it are not heard any more.
    """

    def __init__(self, remote: Remote) -> None:
        self._remote = remote
        self._name = ""
        self._offset = 0

    def read(self) -> Iterator[Event]:
        """The events that were uploaded since the last call. Raises StorageError."""
        yield from parse(self.read_bytes())

    def read_bytes(self) -> bytes:
        """The same as whole lines."""
        sizes = self._remote.sizes(_FOLDER)
        newest = max(sizes, default="")
        lines = b""
        for name in sorted(sizes):
            is_current = name == self._name
            # One with a successor is read to its end: it may have grown after it was listed.
            has_more = name > self._name or (
                is_current and (sizes[name] > self._offset or name != newest)
            )
            if not has_more:
                continue
            block = self._remote.read(f"{_FOLDER}/{name}") or b""
            lines += block[self._offset if is_current else 0 :]
            self._name, self._offset = name, len(block)
        return lines
