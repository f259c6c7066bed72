"""API keys: made, listed, revoked and rotated in the registry, which keeps no secret.

A key is `sk-loray-<id>-<secret>`. The secret has 256 random bits, so a fast hash (SHA-256) is as
good as a slow one: there is nothing to guess. A key is shown once, when it is made. Rows of revoked
keys stay, so that it is known for ever that there was a key; files beside the registry and in the
storage say so, too (`mark`), so that the loss of the database opens no server.

Times are compared with those of the machines that serve, whose clocks must agree.
"""

import hashlib
import re
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from sqlalchemy import select
from sqlalchemy.orm import Session

from cluster import storage
from cluster.errors import ConfigError
from cluster.registry.database import Database
from cluster.registry.tables import ApiKey

Scope = Literal["infer", "tune", "admin"]
SCOPES: tuple[Scope, ...] = get_args(Scope)
PREFIX = "sk-loray-"
ID = re.compile(r"[0-9a-f]{8}")
MAX_GRACE_S = 90 * 86400.0
_MARK = b"API keys were made for this server. Without this file it could be served without any.\n"
_ID_BYTES = 4
_SECRET_BYTES = 32
_PASTED = re.compile(rf"{PREFIX}[\w-]*")
_PROJECT = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_MAX_NAME_CHARS = 128
_MAX_MODELS = 1000
_MAX_MODEL_CHARS = 512
_MAX_QUOTA = {
    "requests_per_minute": 1_000_000,
    "tokens_per_day": 10**15,
    "concurrent_jobs": 100_000,
}
_MAX_NAMED = 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Rights:
    """What a key is made with."""

    name: str
    """Whose it is."""
    project: str = "default"
    """Whose files, jobs and models it sees."""
    scopes: tuple[Scope, ...] = ("infer",)
    """infer: ask models; tune: files and jobs; admin: everything."""
    models: tuple[str, ...] | None = None
    """The models that it opens; null: all of its project."""
    requests_per_minute: int | None = None
    """Null, here and below: no limit."""
    tokens_per_day: int | None = None
    """Of prompts and answers together."""
    concurrent_jobs: int | None = None

    def __post_init__(self) -> None:
        require_name(self.name)
        if not _PROJECT.fullmatch(self.project):
            raise ConfigError(
                f"project is {masked(self.project)!r}; allowed: 1 to 64 letters, digits and _ . -, "
                "beginning with a letter or digit"
            )
        unknown = [scope for scope in self.scopes if scope not in SCOPES]
        if unknown or not self.scopes:
            given = masked(unknown[0]) if unknown else "none"
            raise ConfigError(f"scope is {given!r}; allowed: one or more of {', '.join(SCOPES)}")
        for model in self.models or ():
            if not model.strip() or len(model) > _MAX_MODEL_CHARS or not model.isprintable():
                raise ConfigError(
                    f"model is {masked(model)!r}; allowed: 1 to {_MAX_MODEL_CHARS} characters that "
                    "can be printed"
                )
        if self.models is not None and not 1 <= len(self.models) <= _MAX_MODELS:
            raise ConfigError(f"{len(self.models)} models; allowed: 1 to {_MAX_MODELS}, or null")
        for field, most in _MAX_QUOTA.items():
            value = getattr(self, field)
            if value is not None and not 1 <= value <= most:
                raise ConfigError(f"{field} is {value}; allowed: 1 to {most}, or leave it out")


@dataclass(frozen=True, kw_only=True, slots=True)
class Known:
    """The keys at one moment."""

    keys: Mapping[str, ApiKey]
    """Those that are not revoked, by their ids."""
    was_any: bool
    """Whether a key was ever made, revoked ones too."""


def create(database: Database, rights: Rights, *, now: float) -> str:
    """Make a key; the key itself, which is kept nowhere. Raises RegistryError."""
    row = ApiKey(
        name=rights.name,
        project=rights.project,
        scopes=sorted(set(rights.scopes)),
        models=sorted(set(rights.models)) if rights.models is not None else None,
        requests_per_minute=rights.requests_per_minute,
        tokens_per_day=rights.tokens_per_day,
        concurrent_jobs=rights.concurrent_jobs,
        created_at=now,
    )
    with database.write() as session:
        return _add(session, row)


