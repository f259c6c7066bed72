"""Who asks, and what he may: the gate before every route, and what routes ask of a caller.

A replica keeps the registry's keys in memory and reads them again twice a second, so that no
request with a known key waits for the database, and a revoked key ends within a second. While the
database is away, known keys go on for a minute; unknown ones are answered with 503, never let in.

What is not covered: what one IP address may do. That is a proxy's work.
"""

import asyncio
import hmac
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TypeAlias

from fastapi import Depends, Request
from fastapi.responses import JSONResponse
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Send
from starlette.types import Scope as Connection

from cluster.errors import RegistryError, StorageError
from cluster.registry import keys as registry_keys
from cluster.registry.database import Database
from cluster.registry.keys import PREFIX, Known, Scope, hash_of
from cluster.registry.tables import ApiKey
from serving import problems
from serving.keys import Key, Keys
from serving.loopback import is_loopback

log = logging.getLogger(__name__)

OPEN_PATH = "/healthz"
"""The one path that asks for no key."""
KNOWN_KEYS_GO_ON_S = 60.0
_PERIOD_S = 0.5
_GAP_S = 0.05
"""Between two readings, however many unknown keys come."""
_PATIENCE_S = 5.0
_RETRY_AFTER_S = 2.0
_MAX_HEADER_CHARS = 512
_NO_HASH = "0" * 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Caller:
    """Who asks."""

    key_id: str = ""
    """Empty where no key is asked."""
    project: str = "default"
    """Whose files, jobs and models it sees."""
    scopes: frozenset[Scope] = frozenset({"infer", "tune", "admin"})
    models: tuple[str, ...] | None = None
    """The models that it opens; null: all of its project."""
    requests_per_minute: int | None = None
    tokens_per_day: int | None = None
    concurrent_jobs: int | None = None

    def require(self, scope: Scope) -> None:
        """Raises ApiError (403). An admin may do everything."""
        if scope not in self.scopes and "admin" not in self.scopes:
            raise problems.forbidden(f"This API key does not have the scope {scope}.")

    def may_use(self, model: str) -> bool:
        """Whether it opens a model."""
        return self.models is None or model in self.models


class Access:
    """Tells callers by their keys: those of the registry, and those of a keys file."""

    def __init__(
        self,
        database: Database,
        *,
        keys_file: Keys | None,
        host: str,
        marks: Sequence[Path] = (),
        clock: Callable[[], float] = time.time,
        steady: Callable[[], float] = time.monotonic,
    ) -> None:
        """host: where the server listens; the loopback is open while there never was a key.

        marks: files any of which says that there was one, and which are made once there is.
        clock: seconds since the epoch. steady: seconds, for ages. Raises RegistryError.
        """
        self._database = database
        self._keys_file = keys_file
        self._clock = clock
        self._steady = steady
        self._may_be_open = keys_file is None and is_loopback(host)
        self._reading: asyncio.Task[None] | None = None
        self._is_away = False
        self._began = steady()
        self._marks = marks
        was_any = any(mark.exists() for mark in marks)
        self._is_marked = all(mark.exists() for mark in marks)
        self._known = Known(keys={}, was_any=was_any)
        self._known = self._look()
        self._read_at = self._began

    async def check(self, authorization: str | None, *, client: str | None) -> Caller:
        """The caller of a request, by its Authorization header.

        client: the address it came from. Raises ApiError: 401, or 503 while nobody can tell.
        """
        given = _split(authorization)
        caller = self._recognised(given)
        if caller is not None:
            return caller
        if given is not None and given[0] not in self._known.keys:  # it may be a minute old
            await self._look_again()
            caller = self._recognised(given)
            if caller is not None:
                return caller
        if self._may_be_open and not self._known.was_any and _is_here(client):
            self._require_fresh()
            return Caller()
        if given is not None and self._is_away and given[0] not in self._known.keys:
            raise problems.overloaded(_RETRY_AFTER_S)
        raise problems.invalid_api_key()

    async def follow(self) -> None:
        """Read the registry's keys over and over."""
        while True:
            await asyncio.sleep(_PERIOD_S)
            await self._read_soon()

    def _recognised(self, given: tuple[str, str] | None) -> Caller | None:
        """The caller of a key, as far as it is known here. Raises ApiError (503)."""
        id_, secret = given or ("", "")
        hash_ = hash_of(secret)
        fixed = self._keys_file.get(id_) if self._keys_file is not None else None
        kept = self._known.keys.get(id_)
        # Compared in any case: the time tells nothing about which ids there are.
        is_fixed = hmac.compare_digest(hash_, fixed.hash if fixed else _NO_HASH)
        is_kept = hmac.compare_digest(hash_, kept.hash if kept else _NO_HASH)
        if fixed is not None and is_fixed:
            return _of_file(fixed)
        if kept is None or not is_kept:
            return None
        if kept.revoked_at is not None and kept.revoked_at <= self._clock():
            return None
        self._require_fresh()
        return _of_registry(kept)

    def _require_fresh(self) -> None:
        if self._steady() - self._read_at > KNOWN_KEYS_GO_ON_S:
            raise problems.overloaded(_RETRY_AFTER_S)

    async def _look_again(self) -> None:
        """Have the keys be read by a reading that begins from now on."""
        if self._is_away:  # `follow` finds out when it is back
            return
        if self._reading is not None and not self._reading.done():  # it began before
            await asyncio.wait({self._reading}, timeout=_PATIENCE_S)
        await asyncio.wait({self._read_soon()}, timeout=_PATIENCE_S)

    def _read_soon(self) -> "asyncio.Task[None]":
        """The one reading that is under way."""
        if self._reading is None or self._reading.done():
            self._reading = asyncio.create_task(self._read())
        return self._reading

    async def _read(self) -> None:
        await asyncio.sleep(self._began + _GAP_S - self._steady())
        self._began = began = self._steady()
        try:
            known = await asyncio.to_thread(self._look)
        except RegistryError as error:
            if not self._is_away:
                log.warning("keys=kept for_s=%.0f registry=%s", KNOWN_KEYS_GO_ON_S, error)
            self._is_away = True
            return
        if self._is_away:
            log.warning("keys=read registry=back")
        self._is_away = False
        self._known = known
        self._read_at = began

    def _look(self) -> Known:
        """What the registry says now. Raises RegistryError."""
        known = registry_keys.known(self._database, now=self._clock())
        # A registry that was emptied under a server, or lost before it, does not open it.
        was_any = known.was_any or self._known.was_any
        if was_any and not self._is_marked:
            self._is_marked = True  # tried once, or a read-only disk would be told of for ever
            try:
                registry_keys.mark(self._marks)
            except StorageError as error:
                log.warning("keys=not_marked error=%r", str(error))
        return Known(keys=known.keys, was_any=was_any)


