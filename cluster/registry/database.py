"""The registry's database: a SQLite file, or PostgreSQL by its URL, brought to our tables."""

import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from alembic.util import CommandError
from filelock import FileLock, Timeout
from sqlalchemy import Connection, Engine, create_engine, event, make_url, text
from sqlalchemy.exc import ArgumentError, DBAPIError, IntegrityError, SQLAlchemyError
from sqlalchemy.orm import Session

from cluster import storage
from cluster.errors import ConfigError, RegistryError

_MIGRATIONS = Path(__file__).parent / "migrations"
_LOCK_S = 60.0
_BUSY_S = 15.0
"""How long a writer waits for another."""
_CONNECT_S = 5
_STATEMENT_MS = 15000
_ADVISORY_LOCK = 0x10A4A7
"""A number of ours, under which migrations on PostgreSQL take turns."""


class Database:
    """Sessions over the tables; threads may share it, processes open their own."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._writing = engine.execution_options(is_writing=True)

    @contextmanager
    def read(self) -> Iterator[Session]:
        """A session that sees one state and changes nothing. Raises RegistryError."""
        with _explained(self.engine), Session(self.engine, expire_on_commit=False) as session:
            yield session

    @contextmanager
    def write(self) -> Iterator[Session]:
        """A session whose changes are kept together, at the end of the block, or not at all.

        On SQLite one writer is in at a time, from the block's first statement on. Raises
        RegistryError; SQLAlchemy's IntegrityError for a row that is there already.
        """
        with (
            _explained(self.engine),
            Session(self._writing, expire_on_commit=False) as session,
            session.begin(),
        ):
            yield session

    @property
    def is_sqlite(self) -> bool:
        """Whether it is a file of ours."""
        return self.engine.dialect.name == "sqlite"

    def close(self) -> None:
        """Give the connections back."""
        self.engine.dispose()


def open_(url: str) -> Database:
    """Open a database and bring it to this version's tables, which are made where it is empty.

    url: `sqlite:////absolute/path/registry.db` or `postgresql://user:password@host/name`.
    Raises ConfigError for a URL that cannot be used, RegistryError where the database cannot be
    reached, is damaged, or belongs to a newer LoRay.
    """
    engine = _engine(url)
    try:
        with _explained(engine):
            _migrate(engine)
    except BaseException:
        engine.dispose()
        raise
    return Database(engine)


def sqlite_url(path: Path) -> str:
    """The URL of a SQLite file, whose directory is made if need be."""
    storage.make_directory(path.parent)
    return f"sqlite:///{path.absolute()}"


def _engine(url: str) -> Engine:
    try:
        parts = make_url(url)
    except ArgumentError:
        raise ConfigError(  # not shown: there may be a password in it
            "database: not a URL; allowed: sqlite:////path/registry.db or "
            "postgresql://USER:PASSWORD@HOST/NAME"
        ) from None
    kind = parts.get_backend_name()
    if kind == "sqlite" and parts.database not in (None, "", ":memory:"):
        return _sqlite_engine(str(parts.database))
    if kind == "postgresql":
        return create_engine(
            parts.set(drivername="postgresql+psycopg"),
            pool_pre_ping=True,
            pool_size=4,
            max_overflow=12,
            pool_timeout=_CONNECT_S,
            hide_parameters=True,
            connect_args={
                "connect_timeout": _CONNECT_S,
                "options": f"-c statement_timeout={_STATEMENT_MS}",
                # A server that is gone without a word is noticed, too.
                "keepalives_idle": 5,
                "keepalives_interval": 5,
                "keepalives_count": 2,
                "tcp_user_timeout": _STATEMENT_MS,
            },
        )
    raise ConfigError(
        f"database: {kind!r} is not supported; allowed: sqlite:////path/registry.db or "
        "postgresql://USER:PASSWORD@HOST/NAME"
    )


def _sqlite_engine(path: str) -> Engine:
    umask = os.umask(0o077)  # hashes of keys and names of people's models are in it
    try:
        Path(path).touch()
    except OSError as error:
        raise RegistryError(
            f"database: cannot write {path} ({error.strerror}); set database=, or see who owns it"
        ) from None
    finally:
        os.umask(umask)
    engine = create_engine(
        f"sqlite:///{path}", hide_parameters=True, connect_args={"timeout": _BUSY_S}
    )

    @event.listens_for(engine, "connect")
    def set_up(connection: sqlite3.Connection, _: object) -> None:
        connection.isolation_level = None  # we say when a transaction begins, see `begin`
        for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
            connection.execute(f"PRAGMA {pragma}")

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        # A writer that first only reads could otherwise be refused in the middle.
        is_writing = connection.get_execution_options().get("is_writing", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if is_writing else "BEGIN")

    return engine


def _migrate(engine: Engine) -> None:
    settings = Config()
    settings.set_main_option("script_location", str(_MIGRATIONS))
    if engine.dialect.name == "sqlite":
        lock: Any = FileLock(f"{engine.url.database}.lock", timeout=_LOCK_S, mode=0o600)
        with lock, engine.execution_options(is_writing=True).begin() as connection:
            _upgrade(settings, connection)
        return
    with engine.begin() as connection:
        connection.execute(text(f"SELECT pg_advisory_xact_lock({_ADVISORY_LOCK})"))
        _upgrade(settings, connection)


def _upgrade(settings: Config, connection: Connection) -> None:
    settings.attributes["connection"] = connection
    try:
        command.upgrade(settings, "head")
    except CommandError as error:
        raise RegistryError(
            f"database: made by another version of LoRay ({error}); use that version or a newer "
            "one, or restore a backup"
        ) from None


@contextmanager
def _explained(engine: Engine) -> Iterator[None]:
    """Turn what the database raises into an error that says what to do, and shows no values."""
    # Also of the query nothing is shown: a password may stand there.
    where = engine.url.set(query={}).render_as_string(hide_password=True)
    try:
        yield
    except IntegrityError:
        raise
    except DBAPIError as error:
        why = str(error.orig).strip().splitlines()[:1]
        raise RegistryError(f"database {where}: {''.join(why)}; see that it runs") from error
    except (SQLAlchemyError, Timeout) as error:
        raise RegistryError(f"database {where}: {type(error).__name__}") from error
