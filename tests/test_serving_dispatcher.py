"""The dispatcher: whose turn it is, what survives it, and that nothing happens twice."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import chaos
import pytest
from process_runs import ProcessRuns
from processes import ROOT
from sqlalchemy import create_engine, select

from cluster import storage
from cluster.errors import FencedError, RegistryError
from cluster.registry import cards, database, leases
from cluster.registry.database import Database
from cluster.registry.tables import ApiKey, Job, JobCheckpoint, JobEvent, Model
from serving.access import Caller
from serving.dispatcher import Dispatcher
from serving.finding import Finding
from serving.job_book import JobBook
from serving.runner import Room, RunState
from serving.shelf import FileLimits, Label, Shelf
from serving.tuning_config import TuningConfig
from serving.tuning_schema import CreateJob
from training.config import ModelConfig
from training.events import EventLog

LINE = b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
BASE = "tiny"


class Instant:
    """Runs that have ended when they are started."""

    def __init__(self, adapter: Path) -> None:
        self._adapter = adapter
        self.order: list[str] = []
        self.free = {"CPU": 4.0}

    def start(self, run_job: str, recipe: Path) -> None:
        self.order.append(run_job)
        events = EventLog(recipe.parent / "events.jsonl")
        events.write("started", from_step=0, num_steps=1)
        events.write("step", step=1, num_steps=1, loss=1.0, step_s=0.1)
        shutil.copytree(self._adapter, recipe.parent / "adapter")
        events.write("finished", steps=1, was_stopped=False, real_tokens=7)
        events.close()

    def state(self, run_job: str) -> RunState:
        return "ended" if run_job in self.order else "unknown"

    def stop(self, run_job: str) -> None:
        raise AssertionError("it has ended")

    def room(self) -> Room:
        return Room(free=self.free, total=self.free)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Something that verifies; nothing here loads it."""
    target = tmp_path_factory.mktemp("result") / "adapter"
    storage.commit(target, lambda path: (path / "x").write_text("x") and None, attempt="1")
    return target


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Database]:
    found = database.open_(database.sqlite_url(tmp_path / "registry.db"))
    yield found
    found.close()


def shelf_of(opened: Database, directory: Path) -> Shelf:
    return Shelf(opened, directory / "runs", FileLimits(), time.time)


def book_of(opened: Database, shelf: Shelf) -> JobBook:
    return JobBook(opened, shelf, base=BASE, unfinished_per_key=1000, clock=time.time)


def file_of(shelf: Shelf) -> str:
    upload = shelf.receive("default")
    upload.write(LINE * 10)
    file = shelf.keep(upload, Label(project="default", filename="a.jsonl", purpose="fine-tune"))
    upload.close()
    shelf.judge(file.id, Finding(examples=10, details=None))
    return file.id


def dispatcher_of(
    opened: Database, shelf: Shelf, directory: Path, runner: Instant, **fields: int
) -> Dispatcher:
    return Dispatcher(
        database=opened,
        shelf=shelf,
        runner=runner,
        tuning=TuningConfig(storage=str(directory / "runs"), **fields),
        model=ModelConfig(base=BASE),
        holder="me",
    )


