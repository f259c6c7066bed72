"""/v1/files over a real socket, with the stock `openai` client and with clients that misbehave."""

import asyncio
import gc
import json
import logging
import os
import secrets
import socket
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import BytesIO, UnsupportedOperation
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest
import requests
import uvicorn
from fastapi import FastAPI
from local_cluster import free_port
from openai import OpenAI
from openai.types import FileDeleted, FileObject

from cluster.registry import database
from serving import files, problems, upload
from serving.access import Access, Caller, Gate
from serving.checking import Checking, CheckLimits
from serving.shelf import FileLimits, Shelf

LIMITS = FileLimits(max_file_bytes=4 << 20, max_line_bytes=1 << 20, max_project_bytes=12 << 20)
CHAT = {"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]}
LINE = json.dumps(CHAT).encode() + b"\n"
SECRET = "the patient's name is Ada"


class Names(Access):
    """Keys that are the names of their projects."""

    def __init__(self) -> None:
        """It knows them by heart."""

    async def check(self, authorization: str | None, *, client: str | None) -> Caller:
        project = (authorization or "").removeprefix("Bearer ")
        if project == "infer-only":
            return Caller(project=project, scopes=frozenset({"infer"}))
        if project not in ("mine", "theirs"):
            raise problems.invalid_api_key()
        return Caller(key_id=project if project == "mine" else "", project=project)


@dataclass
class Running:
    """A server that answers."""

    url: str
    client: OpenAI
    shelf: Shelf
    folder: Path

    def client_of(self, project: str) -> OpenAI:
        return self.client.with_options(api_key=project)

    def send(self, body: Any, *, boundary: str = "b", **headers: str) -> requests.Response:
        kind = f"multipart/form-data; boundary={boundary}"
        whole = {"authorization": "Bearer mine", "content-type": kind, **headers}
        return requests.post(f"{self.url}/v1/files", data=body, headers=whole, timeout=60)

    def names(self) -> list[str]:
        return sorted(path.name for path in self.folder.iterdir())


@contextmanager
def serving(directory: Path, limits: FileLimits = LIMITS) -> Iterator[Running]:
    opened = database.open_(database.sqlite_url(directory / "registry.db"))
    shelf = Shelf(opened, directory / "runs", limits, time.time)
    app = FastAPI(responses=problems.RESPONSES)
    access = Names()
    problems.install(
        app,
        max_body_bytes=64 << 10,
        longer=files.body_limits(limits),
        gate=lambda inner: Gate(inner, access),
    )
    app.state.access = access
    app.include_router(files.router(shelf))

    @app.post("/echo")
    async def echo(body: dict[str, Any]) -> dict[str, Any]:
        return body

    port = free_port()
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="error", lifespan="on"))
    thread = threading.Thread(target=server.run)
    thread.start()
    url = f"http://127.0.0.1:{port}"
    try:
        until(lambda: server.started, thread)
        with OpenAI(base_url=f"{url}/v1", api_key="mine", max_retries=0, timeout=60) as client:
            yield Running(url, client, shelf, directory / "runs" / "files")
    finally:
        server.should_exit = True
        thread.join(30)
        opened.close()
        assert not thread.is_alive(), "the server does not end"


def until(condition: Callable[[], bool], thread: threading.Thread | None = None) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert thread is None or thread.is_alive(), "the server ended"
        assert time.monotonic() < deadline, "nothing happened in time"
        time.sleep(0.005)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with serving(tmp_path_factory.mktemp("shared")) as running:
        yield running


@pytest.fixture
def server(shared: Running) -> Iterator[Running]:
    yield shared
    for project in ("mine", "theirs"):
        for file in list(shared.client_of(project).files.list()):
            shared.client_of(project).files.delete(file.id)
    assert shared.names() == [], "a test has left bytes"


def part(name: str, value: str | bytes, *, filename: str | None = None) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    more = "" if filename is None else f'; filename="{filename}"'
    head = f'--b\r\nContent-Disposition: form-data; name="{name}"{more}\r\n\r\n'
    return head.encode() + data + b"\r\n"


def form(*parts: bytes) -> bytes:
    return b"".join(parts) + b"--b--\r\n"


