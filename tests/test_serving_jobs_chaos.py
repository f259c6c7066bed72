"""Short jobs over HTTP, while dispatchers, runs and the database server are killed all the time.

`-s` shows how often. The runs are plain processes; test_serving_jobs_ray has real ones.
"""

import os
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import chaos
import psutil
import pytest
import requests
from jobs_under_faults import LINE, PATH, Lookers, Owner, check_all, is_clear, is_over, statuses
from openai import OpenAI
from postgres import PostgresServer
from process_runs import ProcessRuns
from processes import ROOT
from server import serving
from sqlalchemy import event, select
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from cluster import storage
from cluster.registry import database
from cluster.registry.database import Database
from cluster.registry.tables import Lease

pytestmark = pytest.mark.chaos

NUM_JOBS = chaos.times(6, 50)
NUM_KILLS = chaos.times(12, 150)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Something that verifies; nothing here loads it."""
    target = tmp_path_factory.mktemp("result") / "adapter"
    storage.commit(target, lambda path: (path / "x").write_text("x") and None, attempt="1")
    return target


class Dispatchers:
    """Two processes; those that have ended are made anew."""

    def __init__(self, directory: Path, adapter: Path, url: str) -> None:
        script = str(ROOT / "tests" / "dispatcher_process.py")
        paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
        with (directory / "dispatchers.log").open("wb") as log:
            self._parent = subprocess.Popen(
                [sys.executable, script, str(directory), str(adapter), url, "2"],
                env={**os.environ, "PYTHONPATH": paths}, stdout=log, stderr=log,
            )  # fmt: skip

    def kill(self, name: str | None) -> bool:
        """Kill the one that dispatches; whether it was not killed before."""
        assert self._parent.poll() is None
        for process in psutil.Process(self._parent.pid).children():
            if str(process.pid) == name and process.status() != psutil.STATUS_ZOMBIE:
                process.kill()
                return True
        return False

    def end(self) -> None:
        children = psutil.Process(self._parent.pid).children()
        self._parent.kill()
        self._parent.wait()
        for process in children:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        _, alive = psutil.wait_procs(children, timeout=30)
        assert not alive


@contextmanager
def away(server: PostgresServer, seconds: float) -> Iterator[None]:
    """Kill a database server, and start it again after the block, which takes so long at least."""
    server.kill()
    back = time.monotonic() + seconds
    yield
    time.sleep(max(0.0, back - time.monotonic()))
    server.start()


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_every_job_ends_as_it_should_and_once_whatever_is_killed(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path, tiny_base: Path, adapter: Path
) -> None:
    server: PostgresServer | None = None
    url = database.sqlite_url(tmp_path / "registry.db")
    if kind == "postgresql":
        server = request.getfixturevalue("own_postgres")
        assert server is not None
        url = server.make_database()
    dice, kills = random.Random(3), Counter[str]()
    runs = ProcessRuns(tmp_path / "processes", adapter)
    dispatchers = Dispatchers(tmp_path, adapter, url)
    tuning = {"storage": str(tmp_path / "runs"), "unfinished_per_key": 1000}
    with serving(tmp_path, tiny_base, tuning=tuning, database=url) as running:
        owner = Owner(running.url, running.replica.recipe.model_name, NUM_JOBS)
        lookers = Lookers(running.url)
        try:
            deadline = time.monotonic() + 900
            while not (owner.is_done() and is_over(running.database)):
                assert time.monotonic() < deadline, statuses(running.database)
                time.sleep(dice.uniform(0.3, 1.2))
                if sum(kills.values()) >= NUM_KILLS:
                    continue
                alive, chance = runs.alive(), dice.random()
                holder = dispatching(running.database)
                if chance < 0.25 and server is not None:
                    kills["database"] += 1
                    with away(server, dice.uniform(0.5, 3.0)):
                        if dice.random() < 0.3:
                            kills["dispatcher"] += dispatchers.kill(holder)
                elif chance < 0.65 and alive:
                    kills["run"] += 1
                    runs.stop(dice.choice(alive))
                else:
                    kills["dispatcher"] += dispatchers.kill(holder)
        finally:
            owner.end()
            lookers.end()
            dispatchers.end()
        assert runs.alive() == []
        check_all(running.database, owner.wanted, runs.started(), tmp_path / "runs")
    print(f"figure: {kind}: {dict(Counter(owner.wanted.values()))} jobs; {dict(kills)} killed")
    print(f"figure: {kind}: lists were answered {dict(lookers.answers)}")
    assert lookers.odd == []
    assert set(lookers.answers) <= ({200, 503} if server else {200})


def dispatching(opened: Database) -> str | None:
    with opened.read() as session:
        return session.scalar(select(Lease.holder))


def test_a_job_whose_answer_was_lost_with_the_database_is_made_once(
    tmp_path: Path, tiny_base: Path, own_postgres: PostgresServer
) -> None:
    tuning = {"storage": str(tmp_path / "runs")}
    url = own_postgres.make_database()
    with serving(tmp_path, tiny_base, tuning=tuning, database=url) as running:
        file = running.client.files.create(file=("a.jsonl", LINE * 10), purpose="fine-tune").id
        body: Any = {"model": running.replica.recipe.model_name, "training_file": file}
        lost: list[int] = []

        def lose(_: Session) -> None:
            """The server is killed when it has committed, before it says so."""
            if not lost:
                own_postgres.kill()
                lost.append(1)
                raise OperationalError("COMMIT", None, Exception("server closed the connection"))

        def come_back() -> None:
            while not lost:
                time.sleep(0.01)
            time.sleep(2.5)
            own_postgres.start()

        coming = threading.Thread(target=come_back)
        coming.start()
        event.listen(Session, "after_commit", lose)
        try:
            first = requests.post(f"{running.url}{PATH}", json=body, timeout=30)
        finally:
            event.remove(Session, "after_commit", lose)
        assert is_clear(first), first.text
        away = requests.post(f"{running.url}{PATH}", json=body, timeout=30)
        assert is_clear(away), away.text
        client = OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=10)
        made = client.fine_tuning.jobs.create(**body).id
        coming.join()
        assert [job.id for job in client.fine_tuning.jobs.list()] == [made]
        events = [one.message for one in client.fine_tuning.jobs.list_events(made)]
        assert events == [f"Validating training file: {file}", f"Created fine-tuning job: {made}"]
