"""Fine-tuning jobs over a real socket, with the stock client."""

import json
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
from process_runs import ProcessRuns
from server import Running, serving, until
from sqlalchemy import select
from test_training_adapter import make_adapter

import loray
from cluster import command, storage
from cluster.errors import ConfigError
from cluster.registry.tables import Delivery
from serving import connection

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
def server(
    tmp_path: Path, tiny_base: Path, runs: ProcessRuns, registry_url: str
) -> Iterator[Running]:
    tuning = {"storage": str(tmp_path / "runs")}
    with serving(tmp_path, tiny_base, tuning=tuning, runner=runs, database=registry_url) as running:
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
    tmp_path: Path, tiny_base: Path, runs: ProcessRuns, registry_url: str
) -> None:
    sections: Any = {
        "tuning": {"storage": str(tmp_path / "runs")},
        "webhooks": [{"url": "https://hooks.example/", "secret_file": "secret"}],
        "database": registry_url,
    }
    with serving(tmp_path, tiny_base, runner=runs, **sections) as server:
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
        with server.database.read() as session:
            bodies = [json.loads(row.body) for row in session.scalars(select(Delivery))]
    assert {body["data"]["id"]: body["type"] for body in bodies} == {
        one.id: "fine_tuning.job.succeeded",
        queued.id: "fine_tuning.job.cancelled",
        bad.id: "fine_tuning.job.failed",
    }
    assert len(bodies) == 3


def call(*words: str) -> int:
    return command.run(loray.app, words)


def test_commands_look_at_and_steer_jobs_after_a_login(
    server: Running,
    runs: ProcessRuns,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "settings"))
    monkeypatch.setenv("COLUMNS", "200")
    assert call("login", server.url + "/v1", "--key", "none") == 0
    kept = tmp_path / "settings" / "loray" / "credentials.json"
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    runs._words[1] = "0.2"
    job = server.client.fine_tuning.jobs.create(
        model=base_of(server), training_file=upload(server.client)
    )
    wait(server, job.id, "running")
    assert call("jobs", "pause", job.id) == 0
    assert call("jobs", "resume", job.id) == 0
    assert call("jobs", "logs", job.id, "--follow") == 0
    assert call("jobs", "show", job.id) == 0
    assert call("jobs", "list") == 0
    out = capsys.readouterr().out
    for text in (
        f"{job.id} is paused", f"{job.id} is queued", "The job has successfully completed",
        "step 6: ft:", "succeeded",
    ):  # fmt: skip
        assert text in out
    assert call("jobs", "cancel", job.id) == 1
    assert "is succeeded and cannot be cancelled" in capsys.readouterr().err
    assert call("jobs", "show", "ftjob-none") == 1
    assert "No such fine-tuning job" in capsys.readouterr().err


def test_a_stored_key_goes_to_no_other_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    kept = tmp_path / "loray" / "credentials.json"
    kept.parent.mkdir()
    kept.write_text('{"url": "http://127.0.0.1:1", "key": "secret"}')
    assert connection.connect(None, None).key == "secret"
    assert connection.connect("http://127.0.0.1:1/v1", None).key == "secret"
    assert connection.connect("http://127.0.0.1:2", None).key is None
    assert "secret" not in repr(connection.connect(None, None))
    kept.write_text("{")
    with pytest.raises(ConfigError, match="loray login"):
        connection.connect(None, None)


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"model": "gpt-9"}, 404, "model"),
        ({"training_file": "file-none"}, 400, "training_file"),
        ({"validation_file": "file-none"}, 400, "validation_file"),
        ({"suffix": "a/b"}, 400, "suffix"),
        ({"suffix": ""}, 400, "suffix"),
        ({"suffix": "x" * 65}, 400, "suffix"),
        ({"seed": -1}, 400, "seed"),
        ({"hyperparameters": {"n_epochs": 51}}, 400, None),
        ({"hyperparameters": {"batch_size": 0}}, 400, None),
        ({"hyperparameters": {"learning_rate_multiplier": 0}}, 400, None),
        ({"hyperparameters": {"epochs": 1}}, 400, "hyperparameters"),
        ({"method": {"type": "reinforcement", "reinforcement": {}}}, 400, "method"),
        ({"method": {"type": "dpo", "dpo": {"hyperparameters": {"beta": 3}}}}, 400, None),
        ({"method": {"type": "dpo", "supervised": {}}}, 400, "method"),
        ({"metadata": {"k": "v" * 513}}, 400, "metadata.k"),
        ({"metadata": {str(n): "" for n in range(17)}}, 400, "metadata"),
        ({"integrations": [{"type": "wandb", "wandb": {"project": "x"}}]}, 400, "integrations"),
        ({"extra_body": {"lora": {"rank": 0}}}, 400, "lora.rank"),
        ({"extra_body": {"lora": {"variant": "dora"}}}, 400, "lora.variant"),
        ({"extra_body": {"search": {"trials": 4}}}, 400, None),
        ({"extra_body": {"colour": "red"}}, 400, None),
    ],
)
def test_a_request_that_cannot_be_is_refused_with_the_place(
    shared: tuple[Running, str], fields: dict[str, Any], status: int, param: str | None
) -> None:
    server, file = shared
    body = {"model": base_of(server), "training_file": file, **fields}
    with pytest.raises(openai.APIStatusError) as caught:
        server.client.fine_tuning.jobs.create(**body)
    assert caught.value.status_code == status, caught.value.message
    if param is not None:
        assert caught.value.param == param