def refused(response: requests.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    body = response.json()["error"]
    assert list(body) == ["message", "type", "param", "code"]
    return body


# The stock client


def test_the_stock_client_uploads_waits_reads_lists_and_deletes(server: Running) -> None:
    client, data = server.client, LINE * 12
    file = client.files.create(file=("train.jsonl", data), purpose="fine-tune")
    assert type(file) is FileObject
    assert (file.bytes, file.filename, file.purpose) == (len(data), "train.jsonl", "fine-tune")
    assert (file.object, file.status) == ("file", "uploaded")
    assert abs(file.created_at - time.time()) < 60
    done = client.files.wait_for_processing(file.id, poll_interval=0.02, max_wait_seconds=60)
    assert (done.status, done.status_details) == ("processed", None)
    assert server.shelf.get("mine", file.id).examples == 12
    assert client.files.content(file.id).read() == data
    assert [one.id for one in client.files.list()] == [file.id]
    deleted = client.files.delete(file.id)
    assert deleted == FileDeleted(id=file.id, object="file", deleted=True)
    with pytest.raises(openai.NotFoundError) as caught:
        client.files.retrieve(file.id)
    assert (caught.value.code, caught.value.param) == ("not_found", "id")
    assert server.names() == []


def test_a_list_that_shrinks_while_it_is_read_skips_and_repeats_nothing(server: Running) -> None:
    ids = [server.client.files.create(file=b"x", purpose="batch").id for _ in range(4)]
    page = server.client.files.list(limit=2, order="asc")
    server.client.files.delete(ids[1])
    assert [file.id for file in page.get_next_page()] == ids[2:]


def test_what_is_bad_in_training_data_is_told_with_its_line(server: Running) -> None:
    data = LINE + b'{"messages": []}\n' + LINE + b"not json\n"
    file = server.client.files.create(file=("a.jsonl", data), purpose="fine-tune")
    done = server.client.files.wait_for_processing(file.id, poll_interval=0.02)
    assert done.status == "error"
    assert done.status_details is not None
    assert "Line 2: " in done.status_details
    assert "Line 4: " in done.status_details
    assert server.shelf.get("mine", file.id).examples == 2


def zipped() -> bytes:
    stream = BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("train.jsonl", LINE * 20)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (zipped(), "zip"),
        (b"\0" * 1000, "binary"),
        (b"\n\n", "no examples"),
        (b"\xff\xfe" + LINE.decode().encode("utf-16-le"), "UTF-16"),
        (b'{"messages": ' + b"[" * 10_000 + b"]" * 10_000 + b"}\n", "nested too deeply"),
        (b"[" * 10_000 + b"\n", "nested too deeply"),
        (b'{"messages": ' + b'{"a":' * 10_000 + b"\n", "nested too deeply"),
    ],
)
def test_what_is_no_training_data_is_told_by_its_kind(
    server: Running, data: bytes, words: str
) -> None:
    file = server.client.files.create(file=("train.jsonl", data), purpose="fine-tune")
    done = server.client.files.wait_for_processing(file.id, poll_interval=0.02)
    assert done.status == "error"
    assert words in str(done.status_details)


@pytest.mark.parametrize("opening", [b"[", b'{"a":', b'{"messages":['])
def test_json_nested_ten_thousand_deep_is_refused_within_a_second_and_50_mb(
    tmp_path: Path, opening: bytes
) -> None:
    path = tmp_path / "deep.jsonl"
    path.write_bytes(opening * 10_000 + b"\n")
    code = (
        "import re, sys, time; from serving import finding; finding.main(sys.argv[1:]); "
        "peak = re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]; "
        "print(int(peak) >> 10, time.process_time())"
    )
    parent, child = os.pipe()  # the process ends when this one is closed
    try:
        done = subprocess.run(
            [sys.executable, "-c", code, str(path), str(2 << 30)],
            stdin=parent, capture_output=True, text=True, timeout=60, check=True,
            env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
        )  # fmt: skip
    finally:
        os.close(parent)
        os.close(child)
    finding, use = done.stdout.splitlines()
    assert "nested too deeply" in finding
    rss_mb, cpu_s = use.split()
    assert int(rss_mb) < 50
    assert float(cpu_s) < 1


# Whose files


