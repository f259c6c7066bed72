"""A file of API keys that its operator writes: who may ask, and for what. It holds hashes.

Keys in the registry (`loray keys`) can do more: projects, quotas, and an end within a second.
"""

import logging
import re
import stat
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cluster import config
from cluster.errors import ConfigError
from cluster.registry.keys import ID, masked, require_name

log = logging.getLogger(__name__)

Role = Literal["inference", "admin"]
_HASH = re.compile(r"[0-9a-f]{64}")
_LOOK_S = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Key:
    """What is known of a key."""

    id: str
    """The part after sk-loray-, which is no secret."""
    name: str
    """Whose it is."""
    hash: str
    """SHA-256 of the secret, in hex."""
    roles: tuple[Role, ...] = ("inference",)
    models: tuple[str, ...] | None = None
    """The models that it opens; null: all."""
    created: int = 0
    """Seconds since the epoch."""

    def __post_init__(self) -> None:
        require_name(self.name)
        if not ID.fullmatch(self.id):
            raise ConfigError(f"the id of key {self.name!r} is not 8 hex digits")
        if not _HASH.fullmatch(self.hash):  # not shown: it may be a key that was pasted there
            raise ConfigError(
                f"the hash of key {self.name!r} is not 64 hex digits (SHA-256 of the part after "
                "sk-loray-<id>-, lower case)"
            )
        for field in ("roles", "models"):
            if getattr(self, field) == ():
                raise ConfigError(f"key {self.name!r} has no {field}; name one, or remove the key")


@dataclass(frozen=True, kw_only=True, slots=True)
class KeysFile:
    """A keys file."""

    keys: tuple[Key, ...] = ()


class Keys:
    """The keys of a file, which is read again when it has changed."""

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.monotonic) -> None:
        """Raises ConfigError for a file that is missing, broken, or open to others."""
        self._path = path
        self._clock = clock
        self._facts = _facts(path)  # before reading: what changes meanwhile is seen next time
        self._keys = _read(path)
        self._looked = clock()

    def get(self, id: str) -> Key | None:
        """The key of an id, as the file says now; a file that is broken later changes nothing."""
        self._look()
        return self._keys.get(id)

    def _look(self) -> None:
        now = self._clock()
        if now - self._looked < _LOOK_S:
            return
        self._looked = now
        facts = _facts(self._path)
        if facts == self._facts:
            return
        self._facts = facts  # of a broken file too, so that it is told of once
        try:
            self._keys = _read(self._path)
        except ConfigError as error:
            log.warning("keys_file=%s kept_the_old_keys=%r", self._path, str(error))


def _facts(path: Path) -> tuple[int, ...] | None:
    """What changes with a file and with who may read it; None where there is none."""
    try:
        facts = path.stat()
    except OSError:
        return None
    return facts.st_mtime_ns, facts.st_ctime_ns, facts.st_size, facts.st_ino


def _read(path: Path) -> dict[str, Key]:
    try:
        facts = path.stat()
    except OSError as error:
        raise ConfigError(
            f"keys_file {path}: {error.strerror}; leave keys_file out and make keys by `loray keys "
            "create`, or write one"
        ) from None
    if not stat.S_ISREG(facts.st_mode):
        raise ConfigError(f"keys_file {path} is not a plain file; name one")
    if stat.S_IMODE(facts.st_mode) & 0o027:
        raise ConfigError(f"keys_file {path} is open to others; run: chmod 600 {path}")
    try:
        rows = config.load(KeysFile, path).keys
    except ConfigError as error:  # which quotes what it found, a key that was pasted there too
        raise ConfigError(f"keys_file {masked(str(error), 2000)}") from None
    keys = {key.id: key for key in rows}
    if len(keys) < len(rows):
        raise ConfigError(f"keys_file {path}: an id stands twice; keep one of them")
    return keys