def test_200_jobs_of_five_keys_take_turns_and_lists_stay_quick(
    tmp_path: Path, opened: Database, adapter: Path
) -> None:
    shelf = shelf_of(opened, tmp_path)
    book, file = book_of(opened, shelf), file_of(shelf)
    keys = [f"key{number}" for number in range(5)]
    owner: dict[str, str] = {}
    for key in keys:  # one after the other: the first is 40 jobs ahead
        for number in range(40):
            body = CreateJob(model=BASE, training_file=file, seed=number)
            owner[book.create(body, Caller(key_id=key)).id] = key
    runner = Instant(adapter)
    dispatcher = dispatcher_of(opened, shelf, tmp_path, runner)
    took: list[float] = []
    while len(runner.order) < 200:
        assert dispatcher.step()
        started = time.perf_counter()
        assert len(book.list_("default", after=None, limit=20).rows) == 20
        took.append(time.perf_counter() - started)
    for _ in range(3):
        dispatcher.step()
    starts = [owner[name.rpartition("-")[0]] for name in runner.order]
    for place in range(0, 200, 5):
        assert sorted(starts[place : place + 5]) == keys
    assert len(set(runner.order)) == 200
    with opened.read() as session:
        jobs = session.scalars(select(Job)).all()
        assert {job.status for job in jobs} == {"succeeded"}
        assert {job.trained_tokens for job in jobs} == {7}
    print(f"figure: listing p99 {sorted(took)[int(len(took) * 0.99)] * 1e3:.1f} ms")


def test_a_key_runs_no_more_jobs_at_once_than_it_may_and_none_without_room(
    tmp_path: Path, opened: Database, adapter: Path
) -> None:
    shelf = shelf_of(opened, tmp_path)
    book, file = book_of(opened, shelf), file_of(shelf)
    with opened.write() as session:
        session.add(
            ApiKey(
                id="few", name="few", project="default", hash="0" * 64, scopes=["tune"],
                concurrent_jobs=1, created_at=0.0,
            )
        )  # fmt: skip
    for number in range(3):
        for key in ("few", "many"):
            body = CreateJob(model=BASE, training_file=file, seed=number)
            book.create(body, Caller(key_id=key))

    class Endless(Instant):
        def start(self, run_job: str, recipe: Path) -> None:
            self.order.append(run_job)
            events = EventLog(recipe.parent / "events.jsonl")
            events.write("started", from_step=0, num_steps=9)
            events.close()

        def state(self, run_job: str) -> RunState:
            return "alive"

    runner = Endless(adapter)
    dispatcher = dispatcher_of(opened, shelf, tmp_path, runner, jobs_at_once=6)
    runner.free = {"CPU": 0.5}
    for _ in range(4):
        dispatcher.step()
    assert runner.order == []
    runner.free = {"CPU": 4.0}
    for _ in range(20):
        dispatcher.step()
    with opened.read() as session:
        running = session.scalars(select(Job.key_id).where(Job.status == "running"))
        assert Counter(running) == {"few": 1, "many": 3}


def test_one_dispatches_at_a_time_and_an_older_one_writes_nothing(
    tmp_path: Path, opened: Database, adapter: Path
) -> None:
    now = 100.0
    assert leases.take(opened, "x", holder="a", now=now, for_s=10) == 1
    assert leases.take(opened, "x", holder="b", now=now + 5, for_s=10) is None
    assert leases.take(opened, "x", holder="a", now=now + 5, for_s=10) == 1
    assert leases.take(opened, "x", holder="b", now=now + 20, for_s=10) == 2
    with opened.write() as session, pytest.raises(FencedError):
        leases.require(session, "x", 1)
    leases.give_back(opened, "x", 2)
    assert leases.take(opened, "x", holder="a", now=now + 21, for_s=10) == 3


