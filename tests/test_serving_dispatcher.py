"""The dispatcher: whose turn it is, what survives it, and that nothing happens twice."""

import shutil
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import pytest
from sqlalchemy import create_engine, event, select
from sqlalchemy.orm import Session

from cluster import storage
from cluster.errors import FencedError, RegistryError
from cluster.registry import cards, leases
from cluster.registry.database import Database
from cluster.registry.tables import ApiKey, File, Job, Model
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

    def start(self, run_job: str, words: Sequence[str]) -> None:
        self.order.append(run_job)
        run_dir = Path(words[1]).parent
        events = EventLog(run_dir / "events.jsonl")
        events.write("started", from_step=0, num_steps=1)
        events.write("step", step=1, num_steps=1, loss=1.0, step_s=0.1)
        shutil.copytree(self._adapter, run_dir / "adapter")
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
    tmp_path: Path, registry: Database, adapter: Path
) -> None:
    shelf = shelf_of(registry, tmp_path)
    book, file = book_of(registry, shelf), file_of(shelf)
    keys = [f"key{number}" for number in range(5)]
    owner: dict[str, str] = {}
    for key in keys:  # one after the other: the first is 40 jobs ahead
        for number in range(40):
            body = CreateJob(model=BASE, training_file=file, seed=number)
            owner[book.create(body, Caller(key_id=key)).id] = key
    runner = Instant(adapter)
    dispatcher = dispatcher_of(registry, shelf, tmp_path, runner)
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
    with registry.read() as session:
        jobs = session.scalars(select(Job)).all()
        assert {job.status for job in jobs} == {"succeeded"}
        assert {job.trained_tokens for job in jobs} == {7}
    print(f"figure: listing p99 {sorted(took)[int(len(took) * 0.99)] * 1e3:.1f} ms")


def test_a_key_runs_no_more_jobs_at_once_than_it_may_and_none_without_room(
    tmp_path: Path, registry: Database, adapter: Path
) -> None:
    shelf = shelf_of(registry, tmp_path)
    book, file = book_of(registry, shelf), file_of(shelf)
    with registry.write() as session:
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
        def start(self, run_job: str, words: Sequence[str]) -> None:
            self.order.append(run_job)
            events = EventLog(Path(words[1]).parent / "events.jsonl")
            events.write("started", from_step=0, num_steps=9)
            events.close()

        def state(self, run_job: str) -> RunState:
            return "alive"

    runner = Endless(adapter)
    dispatcher = dispatcher_of(registry, shelf, tmp_path, runner, jobs_at_once=6)
    runner.free = {"CPU": 0.5}
    for _ in range(4):
        dispatcher.step()
    assert runner.order == []
    runner.free = {"CPU": 4.0}
    for _ in range(20):
        dispatcher.step()
    with registry.read() as session:
        running = session.scalars(select(Job.key_id).where(Job.status == "running"))
        assert Counter(running) == {"few": 1, "many": 3}


def test_one_dispatches_at_a_time_and_an_older_one_writes_nothing(
    tmp_path: Path, registry: Database, adapter: Path
) -> None:
    now = 100.0
    assert leases.take(registry, "x", holder="a", now=now, for_s=10) == 1
    assert leases.take(registry, "x", holder="b", now=now + 5, for_s=10) is None
    assert leases.take(registry, "x", holder="a", now=now + 5, for_s=10) == 1
    assert leases.take(registry, "x", holder="b", now=now + 20, for_s=10) == 2
    with registry.write() as session, pytest.raises(FencedError):
        leases.require(session, "x", 1)
    leases.give_back(registry, "x", 2)
    assert leases.take(registry, "x", holder="a", now=now + 21, for_s=10) == 3


def test_a_registry_that_is_away_for_a_moment_ends_no_job(
    tmp_path: Path, registry: Database, adapter: Path
) -> None:
    shelf = shelf_of(registry, tmp_path)
    book, file = book_of(registry, shelf), file_of(shelf)
    job = book.create(CreateJob(model=BASE, training_file=file, seed=1), Caller())
    runner = Instant(adapter)
    dispatcher = dispatcher_of(registry, shelf, tmp_path, runner)
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


class Crashing(Instant):
    """Runs that are lost before they begin."""

    def start(self, run_job: str, words: Sequence[str]) -> None:
        self.order.append(run_job)


def test_a_run_that_is_lost_rests_ever_longer_before_it_is_started_again(
    tmp_path: Path, registry: Database, adapter: Path
) -> None:
    shelf = shelf_of(registry, tmp_path)
    book, file = book_of(registry, shelf), file_of(shelf)
    job = book.create(CreateJob(model=BASE, training_file=file, seed=1), Caller())
    runner = Crashing(adapter)
    now = 1000.0

    def step() -> int:
        """By a dispatcher that remembers nothing; how many runs were started."""
        dispatcher = dispatcher_of(registry, shelf, tmp_path, runner, attempts=9)
        dispatcher.clock = lambda: now
        for _ in range(3):
            assert dispatcher.step()
        return len(runner.order)

    for number, rest_s in enumerate((5, 10, 20, 40, 80, 160, 300, 300), start=1):
        assert step() == number
        now += rest_s - 0.5
        assert step() == number
        now += 0.5
    other = book.create(CreateJob(model=BASE, training_file=file, seed=2), Caller())
    assert step() == 10  # it did not wait for the job that rests
    assert runner.order[-1] == f"{other.id}-1"
    failed = book.get("default", job.id)
    assert failed.error is not None
    assert (failed.status, failed.error["code"]) == ("failed", "server_error")
    assert "9 times" in failed.error["message"]


