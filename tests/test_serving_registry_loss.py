"""A database server that is killed under traffic: what is known goes on, the rest waits for it."""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import requests
from postgres import PostgresServer
from server import Running, serving
from sqlalchemy import select

from cluster.registry import keys
from cluster.registry.keys import Rights
from cluster.registry.tables import Usage
from serving.access import Tune

pytestmark = pytest.mark.chaos

_SOON_S = 30.0


def ask(running: Running, key: str, method: str = "POST", path: str = "") -> requests.Response:
    body: Any = {"model": running.replica.service.base.name, "prompt": "a", "max_tokens": 2}
    return requests.request(
        method,
        f"{running.url}{path or '/v1/completions'}",
        json=body,
        headers={"Authorization": f"Bearer {key}"},
        timeout=30,
    )


class Traffic:
    """A client that asks without a pause."""

    def __init__(self, running: Running, key: str) -> None:
        self.statuses: list[int] = []
        self.slowest_s = 0.0
        self._stop = threading.Event()
        self._ask = lambda: ask(running, key)
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.is_set():
            started = time.monotonic()
            self.statuses.append(self._ask().status_code)
            self.slowest_s = max(self.slowest_s, time.monotonic() - started)

    def more(self, num: int) -> None:
        """Wait for so many more answers."""
        wanted = len(self.statuses) + num
        wait(lambda: len(self.statuses) >= wanted)

    def end(self) -> None:
        self._stop.set()
        self._thread.join(30)


def wait(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _SOON_S
    while not condition():
        assert time.monotonic() < deadline, "nothing happened in time"
        time.sleep(0.02)


def test_a_database_server_that_is_killed_under_traffic_is_not_felt_by_known_keys(
    tmp_path: Path, tiny_base: Path, own_postgres: PostgresServer
) -> None:
    url = own_postgres.make_database()
    with serving(tmp_path, tiny_base, database=url) as running:

        @running.app.post("/v1/made")
        def make(caller: Tune) -> dict[str, str]:
            """A route that writes."""
            rights = Rights(name="new", requests_per_minute=100_000)
            return {"key": keys.create(running.database, rights, now=time.time())}

        rights = Rights(name="ada", scopes=("infer", "tune"), tokens_per_day=10**9)
        known = keys.create(running.database, rights, now=time.time())
        traffic = Traffic(running, known)
        try:
            traffic.more(20)
            for _ in range(2):
                assert ask(running, known, path="/v1/made").status_code == 200
                own_postgres.kill()
                traffic.more(50)
                written = ask(running, known, path="/v1/made")
                assert written.status_code == 503
                assert written.json()["error"]["code"] == "registry_unavailable"
                assert int(written.headers["retry-after"]) >= 1
                assert "postgres" not in written.text
                assert "127.0.0.1" not in written.text
                unknown = "sk-loray-0a0a0a0a-x"
                wait(lambda: ask(running, unknown).status_code == 503)  # noqa: B023
                assert ask(running, "").status_code == 401
                traffic.more(50)
                own_postgres.start()
                wait(lambda: ask(running, unknown).status_code == 401)  # noqa: B023
                made = ask(running, known, path="/v1/made")
                assert made.status_code == 200
                assert ask(running, made.json()["key"]).status_code == 200
                keys.revoke(running.database, made.json()["key"].split("-")[2], now=time.time())
                wait(lambda: ask(running, made.json()["key"]).status_code == 401)  # noqa: B023
        finally:
            traffic.end()
        assert set(traffic.statuses) == {200}
        assert traffic.slowest_s < 5
        num = len(traffic.statuses)

        def counted() -> int:
            rows = select(Usage.used).where(
                Usage.key_id == known.split("-")[2], Usage.kind == "tokens"
            )
            with running.database.read() as session:
                return sum(session.scalars(rows))

        wait(lambda: counted() >= 2 * num)  # what was counted meanwhile has come, too