def test_another_projects_file_is_not_there_in_any_way(server: Running) -> None:
    file = server.client.files.create(file=b"x", purpose="batch")
    theirs = server.client_of("theirs")
    for ask in (theirs.files.retrieve, theirs.files.content, theirs.files.delete):
        with pytest.raises(openai.NotFoundError) as caught:
            ask(file.id)
        assert caught.value.code == "not_found"
    assert list(theirs.files.list()) == []
    assert server.client.files.retrieve(file.id) == file


@pytest.mark.parametrize("id", ["file-x", "file-" + "0" * 24, "..%2Fregistry.db", "%00", "x" * 999])
def test_an_id_that_is_none_is_a_404(server: Running, id: str) -> None:
    for method, path in (("GET", ""), ("GET", "/content"), ("DELETE", "")):
        url = f"{server.url}/v1/files/{id}{path}"
        response = requests.request(
            method, url, headers={"authorization": "Bearer mine"}, timeout=9
        )
        assert refused(response, 404)["code"] in ("not_found", "unknown_url")


def test_who_has_no_key_or_may_not_tune_is_refused_before_the_body_is_read(
    server: Running,
) -> None:
    with pytest.raises(openai.AuthenticationError):
        server.client_of("nobody").files.create(file=bytes(3 << 20), purpose="batch")
    with pytest.raises(openai.PermissionDeniedError):
        server.client_of("infer-only").files.create(file=bytes(3 << 20), purpose="batch")


def test_where_tuning_is_off_the_routes_say_so() -> None:
    from fastapi.testclient import TestClient

    app = FastAPI()
    problems.install(app, max_body_bytes=1 << 10)
    app.state.access = None
    app.include_router(files.router(None))
    with TestClient(app) as client:
        for method, path in (
            ("POST", ""), ("GET", ""), ("GET", f"/file-{'0' * 24}"), ("DELETE", f"/file-{'0' * 24}")
        ):  # fmt: skip
            response = client.request(method, f"/v1/files{path}")
            assert response.status_code == 404
            assert "tuning" in response.json()["error"]["message"]


# Downloads


def test_a_download_is_saved_and_never_shown(server: Running) -> None:
    name = 'ü "x"; \\filename=y\r\nX-Evil: 1.html'
    body = form(
        part("purpose", "batch"),
        part("file", b"<script>", filename=name.replace('"', "%22").replace("\r\n", "%0D%0A")),
    )
    id_ = server.send(body).json()["id"]
    response = requests.get(
        f"{server.url}/v1/files/{id_}/content", headers={"authorization": "Bearer mine"}, timeout=9
    )
    assert response.content == b"<script>"
    assert response.headers["content-type"] == "application/octet-stream"
    assert response.headers["content-length"] == "8"
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["content-disposition"].startswith('attachment; filename="')
    assert "filename*=UTF-8''" in response.headers["content-disposition"]
    assert "x-evil" not in response.headers


def test_a_download_goes_on_while_the_file_is_deleted(server: Running) -> None:
    data = os.urandom(4 << 20)
    file = server.client.files.create(file=data, purpose="batch")
    with server.client.files.with_streaming_response.content(file.id) as response:
        server.client.files.delete(file.id)
        assert response.read() == data


# Forms that cannot be


@pytest.mark.parametrize(
    ("parts", "param", "words"),
    [
        ([part("file", b"x", filename="a")], "purpose", "purpose is missing"),
        ([part("purpose", "batch")], "file", "file is missing"),
        ([], "purpose", "purpose is missing"),
        ([part("purpose", "x"), part("file", b"x", filename="a")], "purpose", "not one of: ass"),
        (
            [part("purpose", "fine-tune-results"), part("file", b"x", filename="a")],
            "purpose", "not one of",
        ),
        (
            [part("purpose", "batch"), part("file", b"x", filename="a")] * 2,
            "purpose", "stands twice",
        ),
        ([part("file", b"x", filename="a"), part("file", b"y", filename="b")], "file", "several"),
        ([part("purpose", "batch"), part("file", b"", filename="a")], "file", "empty"),
        ([part("purpose", "batch"), part("file", b"x", filename="")], "file", "no name"),
        ([part("purpose", "batch"), part("file", b"x", filename="../")], "file", "no name"),
        ([part("purpose", "batch"), part("file", "x")], "file", "expected a file"),
        ([part("colour", "red")], None, "unknown field; valid: purpose, file"),
        (
            [part("purpose", "fine-tune"), part("file", LINE, filename="a.txt")],
            "file", "must end in .jsonl",
        ),
        (
            [part("file", LINE, filename="a.txt"), part("purpose", "fine-tune")],
            "file", "must end in .jsonl",
        ),
        ([part("expires_after[anchor]", "now")], "expires_after[anchor]", "created_at"),
        ([part("expires_after[seconds]", "60")], "expires_after[seconds]", "3600 to 2592000"),
        ([part("expires_after[seconds]", "4e3")], "expires_after[seconds]", "whole number"),
        ([part("expires_after[seconds]", "9" * 99)], "expires_after[seconds]", "whole number"),
        (
            [
                part("purpose", "batch"), part("expires_after[seconds]", "3600"),
                part("file", b"x", filename="a"),
            ],
            "expires_after[anchor]", "is missing",
        ),
    ],
)  # fmt: skip
def test_a_form_that_cannot_be_is_a_400_that_names_the_field(
    server: Running, parts: list[bytes], param: str | None, words: str
) -> None:
    error = refused(server.send(form(*parts)), 400)
    assert words in error["message"]
    assert error["param"] == param
    assert server.names() == []


