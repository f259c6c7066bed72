"""API keys: who may ask, and for what. The file holds hashes; a key is shown once, when it is made.

A key is `sk-loray-<id>-<secret>`. The secret has 256 random bits, so a fast hash (SHA-256) is as
good as a slow one: there is nothing to guess.
"""

import hashlib
import hmac
import ipaddress
import logging
import secrets
import stat
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import yaml
from filelock import FileLock

from cluster import config, storage
from cluster.errors import ConfigError, LorayError
from serving import problems

log = logging.getLogger(__name__)

Role = Literal["inference", "admin"]
_PREFIX = "sk-loray-"
_ID_BYTES = 4
_SECRET_BYTES = 32
_LOOK_S = 1.0
_MAX_HEADER_CHARS = 512


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

    def may_use(self, model: str) -> bool:
        """Whether it opens a model."""
        return self.models is None or model in self.models

    def require_model(self, model: str) -> None:
        """Raises ApiError (404, as for a name that does not exist) where it does not open it."""
        self.require_role("inference")
        if not self.may_use(model):
            raise problems.model_not_found(model)

    def require_role(self, role: Role) -> None:
        """Raises ApiError (403). An admin may do everything."""
        if role not in self.roles and "admin" not in self.roles:
            raise problems.forbidden(f"This API key does not have the role {role}.")


@dataclass(frozen=True, kw_only=True, slots=True)
class KeysFile:
    """A keys file."""

    keys: tuple[Key, ...] = ()


class Keys:
    """The keys of a file, which is read again when it has changed."""

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._path = path
        self._clock = clock
        self._facts, self._keys = _read(path)
        self._looked = clock()

    @classmethod
    def load(cls, path: Path, *, clock: Callable[[], float] = time.monotonic) -> "Keys":
        """Raises ConfigError for a file that is missing, broken, or open to others."""
        return cls(path, clock=clock)

    def check(self, authorization: str | None) -> Key:
        """The key of an Authorization header. Raises ApiError (401)."""
        self._look()
        text = (authorization or "")[:_MAX_HEADER_CHARS]
        scheme, _, given = text.partition(" ")
        id_, _, secret = given.strip().removeprefix(_PREFIX).partition("-")
        key = self._keys.get(id_)
        # Compared in any case: the time tells nothing about which ids there are.
        is_right = hmac.compare_digest(_hash(secret), key.hash if key else "0" * 64)
        if key is None or not is_right or scheme.lower() != "bearer":
            raise problems.invalid_api_key()
        return key

    def _look(self) -> None:
        now = self._clock()
        if now - self._looked < _LOOK_S:
            return
        self._looked = now
        try:
            if _facts(self._path) != self._facts:
                self._facts, self._keys = _read(self._path)
        except (LorayError, OSError) as error:
            log.warning("keys_file=%s kept_the_old_keys=%r", self._path, str(error))


def create(
    path: Path, name: str, *, roles: Sequence[Role] = ("inference",), models: Sequence[str] | None
) -> str:
    """Add a key to a file, which is made if need be; the key itself, which is kept nowhere."""
    if not name.strip() or len(name) > 128:
        raise ConfigError(f"a key's name is {name[:80]!r}; allowed: 1 to 128 characters")
    secret = secrets.token_urlsafe(_SECRET_BYTES)
    key = Key(
        id=secrets.token_hex(_ID_BYTES),
        name=name,
        hash=_hash(secret),
        roles=tuple(roles),
        models=tuple(models) if models is not None else None,
        created=int(time.time()),
    )
    with _locked(path):
        _write(path, [*(_read(path)[1].values() if path.exists() else ()), key])
    return f"{_PREFIX}{key.id}-{secret}"


def remove(path: Path, id: str) -> None:
    """Take a key out of a file. Raises ConfigError where it is not there."""
    with _locked(path):
        keys = _read(path)[1]
        if keys.pop(id, None) is None:
            known = ", ".join(f"{key.id} ({key.name})" for key in keys.values()) or "none"
            raise ConfigError(f"{path} has no key {id[:80]!r}; there are: {known}")
        _write(path, keys.values())


def require_safe_bind(host: str, keys_file: str | None) -> None:
    """Raises ConfigError for a server without keys that others than this machine can reach."""
    if keys_file is not None or _is_loopback(host):
        return
    raise ConfigError(
        f"http.host is {host!r}, which others can reach, but there is no keys_file: whoever "
        "reaches the server could use it. Make a key (`loray keys add FILE NAME`) and set "
        "keys_file, or listen on 127.0.0.1"
    )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode(errors="replace")).hexdigest()


def _facts(path: Path) -> tuple[int, int, int]:
    facts = path.stat()
    return facts.st_mtime_ns, facts.st_size, facts.st_ino


def _read(path: Path) -> tuple[tuple[int, int, int], dict[str, Key]]:
    if not path.is_file():
        raise ConfigError(f"keys_file {path}: no such file; make one by `loray keys add`")
    if stat.S_IMODE(path.stat().st_mode) & 0o027:
        raise ConfigError(f"keys_file {path} can be read by others; run: chmod 600 {path}")
    facts = _facts(path)
    rows = config.load(KeysFile, path, []).keys
    keys = {key.id: key for key in rows}
    if len(keys) < len(rows):
        raise ConfigError(f"keys_file {path}: an id stands twice; keep one of them")
    return facts, keys


def _write(path: Path, keys: "Sequence[Key] | object") -> None:
    rows = [config.plain(key) for key in keys]  # pyright: ignore
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        path.touch(mode=0o600)
    mode = stat.S_IMODE(path.stat().st_mode)
    storage.write_file(path, yaml.safe_dump({"keys": rows}, sort_keys=False).encode())
    path.chmod(mode & 0o640)


def _locked(path: Path) -> FileLock:
    path.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(path.with_name(f".{path.name}.lock"), timeout=30)
