"""Jobs under faults: who makes them over HTTP, who looks at them, and what must be true of each."""

import json
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import requests
from openai import BadRequestError, OpenAI
from sqlalchemy import select
from sqlalchemy.orm import Session

from cluster.registry import cards
from cluster.registry.database import Database
from cluster.registry.tables import File, Job, JobCheckpoint, JobEvent, Model

LINE = b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
PATH = "/v1/fine_tuning/jobs"
ENDS = ("succeeded", "failed", "cancelled")


class Owner:
    """Makes jobs with the stock client, steers some, and notes how each is to end."""

    def __init__(
        self,
        url: str,
        model: str,
        num_jobs: int,
        *,
        has_keys: bool = False,
        settings: Mapping[str, Any] | None = None,
        enter: Callable[[], None] = lambda: None,
    ) -> None:
        """has_keys: each request has an Idempotency-Key. settings: of each job. enter: called in
        the thread that asks, before it does."""
        self.wanted: dict[str, str] = {}
        """The status in which each job is to end, by its id."""
        self.error: BaseException | None = None
        self._client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=20, timeout=60)
        self._model = model
        self._num_jobs = num_jobs
        self._has_keys = has_keys
        self._settings = settings or {}
        self._enter = enter
        self._dice = random.Random(3)
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
            self._enter()
            good, short = (
                self._client.files.create(file=("a.jsonl", LINE * num), purpose="fine-tune").id
                for num in (10, 9)
            )
            for number in range(self._num_jobs):
                self._make(number, short if number % 5 == 1 else good)
        except BaseException as error:
            self.error = error

    def _make(self, number: int, file: str) -> None:
        jobs, act = self._client.fine_tuning.jobs, number % 5
        headers = {"Idempotency-Key": f"job {number}"} if self._has_keys else {}
        id_ = jobs.create(
            model=self._model,
            training_file=file,
            seed=number,
            extra_headers=headers,
            **self._settings,
        ).id
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

    def __init__(
        self, url: str, *, period_s: float = 0.05, enter: Callable[[], None] = lambda: None
    ) -> None:
        self.answers = Counter[int]()
        """How often each status came; 0: the connection was lost."""
        self.odd: list[str] = []
        """What neither was well nor said clearly why."""
        self._enter = enter
        self._period_s = period_s
        self._url = f"{url}{PATH}"
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def end(self) -> None:
        self._stop.set()
        self._thread.join(60)

    def _run(self) -> None:
        self._enter()
        while not self._stop.wait(self._period_s):
            try:
                answer = requests.get(self._url, timeout=60)
            except requests.RequestException as error:
                self.answers[0] += 1
                self.odd.append(repr(error))
                continue
            self.answers[answer.status_code] += 1
            if answer.status_code != 200 and not is_clear(answer):
                self.odd.append(f"{answer.status_code} {answer.text}")


def is_clear(answer: requests.Response) -> bool:
    """503 with a code, when to come again, and nothing of where the database is."""
    error = answer.json()["error"]
    is_silent = not any(word in answer.text for word in ("Traceback", "psycopg", "127.0.0.1"))
    told = (answer.status_code, error["code"], int(answer.headers["retry-after"]) >= 1)
    return told == (503, "registry_unavailable", True) and is_silent


def statuses(opened: Database) -> Counter[str]:
    with opened.read() as session:
        return Counter(session.scalars(select(Job.status)))


def is_over(opened: Database) -> bool:
    """Whether every job has come to its end, its run, too, and nothing is held for it."""
    with opened.read() as session:
        rows = session.execute(select(Job.status, Job.run_job, Job.is_tidy)).all()
    return all(status in ENDS and run_job is None and is_tidy for status, run_job, is_tidy in rows)


def check_all(
    opened: Database, wanted: Mapping[str, str], started: Sequence[str], runs: Path
) -> None:
    """Each job that was made is there once, and has ended as it should, once.

    started: every run that was ever started. runs: where their directories are.
    """
    with opened.read() as session:
        jobs = session.scalars(select(Job).order_by(Job.number)).all()
        assert {job.id: job.status for job in jobs} == wanted
        assert [job.seed for job in jobs] == list(range(len(wanted)))
        for job in jobs:
            mine = [name for name in started if name.startswith(job.id)]
            assert sorted(mine) == sorted(f"{job.id}-{n}" for n in range(1, job.attempt + 1))
            check_story(session, job, runs / job.id)
            check_result(session, job, runs / job.id)


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
