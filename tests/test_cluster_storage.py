"""Commit, verify, quarantine, locks and fences, with real crashes and a really full disk."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import chaos
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from cluster import ownership, storage
from cluster.errors import ConfigError, FencedError, ResourceError, RunInUseError, StorageError

REPOSITORY = Path(__file__).resolve().parent.parent


def _write(directory: Path) -> None:
    (directory / "weights.bin").write_bytes(bytes(range(256)) * 4)
    (directory / "state").mkdir()
    (directory / "state" / "cursor.json").write_text('{"step": 3}')


def _commit(final: Path, **options: object) -> storage.Manifest:
    return storage.commit(final, _write, attempt="1", **options)  # pyright: ignore


@pytest.fixture
def committed(tmp_path: Path) -> Path:
    """A whole step-1 with two files."""
    final = tmp_path / "run" / "step-1"
    _commit(final, info={"loss": 0.5, "note": "é"})
    return final


def _start(code: str, *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stdin=subprocess.PIPE,
        text=True,
    )


def test_commit_writes_files_and_a_manifest_that_verifies(committed: Path) -> None:
    manifest = storage.verify(committed)
    assert set(manifest.files) == {"weights.bin", "state/cursor.json"}
    assert manifest.files["weights.bin"].size_bytes == 1024
    assert manifest.info == {"loss": 0.5, "note": "é"}
    assert manifest == storage.read_manifest(committed)
    assert [path.name for path in committed.parent.iterdir()] == ["step-1"]


def test_commit_refuses_an_existing_directory_and_leaves_it_alone(committed: Path) -> None:
    before = storage.verify(committed)
    with pytest.raises(StorageError, match="exists already"):
        _commit(committed)
    assert storage.verify(committed) == before


def test_commit_replaces_when_told_to(committed: Path) -> None:
    _commit(committed, replace=True, info={"loss": 0.25})
    assert storage.verify(committed).info == {"loss": 0.25}
    assert [path.name for path in committed.parent.iterdir()] == ["step-1"]


def test_failed_replacement_keeps_the_old_directory(committed: Path) -> None:
    before = storage.verify(committed)
    with pytest.raises(FencedError, match="superseded"):
        _commit(committed, replace=True, is_fenced=lambda: True)
    assert storage.verify(committed) == before


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt(), StorageError("bad")])
def test_exception_in_write_leaves_nothing(committed: Path, error: BaseException) -> None:
    def write(directory: Path) -> None:
        _write(directory)
        raise error

    with pytest.raises(type(error)):
        storage.commit(committed.parent / "step-2", write, attempt="1")
    assert [path.name for path in committed.parent.iterdir()] == ["step-1"]
    storage.verify(committed)


def test_an_attempt_whose_files_its_successor_has_removed_ends_as_superseded(
    tmp_path: Path,
) -> None:
    def write(directory: Path) -> None:
        storage.clean_leftovers(tmp_path)  # as the successor does
        (directory / "weights").write_bytes(b"")

    with pytest.raises(FencedError, match="superseded"):
        storage.commit(tmp_path / "step-1", write, attempt="1", is_fenced=lambda: True)
    with pytest.raises(StorageError):
        storage.commit(tmp_path / "step-1", write, attempt="1", is_fenced=lambda: False)


def test_fenced_attempt_never_commits(committed: Path) -> None:
    run = committed.parent
    old = ownership.next_attempt(run)
    new = ownership.next_attempt(run)
    assert (old, new) == (1, 2)

    def is_fenced() -> bool:
        return not ownership.is_current_attempt(run, old)

    with pytest.raises(FencedError, match="has been superseded"):
        _commit(run / "step-2", is_fenced=is_fenced)
    assert not (run / "step-2").exists()
    assert not list(run.glob(".tmp-*"))
    _commit(run / "step-2", is_fenced=lambda: not ownership.is_current_attempt(run, new))


def test_attempts_are_unique_across_processes(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from cluster import ownership\n"
        "for _ in range(20): print(ownership.next_attempt(Path(sys.argv[1])))"
    )
    processes = [_start(code, tmp_path / "run") for _ in range(3)]
    numbers = [int(n) for p in processes for n in p.communicate(timeout=60)[0].split()]
    assert sorted(numbers) == list(range(1, 61))


def test_attempt_of_a_removed_run_is_not_current(tmp_path: Path) -> None:
    assert not ownership.is_current_attempt(tmp_path / "gone", 1)


def test_damaged_attempt_file_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "attempt").write_text("")
    with pytest.raises(StorageError, match="attempt does not hold a number"):
        ownership.next_attempt(tmp_path)


def test_info_that_json_cannot_hold_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="not JSON"):
        _commit(tmp_path / "run" / "step-1", info={"loss": float("nan")})
    assert not (tmp_path / "run").exists()


def test_links_are_not_committed(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="not a plain file"):
        storage.commit(
            tmp_path / "step-1", lambda d: (d / "link").symlink_to("/etc/hosts"), attempt="1"
        )


def _flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 0x01
    path.write_bytes(data)


def _grow(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\n")


def _to_link(path: Path) -> None:
    copy = path.with_name(".copy")
    path.rename(copy)
    path.symlink_to(copy)


@pytest.mark.parametrize("name", ["weights.bin", "state/cursor.json", "manifest.json"])
@pytest.mark.parametrize(
    "damage",
    [
        lambda path: _flip(path, 0),
        lambda path: _flip(path, path.stat().st_size // 2),
        lambda path: _flip(path, -1),
        lambda path: os.truncate(path, path.stat().st_size - 1),
        lambda path: os.truncate(path, 0),
        _grow,
        Path.unlink,
    ],
    ids=["flip first", "flip middle", "flip last", "truncate", "empty", "grow", "remove"],
)
def test_verify_names_the_damaged_file(
    committed: Path, name: str, damage: Callable[[Path], None]
) -> None:
    damage(committed / name)
    with pytest.raises(StorageError, match=re.escape(name)) as caught:
        storage.verify(committed)
    assert str(committed) in str(caught.value)


def test_verify_sees_every_single_flipped_bit_of_the_manifest(committed: Path) -> None:
    path = committed / "manifest.json"
    good = path.read_bytes()
    for position in range(len(good)):
        for bit in range(8):
            bad = bytearray(good)
            bad[position] ^= 1 << bit
            path.write_bytes(bad)
            with pytest.raises(StorageError, match=r"manifest\.json"):
                storage.verify(committed)
    path.write_bytes(good)
    storage.verify(committed)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_verify_accepts_what_was_written_and_no_other_bytes(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    names = st.from_regex(r"[a-z]{1,8}(/[a-z]{1,8})?\.bin", fullmatch=True)
    files = data.draw(st.dictionaries(names, st.binary(max_size=64), min_size=1, max_size=4))

    def write(directory: Path) -> None:
        for name, content in files.items():
            (directory / name).parent.mkdir(exist_ok=True)
            (directory / name).write_bytes(content)

    final = tmp_path_factory.mktemp("property") / "step-1"
    storage.commit(final, write, attempt="1", info={"n": len(files)})
    storage.verify(final)
    name = data.draw(st.sampled_from(sorted(files)))
    other = data.draw(st.binary(max_size=64).filter(lambda content: content != files[name]))
    (final / name).write_bytes(other)
    with pytest.raises(StorageError, match=re.escape(name)):
        storage.verify(final)


def test_verify_refuses_extra_files_but_not_hidden_ones(committed: Path) -> None:
    (committed / ".nfs0001").write_text("left by the file system")
    storage.verify(committed)
    (committed / "state" / "extra.json").write_text("{}")
    with pytest.raises(StorageError, match=r"state/extra\.json is extra"):
        storage.verify(committed)


def test_verify_refuses_a_file_turned_into_a_link_or_directory(committed: Path) -> None:
    _to_link(committed / "weights.bin")
    with pytest.raises(StorageError, match=r"weights\.bin is not a plain file"):
        storage.verify(committed)


def test_verify_refuses_a_directory_without_manifest(tmp_path: Path) -> None:
    for directory in (tmp_path, tmp_path / "missing"):
        with pytest.raises(StorageError, match="never committed"):
            storage.verify(directory)


def test_forged_manifest_cannot_point_outside(committed: Path) -> None:
    entry = storage.FileEntry(size_bytes=0, sha256="")
    forged, _ = storage._encode({"../../secret": entry}, {}, where=committed)
    (committed / "manifest.json").write_bytes(forged)
    with pytest.raises(StorageError, match="secret"):
        storage.read_manifest(committed)


def test_quarantine_moves_aside_and_keeps_the_reason(committed: Path) -> None:
    first = storage.quarantine(committed, "weights.bin is truncated")
    assert first.name == ".broken-step-1-1"
    assert (first / "reason.txt").read_text() == "weights.bin is truncated\n"
    assert not committed.exists()
    _commit(committed)
    assert storage.quarantine(committed, "again").name == ".broken-step-1-2"


def test_quarantine_of_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="move it by hand"):
        storage.quarantine(tmp_path / "gone", "broken")


_CRASH = """
import os, signal, sys
from pathlib import Path
from cluster import storage
run, crash_at, replace = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "True"
calls = 0
def crashing(name, real, after):
    def call(*arguments):
        global calls
        calls += 1
        if calls == crash_at and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = real(*arguments)
        if calls == crash_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    return call