@pytest.mark.parametrize("kind", ["application/json", "text/plain", "multipart/form-data"])
def test_a_body_of_another_kind_is_a_400(server: Running, kind: str) -> None:
    refused(server.send(b'{"purpose": "batch"}', **{"content-type": kind}), 400)


def test_a_form_that_is_cut_off_is_a_400_and_leaves_nothing(server: Running) -> None:
    body = form(part("purpose", "batch"), part("file", bytes(100_000), filename="a"))
    for length in (0, 10, 50, 1000, len(body) - 4):
        refused(server.send(body[:length]), 400)
    assert server.names() == []


def test_the_fields_may_come_in_any_order_and_pieces(server: Running) -> None:
    body = form(
        part("expires_after[seconds]", "3600"), part("file", LINE * 9, filename="a.jsonl"),
        part("purpose", "fine-tune"), part("expires_after[anchor]", "created_at"),
    )  # fmt: skip
    pieces = (body[start : start + 7] for start in range(0, len(body), 7))
    response = server.send(pieces)
    assert response.status_code == 200, response.text
    assert response.json()["expires_at"] is not None


def test_a_client_that_goes_away_in_the_middle_leaves_nothing(
    server: Running, caplog: pytest.LogCaptureFixture
) -> None:
    head = (
        "POST /v1/files HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer mine\r\n"
        "Content-Type: multipart/form-data; boundary=b\r\nContent-Length: 3000000\r\n\r\n"
    )
    started = part("purpose", "batch") + part("file", bytes(1_000_000), filename="a")[:-2]
    address = ("127.0.0.1", int(server.url.rsplit(":", 1)[1]))
    with caplog.at_level(logging.INFO):
        with socket.create_connection(address, timeout=30) as connection:
            connection.sendall(head.encode() + started)
            until(lambda: len(server.names()) == 1)
        until(lambda: server.names() == [])
    assert "request_failed" not in caplog.text


def test_a_client_that_falls_silent_is_let_go(tmp_path: Path) -> None:
    opened = database.open_(database.sqlite_url(tmp_path / "registry.db"))
    shelf = Shelf(opened, tmp_path / "runs", LIMITS, time.time)

    async def chunks() -> AsyncIterator[bytes]:
        yield part("purpose", "batch") + part("file", b"x", filename="a")[:-2]
        await asyncio.Event().wait()

    async def receive() -> None:
        await upload.receive(
            shelf, chunks(), caller=Caller(), content_type="multipart/form-data; boundary=b",
            expected_bytes=0, silence_s=0.05,
        )  # fmt: skip

    with pytest.raises(problems.ApiError) as caught:
        asyncio.run(receive())
    assert caught.value.status == 408
    assert list((tmp_path / "runs" / "files").iterdir()) == []
    opened.close()


def test_a_page_of_another_site_cannot_upload_where_no_key_is_asked(server: Running) -> None:
    body = form(part("purpose", "batch"), part("file", b"x", filename="a"))
    keyless = {"authorization": "Bearer theirs", "sec-fetch-site": "cross-site"}
    refused(server.send(body, **keyless), 403)
    assert server.send(body, **{**keyless, "sec-fetch-site": "same-origin"}).ok
    assert server.send(body, **{"sec-fetch-site": "cross-site"}).ok  # it has a key


