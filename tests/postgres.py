"""A PostgreSQL server of our own, from Debian's package, in a directory of its own."""

import os
import pwd
import secrets
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import psycopg
from local_cluster import free_port

_START_S = 60.0
_BINARIES = Path("/usr/lib/postgresql")
_USER = "tester"


def binaries() -> Path | None:
    """The directory of the newest PostgreSQL that is installed."""
    found = [path.parent for path in _BINARIES.glob("*/bin/initdb")]
    return max(found, key=lambda path: int(path.parent.name), default=None)


class PostgresServer:
    """One that can be killed and started again with what it has kept."""

    def __init__(self, directory: Path, bin_: Path) -> None:
        self._bin = bin_
        self._directory = directory
        self._data = directory / "data"
        self._log = directory / "log"
        self._password = secrets.token_hex(16)
        self._port = free_port()
        self._process: subprocess.Popen[bytes] | None = None
        password_file = directory / "password"
        password_file.write_text(self._password)
        self._identity = _unprivileged()
        if self._identity:
            for path in (directory, password_file):
                os.chown(path, self._identity["user"], self._identity["group"])
        subprocess.run(
            [
                bin_ / "initdb", "-D", self._data, "-U", _USER, "-A", "scram-sha-256",
                f"--pwfile={password_file}", "-E", "UTF8", "--no-locale", "--no-sync",
            ],
            check=True, capture_output=True, timeout=_START_S, cwd=directory, **self._identity,
        )  # fmt: skip

    def start(self) -> None:
        """Start it, and wait until it answers."""
        settings = {
            "listen_addresses": "127.0.0.1", "port": str(self._port), "fsync": "off",
            "unix_socket_directories": str(self._directory), "max_connections": "100",
        }  # fmt: skip
        words = [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
        with self._log.open("ab") as log:
            self._process = process = subprocess.Popen[bytes](
                [self._bin / "postgres", "-D", self._data, *words],
                stdout=log, stderr=log, cwd=self._data, start_new_session=True, **self._identity,
            )  # fmt: skip
        deadline = time.monotonic() + _START_S
        while True:
            assert process.poll() is None, self._log.read_text()
            try:
                psycopg.connect(self.url("postgres"), connect_timeout=5).close()
                return
            except psycopg.OperationalError:
                assert time.monotonic() < deadline, self._log.read_text()
                time.sleep(0.05)

    def kill(self) -> None:
        """Kill it and all its children; nothing that it holds in memory is kept."""
        if self._process is not None:
            # Each of them is the leader of a group of its own.
            all_ = [parent := psutil.Process(self._process.pid), *parent.children(recursive=True)]
            for process in all_:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            self._process.wait(30)
            self._process = None
            _, alive = psutil.wait_procs(all_, timeout=30)
            assert not alive

    def url(self, name: str, *, is_local: bool = False) -> str:
        """Of a database. is_local: by a socket in the file system, for other network namespaces."""
        where = f"127.0.0.1:{self._port}/{name}"
        if is_local:
            where = f"/{name}?host={self._directory}&port={self._port}"
        return f"postgresql://{_USER}:{self._password}@{where}"

    def make_database(self, *, is_local: bool = False) -> str:
        """The URL of a new and empty database; is_local: see `url`."""
        name = f"t{secrets.token_hex(8)}"
        with psycopg.connect(self.url("postgres"), autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}".encode())
        return self.url(name, is_local=is_local)


@contextmanager
def postgres_server(bin_: Path) -> Iterator[PostgresServer]:
    """A server that runs."""
    directory = Path(tempfile.mkdtemp(prefix="loray-postgres-"))
    server = None
    try:
        server = PostgresServer(directory, bin_)
        server.start()
        yield server
    finally:
        if server is not None:
            server.kill()
        shutil.rmtree(directory)


def _unprivileged() -> dict[str, Any]:
    """Who PostgreSQL is to be, which refuses to be root."""
    if os.geteuid() != 0:
        return {}
    names = {entry.pw_name: entry for entry in pwd.getpwall()}
    entry = names.get("postgres") or names["nobody"]
    return {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}
