"""Who is let in: every route asks for a key, a revoked one ends soon, and nobody comes in while
the registry is away."""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import requests
from fastapi.routing import APIRoute
from keys_file import add_key
from server import Running, serving
from sqlalchemy import text
from starlette.routing import Route

from cluster.errors import RegistryError
from cluster.registry import database, keys
from cluster.registry.database import Database
from cluster.registry.keys import Rights
from serving.access import KNOWN_KEYS_GO_ON_S, Access, Caller
from serving.keys import Keys
from serving.problems import ApiError

HERE = "127.0.0.1"
SOON_S = 5.0
"""A second is promised, on a machine that has time."""


def header(key: str) -> str:
    return f"Bearer {key}"


def id_of(key: str) -> str:
    return key.split("-", 3)[2]


def secret_of(key: str) -> str:
    return key.split("-", 3)[3]


def create(registry: Database, name: str = "ada", **rights: Any) -> str:
    return keys.create(registry, Rights(name=name, **rights), now=time.time())


def break_(registry: Database) -> None:
    """Take the table of keys away, as if the database were not there."""
    with registry.write() as session:
        session.execute(text("ALTER TABLE keys RENAME TO away"))


def mend(registry: Database) -> None:
    with registry.write() as session:
        session.execute(text("ALTER TABLE away RENAME TO keys"))


def caller_of(access: Access, authorization: str | None, client: str | None = HERE) -> Caller:
    return asyncio.run(access.check(authorization, client=client))


def refused(access: Access, authorization: str | None, client: str | None = HERE) -> int:
    with pytest.raises(ApiError) as raised:
        caller_of(access, authorization, client)
    if authorization and len(authorization) > 40:
        assert authorization[-20:] not in str(raised.value)
    return raised.value.status


@asynccontextmanager
async def followed(access: Access) -> AsyncIterator[None]:
    task = asyncio.create_task(access.follow())
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def becomes(access: Access, authorization: str | None, status: int) -> float:
    """The seconds until a request is answered so."""
    started = time.monotonic()
    while True:
        try:
            await access.check(authorization, client=HERE)
            found = 200
        except ApiError as error:
            found = error.status
        if found == status:
            return time.monotonic() - started
        assert time.monotonic() < started + SOON_S, found
        await asyncio.sleep(0.01)


def test_a_caller_has_the_rights_of_its_key(registry: Database) -> None:
    key = create(
        registry, project="team-a", scopes=("infer", "tune"), models=("m",),
        requests_per_minute=5, tokens_per_day=6, concurrent_jobs=7,
    )  # fmt: skip
    caller = caller_of(Access(registry, keys_file=None, host=HERE), header(key))
    assert caller == Caller(
        key_id=id_of(key), project="team-a", scopes=frozenset({"infer", "tune"}), models=("m",),
        requests_per_minute=5, tokens_per_day=6, concurrent_jobs=7,
    )  # fmt: skip
    caller.require("tune")
    with pytest.raises(ApiError, match="scope admin") as forbidden:
        caller.require("admin")
    assert forbidden.value.status == 403
    assert (caller.may_use("m"), caller.may_use("n")) == (True, False)


def test_an_admin_may_everything(registry: Database) -> None:
    key = create(registry, scopes=("admin",))
    caller = caller_of(Access(registry, keys_file=None, host=HERE), header(key))
    for scope in keys.SCOPES:
        caller.require(scope)


@pytest.mark.parametrize(
    "change",
    ["", "x", "sk-loray-", "sk-loray-1-2", "é" * 20, "\x00", "a b", "\udc80", "-", "x" * 100_000],
)
def test_what_is_no_key_opens_nothing(registry: Database, tmp_path: Path, change: str) -> None:
    fixed = add_key(tmp_path / "keys.yaml", "ada")
    kept = create(registry)
    access = Access(registry, keys_file=Keys(tmp_path / "keys.yaml"), host=HERE)
    assert caller_of(access, f"bearer  {kept} ").key_id == id_of(kept)
    for key in (fixed, kept):
        bare = key.removeprefix("sk-loray-")
        for given in (
            None,
            change,
            header(change),
            key,
            f"Basic {key}",
            header(bare),
            header(key[:-1]),
            header(f"sk-loray-{bare[:8]}-{change}"),
            header(f"sk-loray-00000000-{secret_of(key)}"),
            header(f"{key}{change}x"),
        ):
            assert refused(access, given) == 401


