"""Fine-tuning over HTTP as people run it: `loray serve`, Ray Serve and Ray Jobs."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from openai import OpenAI
from processes import ROOT, finish, start
from test_serving_app import wait_for, write

from cluster.ownership import RunLock

pytestmark = pytest.mark.ray
COLOURS = ("red", "green", "blue", "white")


def lines(number: int) -> str:
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"Say {colour} please, {index}"},
                {"role": "assistant", "content": colour},
            ]
        }
        for index in range(number)
        for colour in COLOURS
    ]
    return "".join(f"{json.dumps(row)}\n" for row in rows)


def pairs(number: int) -> str:
    rows = [
        {
            "input": {"messages": [{"role": "user", "content": f"Say {colour}, {index}"}]},
            "preferred_output": [{"role": "assistant", "content": colour}],
            "non_preferred_output": [{"role": "assistant", "content": "no"}],
        }
        for index in range(number)
        for colour in COLOURS
    ]
    return "".join(f"{json.dumps(row)}\n" for row in rows)


def told(client: OpenAI, id: str) -> list[str]:
    return [e.message for e in client.fine_tuning.jobs.list_events(id, limit=100)][::-1]


@pytest.fixture(scope="module")
def server(
    tmp_path_factory: pytest.TempPathFactory, tiny_base: Path
) -> Iterator[tuple[OpenAI, Path]]:
    directory = tmp_path_factory.mktemp("tuning")
    path, url = write(
        directory,
        tiny_base,
        cpus_per_replica=1,
        tuning={"storage": str(directory / "runs"), "recipe": ["data.max_length=128"]},
    )
    process = start(["serving", path.name], directory)
    try:
        wait_for(f"{url}/healthz", process)
        yield OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0), directory
        os.kill(process.pid, signal.SIGTERM)
        status, _, err = finish(process)
        assert status == 0, err
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def training_processes(directory: Path) -> list[str]:
    found = []
    for process in psutil.process_iter():
        try:
            words = " ".join(process.cmdline())
        except psutil.Error:
            continue
        if f"{directory}/runs" in words and "training" in words:
            found.append(words)
    return found


def wait(client: OpenAI, id: str, *wanted: str) -> str:
    deadline = time.monotonic() + 240
    while True:
        job = client.fine_tuning.jobs.retrieve(id)
        if job.status in wanted:
            return job.status
        assert job.status not in ("succeeded", "failed", "cancelled"), job.error
        assert time.monotonic() < deadline, job.status
        time.sleep(0.2)


@pytest.mark.timeout(600)
def test_the_script_of_the_readme_goes_from_a_file_to_an_answer(
    server: tuple[OpenAI, Path],
) -> None:
    client, directory = server
    (directory / "examples.jsonl").write_text(lines(5))
    done = subprocess.run(
        [
            sys.executable, str(ROOT / "scripts" / "finetune_with_openai.py"),
            str(directory / "examples.jsonl"), "Say red please, 1",
        ],
        env={**os.environ, "OPENAI_BASE_URL": str(client.base_url), "OPENAI_API_KEY": "none"},
        capture_output=True, text=True, timeout=400, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    said = done.stdout.splitlines()
    assert "Fine-tuning job started" in said
    assert "The job has successfully completed" in said
    assert any(line.startswith("Checkpoint created at step") for line in said)
    assert any(":ckpt-step-" in line for line in said)


def answer(client: OpenAI, model: str) -> str:
    said = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": "Say red please, 1"}],
        max_completion_tokens=8,
        temperature=0,
    )
    return said.choices[0].message.content or ""


@pytest.mark.timeout(600)
def test_a_job_that_is_a_search_answers_with_its_winner(server: tuple[OpenAI, Path]) -> None:
    client, directory = server
    training = client.files.create(file=("a.jsonl", lines(8).encode()), purpose="fine-tune")
    held_out = client.files.create(file=("b.jsonl", lines(2).encode()), purpose="fine-tune")
    search = {
        "space": {"lora.rank": [4, 8], "optim.learning_rate_at_rank_16": [1e-3, 1e-2]},
        "searcher": "grid",
        "scheduler": "fifo",
        "trials": 4,
        "finalists": 2,
        "seeds": 2,
    }
    job = client.fine_tuning.jobs.create(
        model="llama",
        training_file=training.id,
        validation_file=held_out.id,
        hyperparameters={"n_epochs": 2, "batch_size": 4},
        extra_body={"search": search},
    )
    assert wait(client, job.id, "succeeded", "failed") == "succeeded", told(client, job.id)
    done = client.fine_tuning.jobs.retrieve(job.id)
    assert done.fine_tuned_model is not None
    assert done.model_extra is not None
    winner = done.model_extra["search"]["winner"]
    assert winner["value"] < winner["base_value"]
    assert done.model_extra["lora"]["rank"] == winner["params"]["lora.rank"]
    rank, at_16 = winner["params"]["lora.rank"], winner["params"]["optim.learning_rate_at_rank_16"]
    rate = at_16 * (16 / rank) ** 0.5
    assert done.hyperparameters.learning_rate_multiplier == pytest.approx(rate / 3e-4, rel=1e-4)
    assert (done.trained_tokens or 0) > 0
    said = told(client, job.id)
    assert len({text.split()[1] for text in said if text.startswith("Trial ")}) == 4, said
    rows = client.files.content(done.result_files[0]).text.splitlines()
    assert len(rows) == 5
    assert answer(client, done.fine_tuned_model)
    config = json.loads((directory / "runs" / job.id / "best" / "adapter_config.json").read_text())
    assert config["r"] == rank


@pytest.mark.timeout(600)
def test_a_job_learns_preferences_and_is_validated(server: tuple[OpenAI, Path]) -> None:
    client, _ = server
    training = client.files.create(file=("a.jsonl", pairs(6).encode()), purpose="fine-tune")
    held_out = client.files.create(file=("b.jsonl", pairs(1).encode()), purpose="fine-tune")
    hyperparameters = {"n_epochs": 2, "batch_size": 4, "beta": 0.5}
    job = client.fine_tuning.jobs.create(
        model="llama",
        training_file=training.id,
        validation_file=held_out.id,
        method={"type": "dpo", "dpo": {"hyperparameters": hyperparameters}},  # pyright: ignore
    )
    assert wait(client, job.id, "succeeded", "failed") == "succeeded", told(client, job.id)
    done = client.fine_tuning.jobs.retrieve(job.id)
    assert done.method is not None
    assert done.method.dpo is not None
    assert done.method.dpo.hyperparameters is not None
    assert done.method.dpo.hyperparameters.beta == 0.5
    said = told(client, job.id)
    assert any(text.startswith("Step 12/12: training loss=") for text in said), said
    first = next(text for text in said if text.startswith("Step 1/"))
    assert first == "Step 1/12: training loss=0.69"  # log 2: the adapter is the base still
    points = client.fine_tuning.jobs.checkpoints.list(job.id).data
    assert [point.step_number for point in points] == [12, 6]
    assert all(point.metrics.valid_loss is not None for point in points)
    assert done.fine_tuned_model is not None
    assert answer(client, done.fine_tuned_model) is not None


@pytest.mark.timeout(900)
def test_a_job_pauses_and_goes_on_as_if_it_had_not_and_a_cancelled_one_leaves_nothing(
    server: tuple[OpenAI, Path],
) -> None:
    client, directory = server
    file = client.files.create(file=("a.jsonl", lines(20).encode()), purpose="fine-tune")

    def create(name: str) -> str:
        hyperparameters = {"n_epochs": 2, "batch_size": 1}
        return client.fine_tuning.jobs.create(
            model="llama",
            training_file=file.id,
            seed=7,
            metadata={"name": name},  # else it would be the same job
            method={"type": "supervised", "supervised": {"hyperparameters": hyperparameters}},  # pyright: ignore
        ).id

    def is_quiet() -> None:
        deadline = time.monotonic() + 120
        while training_processes(directory):
            assert time.monotonic() < deadline, training_processes(directory)
            time.sleep(0.2)

    cancelled = create("cancelled")
    wait(client, cancelled, "running")
    assert client.fine_tuning.jobs.cancel(cancelled).status == "cancelled"
    is_quiet()
    with RunLock(directory / "runs" / cancelled):
        pass
    paused = create("paused")  # runs: the cluster's one free core has been given back
    wait(client, paused, "running")
    assert client.fine_tuning.jobs.pause(paused).status == "paused"
    is_quiet()
    saved = sorted((directory / "runs" / paused / "checkpoints").glob("step-*"))
    assert saved
    step = int(saved[-1].name[5:])
    assert 0 < step < 160
    client.fine_tuning.jobs.resume(paused)
    wait(client, paused, "succeeded")
    done = time.monotonic()
    model = client.fine_tuning.jobs.retrieve(paused).fine_tuned_model
    assert model is not None
    assert answer(client, model)
    print(f"figure: first answer {time.monotonic() - done:.2f} s after the job was seen to succeed")
    assert f"Fine-tuning job goes on after step {step}" in told(client, paused)
    whole = create("whole")
    wait(client, whole, "succeeded")
    one, other = (
        (directory / "runs" / id / "adapter" / "adapter_model.safetensors").read_bytes()
        for id in (paused, whole)
    )
    assert one == other
