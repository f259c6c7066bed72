"""Fixtures shared by all tests. Nothing here needs a network or a model hub."""

import os
import signal

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import chaos
import fsspec
import postgres as postgres_room
import pytest
from tiny import make_base

from cluster.registry import database

if TYPE_CHECKING:
    from s3_server import S3Server

# A shell without job control has what it starts in the background ignore Ctrl-C, and children of
# that too; tests send it.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a random two-layer Llama with a byte tokenizer."""
    return make_base(tmp_path_factory.mktemp("bases") / "llama")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test has a LoRay cache directory of its own."""
    monkeypatch.setenv("LORAY_CACHE", str(tmp_path / "loray-cache"))


@pytest.fixture
def nothing_left() -> Iterator[None]:
    """The test fails where it leaves a process or a temporary file."""
    with chaos.nothing_left():
        yield


@pytest.fixture(scope="session")
def postgres() -> Iterator[postgres_room.PostgresServer]:
    """A PostgreSQL server, for the whole session."""
    found = postgres_room.binaries()
    if found is None:
        pytest.skip("PostgreSQL is not installed: apt-get install postgresql")
    with postgres_room.postgres_server(found) as server:
        yield server


@pytest.fixture
def own_postgres() -> Iterator[postgres_room.PostgresServer]:
    """A PostgreSQL server that no other test uses, to be killed."""
    found = postgres_room.binaries()
    if found is None:
        pytest.skip("PostgreSQL is not installed: apt-get install postgresql")
    with postgres_room.postgres_server(found) as server:
        yield server


@pytest.fixture(params=["sqlite", "postgresql"])
def registry_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """URL of an empty database for a registry, of each kind."""
    return _empty_database(request, tmp_path)


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def module_registry_url(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> str:
    """The same, for all tests of a module."""
    return _empty_database(request, tmp_path_factory.mktemp("registry"))


def _empty_database(request: pytest.FixtureRequest, directory: Path) -> str:
    if request.param == "sqlite":
        return database.sqlite_url(directory / "registry.db")
    server: postgres_room.PostgresServer = request.getfixturevalue("postgres")
    return server.make_database()


@pytest.fixture
def registry(registry_url: str) -> Iterator[database.Database]:
    """A registry's database."""
    opened = database.open_(registry_url)
    yield opened
    opened.close()


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> "Iterator[S3Server]":
    """An S3 server with an empty bucket, which this process and its children use."""
    for name in ("s3fs", "moto"):
        pytest.importorskip(name, reason=f"{name} is not installed: pip install -e '.[dev]'")
    from s3_server import s3_server

    with s3_server() as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setitem(fsspec.config.conf, "s3", {"endpoint_url": server.endpoint})
        yield server
