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


@pytest.mark.timeout(600)
def test_a_job_pauses_goes_on_and_is_cancelled_and_leaves_nothing(
    server: tuple[OpenAI, Path],
) -> None:
    client, directory = server
    file = client.files.create(file=("a.jsonl", lines(20).encode()), purpose="fine-tune")
    hyperparameters = {"n_epochs": 50, "batch_size": 1}
    job = client.fine_tuning.jobs.create(
        model="llama",
        training_file=file.id,
        method={"type": "supervised", "supervised": {"hyperparameters": hyperparameters}},  # pyright: ignore
    )
    wait(client, job.id, "running")
    assert client.fine_tuning.jobs.pause(job.id).status == "paused"
    deadline = time.monotonic() + 120
    while training_processes(directory):
        assert time.monotonic() < deadline, training_processes(directory)
        time.sleep(0.2)
    saved = sorted((directory / "runs" / job.id / "checkpoints").glob("step-*"))
    assert saved
    client.fine_tuning.jobs.resume(job.id)
    wait(client, job.id, "running")
    said = [event.message for event in client.fine_tuning.jobs.list_events(job.id, limit=50)]
    assert f"Fine-tuning job goes on after step {int(saved[-1].name[5:])}" in said
    assert client.fine_tuning.jobs.cancel(job.id).status == "cancelled"
    deadline = time.monotonic() + 120
    while training_processes(directory):
        assert time.monotonic() < deadline, training_processes(directory)
        time.sleep(0.2)
    assert client.chat.completions.create(
        model="llama", messages=[{"role": "user", "content": "hi"}], max_tokens=2
    ).choices