@pytest.fixture(scope="module")
def shared(
    tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, module_registry_url: str
) -> Iterator[tuple[Running, str]]:
    """A server where no job is ever started, and a file."""
    directory = tmp_path_factory.mktemp("shared")
    tuning = {"storage": str(directory / "runs")}
    with serving(directory, tiny_base, tuning=tuning, database=module_registry_url) as running:
        yield running, upload(running.client)


def test_the_same_request_twice_is_one_job(shared: tuple[Running, str]) -> None:
    server, file = shared

    def create(suffix: str, key: str | None = None) -> str:
        headers = {"Idempotency-Key": key} if key else {}
        return server.client.fine_tuning.jobs.create(
            model=base_of(server), training_file=file, suffix=suffix, extra_headers=headers
        ).id

    first = create("a")
    assert create("a") == first
    assert create("b") != first
    kept = create("c", "key")
    assert create("c", "key") == kept
    with pytest.raises(openai.ConflictError, match="another request"):
        create("d", "key")
    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(lambda _: create("together"), range(8)))) == 1


def test_lists_page_exactly_and_choose_by_metadata(shared: tuple[Running, str]) -> None:
    server, file = shared
    jobs = server.client.fine_tuning.jobs
    made = [
        jobs.create(
            model=base_of(server), training_file=file, metadata={"team": "x", "n": str(n)}
        ).id
        for n in range(7)
    ]
    plain = jobs.create(model=base_of(server), training_file=file, seed=4).id
    for limit in (1, 2, 7, 100):
        found = [job.id for job in jobs.list(limit=limit, metadata={"team": "x"})]
        assert found == made[::-1]
    assert [job.id for job in jobs.list(metadata={"team": "x", "n": "3"})] == [made[3]]
    without = [job.id for job in jobs.list(extra_query={"metadata": "null"})]
    assert plain in without
    assert not set(made) & set(without)
    with pytest.raises(openai.BadRequestError):
        jobs.list(after="ftjob-none")
    for id in ("ftjob-none", "ftjob-" + "0" * 24, "%00"):
        with pytest.raises(openai.NotFoundError):
            jobs.retrieve(id)


@pytest.mark.parametrize(
    ("content", "code", "words"),
    [
        (LINES[:-1].rsplit(b"\n", 9)[0] + b"\n", "invalid_n_examples", "must have at least 10"),
        (LINES + b"{}\n", "invalid_training_file", "Line 13"),
        (b"PK\x03\x04" + b"0" * 100, "invalid_training_file", "zip"),
        (b"[" * 10000, "invalid_training_file", "nested"),
    ],
)
def test_a_file_that_cannot_be_trained_on_ends_the_job(
    server: Running, content: bytes, code: str, words: str
) -> None:
    file = upload(server.client, content)
    job = server.client.fine_tuning.jobs.create(model=base_of(server), training_file=file)
    done = wait(server, job.id)
    assert done.status == "failed"
    assert (done.error.code, done.error.param) == (code, "training_file")
    assert words in done.error.message
    assert done.finished_at
    assert messages(server, job.id)[-1].startswith("The job failed: ")


def test_a_training_file_that_is_deleted_while_queued_ends_the_job(
    tmp_path: Path, tiny_base: Path, adapter: Path
) -> None:
    full = ProcessRuns(tmp_path / "processes", adapter, free={"CPU": 0.5})
    tuning = {"storage": str(tmp_path / "runs")}
    with serving(tmp_path, tiny_base, tuning=tuning, runner=full) as server:
        file = upload(server.client)
        job = server.client.fine_tuning.jobs.create(model=base_of(server), training_file=file)
        wait(server, job.id, "queued")
        server.client.files.delete(file)
        done = wait(server, job.id)
        assert done.status == "failed"
        assert "deleted while the job was queued" in done.error.message
        assert full.started() == []