for name in ("fsync", "rename", "replace"):
    setattr(os, name, crashing(name, getattr(os, name), sys.argv[4] == "True"))
def write(directory):
    (directory / "a.bin").write_bytes(b"new" * 1000)
    (directory / "sub").mkdir()
    (directory / "sub" / "b.bin").write_bytes(b"new")
target = run / ("step-1" if replace else "step-2")
storage.commit(target, write, attempt="2", info={"new": True}, replace=replace)
print("done")
"""


@pytest.mark.chaos
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("replace", [False, True], ids=["new", "replace"])
def test_kill_at_any_protocol_point_leaves_all_or_nothing(
    committed: Path, replace: bool, after: bool
) -> None:
    run = committed.parent
    crash_at = 0
    while True:
        crash_at += 1
        process = _start(_CRASH, run, crash_at, replace, after)
        output, _ = process.communicate(timeout=60)
        assert process.returncode in (0, -signal.SIGKILL)
        storage.clean_leftovers(run)
        assert not list(run.glob(".*"))
        is_new = storage.verify(committed).info.get("new")
        assert is_new is None or replace
        if (run / "step-2").exists():
            storage.verify(run / "step-2")
            storage.quarantine(run / "step-2", "make room")
            (run / ".broken-step-2-1").rename(run.parent / f"step-2-{crash_at}")
        if "done" in output:
            break
    assert crash_at > 6


def test_leftovers_of_earlier_attempts_are_removed(committed: Path) -> None:
    run = committed.parent
    (run / ".tmp-1-step-2" / "state").mkdir(parents=True)
    (run / ".tmp-0123-attempt").write_text("2")
    assert {path.name for path in storage.clean_leftovers(run)} == {
        ".tmp-1-step-2",
        ".tmp-0123-attempt",
    }
    assert [path.name for path in run.iterdir()] == ["step-1"]
    storage.verify(committed)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    with chaos.small_disk(tmp_path / "disk", 1 << 20) as disk:
        yield disk


def _with_open(directory: Path) -> None:
    (directory / "big.bin").write_bytes(bytes(4 << 20))


def _with_safetensors(directory: Path) -> None:
    import numpy

    save_file({"w": numpy.zeros(1 << 20, dtype=numpy.float32)}, directory / "big.safetensors")


@pytest.mark.chaos
@pytest.mark.parametrize("write", [_with_open, _with_safetensors])
def test_full_disk_keeps_earlier_commits_and_says_what_is_needed(
    small_disk: Path, write: Callable[[Path], None]
) -> None:
    _commit(small_disk / "step-1")
    with pytest.raises(StorageError) as caught:
        storage.commit(small_disk / "step-2", write, attempt="1")
    message = str(caught.value)
    assert "disk or quota is full" in message
    assert str(small_disk / "step-2") in message
    assert re.search(r"\d+ bytes\) free", message)
    assert "earlier is intact" in message
    assert [path.name for path in small_disk.iterdir()] == ["step-1"]
    storage.verify(small_disk / "step-1")


@pytest.mark.chaos
def test_write_file_on_a_full_disk_keeps_the_old_content(small_disk: Path) -> None:
    storage.write_file(small_disk / "state", b"old")
    with pytest.raises(StorageError, match="disk or quota is full"):
        storage.write_file(small_disk / "state", bytes(4 << 20))
    assert (small_disk / "state").read_bytes() == b"old"
    assert len(list(small_disk.iterdir())) == 1


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_full_disk_and_full_quota_read_the_same(tmp_path: Path, code: int) -> None:
    def write(_: Path) -> None:
        raise OSError(code, os.strerror(code))

    with pytest.raises(StorageError, match="disk or quota is full"):
        storage.commit(tmp_path / "step-1", write, attempt="1")


def test_other_io_errors_name_the_target(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match=r"writing .*file failed .*check the directory"):
        _commit(tmp_path / "file" / "step-1")


def test_require_free_gives_both_numbers(tmp_path: Path) -> None:
    storage.require_free(tmp_path, 1, purpose="a checkpoint")
    with pytest.raises(ResourceError, match=r"a merged model needs .*1048576\.00 GiB") as caught:
        storage.require_free(tmp_path / "new" / "dir", 1 << 50, purpose="a merged model")
    assert re.search(r"has [\d.]+ .iB \(\d+ bytes\) free", str(caught.value))


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "../x", "a/../b", "/etc/passwd", "a//b", "a/", "./a", "a\\b", "a\nb", "a\0b"],
)
def test_join_refuses_names_that_escape(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="allowed"):
        storage.join(tmp_path, name)


def test_join_refuses_links_that_lead_out(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "link").symlink_to(tmp_path)
    with pytest.raises(ConfigError, match="leads out"):
        storage.join(tmp_path / "root", "link/other")


def test_join_accepts_plain_relative_names(tmp_path: Path) -> None:
    assert storage.join(tmp_path, "a-1/b_2.json") == tmp_path / "a-1" / "b_2.json"


def test_second_owner_is_told_who_the_first_is(tmp_path: Path) -> None:
    with ownership.RunLock(tmp_path), pytest.raises(RunInUseError) as caught:
        ownership.RunLock(tmp_path).__enter__()
    assert f"process {os.getpid()} on " in str(caught.value)
    assert "stop it, or choose another name" in str(caught.value)
    with ownership.RunLock(tmp_path):
        pass
    assert not (tmp_path / ".lock-owner").exists()


def test_unreadable_owner_record_still_refuses(tmp_path: Path) -> None:
    with ownership.RunLock(tmp_path):
        (tmp_path / ".lock-owner").write_text("{")
        with pytest.raises(RunInUseError, match="another process"):
            ownership.RunLock(tmp_path).__enter__()


@pytest.mark.chaos
def test_killed_owner_frees_the_run(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from cluster import ownership\n"
        "with ownership.RunLock(Path(sys.argv[1])):\n    print('held', flush=True); input()"
    )
    owner = _start(code, tmp_path)
    assert owner.stdout is not None
    assert owner.stdout.readline() == "held\n"
    with pytest.raises(RunInUseError, match=f"process {owner.pid} "):
        ownership.RunLock(tmp_path).__enter__()
    owner.kill()
    owner.communicate(timeout=20)
    assert json.loads((tmp_path / ".lock-owner").read_text())["pid"] == owner.pid
    with ownership.RunLock(tmp_path):
        assert json.loads((tmp_path / ".lock-owner").read_text())["pid"] == os.getpid()