# Limits


def zeros(purpose: str, num_bytes: int, sent: list[int]) -> Iterator[bytes]:
    """A form whose file is so many zeros."""
    yield part("purpose", purpose) + part("file", b"", filename="a.jsonl")[:-2]
    for _ in range(num_bytes >> 16):
        sent[0] += 1 << 16
        yield bytes(1 << 16)
    yield b"\r\n--b--\r\n"


class Zeros(BytesIO):
    """A file of 10 GB of zeros; is_sized: whether it says so before it is read."""

    def __init__(self, *, is_sized: bool) -> None:
        super().__init__()
        self.is_sized = is_sized
        self.num_read = 0

    def read(self, size: int | None = -1) -> bytes:
        assert size is not None
        assert size > 0
        if self.num_read >= 10_000_000_000:
            return b""
        self.num_read += size
        return bytes(size)

    def seek(self, offset: int, whence: int = 0) -> int:
        if not self.is_sized:
            raise UnsupportedOperation
        return 10_000_000_000 if whence == 2 else 0

    def tell(self) -> int:
        if not self.is_sized:
            raise UnsupportedOperation
        return 0


@pytest.mark.parametrize("is_sized", [True, False])
@pytest.mark.parametrize("purpose", ["batch", "fine-tune"])
def test_ten_gigabytes_of_zeros_are_refused_as_soon_as_it_shows(
    server: Running, purpose: Any, is_sized: bool
) -> None:
    """Without a length, a line without an end is too long long before the file is."""
    stream = Zeros(is_sized=is_sized)
    with pytest.raises(openai.APIStatusError) as caught:
        server.client.files.create(file=("a.jsonl", stream), purpose=purpose)
    is_line = purpose == "fine-tune" and not is_sized
    assert caught.value.status_code == (400 if is_line else 413)
    assert ("line 1 is longer than" if is_line else "larger than") in caught.value.message
    assert caught.value.response.headers["connection"] == "close"
    assert caught.value.request_id
    assert stream.num_read < 64 << 20
    assert server.names() == []


def test_a_line_beyond_the_limit_is_refused_also_where_the_purpose_comes_last(
    server: Running,
) -> None:
    data = LINE * 3 + b"x" * (LIMITS.max_line_bytes + 1) + b"\n" + LINE
    for parts in (
        [part("purpose", "fine-tune"), part("file", data, filename="a.jsonl")],
        [part("file", data, filename="a.jsonl"), part("purpose", "fine-tune")],
    ):
        error = refused(server.send(form(*parts)), 400)
        assert "line 4 is longer than 1048576 bytes" in error["message"]
    assert server.names() == []
    assert server.client.files.create(file=data, purpose="batch").bytes == len(data)


def test_other_routes_keep_their_limit(server: Running) -> None:
    response = requests.post(f"{server.url}/echo", data=b"x" * (65 << 10), timeout=9)
    refused(response, 413)
    response = requests.get(
        f"{server.url}/v1/files", data=b"x" * (65 << 10), timeout=9,
        headers={"authorization": "Bearer mine"},
    )  # fmt: skip
    refused(response, 413)


def test_the_share_of_a_project_is_told(server: Running) -> None:
    for _ in range(3):
        server.client.files.create(file=bytes(4 << 20), purpose="batch")
    with pytest.raises(openai.BadRequestError) as caught:
        server.client.files.create(file=b"x", purpose="batch")
    assert caught.value.code == "exceeded_quota"
    assert server.client_of("theirs").files.create(file=b"x", purpose="batch")


def test_uploads_at_once_are_bounded_by_project(server: Running) -> None:
    head = (
        "POST /v1/files HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer mine\r\n"
        "Content-Type: multipart/form-data; boundary=b\r\nContent-Length: 3000\r\n\r\n"
    )
    address = ("127.0.0.1", int(server.url.rsplit(":", 1)[1]))
    waiting = [socket.create_connection(address, timeout=30) for _ in range(8)]
    try:
        for connection in waiting:
            connection.sendall(head.encode())
        until(lambda: len(server.names()) == 8)
        with pytest.raises(openai.RateLimitError) as caught:
            server.client.files.create(file=b"x", purpose="batch")
        assert int(caught.value.response.headers["retry-after"]) >= 1
        assert server.client_of("theirs").files.create(file=b"x", purpose="batch")
    finally:
        for connection in waiting:
            connection.close()
    until(lambda: len(server.names()) == 1)


