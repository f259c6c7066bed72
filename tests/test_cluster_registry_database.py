"""The registry's database: its tables, its migrations, its errors."""

import sqlite3
import stat
import threading
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import select
from sqlalchemy.exc import IntegrityError

from cluster.errors import ConfigError, RegistryError
from cluster.registry import database
from cluster.registry.tables import Lease, Table


def lease(name: str = "dispatcher") -> Lease:
    return Lease(name=name, holder="me", token=1, expires_at=1.5)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "registry.db"


def test_migrations_give_the_tables_that_the_code_knows(registry_url: str) -> None:
    opened = database.open_(registry_url)
    with opened.engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, Table.metadata) == []
    opened.close()


def test_what_was_written_is_there_after_opening_again(path: Path) -> None:
    for _ in range(2):
        opened = database.open_(database.sqlite_url(path))
        with opened.write() as session:
            found = session.get(Lease, "dispatcher")
            if found is None:
                session.add(lease())
        opened.close()
    assert found is not None
    assert (found.holder, found.expires_at) == ("me", 1.5)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_an_error_in_the_middle_keeps_nothing(registry_url: str) -> None:
    opened = database.open_(registry_url)

    def stop_half_way() -> None:
        with opened.write() as session:
            session.add(lease())
            session.flush()
            raise KeyError

    with pytest.raises(KeyError):
        stop_half_way()
    with opened.read() as session:
        assert session.scalars(select(Lease)).all() == []
    opened.close()


def test_a_row_that_is_there_already_is_the_callers_to_handle(registry_url: str) -> None:
    opened = database.open_(registry_url)
    with opened.write() as session:
        session.add(lease())
    with pytest.raises(IntegrityError), opened.write() as session:
        session.add(lease())
    opened.close()


def test_writers_in_many_threads_take_turns(registry_url: str) -> None:
    opened = database.open_(registry_url)
    with opened.write() as session:
        session.add(lease())

    def count_up() -> None:
        for _ in range(20):
            with opened.write() as session:
                found = session.get_one(Lease, "dispatcher", with_for_update=True)
                found.token += 1

    threads = [threading.Thread(target=count_up) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with opened.read() as session:
        assert session.get_one(Lease, "dispatcher").token == 161
    opened.close()


def test_several_processes_may_open_an_empty_database_at_once(registry_url: str) -> None:
    opened: list[database.Database] = []

    def open_it() -> None:
        opened.append(database.open_(registry_url))

    threads = [threading.Thread(target=open_it) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(opened) == 4
    for one in opened:
        one.close()


@pytest.mark.parametrize(
    "url", ["", "registry.db", "mysql://root:secret@host/x", "sqlite://", "sqlite:///:memory:"]
)
def test_a_url_that_cannot_be_used_says_which_can(url: str) -> None:
    with pytest.raises(ConfigError, match="postgresql://") as caught:
        database.open_(url)
    assert "secret" not in str(caught.value)


def test_a_damaged_file_is_told_by_its_name(path: Path) -> None:
    path.write_bytes(b"not a database at all" * 100)
    with pytest.raises(RegistryError, match=r"registry\.db: file is not a database"):
        database.open_(database.sqlite_url(path))


def test_a_database_of_a_newer_version_is_left_alone(path: Path) -> None:
    database.open_(database.sqlite_url(path)).close()
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
    connection.close()
    with pytest.raises(RegistryError, match="another version of LoRay"):
        database.open_(database.sqlite_url(path))


def test_a_server_that_is_not_there_is_a_registry_error_without_the_password() -> None:
    with pytest.raises(RegistryError, match=r"database postgresql\+psycopg://me:\*\*\*@") as caught:
        database.open_("postgresql://me:secret@127.0.0.1:1/x")
    assert "secret" not in str(caught.value)