def test_the_key_of_one_does_not_open_as_another(registry: Database, tmp_path: Path) -> None:
    fixed = add_key(tmp_path / "keys.yaml", "ada")
    first, second = create(registry, "first"), create(registry, "second")
    access = Access(registry, keys_file=Keys(tmp_path / "keys.yaml"), host=HERE)
    for one in (fixed, first, second):
        for other in (fixed, first, second):
            if one != other:
                assert refused(access, header(f"{one[:17]}-{secret_of(other)}")) == 401


def test_a_key_of_a_file_opens_beside_those_of_the_registry(
    registry: Database, tmp_path: Path
) -> None:
    path = tmp_path / "keys.yaml"
    plain, boss = add_key(path, "ada", models=["m"]), add_key(path, "boss", roles=["admin"])
    access = Access(registry, keys_file=Keys(path), host=HERE)
    assert caller_of(access, header(plain)) == Caller(
        key_id=id_of(plain), scopes=frozenset({"infer"}), models=("m",)
    )
    assert caller_of(access, header(boss)).scopes == {"admin"}
    assert caller_of(access, header(create(registry))).scopes == {"infer"}


def test_a_new_key_opens_at_once(registry: Database) -> None:
    create(registry, "first")
    access = Access(registry, keys_file=None, host="0.0.0.0")
    for _ in range(3):
        key = create(registry)
        assert caller_of(access, header(key)).key_id == id_of(key)


def test_a_revoked_key_opens_nothing_within_a_second_on_every_replica(
    registry: Database, registry_url: str
) -> None:
    key, other = create(registry), create(registry)
    second = database.open_(registry_url)

    async def watch() -> list[float]:
        replicas = [Access(one, keys_file=None, host=HERE) for one in (registry, second)]
        async with followed(replicas[0]), followed(replicas[1]):
            for access in replicas:
                await access.check(header(key), client=HERE)
            keys.revoke(registry, id_of(key), now=time.time())
            took = [await becomes(access, header(key), 401) for access in replicas]
            for access in replicas:
                await access.check(header(other), client=HERE)
            return took

    assert sum(asyncio.run(watch())) < SOON_S
    second.close()


def test_a_key_with_grace_ends_when_it_is_over(registry: Database) -> None:
    key, now = create(registry), [time.time()]
    access = Access(registry, keys_file=None, host=HERE, clock=lambda: now[0])
    keys.rotate(registry, id_of(key), now=now[0], grace_s=60)
    access = Access(registry, keys_file=None, host=HERE, clock=lambda: now[0])
    assert caller_of(access, header(key)).key_id == id_of(key)
    now[0] += 60
    assert refused(access, header(key)) == 401


@pytest.mark.parametrize("given", [None, "", "Bearer none", "Bearer sk-loray-00000000-x"])
def test_the_loopback_is_open_while_there_never_was_a_key(
    registry: Database, given: str | None
) -> None:
    access = Access(registry, keys_file=None, host=HERE)
    assert caller_of(access, given) == Caller()
    assert caller_of(access, given, "::1") == caller_of(access, given, "::ffff:127.0.0.1")
    for elsewhere in ("10.0.0.1", "localhost", "", None):  # where the host is not what it says
        assert refused(access, given, elsewhere) == 401


def test_another_host_is_never_open(registry: Database, tmp_path: Path) -> None:
    assert refused(Access(registry, keys_file=None, host="0.0.0.0"), None) == 401
    path = tmp_path / "keys.yaml"
    path.touch(0o600)
    path.write_text("keys: []")
    assert refused(Access(registry, keys_file=Keys(path), host=HERE), None) == 401