class Gate:
    """ASGI layer that lets no request without a good key further, whatever it asks for."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app = app
        self._access = access

    async def __call__(self, scope: Connection, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or scope["path"] == OPEN_PATH:
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":  # there are no routes for web sockets
            await send({"type": "websocket.close", "code": 1008})
            return
        authorization = Headers(scope=scope).get("authorization")
        client = (scope.get("client") or (None,))[0]
        try:
            caller = await self._access.check(authorization, client=client)
        except problems.ApiError as error:
            status, body, headers = problems.of_exception(error)
            await JSONResponse(body, status, headers)(scope, receive, send)
            return
        state = {**scope.get("state", {}), "caller": caller}  # of this request alone
        await self._app({**scope, "state": state}, receive, send)


async def _user(request: Request) -> Caller:
    if request.app.state.access is None:
        return Caller()
    return request.state.caller  # the gate's; where there is none, that is an error, not a way in


async def _infer(caller: Annotated[Caller, Depends(_user)]) -> Caller:
    caller.require("infer")
    return caller


async def _tune(caller: Annotated[Caller, Depends(_user)]) -> Caller:
    caller.require("tune")
    return caller


async def _admin(caller: Annotated[Caller, Depends(_user)]) -> Caller:
    caller.require("admin")
    return caller


User: TypeAlias = Annotated[Caller, Depends(_user)]
Infer: TypeAlias = Annotated[Caller, Depends(_infer)]
Tune: TypeAlias = Annotated[Caller, Depends(_tune)]
Admin: TypeAlias = Annotated[Caller, Depends(_admin)]


def _split(authorization: str | None) -> tuple[str, str] | None:
    """Id and secret of `Bearer sk-loray-<id>-<secret>`; None for anything else."""
    scheme, _, given = (authorization or "")[:_MAX_HEADER_CHARS].partition(" ")
    given = given.strip()
    if scheme.lower() != "bearer" or not given.startswith(PREFIX):
        return None
    id_, _, secret = given.removeprefix(PREFIX).partition("-")
    return id_, secret


def _is_here(client: str | None) -> bool:
    """Whether an address is of this machine; `::ffff:` is what IPv6 puts before one of IPv4."""
    return is_loopback((client or "").removeprefix("::ffff:"), resolve=lambda _: ())


def _of_file(key: Key) -> Caller:
    is_admin = "admin" in key.roles
    scopes = frozenset[Scope]({"admin"} if is_admin else {"infer"})
    return Caller(key_id=key.id, scopes=scopes, models=key.models)


def _of_registry(key: ApiKey) -> Caller:
    return Caller(
        key_id=key.id,
        project=key.project,
        scopes=frozenset(scope for scope in registry_keys.SCOPES if scope in key.scopes),
        models=tuple(key.models) if key.models is not None else None,
        requests_per_minute=key.requests_per_minute,
        tokens_per_day=key.tokens_per_day,
        concurrent_jobs=key.concurrent_jobs,
    )
