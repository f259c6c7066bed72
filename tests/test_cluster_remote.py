"""Committing into an object store: a real S3 server, real kills, and answers that go wrong."""

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import fsspec
import pytest

from cluster import remote, storage
from cluster.errors import ConfigError, FencedError, ResourceError, StorageError
from cluster.remote import Remote

if TYPE_CHECKING:
    from s3_server import Request, S3Server

ROOT = Path(__file__).resolve().parent.parent
URL = "s3://bucket/runs/one"
FILES = {
    "a.bin": bytes(range(256)) * 40,
    "b.bin": bytes(range(255, -1, -1)) * 40,
    "sub/c.txt": b"c",
}


def never() -> bool:
    return False


def make_directory(path: Path, files: dict[str, bytes] = FILES) -> Path:
    """A committed local directory."""

    def write(directory: Path) -> None:
        for name, data in files.items():
            (directory / name).parent.mkdir(exist_ok=True)
            (directory / name).write_bytes(data)

    storage.commit(path, write, attempt="1")
    return path


def impatient(url: str = URL, *, tries: int = 4) -> Remote:
    """One that does not wait between tries."""
    return Remote(url, tries=tries, sleep=lambda _: None)


def test_a_published_directory_comes_back_as_it_was(s3: "S3Server", tmp_path: Path) -> None:
    directory = make_directory(tmp_path / "step")
    Remote(URL).publish(directory, "step", is_fenced=never)
    assert s3.puts()[-1] == "runs/one/step/manifest.json"
    assert sorted(s3.puts()[:-1]) == [f"runs/one/step/{name}" for name in sorted(FILES)]
    final = tmp_path / "other machine" / "step"
    assert Remote(URL).fetch("step", final) is None
    assert storage.verify(final) == storage.verify(directory)
    assert {name: (final / name).read_bytes() for name in FILES} == FILES


def test_what_is_here_already_is_not_fetched_again(s3: "S3Server", tmp_path: Path) -> None:
    directory = make_directory(tmp_path / "step")
    Remote(URL).publish(directory, "step", is_fenced=never)
    s3.requests.clear()
    assert Remote(URL).fetch("step", directory) is None
    assert {one.key for one in s3.requests} == {"runs/one/step/manifest.json"}


def test_a_directory_takes_the_place_of_an_earlier_one(s3: "S3Server", tmp_path: Path) -> None:
    store = Remote(URL)
    store.publish(make_directory(tmp_path / "old"), "adapter", is_fenced=never)
    store.publish(make_directory(tmp_path / "new", {"a.bin": b"new"}), "adapter", is_fenced=never)
    assert s3.objects("runs/one") == ["runs/one/adapter/a.bin", "runs/one/adapter/manifest.json"]
    final = tmp_path / "final"
    make_directory(final)
    assert store.fetch("adapter", final) is None
    assert [path.name for path in sorted(final.iterdir())] == ["a.bin", "manifest.json"]


PUBLISH = f"""
import sys
from pathlib import Path
from cluster.remote import Remote
print("up", flush=True)
sys.stdin.readline()
Remote({URL!r}).publish(Path(sys.argv[1]), "new", is_fenced=lambda: False)
print("published", flush=True)
"""