def test_the_first_key_closes_a_server_that_runs_and_revoking_it_does_not_open_it(
    registry: Database,
) -> None:
    async def watch() -> None:
        access = Access(registry, keys_file=None, host=HERE)
        async with followed(access):
            await access.check(None, client=HERE)
            key = create(registry)
            await becomes(access, None, 401)
            keys.revoke(registry, id_of(key), now=time.time())
            await becomes(access, header(key), 401)
            with registry.write() as session:
                session.execute(text("DELETE FROM keys"))
            for _ in range(3):
                await access._read_soon()
                await becomes(access, None, 401)

    asyncio.run(watch())
    key = create(registry)
    keys.revoke(registry, id_of(key), now=time.time())
    assert refused(Access(registry, keys_file=None, host=HERE), None) == 401


def test_a_registry_that_is_lost_does_not_open_the_loopback(
    registry: Database, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    marks = [tmp_path / "registry" / "made", tmp_path / "storage" / "made"]
    access = Access(registry, keys_file=None, host=HERE, marks=marks)
    assert caller_of(access, None) == Caller()
    assert not any(mark.exists() for mark in marks)
    create(registry)
    asyncio.run(_read(access))
    assert all(mark.exists() for mark in marks)
    empty = database.open_(database.sqlite_url(tmp_path / "new.db"))
    for gone in (marks[0], marks[1]):
        gone.unlink()
        assert refused(Access(empty, keys_file=None, host=HERE, marks=marks), None) == 401
        assert all(mark.exists() for mark in marks)  # each of them makes the other anew
    key = create(empty)
    access = Access(empty, keys_file=None, host=HERE, marks=marks)
    assert caller_of(access, header(key)).key_id == id_of(key)
    (tmp_path / "file").touch()
    Access(empty, keys_file=None, host=HERE, marks=[tmp_path / "file" / "made"])
    assert "keys=not_marked" in caplog.text
    empty.close()


def test_known_keys_go_on_for_a_minute_without_the_registry_and_unknown_ones_wait(
    registry: Database, tmp_path: Path
) -> None:
    fixed = add_key(tmp_path / "keys.yaml", "ada")
    key = create(registry)
    now = [0.0]
    files = Keys(tmp_path / "keys.yaml")
    access = Access(registry, keys_file=files, host=HERE, steady=lambda: now[0])
    break_(registry)
    now[0] = KNOWN_KEYS_GO_ON_S
    assert caller_of(access, header(key)).key_id == id_of(key)
    assert refused(access, header("sk-loray-00000000-x")) == 503
    assert refused(access, header(f"{key}x")) == 401
    assert refused(access, None) == 401
    now[0] += 1
    assert refused(access, header(key)) == 503
    assert caller_of(access, header(fixed)).key_id == id_of(fixed)
    mend(registry)
    asyncio.run(_read(access))
    assert caller_of(access, header(key)).key_id == id_of(key)
    assert refused(access, header("sk-loray-00000000-x")) == 401


async def _read(access: Access) -> None:
    await access._read_soon()


def test_an_open_server_without_its_registry_is_closed_after_a_minute(registry: Database) -> None:
    now = [0.0]
    access = Access(registry, keys_file=None, host=HERE, steady=lambda: now[0])
    break_(registry)
    now[0] = KNOWN_KEYS_GO_ON_S
    assert caller_of(access, None) == Caller()
    now[0] += 1
    assert refused(access, None) == 503


def test_a_server_does_not_begin_without_its_registry(registry: Database) -> None:
    break_(registry)
    with pytest.raises(RegistryError):
        Access(registry, keys_file=None, host=HERE)


def test_many_unknown_keys_cost_few_readings(registry: Database) -> None:
    create(registry)

    async def flood() -> float:
        access = Access(registry, keys_file=None, host=HERE)
        started = time.monotonic()
        await asyncio.gather(
            *(becomes(access, header(f"sk-loray-{n:08x}-x"), 401) for n in range(500))
        )
        return time.monotonic() - started

    assert asyncio.run(flood()) < SOON_S


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Iterator[Running]:
    with serving(tmp_path_factory.mktemp("access"), tiny_base) as server:
        create(server.database, "somebody")
        yield server


def routes(running: Running) -> list[tuple[str, str]]:
    """Methods and paths of the whole application."""
    found: list[tuple[str, str]] = []
    left = list(running.app.routes)
    while left:
        route = left.pop()
        inner = getattr(route, "original_router", None)  # of `include_router`, in FastAPI 0.165
        if inner is not None:
            left += inner.routes
            continue
        assert isinstance(route, Route | APIRoute), route  # nothing that this walk does not see
        found += [(method, route.path) for method in sorted(route.methods or ())]
    return found


def ask(running: Running, method: str, path: str, **options: Any) -> requests.Response:
    return requests.request(method, f"{running.url}{path}", timeout=30, **options)


def test_every_route_asks_for_a_key(running: Running) -> None:
    deadline = time.monotonic() + SOON_S  # the first key has just been made
    while ask(running, "GET", "/v1/models").status_code != 401:
        assert time.monotonic() < deadline
    walked = routes(running)
    assert ("POST", "/v1/chat/completions") in walked
    assert ("GET", "/openapi.json") in walked
    assert ("POST", "/v1/files") in walked
    assert ("POST", "/v1/fine_tuning/jobs/{job_id}/cancel") in walked
    elsewhere = [
        (method, path)
        for path in ("/", "/v1/no", "/docs", "//healthz", "/healthz/", "/healthz/x", "/HEALTHZ")
        for method in ("GET", "POST")
    ]
    wrong = [
        (method, path)
        for path in ("/v1/models", "/v1/chat/completions", "/metrics")
        for method in ("PUT", "PATCH", "OPTIONS", "TRACE", "HEAD", "DELETE")
    ]
    for method, path in [*walked, *elsewhere, *wrong]:
        if path == "/healthz":
            continue
        for headers in ({}, {"Authorization": "Bearer sk-loray-0a0a0a0a-x"}):
            answer = ask(running, method, path, headers=headers)
            assert answer.status_code == 401, (method, path)
            assert answer.headers["www-authenticate"] == "Bearer"
            assert answer.headers["x-request-id"]
            if method != "HEAD":
                assert answer.json()["error"]["code"] == "invalid_api_key"
    assert ask(running, "GET", "/healthz").ok
    assert ask(running, "POST", "/healthz").status_code == 405


def test_a_body_is_not_read_before_the_key(running: Running) -> None:
    for body in (b"{", b"x" * (3 << 20)):
        answer = ask(running, "POST", "/v1/chat/completions", data=body)
        assert answer.status_code == 401


def test_a_scope_opens_its_routes_and_no_others(running: Running) -> None:
    base = running.replica.service.base.name
    chat = {"model": base, "messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
    expected = {"infer": (200, 200, 403, 403), "tune": (403, 200, 403, 403)}
    for scopes, statuses in {**expected, "admin": (200, 200, 200, 200)}.items():
        key = create(running.database, scopes=(scopes,))
        found = tuple(
            ask(running, method, path, json=body, headers={"Authorization": header(key)})
            for method, path, body in (
                ("POST", "/v1/chat/completions", chat),
                ("GET", "/v1/models", None),
                ("GET", "/v1/adapters", None),
                ("GET", "/metrics", None),
            )
        )
        assert tuple(answer.status_code for answer in found) == statuses


def test_a_model_that_a_key_does_not_open_does_not_exist(running: Running) -> None:
    base = running.replica.service.base.name
    key = create(running.database, models=("other",))
    headers = {"Authorization": header(key)}
    chat = {"model": base, "messages": [{"role": "user", "content": "x"}]}
    for method, path, body in (
        ("POST", "/v1/chat/completions", chat),
        ("POST", "/v1/completions", {"model": base, "prompt": "x"}),
        ("GET", f"/v1/models/{base}", None),
    ):
        answer = ask(running, method, path, json=body, headers=headers)
        assert answer.status_code == 404, path
        assert answer.json()["error"]["code"] == "model_not_found"
    assert ask(running, "GET", "/v1/models", headers=headers).json()["data"] == []
