"""API keys: who may ask, and for what. The file holds hashes; a key is shown once, when it is made.

A key is `sk-loray-<id>-<secret>`. The secret has 256 random bits, so a fast hash (SHA-256) is as
good as a slow one: there is nothing to guess.
"""

import hashlib
import hmac
import ipaddress
import logging
import os
import re
import secrets
import socket
import stat
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import yaml
from filelock import FileLock

from cluster import config, storage
from cluster.errors import ConfigError
from serving import problems

log = logging.getLogger(__name__)

Role = Literal["inference", "admin"]
_PREFIX = "sk-loray-"
_ID_BYTES = 4
_SECRET_BYTES = 32
_ID = re.compile(r"[0-9a-f]{8}")
_HASH = re.compile(r"[0-9a-f]{64}")
_PASTED = re.compile(rf"{_PREFIX}[\w-]*")
_MAX_NAME_CHARS = 128
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

    def __post_init__(self) -> None:
        if not self.name.strip() or len(self.name) > _MAX_NAME_CHARS or not self.name.isprintable():
            raise ConfigError(
                f"a key's name is {self.name[:80]!r}; allowed: 1 to {_MAX_NAME_CHARS} characters "
                "that can be printed"
            )
        if not _ID.fullmatch(self.id):
            raise ConfigError(f"the id of key {self.name!r} is not 8 hex digits")
        if not _HASH.fullmatch(self.hash):  # not shown: it may be a key that was pasted there
            raise ConfigError(
                f"the hash of key {self.name!r} is not 64 hex digits (SHA-256, lower case); "
                "make keys by `loray keys add`"
            )
        for field in ("roles", "models"):
            if getattr(self, field) == ():
                raise ConfigError(f"key {self.name!r} has no {field}; name one, or remove the key")

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
        self._facts = _facts(path)  # before reading: what changes meanwhile is seen next time
        self._keys = _read(path)
        self._looked = clock()

    @classmethod
    def load(cls, path: Path, *, clock: Callable[[], float] = time.monotonic) -> "Keys":
        """Raises ConfigError for a file that is missing, broken, or open to others."""
        return cls(path, clock=clock)

    def check(self, authorization: str | None) -> Key:
        """The key of an Authorization header. Raises ApiError (401)."""
        self._look()
        scheme, _, given = (authorization or "")[:_MAX_HEADER_CHARS].partition(" ")
        given = given.strip()
        id_, _, secret = given.removeprefix(_PREFIX).partition("-")
        key = self._keys.get(id_)
        # Compared in any case: the time tells nothing about which ids there are.
        is_right = hmac.compare_digest(_hash(secret), key.hash if key else "0" * 64)
        is_whole = scheme.lower() == "bearer" and given.startswith(_PREFIX)
        if key is None or not is_right or not is_whole:
            raise problems.invalid_api_key()
        return key

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


def create(
    path: Path, name: str, *, roles: Sequence[Role] = ("inference",), models: Sequence[str] | None
) -> str:
    """Add a key to a file, which is made if need be; the key itself, which is kept nowhere.

    Raises ConfigError for a name, roles or models that cannot be, StorageError on a full disk.
    """
    secret = secrets.token_urlsafe(_SECRET_BYTES)
    with _locked(path):
        keys = _read(path) if path.exists() else {}
        while (id_ := secrets.token_hex(_ID_BYTES)) in keys:
            pass
        keys[id_] = Key(
            id=id_,
            name=name,
            hash=_hash(secret),
            roles=tuple(roles),
            models=tuple(models) if models is not None else None,
            created=int(time.time()),
        )
        _write(path, keys.values())
    return f"{_PREFIX}{id_}-{secret}"


def remove(path: Path, id: str) -> None:
    """Take a key out of a file. Raises ConfigError where it is not there."""
    with _locked(path):
        keys = _read(path)
        if keys.pop(id, None) is None:
            known = ", ".join(f"{key.id} ({key.name})" for key in keys.values()) or "none"
            shown = _PASTED.sub(f"{_PREFIX}...", id)[:80]
            raise ConfigError(f"{path} has no key {shown!r}; there are: {known}")
        _write(path, keys.values())


def list_(path: Path) -> tuple[Key, ...]:
    """The keys of a file, the oldest first. Raises ConfigError as `Keys.load`."""
    return tuple(_read(path).values())


def _resolved(host: str) -> list[str]:
    return [str(address[0]) for *_, address in socket.getaddrinfo(host, None)]


def require_safe_bind(
    host: str, keys_file: str | None, *, resolve: Callable[[str], Iterable[str]] = _resolved
) -> None:
    """Raises ConfigError for a server without keys that others than this machine can reach.

    resolve: the addresses of a host's name, OSError where it has none.
    """
    if keys_file is not None or _is_loopback(host, resolve):
        return
    raise ConfigError(
        f"http.host is {host!r}, which others can reach, but there is no keys_file: whoever "
        "reaches the server could use it. Make a key (`loray keys add FILE NAME`) and set "
        "keys_file, or listen on 127.0.0.1"
    )


def _is_loopback(host: str, resolve: Callable[[str], Iterable[str]]) -> bool:
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        pass
    if not host:  # every address of the machine
        return False
    try:
        addresses = [ipaddress.ip_address(address) for address in resolve(host)]
    except (OSError, ValueError):  # UnicodeError, of names that cannot be, is a ValueError
        return False
    return bool(addresses) and all(address.is_loopback for address in addresses)


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode(errors="replace")).hexdigest()


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
            f"keys_file {path}: {error.strerror}; make one by `loray keys add`"
        ) from None
    if not stat.S_ISREG(facts.st_mode):
        raise ConfigError(f"keys_file {path} is not a plain file; name one")
    if stat.S_IMODE(facts.st_mode) & 0o027:
        raise ConfigError(f"keys_file {path} is open to others; run: chmod 600 {path}")
    try:
        rows = config.load(KeysFile, path).keys
    except ConfigError as error:  # which quotes what it found, a key that was pasted there too
        raise ConfigError(f"keys_file {_PASTED.sub(f'{_PREFIX}...', str(error))}") from None
    except (TypeError, RecursionError):  # a list as a mapping's key; a thousand brackets
        raise ConfigError(f"keys_file {path}: expected `keys:` and a list of mappings") from None
    keys = {key.id: key for key in rows}
    if len(keys) < len(rows):
        raise ConfigError(f"keys_file {path}: an id stands twice; keep one of them")
    return keys


def _write(path: Path, keys: Iterable[Key]) -> None:
    rows = [config.plain(key) for key in keys]
    facts = path.stat() if path.exists() else None
    umask = os.umask(0o077)  # the file is nobody else's from its first moment
    try:
        storage.write_file(path, yaml.safe_dump({"keys": rows}, sort_keys=False).encode())
    finally:
        os.umask(umask)
    if facts is None:
        return
    if os.geteuid() == 0:  # else the server could not read what root has written
        os.chown(path, facts.st_uid, facts.st_gid)
    path.chmod(stat.S_IMODE(facts.st_mode))


def _locked(path: Path) -> FileLock:
    path.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(path.with_name(f".{path.name}.lock"), timeout=30)
