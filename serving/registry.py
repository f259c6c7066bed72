"""What is served, as a file that all replicas follow: the desired state survives every restart.

`<directory>/served.json` maps each name to where its adapter is and how it is served. It is
replaced as a whole, under a lock; replicas look whether it has changed.
"""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from filelock import FileLock

from cluster import storage
from cluster.errors import ConfigError
from serving.config import Mode, require_name

_FILE = "served.json"
_LOCK_S = 30.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One adapter that is to be served."""

    path: str
    mode: Mode
    created: int
    """Seconds since the epoch."""
    version: int
    """Grows whenever the name gets other files or another mode."""


class Registry:
    """The file of a directory."""

    def __init__(self, directory: Path, *, clock: Callable[[], float] = time.time) -> None:
        storage.make_directory(directory)
        self._path = directory / _FILE
        self._lock = FileLock(directory / f"{_FILE}.lock", timeout=_LOCK_S)
        self._clock = clock
        self._seen: tuple[int, int, int] | None = None
        self._entries: dict[str, Entry] = {}

    def entries(self) -> Mapping[str, Entry]:
        """What is to be served now. Raises ConfigError for a file that somebody has broken."""
        try:
            facts = self._path.stat()
        except FileNotFoundError:
            return {}
        seen = (facts.st_mtime_ns, facts.st_size, facts.st_ino)
        if seen != self._seen:
            try:
                rows = json.loads(self._path.read_text(encoding="utf-8"))
                self._entries = {name: Entry(**row) for name, row in rows.items()}
            except (ValueError, TypeError, AttributeError) as error:
                raise ConfigError(
                    f"{self._path}: damaged ({error}); restore or remove it"
                ) from None
            self._seen = seen
        return self._entries

    def put(self, name: str, path: Path, mode: Mode) -> Entry:
        """Serve an adapter under a name, in place of what had it."""
        require_name(name, "name")
        with self._lock:
            entries = dict(self.entries())
            old = entries.get(name)
            entries[name] = Entry(
                path=str(path),
                mode=mode,
                created=int(self._clock()),
                version=old.version + 1 if old else 1,
            )
            self._write(entries)
            return entries[name]

    def remove(self, name: str) -> bool:
        """Serve a name no more; whether it was served."""
        with self._lock:
            entries = dict(self.entries())
            found = entries.pop(name, None)
            if found is not None:
                self._write(entries)
            return found is not None

    def _write(self, entries: Mapping[str, Entry]) -> None:
        rows = {name: asdict(entry) for name, entry in entries.items()}
        storage.write_file(self._path, json.dumps(rows, indent=1).encode())
