"""events.jsonl: what happened in a run, one JSON object a line; its only channel to watchers.

Append-only. A writer that dies leaves at most one torn line, which the next writer closes and
readers pass over. Prompts, completions and keys are never written.
Kinds: started, step, eval, checkpoint, warning, finished, failed.
"""

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from cluster import storage
from cluster.errors import FencedError, LorayError, StorageError


@dataclass(frozen=True, kw_only=True, slots=True)
class Event:
    """One line: its kind, its time in seconds since the epoch, and its own fields."""

    kind: str
    time_s: float
    fields: dict[str, object] = field(default_factory=dict)

    def number(self, name: str) -> float:
        """A numeric field; NaN where it is missing or not a number."""
        value = self.fields.get(name)
        return float(value) if isinstance(value, int | float) else float("nan")

    def text(self, name: str) -> str:
        """A field as text; empty where it is missing."""
        return str(self.fields.get(name, ""))


class EventLog:
    """The writer. Every line is flushed to the operating system; `sync` forces it to disk."""

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        is_torn = path.exists() and path.stat().st_size > 0 and _last_byte(path) != b"\n"
        self._file = path.open("a", encoding="utf-8")
        if is_torn:
            self._file.write("\n")

    def write(self, kind: str, *, sync: bool = False, **fields: object) -> None:
        """Append one event; numbers that are not finite become null, which JSON has.

        Raises StorageError where it cannot be written, as on a full disk.
        """
        line = {"event": kind, "time": round(self._clock(), 3), **fields}
        with storage.explained(self._path):
            self._file.write(json.dumps(_finite(line), separators=(",", ":")) + "\n")
            self._file.flush()
            if sync:
                os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file; nothing may be written afterwards."""
        with suppress(OSError):  # what a full disk had no room for is tried again, and lost
            self._file.close()


class EventReader:
    """Reads complete lines as they appear; keeps its place between calls."""

    def __init__(self, path: Path, *, offset: int = 0) -> None:
        self._path = path
        self._offset = offset

    def read(self) -> Iterator[Event]:
        """The events that were completed since the last call. A missing file has none."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                block = file.read()
        except FileNotFoundError:
            return
        end = block.rfind(b"\n") + 1
        self._offset += end
        yield from parse(block[:end])


def parse(block: bytes) -> Iterator[Event]:
    """The events of whole lines; torn ones are passed over."""
    for line in block.splitlines():
        try:
            fields = json.loads(line)
            event = Event(kind=fields.pop("event"), time_s=fields.pop("time"), fields=fields)
        except (ValueError, KeyError, AttributeError, TypeError):
            continue
        yield event


@contextmanager
def telling_of_failure(path: Path) -> Iterator[None]:
    """Write the event of an error that nobody else has told of since the block began."""
    before = path.stat().st_size if path.exists() else 0
    try:
        yield
    except FencedError:
        raise
    except LorayError as error:
        if all(event.kind != "failed" for event in EventReader(path, offset=before).read()):
            with suppress(StorageError), closing(EventLog(path)) as events:
                events.write("failed", sync=True, code=error.code, message=str(error))
        raise


def _last_byte(path: Path) -> bytes:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1)


def _finite(value: object) -> object:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    return value
