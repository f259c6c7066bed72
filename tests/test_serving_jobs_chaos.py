"""Short jobs over HTTP, while dispatchers, runs and the database server are killed all the time.

`-s` shows how often. The runs are plain processes; test_serving_jobs_ray has real ones.
"""

import json
import os
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import chaos
import psutil
import pytest
import requests
from openai import BadRequestError, OpenAI
from postgres import PostgresServer
from process_runs import ProcessRuns
from processes import ROOT
from server import Running, serving
from sqlalchemy import event, select
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from cluster import storage
from cluster.registry import cards, database
from cluster.registry.database import Database
from cluster.registry.tables import File, Job, JobCheckpoint, JobEvent, Lease, Model

pytestmark = pytest.mark.chaos

LINE = b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
PATH = "/v1/fine_tuning/jobs"
NUM_JOBS = chaos.times(6, 50)
NUM_KILLS = chaos.times(12, 150)
ENDS = ("succeeded", "failed", "cancelled")


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


class Owner:
    """Makes the jobs with the stock client, steers some, and notes how each is to end."""

    def __init__(self, running: Running, files: Mapping[str, str], *, seed: int) -> None:
        self.wanted: dict[str, str] = {}
        self.error: BaseException | None = None
        self._client = OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=15)
        self._model = running.replica.recipe.model_name
        self._files = files
        self._dice = random.Random(seed)
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def is_done(self) -> bool:
        if self.error is not None:
            raise self.error
        return not self._thread.is_alive()

    def end(self) -> None:
        self._thread.join(120)
        assert not self._thread.is_alive()

    def _run(self) -> None:
        try:
            for number in range(NUM_JOBS):
                self._make(number)
        except BaseException as error:
            self.error = error

    def _make(self, number: int) -> None:
        jobs, act = self._client.fine_tuning.jobs, number % 5
        file = self._files["short" if act == 1 else "good"]
        id_ = jobs.create(model=self._model, training_file=file, seed=number).id
        self.wanted[id_] = "failed" if act == 1 else "succeeded"
        time.sleep(self._dice.uniform(0, 1))
        if act == 2:
            with suppress(BadRequestError):  # it was quicker
                jobs.cancel(id_)
                self.wanted[id_] = "cancelled"
        elif act == 3:
            with suppress(BadRequestError):
                jobs.pause(id_)
                time.sleep(self._dice.uniform(0, 1))
            with suppress(BadRequestError):  # it was resumed, and the answer was lost
                jobs.resume(id_)


class Lookers:
    """Who lists jobs all the time, without retries."""

    def __init__(self, running: Running) -> None:
        self.answers = Counter[int]()
        self.odd: list[str] = []
        self._url = f"{running.url}{PATH}"
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def end(self) -> None:
        self._stop.set()
        self._thread.join(60)

    def _run(self) -> None:
        while not self._stop.wait(0.05):
            answer = requests.get(self._url, timeout=60)
            self.answers[answer.status_code] += 1
            if answer.status_code != 200 and not is_clear(answer):
                self.odd.append(f"{answer.status_code} {answer.text}")


def is_clear(answer: requests.Response) -> bool:
    """503 with a code, when to come again, and nothing of where the database is."""
    error = answer.json()["error"]
    is_silent = not any(word in answer.text for word in ("Traceback", "psycopg", "127.0.0.1"))
    told = (answer.status_code, error["code"], int(answer.headers["retry-after"]) >= 1)
    return told == (503, "registry_unavailable", True) and is_silent


@contextmanager
def away(server: PostgresServer, seconds: float) -> Iterator[None]:
    """Kill a database server, and start it again after the block, which takes so long at least."""
    server.kill()
    back = time.monotonic() + seconds
    yield
    time.sleep(max(0.0, back - time.monotonic()))
    server.start()


def upload(running: Running, num_lines: int) -> str:
    file = ("data.jsonl", LINE * num_lines)
    return running.client.files.create(file=file, purpose="fine-tune").id


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
        files = {"good": upload(running, 10), "short": upload(running, 9)}
        owner, lookers = Owner(running, files, seed=3), Lookers(running)
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
        check_all(running.database, owner.wanted, runs.started(), tmp_path)
    print(f"figure: {kind}: {dict(Counter(owner.wanted.values()))} jobs; {dict(kills)} killed")
    print(f"figure: {kind}: lists were answered {dict(lookers.answers)}")
    assert lookers.odd == []
    assert set(lookers.answers) <= ({200, 503} if server else {200})


