"""The store of files: whole or not there, bounded, and clean after crashes."""

import hashlib
import multiprocessing
import os
import signal
import stat
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import chaos
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import RegistryError
from cluster.registry.database import Database
from cluster.registry.tables import File, Table
from serving import incoming
from serving.finding import Finding
from serving.incoming import Incoming, Lines
from serving.problems import ApiError
from serving.shelf import FileLimits, Label, Purpose, Shelf, plain_filename

LIMITS = FileLimits(max_file_bytes=1000, max_line_bytes=100, max_project_bytes=2500)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Setting:
    shelf: Shelf
    clock: Clock
    database: Database
    folder: Path

    def add(self, data: bytes = b"x" * 10, **label: object) -> File:
        upload = self.shelf.receive("mine")
        try:
            upload.write(data)
            whole = {"project": "mine", "filename": "a.jsonl", "purpose": "fine-tune", **label}
            return self.shelf.keep(upload, Label(**whole))  # pyright: ignore[reportArgumentType]
        finally:
            upload.close()

    def names(self) -> list[str]:
        return sorted(path.name for path in self.folder.iterdir())


@pytest.fixture
def setting(tmp_path: Path, registry: Database) -> Setting:
    clock = Clock()
    shelf = Shelf(registry, tmp_path / "runs", LIMITS, clock)
    return Setting(shelf, clock, registry, tmp_path / "runs" / "files")


def refused(act: Callable[[], object], status: int) -> ApiError:
    with pytest.raises(ApiError) as caught:
        act()
    assert caught.value.status == status
    return caught.value


def test_a_file_is_kept_as_it_came(setting: Setting) -> None:
    upload = setting.shelf.receive("mine")
    for _ in range(3):
        upload.write(b"abc\n")
    label = Label(project="mine", filename="a.jsonl", purpose="fine-tune", key_id="k1")
    file = setting.shelf.keep(upload, label)
    upload.close()
    assert (file.bytes, file.status, file.created_at, file.key_id) == (12, "uploaded", 1000.0, "k1")
    assert file.sha256 == hashlib.sha256(b"abc\n" * 3).hexdigest()
    path = setting.shelf.path(setting.shelf.get("mine", file.id))
    assert path.read_bytes() == b"abc\n" * 3
    assert path.suffix == ".jsonl"  # by which a recipe's data.train knows the format
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert setting.names() == [f"{file.id}.jsonl"]


def test_only_files_for_fine_tuning_are_still_to_be_looked_into(setting: Setting) -> None:
    first, other = setting.add(), setting.add(purpose="batch")
    assert (first.status, other.status) == ("uploaded", "processed")
    assert [file.id for file in setting.shelf.unchecked()] == [first.id]
    setting.shelf.judge(first.id, Finding(examples=3, details=None))
    setting.shelf.judge(first.id, Finding(examples=0, details="too late"))
    found = setting.shelf.get("mine", first.id)
    assert (found.status, found.examples, found.status_details) == ("processed", 3, None)
    assert not setting.shelf.unchecked()


def test_a_file_that_was_found_bad_says_why(setting: Setting) -> None:
    file = setting.add()
    setting.shelf.judge(file.id, Finding(examples=0, details="Line 2: no messages"))
    found = setting.shelf.get("mine", file.id)
    assert (found.status, found.status_details) == ("error", "Line 2: no messages")


def test_results_are_put_as_files(setting: Setting) -> None:
    file = setting.shelf.put("mine", "results.csv", "fine-tune-results", b"step\n", id="file-1")
    assert (file.status, file.purpose, file.filename) == (
        "processed", "fine-tune-results", "results.csv",
    )  # fmt: skip
    assert setting.shelf.path(file).read_bytes() == b"step\n"
    refused(lambda: setting.shelf.put("mine", "a", "batch", bytes(1001), id="file-2"), 413)
    assert len(setting.names()) == 1
    setting.shelf.clean()
    assert len(setting.names()) == 1


def test_results_that_are_put_again_are_there_once(setting: Setting) -> None:
    barrier = threading.Barrier(4)

    def put(_: int) -> str:
        barrier.wait()
        return setting.shelf.put("mine", "a.csv", "fine-tune-results", b"step\n", id="file-1").id

    with ThreadPoolExecutor(4) as pool:  # dispatchers that were slow to notice that they are not
        assert set(pool.map(put, range(4))) == {"file-1"}
    assert [file.id for file in setting.shelf.list_("mine").rows] == ["file-1"]
    assert len(setting.names()) == 1
    assert setting.shelf.path(setting.shelf.get("mine", "file-1")).read_bytes() == b"step\n"