@pytest.mark.chaos
@pytest.mark.timeout(900)
def test_jobs_whose_dispatchers_and_runs_are_killed_all_end_once_and_in_order(
    tmp_path: Path, opened: Database, adapter: Path
) -> None:
    """Two dispatchers; one of them, or a run, is killed every third of a second."""
    shelf = shelf_of(opened, tmp_path)
    book, file = book_of(opened, shelf), file_of(shelf)
    jobs = [
        book.create(CreateJob(model=BASE, training_file=file, seed=n), Caller()).id
        for n in range(50 if chaos.IS_FULL else 8)
    ]
    runs = ProcessRuns(tmp_path / "processes", adapter)
    dice = random.Random(3)
    kills = Counter[str]()
    living: list[subprocess.Popen[bytes]] = []
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])

    def begin() -> None:
        script = str(ROOT / "tests" / "dispatcher_process.py")
        words = [str(tmp_path), str(adapter), f"d{time.monotonic_ns()}", str(opened.engine.url)]
        environment = {**os.environ, "PYTHONPATH": paths}
        living.append(subprocess.Popen([sys.executable, script, *words], env=environment))

    def statuses() -> Counter[str]:
        with opened.read() as session:
            return Counter(session.scalars(select(Job.status)))

    deadline = time.monotonic() + 800
    last = time.monotonic()
    try:
        while statuses()["succeeded"] < len(jobs):
            assert time.monotonic() < deadline, statuses()
            while len(living) < 2:
                begin()
            time.sleep(0.05)
            if time.monotonic() - last < 1.0 or sum(kills.values()) >= 3 * len(jobs):
                continue
            last = time.monotonic()
            alive = runs.alive()
            if alive and dice.random() < 0.5:
                runs.stop(dice.choice(alive))
                kills["run"] += 1
            elif runs.started():
                victim = living.pop(dice.randrange(2))
                victim.kill()
                victim.wait()
                kills["dispatcher"] += 1
    finally:
        for process in living:
            process.send_signal(signal.SIGKILL)
            process.wait()
    assert runs.alive() == []
    check_all(opened, jobs, runs.started(), tmp_path)
    print(f"figure: {len(jobs)} jobs, {dict(kills)} killed: all succeeded once, in order")


def check_all(opened: Database, jobs: list[str], started: list[str], directory: Path) -> None:
    """Each job has one end, one model, one story without gaps, and steps that only go up."""
    with opened.read() as session:
        for id in jobs:
            job = session.scalars(select(Job).where(Job.id == id)).one()
            told = select(JobEvent).where(JobEvent.job_id == id).order_by(JobEvent.place)
            events = session.scalars(told).all()
            assert [event.place for event in events] == list(range(1, len(events) + 1))
            steps = [event.data["step"] for event in events if event.data]
            assert steps == [1, 2, 3, 4, 5, 6]
            ends = [e.message for e in events if e.message.startswith("The job has")]
            assert ends == ["The job has successfully completed"]
            mine = [name for name in started if name.startswith(id)]
            assert sorted(mine) == sorted(f"{id}-{n}" for n in range(1, job.attempt + 1))
            assert job.run_job is None
            names = session.scalars(select(Model.step).where(Model.job_id == id)).all()
            assert sorted(names, key=lambda step: step or 99) == [2, 4, 6, None]
            points = session.scalars(select(JobCheckpoint.step).where(JobCheckpoint.job_id == id))
            assert sorted(points) == [2, 4, 6]
            card = cards.read(directory / "runs" / id)
            assert card is not None
            assert (card.status, card.model) == ("succeeded", job.fine_tuned_model)
            assert not (directory / "runs" / id / "training_file.jsonl").exists()


def test_a_registry_that_is_away_for_a_moment_ends_no_job(
    tmp_path: Path, opened: Database, adapter: Path
) -> None:
    shelf = shelf_of(opened, tmp_path)
    book, file = book_of(opened, shelf), file_of(shelf)
    job = book.create(CreateJob(model=BASE, training_file=file, seed=1), Caller())
    runner = Instant(adapter)
    dispatcher = dispatcher_of(opened, shelf, tmp_path, runner)
    runner.free = {"CPU": 0.0}
    dispatcher.step()
    assert book.get("default", job.id).status == "queued"
    runner.free = {"CPU": 4.0}
    gone = Database(create_engine(f"sqlite:///{tmp_path}/none/registry.db"))
    dispatcher.shelf = shelf_of(gone, tmp_path)
    with pytest.raises(RegistryError):
        dispatcher.step()
    assert book.get("default", job.id).status == "queued"
    dispatcher.shelf = shelf
    for _ in range(3):
        dispatcher.step()
    assert book.get("default", job.id).status == "succeeded"
