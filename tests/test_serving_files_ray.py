"""/v1/files behind Ray Serve's proxy: uploads stream through it, at the replica's pace."""

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest
import requests
from local_cluster import free_port
from openai import OpenAI
from processes import ROOT, finish, start, wait_until
from test_serving_files import LINE, Zeros, form, part, refused, zeros

SERVE = ("ray::ProxyActor", "ray::ServeReplica")


def serve_processes(driver: int) -> list[psutil.Process]:
    """The proxy and the replica below a process."""
    found = []
    for process in psutil.Process(driver).children(recursive=True):
        with suppress(psutil.Error):
            if process.cmdline()[0].startswith(SERVE):
                found.append(process)
    return found


def private_bytes(process: psutil.Process) -> int:
    """Its memory without Ray's object store, whose pages count for whoever has touched them."""
    memory = process.memory_info()
    return memory.rss - memory.shared


class Memory:
    """What the proxy and the replica have grown by at most, since the block began."""

    def __init__(self, processes: list[psutil.Process]) -> None:
        self._processes = processes
        self._done = threading.Event()
        self._before = [private_bytes(one) for one in processes]
        self.grown = [0] * len(processes)
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> "Memory":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.01):
            for place, process in enumerate(self._processes):
                grown = private_bytes(process) - self._before[place]
                self.grown[place] = max(self.grown[place], grown)


@contextmanager
def served(directory: Path) -> Iterator[tuple[str, int]]:
    """Where the API answers, and the id of the process that serves it."""
    port = free_port()
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    process = start(["files_server", str(directory), str(port)], directory, {"PYTHONPATH": paths})
    url = f"http://127.0.0.1:{port}/v1/files"
    try:

        def answers() -> bool:
            try:
                return requests.get(url, timeout=5).ok
            except requests.RequestException:
                return False

        wait_until(answers, process)
        yield url, process.pid
    finally:
        os.kill(process.pid, signal.SIGINT)
        status, _, err = finish(process)
    assert status == 0, err


@pytest.mark.ray
def test_uploads_stream_through_serves_proxy_with_little_memory_and_every_refusal_arrives(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "runs" / "files"

    def names() -> list[str]:
        return sorted(path.name for path in folder.iterdir())

    def send(body: Any) -> requests.Response:
        kind = {"content-type": "multipart/form-data; boundary=b"}
        return requests.post(url, data=body, headers=kind, timeout=120)

    with served(tmp_path) as (url, pid):
        client = OpenAI(base_url=url.removesuffix("/files"), api_key="none", max_retries=0)
        file = client.files.create(file=("train.jsonl", LINE * 12), purpose="fine-tune")
        done = client.files.wait_for_processing(file.id, poll_interval=0.05)
        assert (done.status, done.status_details) == ("processed", None)

        # It is written while it comes in.
        on_disk: list[int] = []

        def watched(pieces: Iterator[bytes]) -> Iterator[bytes]:
            for number, piece in enumerate(pieces):
                if number == 1024:  # 64 MiB were sent; the replica is close behind
                    deadline = time.monotonic() + 60
                    while not on_disk and time.monotonic() < deadline:
                        sizes = [path.stat().st_size for path in folder.glob(".tmp-*")]
                        on_disk.extend(size for size in sizes if size > 32 << 20)
                yield piece

        with Memory(serve_processes(pid)) as memory:
            response = send(watched(zeros("batch", 256 << 20, [0])))
            assert response.status_code == 200, response.text
        print("on disk before the body had ended:", on_disk, "grown by:", memory.grown)
        assert on_disk
        assert len(memory.grown) == 2
        assert max(memory.grown) < 96 << 20
        id_ = response.json()["id"]
        with client.files.with_streaming_response.content(id_) as content:
            assert sum(len(piece) for piece in content.iter_bytes(1 << 16)) == 256 << 20

        # What is too much is refused, and the stock client hears it.
        for purpose, is_sized, status in (
            ("batch", True, 413), ("batch", False, 413), ("fine-tune", False, 400)
        ):  # fmt: skip
            stream = Zeros(is_sized=is_sized)
            asked: Any = purpose
            with pytest.raises(openai.APIStatusError) as caught:
                client.files.create(file=("a.jsonl", stream), purpose=asked)
            assert caught.value.status_code == status
            assert caught.value.request_id
            assert stream.num_read < 384 << 20  # the limit is 256 MiB
        refused(requests.get(url, data=b"x" * (5 << 20), timeout=60), 413)

        # What breaks off leaves nothing.
        host, port = url.split("/")[2].split(":")
        with socket.create_connection((host, int(port)), timeout=30) as connection:
            head = (
                "POST /v1/files HTTP/1.1\r\nHost: x\r\nContent-Length: 90000000\r\n"
                "Content-Type: multipart/form-data; boundary=b\r\n\r\n"
            )
            started = part("purpose", "batch") + part("file", bytes(9_000_000), filename="a")
            connection.sendall(head.encode() + started)
            wait_until(lambda: any(name.startswith(".tmp-") for name in names()))
        wait_until(lambda: names() == sorted([f"{file.id}.jsonl", id_]))
        refused(send(form(part("purpose", "batch"))), 400)