def test_results_are_stored_also_where_the_share_is_used_up(setting: Setting) -> None:
    for _ in range(2):
        setting.add(bytes(1000), purpose="batch")
    refused(lambda: setting.add(bytes(501), purpose="batch"), 400)
    setting.shelf.put("mine", "results.csv", "fine-tune-results", bytes(1000), id="file-1")
    refused(lambda: setting.shelf.receive("mine"), 400)


def test_what_another_project_has_is_not_there(setting: Setting) -> None:
    file = setting.add()
    refused(lambda: setting.shelf.get("theirs", file.id), 404)
    refused(lambda: setting.shelf.delete("theirs", file.id), 404)
    assert setting.shelf.list_("theirs").rows == []
    refused(lambda: setting.shelf.list_("theirs", after=file.id), 400)
    assert setting.shelf.path(file).exists()


def test_lists_are_by_purpose_too(setting: Setting) -> None:
    setting.add()
    other = setting.add(purpose="batch")
    assert [file.id for file in setting.shelf.list_("mine", purpose="batch").rows] == [other.id]


def test_deletion_removes_the_bytes_at_once_and_keeps_the_row_for_jobs(setting: Setting) -> None:
    file = setting.add()
    setting.shelf.delete("mine", file.id)
    assert setting.names() == []
    refused(lambda: setting.shelf.get("mine", file.id), 404)
    refused(lambda: setting.shelf.delete("mine", file.id), 404)
    with setting.database.read() as session:
        assert session.get_one(File, file.number).deleted_at == 1000.0


def test_a_file_goes_when_its_time_is_over(setting: Setting) -> None:
    file = setting.add(lifetime_s=3600)
    stays = setting.add()
    assert file.expires_at == 4600.0
    setting.clock.now = 4599.9
    setting.shelf.expire()
    assert setting.shelf.get("mine", file.id)
    setting.clock.now = 4600.0
    refused(lambda: setting.shelf.get("mine", file.id), 404)  # before anybody has cleaned up
    assert [one.id for one in setting.shelf.list_("mine").rows] == [stays.id]
    assert [one.id for one in setting.shelf.unchecked()] == [stays.id]
    setting.shelf.expire()
    assert setting.names() == [f"{stays.id}.jsonl"]


# Limits


def test_a_file_beyond_the_limit_leaves_nothing(setting: Setting) -> None:
    upload = setting.shelf.receive("mine")
    upload.write(bytes(1000))
    refused(lambda: upload.write(b"x"), 413)
    upload.close()
    assert setting.names() == []


def test_the_share_of_a_project_is_kept_to_the_byte(setting: Setting) -> None:
    setting.add(bytes(1000), purpose="batch")
    setting.add(bytes(1000), purpose="batch")
    error = refused(lambda: setting.add(bytes(501), purpose="batch"), 400)
    assert error.code == "exceeded_quota"
    assert len(setting.names()) == 2
    last = setting.add(bytes(500), purpose="batch")
    refused(lambda: setting.shelf.receive("mine"), 400)
    setting.shelf.receive("theirs").close()
    setting.shelf.delete("mine", last.id)
    refused(lambda: setting.shelf.receive("mine", expected_bytes=501), 400)
    setting.shelf.receive("mine", expected_bytes=500).close()


def test_uploads_at_once_do_not_exceed_the_share_together(setting: Setting) -> None:
    uploads = [setting.shelf.receive("mine") for _ in range(4)]
    outcomes: list[object] = []

    def keep(upload: Incoming) -> None:
        label = Label(project="mine", filename="a", purpose="batch")
        try:
            outcomes.append(setting.shelf.keep(upload, label).id)
        except ApiError as error:
            outcomes.append(error.code)
        finally:
            upload.close()

    for upload in uploads:
        upload.write(bytes(800))
    threads = [threading.Thread(target=keep, args=[upload]) for upload in uploads]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes.count("exceeded_quota") == 1
    assert len(setting.names()) == 3


@given(data=st.lists(st.sampled_from([b"\n", b"a", b"bb", b"\r\n"]), max_size=60), cut=st.data())
def test_the_first_line_that_is_too_long_is_found_however_it_comes(
    data: list[bytes], cut: st.DataObject
) -> None:
    whole = b"".join(data)
    lengths = [len(line) for line in whole.split(b"\n")]
    first = next((number for number, length in enumerate(lengths, 1) if length > 4), None)
    cuts = cut.draw(st.lists(st.integers(0, len(whole)), max_size=8))
    lines = Lines(4)
    places = [0, *sorted(cuts), len(whole)]
    for start, end in pairwise(places):
        lines.look(whole[start:end])
    assert lines.too_long == first


