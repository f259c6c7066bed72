"""Fine-tuning jobs over a real socket, with the stock client."""

import json
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from process_runs import ProcessRuns, make_result
from server import Running, serving, until
from sqlalchemy import select

import loray
from cluster import command
from cluster.errors import ConfigError
from cluster.registry import cards
from cluster.registry.tables import Delivery
from serving import connection
from serving.tuning_schema import CreateJob
from tune_spaces import spaces

LINES = b"".join(
    b'{"messages": [{"role": "user", "content": "say %d"}, '
    b'{"role": "assistant", "content": "red"}]}\n' % number
    for number in range(12)
)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Path:
    return make_result(tmp_path_factory.mktemp("result"), tiny_base)


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


def test_a_job_that_is_a_search_has_the_winner_as_its_model(
    server: Running, runs: ProcessRuns, tmp_path: Path
) -> None:
    client = server.client
    search = {"trials": 2, "space": {"lora.rank": [8, 16]}, "scheduler": "fifo"}
    runs._words[1] = "0.3"
    job = client.fine_tuning.jobs.create(
        model=base_of(server),
        training_file=upload(client),
        validation_file=upload(client),
        extra_body={"search": search},
    )
    assert job.model_extra is not None
    assert job.model_extra["search"]["winner"] is None
    wait(server, job.id, "running")
    until(lambda: any(text.startswith("Trial") for text in messages(server, job.id)))
    assert client.fine_tuning.jobs.pause(job.id).status == "paused"
    until(lambda: not runs.alive())
    client.fine_tuning.jobs.resume(job.id)
    done = wait(server, job.id)
    assert done.status == "succeeded", done.error
    written = json.loads((tmp_path / "runs" / job.id / "job.json").read_text())
    assert written["space"] == {"lora.rank": [8, 16]}
    assert written["search"]["scheduler"] == "fifo"
    assert written["search"]["seed"] == done.seed
    said = messages(server, job.id)
    assert said[3] == "Fine-tuning job started"
    first = "Trial aaa (rank 8, learning rate 6.00e-04), step 5/10: training loss=0.45, "
    assert said.count(f"{first}eval_loss=0.45") == 1
    assert len([text for text in said if ", step " in text]) == 4
    assert "Trial ccc failed: its process died" in said
    assert "Fine-tuning job goes on after the last reports of its trials" in said
    assert said[-3].startswith("Trial bbb of 3 won: lora.rank 16; eval_loss=0.225 (the base")
    assert done.hyperparameters.learning_rate_multiplier == 2.0
    assert done.trained_tokens == 400
    assert done.model_extra["lora"]["rank"] == 16
    assert done.model_extra["search"]["winner"]["trial"] == "bbb"
    assert client.files.content(done.result_files[0]).text.startswith("trial,rank\n")
    assert client.chat.completions.create(
        model=done.fine_tuned_model, messages=[{"role": "user", "content": "hi"}], max_tokens=3
    ).choices
    until(lambda: "succeeded" in (tmp_path / "runs" / job.id / "card.json").read_text())
    card = cards.read(tmp_path / "runs" / job.id)
    assert card is not None
    assert card.result == "best"


@pytest.mark.parametrize("end", ["succeeded", "cancelled while it runs", "cancelled in a pause"])
def test_a_job_at_its_end_holds_only_what_is_of_use(
    server: Running, runs: ProcessRuns, tmp_path: Path, end: str
) -> None:
    runs._words[1] = "0.02" if end == "succeeded" else "0.3"
    jobs = server.client.fine_tuning.jobs
    id = jobs.create(model=base_of(server), training_file=upload(server.client)).id
    directory = tmp_path / "runs" / id
    if end == "succeeded":
        wait(server, id)
    else:
        until(lambda: (directory / "checkpoints" / "fake-step").exists())
        if end == "cancelled in a pause":
            jobs.pause(id)
            until(lambda: not runs.alive())
            assert (directory / "training_file.jsonl").exists()
        jobs.cancel(id)
    until(lambda: not (directory / "checkpoints").exists())
    assert not (directory / "training_file.jsonl").exists()
    assert (directory / "adapters").exists()
    assert (directory / "events.jsonl").exists()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"search": {"trials": 0}}, "search.trials"),
        ({"search": {"trials": 257}}, "search.trials"),
        ({"search": {"space": "no_such"}}, "rank_lr"),
        ({"search": {"space": {}}}, "search.space"),
        ({"search": {"space": {"lora.rank": []}}}, "search.space"),
        ({"search": {"space": {"lora.rank": [1, 512]}}}, "256"),
        ({"search": {"space": {"lora.rank": list(range(1, 66))}}}, "65 choices"),
        ({"search": {"space": {"lora.rank": {"choices": [1] * 65}}}}, "65 choices"),
        ({"search": {"space": {"optim.epochs": [1, 1000]}}}, "optim.epochs cannot vary"),
        ({"search": {"space": {"model.base": ["/etc"]}}}, "model.base"),
        ({"search": {"searcher": "grid", "sampler": "gp"}}, "sampler"),
        ({"search": {"mode": "solo"}}, "mode"),
        ({"search": {"metric": "eval_loss"}}, "validation_file"),
        ({"search": {"metric": "train_loss"}, "method": {"type": "dpo"}}, "supervised"),
        ({"search": {"metric": "train_loss"}, "lora": {"rank": 8}}, "lora.rank is given"),
        (
            {
                "search": {"metric": "train_loss"},
                "hyperparameters": {"learning_rate_multiplier": 2},
            },
            "hyperparameters.learning_rate_multiplier is given",
        ),
    ],
)
def test_a_search_that_cannot_be_is_refused_with_the_reason(
    shared: tuple[Running, str], fields: dict[str, Any], words: str
) -> None:
    server, file = shared
    with pytest.raises(openai.BadRequestError) as caught:
        server.client.fine_tuning.jobs.create(
            model=base_of(server), training_file=file, extra_body=fields
        )
    assert words in caught.value.message


@pytest.mark.parametrize("space", sorted(spaces.NAMED))
def test_every_named_space_can_be_searched_over_http(space: str) -> None:
    body = {"model": "m", "training_file": "t", "validation_file": "v"}
    assert CreateJob.model_validate({**body, "search": {"space": space}}).search is not None


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


@pytest.fixture(scope="module")
def shared(
    tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, module_registry_url: str
) -> Iterator[tuple[Running, str]]:
    """A server where no job is ever started, and a file."""
    directory = tmp_path_factory.mktemp("shared")
    tuning = {"storage": str(directory / "runs")}
    with serving(directory, tiny_base, tuning=tuning, database=module_registry_url) as running:
        yield running, upload(running.client)


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