def test_memory_stays_flat_while_a_large_file_goes_up_and_down(tmp_path: Path) -> None:
    limits = FileLimits(max_file_bytes=256 << 20, max_line_bytes=1 << 20)
    process = psutil.Process()
    peak, done = [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            peak[0] = max(peak[0], process.memory_info().rss)

    with serving(tmp_path, limits) as running:
        running.client.files.create(file=b"warm", purpose="batch")
        gc.collect()
        before = process.memory_info().rss
        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            response = running.send(zeros("batch", 256 << 20, [0]))
            assert response.status_code == 200, response.text
            id_ = response.json()["id"]
            num_bytes = 0
            with running.client.files.with_streaming_response.content(id_) as content:
                for data in content.iter_bytes(1 << 16):
                    num_bytes += len(data)
            assert num_bytes == 256 << 20
            refused(running.send(zeros("batch", 260 << 20, [0])), 413)
        finally:
            done.set()
            watcher.join()
        assert len(running.names()) == 2
    assert peak[0] - before < 48 << 20


# Looking into files


def new_id() -> str:
    return f"file-{secrets.token_hex(12)}"


def test_files_that_a_dead_server_left_are_looked_into_by_the_next(tmp_path: Path) -> None:
    opened = database.open_(database.sqlite_url(tmp_path / "registry.db"))
    shelf = Shelf(opened, tmp_path / "runs", LIMITS, time.time)
    file = shelf.put("mine", "a.jsonl", "fine-tune", LINE * 3, id=new_id())
    half = shelf.receive("mine")
    half.write(b"half")
    half.is_kept = True  # so that closing leaves it, as a crash does
    half.close()
    opened.close()
    with serving(tmp_path) as running:
        done = running.client.files.wait_for_processing(file.id, poll_interval=0.02)
        assert done.status == "processed"
        until(lambda: running.names() == [Path(file.path).name])


def test_a_check_that_takes_too_much_ends_and_says_so(tmp_path: Path) -> None:
    opened = database.open_(database.sqlite_url(tmp_path / "registry.db"))
    shelf = Shelf(opened, tmp_path / "runs", LIMITS, time.time)
    for limits, words in (
        (CheckLimits(time_s=0.01), "more than 0.01 s"),
        (CheckLimits(memory_bytes=16 << 20), "ended with status"),
    ):
        file = shelf.put("mine", "a.jsonl", "fine-tune", LINE * 3, id=new_id())
        with Checking(shelf, limits=limits, look_s=0.05):
            until(lambda file=file: shelf.get("mine", file.id).status == "error")
        assert words in str(shelf.get("mine", file.id).status_details)
    opened.close()


def test_a_server_that_stops_takes_the_check_with_it(tmp_path: Path) -> None:
    opened = database.open_(database.sqlite_url(tmp_path / "registry.db"))
    limits = FileLimits(max_file_bytes=64 << 20)
    shelf = Shelf(opened, tmp_path / "runs", limits, time.time)
    file = shelf.put("mine", "a.jsonl", "fine-tune", LINE * 200_000, id=new_id())

    def checks() -> list[psutil.Process]:
        found = []
        for child in psutil.Process().children():
            with suppress(psutil.Error):
                if "serving.finding" in child.cmdline():
                    found.append(child)
        return found

    with Checking(shelf):
        until(lambda: bool(checks()))
    assert not checks()
    assert shelf.get("mine", file.id).status == "uploaded"
    opened.close()


def test_neither_names_nor_contents_are_logged(
    server: Running, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG, logger="serving"):
        data = json.dumps({"messages": SECRET}).encode()
        file = server.client.files.create(file=(f"{SECRET}.jsonl", data), purpose="fine-tune")
        done = server.client.files.wait_for_processing(file.id, poll_interval=0.02)
        server.send(form(part(SECRET, SECRET)))
        server.send(f"--b\r\n{SECRET}: \1\r\n")
    assert done.status == "error"
    assert SECRET not in caplog.text