def statuses(opened: Database) -> Counter[str]:
    with opened.read() as session:
        return Counter(session.scalars(select(Job.status)))


def dispatching(opened: Database) -> str | None:
    with opened.read() as session:
        return session.scalar(select(Lease.holder))


def is_over(opened: Database) -> bool:
    """Whether every job has come to its end, and its run, too."""
    with opened.read() as session:
        rows = session.execute(select(Job.status, Job.run_job)).all()
    return all(status in ENDS and run_job is None for status, run_job in rows)


def check_all(
    opened: Database, wanted: Mapping[str, str], started: list[str], directory: Path
) -> None:
    """Each job that was made is there once and has ended as it should; see `check`."""
    with opened.read() as session:
        jobs = session.scalars(select(Job).order_by(Job.number)).all()
        assert {job.id: job.status for job in jobs} == wanted
        assert [job.seed for job in jobs] == list(range(NUM_JOBS))
        for job in jobs:
            mine = [name for name in started if name.startswith(job.id)]
            assert sorted(mine) == sorted(f"{job.id}-{n}" for n in range(1, job.attempt + 1))
            check_story(session, job, directory / "runs" / job.id)
            check_result(session, job, directory / "runs" / job.id)


def check_story(session: Session, job: Job, run_dir: Path) -> None:
    """No event is out of order, lost or told twice; all of the run's are read."""
    told = select(JobEvent).where(JobEvent.job_id == job.id).order_by(JobEvent.place)
    events = session.scalars(told).all()
    assert [event.place for event in events] == list(range(1, len(events) + 1))
    assert [event.number for event in events] == sorted(event.number for event in events)
    said = [event.message for event in events]
    assert said[0] == f"Created fine-tuning job: {job.id}"
    last = {
        "succeeded": "The job has successfully completed",
        "failed": "The job failed: ",
        "cancelled": "The job was cancelled",
    }
    ends = [message for message in said if message.startswith(tuple(last.values()))]
    assert ends == said[-1:]
    assert ends[0].startswith(last[job.status])
    steps = [event.data["step"] for event in events if event.data]
    assert steps == list(range(1, job.last_step + 1))
    assert said.count("Fine-tuning job started") == (job.started_at is not None)
    if job.status == "succeeded":
        path = run_dir / "events.jsonl"
        assert job.events_offset == path.stat().st_size
        kinds = [json.loads(line) for line in path.read_text().splitlines() if line[-1:] == "}"]
        ended = [line for line in kinds if line["event"] == "finished" and not line["was_stopped"]]
        assert len(ended) == 1


def check_result(session: Session, job: Job, run_dir: Path) -> None:
    """What succeeded has one model, one file of results and its checkpoints; the rest has none."""
    is_done = job.status == "succeeded"
    models = session.scalars(select(Model.step).where(Model.job_id == job.id)).all()
    points = session.scalars(select(JobCheckpoint.step).where(JobCheckpoint.job_id == job.id)).all()
    assert sorted(step for step in models if step) == sorted(points)
    assert models.count(None) == is_done
    results = select(File.id).where(File.filename == f"{job.id}.csv")
    assert session.scalars(results).all() == job.result_files
    assert len(job.result_files) == is_done
    assert list(run_dir.glob("*.jsonl")) in ([], [run_dir / "events.jsonl"])
    if is_done:
        assert job.last_step == 6
        assert {2, 4, 6} <= set(points)
        card = cards.read(run_dir)
        assert card is not None
        assert (card.status, card.model) == ("succeeded", job.fine_tuned_model)


def test_a_job_whose_answer_was_lost_with_the_database_is_made_once(
    tmp_path: Path, tiny_base: Path, own_postgres: PostgresServer
) -> None:
    tuning = {"storage": str(tmp_path / "runs")}
    url = own_postgres.make_database()
    with serving(tmp_path, tiny_base, tuning=tuning, database=url) as running:
        file = upload(running, 10)
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
