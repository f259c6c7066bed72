"""Fine-tuning jobs over a real socket, with the stock client."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from process_runs import ProcessRuns
from server import Running, serving, until
from sqlalchemy import select
from test_training_adapter import make_adapter

from cluster import storage
from cluster.registry import database
from cluster.registry.tables import Delivery

LINES = b"".join(
    b'{"messages": [{"role": "user", "content": "say %d"}, '
    b'{"role": "assistant", "content": "red"}]}\n' % number
    for number in range(12)
)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Path:
    """A ready-made result."""
    directory = tmp_path_factory.mktemp("result")
    bare = make_adapter(directory / "bare", tiny_base, seed=3)

    def write(target: Path) -> None:
        for path in bare.iterdir():
            if path.suffix != ".md":
                (target / path.name).write_bytes(path.read_bytes())

    storage.commit(directory / "adapter", write, attempt="1")
    return directory / "adapter"


@pytest.fixture
def runs(tmp_path: Path, adapter: Path) -> ProcessRuns:
    return ProcessRuns(tmp_path / "processes", adapter)


@pytest.fixture
def server(tmp_path: Path, tiny_base: Path, runs: ProcessRuns) -> Iterator[Running]:
    tuning = {"storage": str(tmp_path / "runs")}
    with serving(tmp_path, tiny_base, tuning=tuning, runner=runs) as running:
        yield running


def upload(client: openai.OpenAI, content: bytes = LINES) -> str:
    file = client.files.create(file=("data.jsonl", content), purpose="fine-tune")
    return file.id


def base_of(server: Running) -> str:
    return server.replica.recipe.model_name


def wait(server: Running, id: str, *statuses: str) -> Any:
    wanted = statuses or ("succeeded", "failed", "cancelled")
    until(lambda: server.client.fine_tuning.jobs.retrieve(id).status in wanted)
    return server.client.fine_tuning.jobs.retrieve(id)


def messages(server: Running, id: str) -> list[str]:
    events = [*server.client.fine_tuning.jobs.list_events(id, limit=100)]
    return [event.message for event in reversed(events)]


def test_a_job_runs_from_upload_to_chat(server: Running) -> None:
    client = server.client
    file = upload(client)
    job = client.fine_tuning.jobs.create(
        model=base_of(server), training_file=file, suffix="red", metadata={"team": "x"}
    )
    assert job.status in ("validating_files", "queued")
    done = wait(server, job.id)
    assert done.status == "succeeded", done.error
    assert done.fine_tuned_model.startswith(f"ft:{base_of(server)}:loray:red:")
    assert done.hyperparameters.n_epochs == 9
    assert done.trained_tokens == 600
    said = messages(server, job.id)
    assert said[:5] == [
        f"Created fine-tuning job: {job.id}",
        f"Validating training file: {file}",
        "Files validated, moving job to queued state",
        "Fine-tuning job started",
        "Step 1/6: training loss=2.00",
    ]
    assert said[-2:] == [
        f"New fine-tuned model created: {done.fine_tuned_model}",
        "The job has successfully completed",
    ]
    answer = client.chat.completions.create(
        model=done.fine_tuned_model, messages=[{"role": "user", "content": "hi"}], max_tokens=3
    )
    assert answer.model == done.fine_tuned_model
    checkpoints = client.fine_tuning.jobs.checkpoints.list(job.id).data
    assert [one.step_number for one in checkpoints] == [6, 4, 2]
    assert checkpoints[0].metrics.train_loss == pytest.approx(2 / 6)
    client.completions.create(
        model=checkpoints[2].fine_tuned_model_checkpoint, prompt="a", max_tokens=2
    )
    results = client.files.content(done.result_files[0]).text.splitlines()
    assert results[0].startswith("step,train_loss,train_accuracy,valid_loss")
    assert len(results) == 7
    assert done.fine_tuned_model in [model.id for model in client.models.list()]
    assert client.models.delete(done.fine_tuned_model).deleted
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve(done.fine_tuned_model)


def test_a_job_that_is_paused_goes_on_where_it_was(
    server: Running, runs: ProcessRuns, tmp_path: Path
) -> None:
    runs._words[1] = "0.3"
    client = server.client
    job = client.fine_tuning.jobs.create(model=base_of(server), training_file=upload(client))
    wait(server, job.id, "running")
    assert client.fine_tuning.jobs.pause(job.id).status == "paused"
    until(lambda: not runs.alive())
    assert client.fine_tuning.jobs.retrieve(job.id).status == "paused"
    assert client.fine_tuning.jobs.resume(job.id).status == "queued"
    assert wait(server, job.id).status == "succeeded"
    steps = [text for text in messages(server, job.id) if text.startswith("Step")]
    assert [int(text.split("/")[0].removeprefix("Step ")) for text in steps] == [1, 2, 3, 4, 5, 6]
    assert runs.started() == [f"{job.id}-1", f"{job.id}-2"]


def test_a_job_that_is_cancelled_leaves_nothing_running(server: Running, runs: ProcessRuns) -> None:
    runs._words[1] = "5"
    client = server.client
    job = client.fine_tuning.jobs.create(model=base_of(server), training_file=upload(client))
    wait(server, job.id, "running")
    assert client.fine_tuning.jobs.cancel(job.id).status == "cancelled"
    until(lambda: not runs.alive())
    assert client.fine_tuning.jobs.cancel(job.id).status == "cancelled"
    with pytest.raises(openai.BadRequestError, match="is cancelled and cannot be resumed"):
        client.fine_tuning.jobs.resume(job.id)


def test_each_job_that_ends_is_told_to_the_webhooks_once(
    tmp_path: Path, tiny_base: Path, runs: ProcessRuns
) -> None:
    hook = {"url": "https://hooks.example/", "secret_file": "secret"}
    tuning = {"storage": str(tmp_path / "runs")}
    with serving(tmp_path, tiny_base, tuning=tuning, runner=runs, webhooks=[hook]) as server:
        jobs = server.client.fine_tuning.jobs
        file = upload(server.client)
        base = base_of(server)
        one = jobs.create(model=base, training_file=file, seed=1)
        wait(server, one.id, "running", "succeeded")
        queued = jobs.create(model=base, training_file=file, seed=2)
        cancelled = [jobs.cancel(queued.id).status for _ in range(2)]
        assert cancelled == ["cancelled", "cancelled"]
        short = upload(server.client, LINES[:80])
        bad = jobs.create(model=base, training_file=short)
        for job in (one, bad):
            wait(server, job.id)
        opened = database.open_(database.sqlite_url(tmp_path / "registry" / "registry.db"))
        with opened.read() as session:
            bodies = [json.loads(row.body) for row in session.scalars(select(Delivery))]
        opened.close()
    assert {body["data"]["id"]: body["type"] for body in bodies} == {
        one.id: "fine_tuning.job.succeeded",
        queued.id: "fine_tuning.job.cancelled",
        bad.id: "fine_tuning.job.failed",
    }
    assert len(bodies) == 3