def list_(database: Database) -> tuple[ApiKey, ...]:
    """All keys, revoked ones too, the oldest first. Raises RegistryError."""
    with database.read() as session:
        return tuple(session.scalars(select(ApiKey).order_by(ApiKey.created_at, ApiKey.id)))


def revoke(database: Database, id: str, *, now: float) -> ApiKey:
    """Let a key open nothing any more, on all replicas within a second.

    Raises ConfigError where there is no such key, RegistryError.
    """
    with database.write() as session:
        row = _get(session, id)
        if row.revoked_at is None or row.revoked_at > now:
            row.revoked_at = now
        return row


def rotate(database: Database, id: str, *, now: float, grace_s: float = 0.0) -> str:
    """Make a key with the rights of another, which ends after `grace_s` seconds; the new key.

    Raises ConfigError where there is no such key, or it has ended or been rotated before;
    RegistryError.
    """
    if not 0 <= grace_s <= MAX_GRACE_S:
        raise ConfigError(f"grace is {grace_s:g} s; allowed: 0 to {MAX_GRACE_S:.0f}")
    with database.write() as session:
        old = _get(session, id)
        if old.revoked_at is not None:
            raise ConfigError(
                f"key {old.id} ({old.name}) has been revoked or rotated; rotate the one that came "
                "after it, or make another by `loray keys create`"
            )
        old.revoked_at = now + grace_s
        new = ApiKey(
            name=old.name,
            project=old.project,
            scopes=old.scopes,
            models=old.models,
            requests_per_minute=old.requests_per_minute,
            tokens_per_day=old.tokens_per_day,
            concurrent_jobs=old.concurrent_jobs,
            created_at=now,
            rotated_from=old.id,
        )
        return _add(session, new)


def known(database: Database, *, now: float) -> Known:
    """What opens now. Raises RegistryError."""
    live = ApiKey.revoked_at.is_(None) | (ApiKey.revoked_at > now)
    with database.read() as session:
        rows = session.scalars(select(ApiKey).where(live)).all()
        was_any = bool(rows) or session.scalars(select(ApiKey.id).limit(1)).first() is not None
    return Known(keys={row.id: row for row in rows}, was_any=was_any)


def mark(places: Iterable[Path]) -> None:
    """Have each of these files say that there was a key. Raises StorageError."""
    for place in places:
        if not place.exists():
            storage.make_directory(place.parent)
            storage.write_file(place, _MARK)


def require_name(name: str) -> None:
    """Raises ConfigError for a name that a key cannot have."""
    if not name.strip() or len(name) > _MAX_NAME_CHARS or not name.isprintable():
        raise ConfigError(
            f"a key's name is {masked(name)!r}; allowed: 1 to {_MAX_NAME_CHARS} characters that "
            "can be printed"
        )


def hash_of(secret: str) -> str:
    """SHA-256, in hex."""
    return hashlib.sha256(secret.encode(errors="replace")).hexdigest()


def masked(text: str, most: int = 80) -> str:
    """What may be shown of a text into which somebody may have pasted a key."""
    return _PASTED.sub(f"{PREFIX}...", text)[:most]


def _add(session: Session, row: ApiKey) -> str:
    secret = secrets.token_urlsafe(_SECRET_BYTES)
    row.id = secrets.token_hex(_ID_BYTES)
    while session.get(ApiKey, row.id) is not None:
        row.id = secrets.token_hex(_ID_BYTES)
    row.hash = hash_of(secret)
    session.add(row)
    return f"{PREFIX}{row.id}-{secret}"


def _get(session: Session, id: str) -> ApiKey:
    """A key, which nobody else changes until the transaction ends."""
    is_id = ID.fullmatch(id) is not None
    row = session.get(ApiKey, id, with_for_update=True) if is_id else None
    if row is not None:
        return row
    rows = session.scalars(select(ApiKey).order_by(ApiKey.created_at.desc()).limit(_MAX_NAMED))
    names = ", ".join(f"{row.id} ({row.name})" for row in rows) or "none"
    raise ConfigError(f"there is no key {masked(id)!r}; the newest are: {names}")