def test_a_full_disk_is_told_and_leaves_nothing(setting: Setting, tmp_path: Path) -> None:
    with chaos.small_disk(tmp_path / "disk", 1 << 20) as disk:
        upload = Incoming(disk, max_bytes=8 << 20, max_line_bytes=1 << 30)
        error = refused(lambda: upload.write(bytes(2 << 20)), 507)
        assert str(disk) not in str(error)
        upload.close()
        assert list(disk.iterdir()) == []
        shelf = Shelf(setting.database, disk, LIMITS, setting.clock)
        refused(lambda: shelf.receive("mine"), 507)  # it leaves room for others
        assert list((disk / "files").iterdir()) == []


def test_a_folder_that_has_gone_is_an_error_that_does_not_name_it(setting: Setting) -> None:
    setting.folder.rmdir()
    error = refused(lambda: setting.shelf.receive("mine"), 500)
    assert "runs" not in str(error)


def test_a_database_that_refuses_leaves_no_file(setting: Setting) -> None:
    Table.metadata.tables["files"].drop(setting.database.engine)
    with pytest.raises(RegistryError):
        setting.shelf.receive("mine")
    assert setting.names() == []


# Crashes


def die_in_the_middle(folder: str, ready: "multiprocessing.synchronize.Event") -> None:
    upload = Incoming(Path(folder), max_bytes=100, max_line_bytes=100)
    upload.write(b"half")
    orphan = Incoming(Path(folder), max_bytes=100, max_line_bytes=100)
    orphan.rename(f"file-{'0' * 24}.jsonl")
    ready.set()
    threading.Event().wait(60)


def test_what_a_killed_writer_left_is_removed_and_what_a_living_one_writes_is_not(
    setting: Setting,
) -> None:
    file = setting.add()
    deleted = setting.add()
    setting.shelf.delete("mine", deleted.id)
    (setting.folder / f"{deleted.id}.jsonl").write_bytes(b"a crash between row and bytes")
    (setting.folder / "notes.txt").write_bytes(b"not ours")
    spawn = multiprocessing.get_context("spawn")
    ready = spawn.Event()
    writer = spawn.Process(target=die_in_the_middle, args=(str(setting.folder), ready))
    writer.start()
    living = setting.shelf.receive("mine")
    living.write(b"half")
    try:
        assert ready.wait(60)
        assert [path.name for path in setting.shelf.clean()] == [f"{deleted.id}.jsonl"]
        assert len(setting.names()) == 5
    finally:
        assert writer.pid is not None
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
        writer.close()
    assert len(setting.shelf.clean()) == 2
    kept = setting.shelf.keep(living, Label(project="mine", filename="b", purpose="batch"))
    living.close()
    assert setting.names() == sorted([f"{file.id}.jsonl", kept.id, "notes.txt"])
    assert setting.shelf.clean() == []


def test_a_file_between_its_name_and_its_row_is_not_removed(setting: Setting) -> None:
    upload = setting.shelf.receive("mine")
    upload.rename(f"file-{'1' * 24}")
    assert setting.shelf.clean() == []
    upload.close()
    assert setting.names() == []


def test_nothing_is_written_after_the_writer_has_closed(setting: Setting) -> None:
    upload = setting.shelf.receive("mine")
    upload.close()
    upload.write(b"late")
    upload.close()
    assert setting.names() == []


def test_a_lock_is_held_by_one(setting: Setting) -> None:
    path = setting.folder / "a"
    path.touch()
    with incoming.locked(path) as first, incoming.locked(path) as second:
        assert (first, second) == (True, False)
    with incoming.locked(path) as again, incoming.locked(setting.folder / "b") as missing:
        assert (again, missing) == (True, False)


# Names


@pytest.mark.parametrize(
    ("given_name", "kept"),
    [
        ("train.jsonl", "train.jsonl"),
        ("../../etc/passwd", "passwd"),
        ("C:\\data\\train.jsonl", "train.jsonl"),
        ("a\r\nSet-Cookie: x\0.jsonl", "a__Set-Cookie: x_.jsonl"),
        ("\u202egnp.jsonl", "_gnp.jsonl"),
        ("ü 文 \U0001f600.jsonl", "ü 文 \U0001f600.jsonl"),
        ("x" * 400 + ".jsonl", "x" * 249 + ".jsonl"),
        ("x" * 400, "x" * 255),
        ("dir/", ""),
        ("  ", ""),
        ("..", ".."),
    ],
)
def test_a_filename_is_kept_as_short_plain_text(given_name: str, kept: str) -> None:
    assert plain_filename(given_name) == kept


@given(st.text(max_size=600))
def test_any_filename_fits_the_registry(given_name: str) -> None:
    kept = plain_filename(given_name)
    assert len(kept) <= 255
    assert "/" not in kept
    assert kept.isprintable()


def test_purposes_are_those_of_the_api() -> None:
    from openai.types import FilePurpose

    assert set(Purpose.__args__) == {*FilePurpose.__args__, "fine-tune-results"}