def test_pauses_are_no_losses(tmp_path: Path, registry: Database, adapter: Path) -> None:
    shelf = shelf_of(registry, tmp_path)
    book, file = book_of(registry, shelf), file_of(shelf)
    job = book.create(CreateJob(model=BASE, training_file=file, seed=1), Caller())

    class Stopping(Instant):
        """Runs that end as they are told to pause, but the fourth, which is lost."""

        def start(self, run_job: str, words: Sequence[str]) -> None:
            self.order.append(run_job)
            if len(self.order) == 5:
                shutil.copytree(self._adapter, Path(words[1]).parent / "adapter")
            if len(self.order) == 4:
                return
            events = EventLog(Path(words[1]).parent / "events.jsonl")
            events.write("started", from_step=0, num_steps=1)
            was_stopped = len(self.order) < 4
            events.write("finished", steps=1, was_stopped=was_stopped, real_tokens=7)
            events.close()

    runner = Stopping(adapter)
    dispatcher = dispatcher_of(registry, shelf, tmp_path, runner, attempts=2)
    dispatcher.rest_s = 0.0
    for _ in range(9):
        dispatcher.step()
    assert len(runner.order) == 5
    assert book.get("default", job.id).status == "succeeded"


def test_a_run_that_the_cluster_has_forgotten_is_started_again_unless_it_has_finished(
    tmp_path: Path, registry: Database, adapter: Path
) -> None:
    shelf = shelf_of(registry, tmp_path)
    book, file = book_of(registry, shelf), file_of(shelf)
    for seed in (1, 2):
        book.create(CreateJob(model=BASE, training_file=file, seed=seed), Caller())

    class Forgetful(Instant):
        """A cluster that was lost twice: the first time before its run began."""

        def start(self, run_job: str, words: Sequence[str]) -> None:
            if self.order.count(run_job):
                super().start(run_job, words)
            else:
                self.order.append(run_job)

        def state(self, run_job: str) -> RunState:
            return "unknown"

    runner = Forgetful(adapter)
    dispatcher = dispatcher_of(registry, shelf, tmp_path, runner)
    for _ in range(6):
        dispatcher.step()
    first, second = (f"{job.id}-1" for job in book.list_("default", after=None, limit=9).rows[::-1])
    assert runner.order == [first, first, second, second]
    statuses = [job.status for job in book.list_("default", after=None, limit=9).rows]
    assert statuses == ["succeeded", "succeeded"]


class KilledError(BaseException):
    """As SIGKILL: nothing of ours catches it."""


@pytest.mark.parametrize("moment", ["before_commit", "after_commit"])
def test_a_dispatcher_that_dies_before_or_after_any_commit_is_followed_by_one_that_goes_on(
    moment: str, tmp_path: Path, registry: Database, adapter: Path
) -> None:
    shelf = shelf_of(registry, tmp_path)
    book, file = book_of(registry, shelf), file_of(shelf)
    runner = Instant(adapter)

    def dispatch() -> None:
        dispatcher = dispatcher_of(registry, shelf, tmp_path, runner)
        for _ in range(3):
            dispatcher.step()

    for number in range(1, 20):
        job = book.create(CreateJob(model=BASE, training_file=file, seed=number), Caller())
        left = number

        def die(_: Session) -> None:
            nonlocal left
            left -= 1
            if left == 0:
                raise KilledError

        event.listen(Session, moment, die)
        try:
            with suppress(KilledError):
                dispatch()
        finally:
            event.remove(Session, moment, die)
        dispatch()
        done = book.get("default", job.id)
        assert (done.status, done.run_job) == ("succeeded", None)
        told = book.events("default", job.id, after=None, limit=99).rows[::-1]
        assert [one.message.partition(":")[0] for one in told] == [
            "Created fine-tuning job", "Validating training file",
            "Files validated, moving job to queued state", "Fine-tuning job started",
            "Step 1/1", "New fine-tuned model created", "The job has successfully completed",
        ]  # fmt: skip
        assert [one.place for one in told] == list(range(1, 8))
        assert runner.order == [f"{job.id}-1"]
        runner.order.clear()
        with registry.read() as session:
            results = session.scalars(select(File.id).where(File.filename == f"{job.id}.csv")).all()
            assert results == done.result_files
            assert len(session.scalars(select(Model).where(Model.job_id == job.id)).all()) == 1
        card = cards.read(tmp_path / "runs" / job.id)
        assert card is not None
        assert (card.status, card.model) == ("succeeded", done.fine_tuned_model)
        if left > 0:
            break
    assert left == 1 < number  # it dies nowhere in the last round