@pytest.mark.chaos
@pytest.mark.parametrize("number", range(len(FILES) + 1))
@pytest.mark.parametrize("is_done", [False, True])
def test_a_writer_killed_at_any_object_leaves_no_half_directory(
    s3: "S3Server", tmp_path: Path, number: int, is_done: bool
) -> None:
    store = Remote(URL)
    store.publish(make_directory(tmp_path / "old"), "old", is_fenced=never)
    directory = make_directory(tmp_path / "new")
    writer = subprocess.Popen(
        [sys.executable, "-c", PUBLISH, str(directory)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    seen: list[str] = []

    def kill(request: "Request") -> int | None:
        if request.method != "PUT" or request.is_done != is_done:
            return None
        seen.append(request.key)
        if len(seen) == number + 1:
            writer.send_signal(signal.SIGKILL)
            writer.wait(10)
            return 503
        return None

    assert writer.stdout is not None
    assert writer.stdout.readline() == "up\n"
    s3.fault = kill
    out, _ = writer.communicate("go\n", timeout=60)
    s3.fault = None
    assert writer.returncode == -signal.SIGKILL
    assert "published" not in out
    reason = store.fetch("new", tmp_path / "copy")
    if seen[-1].endswith("manifest.json") and is_done:
        assert reason is None  # all of it was there
    else:
        assert reason is not None
        assert "never committed" in reason
        assert not (tmp_path / "copy").exists()
    assert store.fetch("old", tmp_path / "old copy") is None
    store.publish(directory, "new", is_fenced=never)  # what is left does not stand in the way
    assert store.fetch("new", tmp_path / "again") is None


@pytest.mark.parametrize("num_questions", range(len(FILES) + 2))
def test_a_fenced_attempt_never_publishes_its_marker(
    s3: "S3Server", tmp_path: Path, num_questions: int
) -> None:
    asked: list[None] = []

    def is_fenced() -> bool:
        asked.append(None)
        return len(asked) > num_questions

    with pytest.raises(FencedError, match="superseded by a newer attempt"):
        Remote(URL).publish(make_directory(tmp_path / "step"), "step", is_fenced=is_fenced)
    assert "runs/one/step/manifest.json" not in s3.objects()
    assert len([key for key in s3.puts() if "/step/" in key]) <= max(0, num_questions - 1)


def damaged(s3: "S3Server", how: str) -> str:
    """Damage what was published; what the reason must say."""
    at = "runs/one/step/"
    if how == "truncated":
        s3.put(f"{at}a.bin", FILES["a.bin"][:-1])
        return "truncated or grown"
    if how == "flipped":
        s3.put(f"{at}a.bin", FILES["a.bin"][:-1] + b"x")
        return "a.bin is altered"
    if how == "swapped":
        s3.put(f"{at}a.bin", FILES["b.bin"])
        s3.put(f"{at}b.bin", FILES["a.bin"])
        return "a.bin is altered"
    if how == "missing":
        s3.delete(f"{at}b.bin")
        return "b.bin is missing"
    marker = s3.get(f"{at}manifest.json")
    if how == "marker flipped":
        s3.put(f"{at}manifest.json", marker.replace(b"10240", b"10241", 1))
        return "does not match its own checksum"
    s3.put(f"{at}manifest.json", marker[:-20])
    return "truncated or altered"


@pytest.mark.parametrize(
    "how", ["truncated", "flipped", "swapped", "missing", "marker flipped", "marker truncated"]
)
def test_damage_is_found_and_what_is_here_is_left_alone(
    s3: "S3Server", tmp_path: Path, how: str
) -> None:
    Remote(URL).publish(make_directory(tmp_path / "step"), "step", is_fenced=never)
    words = damaged(s3, how)
    here = make_directory(tmp_path / "here", {"a.bin": b"other"})
    before = storage.verify(here)
    reason = Remote(URL).fetch("step", here)
    assert reason is not None
    assert words in reason
    assert str(tmp_path) not in reason
    assert storage.verify(here) == before
    assert not list(tmp_path.glob(".tmp-*"))


def test_a_copy_that_does_not_fit_is_refused_before_it_comes(
    s3: "S3Server", tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Remote(URL).publish(make_directory(tmp_path / "step"), "step", is_fenced=never)
    monkeypatch.setattr(storage, "_free_bytes", lambda _: 1000)
    s3.requests.clear()
    with pytest.raises(ResourceError, match="a copy of s3://bucket/runs/one/step"):
        Remote(URL).fetch("step", tmp_path / "copy")
    assert not any(one.key.endswith(".bin") for one in s3.requests)


@pytest.mark.parametrize("is_done", [False, True])
def test_a_busy_store_is_asked_again_with_a_line_each_time(
    s3: "S3Server", tmp_path: Path, caplog: pytest.LogCaptureFixture, is_done: bool
) -> None:
    failures: dict[str, int] = {}

    def busy_twice(request: "Request") -> int | None:
        if request.is_done != is_done or failures.setdefault(request.key, 0) == 2:
            return None
        failures[request.key] += 1
        return 503

    waits: list[float] = []
    s3.fault = busy_twice
    store = Remote(URL, sleep=waits.append)
    store.publish(make_directory(tmp_path / "step"), "step", is_fenced=never)
    s3.fault = None
    assert set(waits) == {1.0, 2.0}
    assert len([r for r in caplog.records if "failed_try=" in r.getMessage()]) == len(waits)
    assert store.fetch("step", tmp_path / "copy") is None


def test_a_store_that_stays_down_is_given_up_and_nothing_half_is_used(
    s3: "S3Server", tmp_path: Path
) -> None:
    store = impatient()
    store.publish(make_directory(tmp_path / "old"), "old", is_fenced=never)
    s3.fault = lambda request: 503 if request.key.endswith("c.txt") else None
    with pytest.raises(StorageError, match=r"put_file failed, tried 4 times .* is intact"):
        store.publish(make_directory(tmp_path / "new"), "new", is_fenced=never)
    s3.fault = None
    assert "runs/one/new/manifest.json" not in s3.objects()
    assert store.fetch("old", tmp_path / "copy") is None


def test_a_store_that_does_not_answer_is_given_up(s3: "S3Server") -> None:
    is_over = threading.Event()

    def hang(_: "Request") -> None:
        is_over.wait(20)

    s3.fault = hang
    started = time.monotonic()
    with pytest.raises(StorageError, match=r"tried 2 times \(FSTimeoutError"):
        Remote(URL, tries=2, request_s=1.0, sleep=lambda _: None).read("object")
    s3.fault = None
    is_over.set()
    assert time.monotonic() - started < 10


def test_a_write_whose_answer_was_lost_is_known_as_ones_own(s3: "S3Server") -> None:
    answers: list[int] = []

    def lose_first(request: "Request") -> int | None:
        if request.method == "PUT" and request.is_done and not answers:
            answers.append(500)
            return 500
        return None

    s3.fault = lose_first
    assert impatient().claim("attempts", b"mine", after=0)
    assert not impatient().claim("attempts", b"another's", after=0)
    assert s3.get("runs/one/attempts/000001") == b"mine"


def test_of_two_that_claim_the_same_number_one_wins(s3: "S3Server") -> None:
    gate = threading.Barrier(2)
    won: dict[bytes, list[int]] = {b"one": [], b"two": []}

    def claim(name: bytes) -> None:
        store = Remote(URL)
        for after in range(20):
            gate.wait(30)
            if store.claim("attempts", name, after=after):
                won[name].append(after + 1)

    threads = [threading.Thread(target=claim, args=(name,)) for name in won]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(won[b"one"] + won[b"two"]) == list(range(1, 21))
    for name, numbers in won.items():
        assert all(s3.get(f"runs/one/attempts/{number:06d}") == name for number in numbers)
    assert Remote(URL).newest("attempts") == 20


def test_retiring_removes_the_marker_first(s3: "S3Server", tmp_path: Path) -> None:
    store = Remote(URL)
    store.publish(make_directory(tmp_path / "step"), "step", is_fenced=never)
    s3.requests.clear()
    store.retire("step")
    removed = [one.key for one in s3.requests if one.method == "DELETE" and one.is_done]
    assert removed[0] == "runs/one/step/manifest.json"
    assert len(removed) == len(FILES) + 1
    assert s3.objects() == []


def test_check_leaves_nothing_behind(s3: "S3Server") -> None:
    Remote(URL).check()
    assert s3.objects() == []


def test_what_cannot_be_used_is_refused_within_seconds(s3: "S3Server") -> None:
    started = time.monotonic()
    with pytest.raises(StorageError, match="the bucket does not exist"):
        impatient("s3://nowhere/runs").check()
    s3.fault = lambda _: 403
    with pytest.raises(StorageError, match=r"the store refuses .* Check the credentials"):
        impatient().check()
    s3.fault = lambda request: 403 if request.method == "GET" else None
    with pytest.raises(StorageError, match="the store refuses"):
        impatient().check()
    s3.fault = None
    s3.honours_conditions = False
    with pytest.raises(ConfigError, match="lets two writers create the same object"):
        impatient().check()
    assert time.monotonic() - started < 10


def test_an_endpoint_that_is_not_there_is_told_within_seconds(
    s3: "S3Server", monkeypatch: pytest.MonkeyPatch
) -> None:
    from local_cluster import free_port

    monkeypatch.setitem(
        fsspec.config.conf, "s3", {"endpoint_url": f"http://127.0.0.1:{free_port()}"}
    )
    started = time.monotonic()
    with pytest.raises(StorageError, match=r"Could not connect to the endpoint"):
        Remote(URL, tries=2).check()
    assert time.monotonic() - started < 10


def test_a_missing_library_is_named_with_what_to_install() -> None:
    code = (
        "import sys; sys.modules['s3fs'] = None\n"
        "from cluster.remote import Remote\n"
        "try: Remote('s3://bucket/runs')\n"
        "except ValueError as error: print(error)"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    ).stdout
    assert "pip install 'loray[s3]' here and on every node" in out


@pytest.mark.parametrize(
    "url", ["s3://", "s3:///runs", "S3://bucket", "a b://c", "s3://k:s@host/x"]
)
def test_a_url_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="allowed: a directory"):
        Remote(url)


def test_unknown_and_private_stores_are_refused() -> None:
    with pytest.raises(ConfigError, match="Protocol not known: strange"):
        Remote("strange://bucket")
    with pytest.raises(ConfigError, match="no two processes share"):
        Remote("memory://runs")


def test_settings_of_one_process_serve_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fsspec.config, "conf", {})
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "id")
    monkeypatch.setenv("FSSPEC_S3_ENDPOINT_URL", "http://127.0.0.1:1")
    sent = remote.settings()
    assert sent["AWS_ACCESS_KEY_ID"] == "id"
    assert not any(name.startswith("RAY") for name in sent)
    remote.use_settings({"FSSPEC_S3_ENDPOINT_URL": "http://127.0.0.1:2"})
    assert fsspec.config.conf["s3"]["endpoint_url"] == "http://127.0.0.1:2"
