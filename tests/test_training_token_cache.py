"""The token cache: made once, never trusted, and in nobody's way when it breaks."""

import json
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from processes import wait_until
from tiny import byte_tokenizer

from cluster.errors import DataError, ResourceError, StorageError
from training import examples, token_cache
from training.config import DataConfig
from training.examples import BadRow, Example
from training.special_ids import stop_ids
from training.token_cache import Request
from training.token_set import TokenSet
from training.tokens import Encoded, Encoder


def write(path: Path, *pairs: tuple[str, str]) -> str:
    rows = [{"prompt": prompt, "completion": completion} for prompt, completion in pairs]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def request(source: str, *, skip: bool = False, kind: type[Encoder] = Encoder) -> Request:
    tokenizer = byte_tokenizer()
    return Request(
        source=source,
        data=DataConfig(train=source, on_bad_row="skip" if skip else "error"),
        encoder=kind(tokenizer, max_length=1024, stop_ids=stop_ids(tokenizer, None)),
        tokenizer_fingerprint="bytes",
    )


def load(source: str, *roots: Path, skip: bool = False, known: str | None = None) -> TokenSet:
    return token_cache.load(request(source, skip=skip), roots, known=known)


def entries(root: Path) -> list[Path]:
    """What there is but for locks."""
    found = sorted(root.iterdir()) if root.exists() else []
    return [path for path in found if not path.name.startswith(".lock-")]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "runs" / ".tokens"


def test_the_second_load_comes_from_the_cache(
    tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write(tmp_path / "train.jsonl", ("Hi", "Hello"), ("a", "one"))
    first = load(source, root)
    assert entries(root) == [first.directory]
    monkeypatch.setattr(examples, "stream", None)  # Would fail if it were called.
    second = load(source, root)
    assert first.fingerprint == second.fingerprint
    for before, after in zip(first, second, strict=True):
        assert (before.id, before.has_end, before.is_truncated) == (
            after.id,
            after.has_end,
            after.is_truncated,
        )
        assert before.labels.tolist() == after.labels.tolist()


def test_a_known_key_is_opened_without_the_source(tmp_path: Path, root: Path) -> None:
    source = write(tmp_path / "train.jsonl", ("Hi", "Hello"))
    first = load(source, root)
    Path(source).unlink()
    again = load(source, tmp_path / "other", root, known=first.directory.name)
    assert again.fingerprint == first.fingerprint
    with pytest.raises(DataError, match="no such file"):
        load(source, root, known="0" * 64)


def test_the_cache_is_keyed_by_contents_and_settings(tmp_path: Path, root: Path) -> None:
    source = write(tmp_path / "train.jsonl", ("Hi", "Hello"))
    load(source, root)
    wanted = request(source)
    tokenizer = byte_tokenizer()
    shorter = Encoder(tokenizer, max_length=512, stop_ids=stop_ids(tokenizer, None))
    token_cache.load(
        Request(
            source=source,
            data=wanted.data,
            encoder=shorter,
            tokenizer_fingerprint=wanted.tokenizer_fingerprint,
        ),
        [root],
    )
    write(tmp_path / "train.jsonl", ("Hi", "Bye"))
    assert load(source, root).num_supervised == 4
    assert len(entries(root)) == 3


DAMAGE = ["empty", "truncate", "flip", "gone"]
FILES = ["ids-00000.i4", "labels-00000.i4", "names.u1", "offsets.i8", "facts.json", "manifest.json"]


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_cache_is_rebuilt_with_a_warning(
    tmp_path: Path, root: Path, caplog: pytest.LogCaptureFixture, name: str, damage: str
) -> None:
    source = write(tmp_path / "train.jsonl", ("Hi", "Hello"))
    first = load(source, root)
    path = first.directory / name
    data = path.read_bytes()
    path.unlink()  # the first set goes on with what it has mapped
    half = len(data) // 2
    if damage != "gone":
        path.write_bytes(
            {
                "empty": b"",
                "truncate": data[:half],
                "flip": data[:half] + bytes([data[half] ^ 1]) + data[half + 1 :],
            }[damage]
        )
    with caplog.at_level(logging.WARNING):
        again = load(source, root)
    assert "token_set=damaged" in caplog.text
    assert name in caplog.text
    assert [item.labels.tolist() for item in again] == [item.labels.tolist() for item in first]
    assert entries(root) == [again.directory]
    caplog.clear()
    assert load(source, root).fingerprint == first.fingerprint
    assert not caplog.text


def test_a_worker_makes_a_set_again_that_was_cut(
    tmp_path: Path, root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = write(tmp_path / "train.jsonl", ("Hi", "Hello"))
    first = load(source, root)
    (first.directory / "ids-00000.i4").unlink()
    (first.directory / "ids-00000.i4").write_bytes(b"1234")
    with caplog.at_level(logging.WARNING):
        again = load(source, root, known=first.directory.name)
    assert "truncated or grown: 4 bytes" in caplog.text
    assert again[0].input_ids.tolist() == first[0].input_ids.tolist()


def test_bad_rows_stay_bad_when_they_come_from_the_cache(tmp_path: Path, root: Path) -> None:
    source = write(tmp_path / "train.jsonl", ("Hi", "Hello"), ("x", ""))
    assert load(source, root, skip=True).facts.num_bad == 1
    assert load(source, root, skip=True).facts.bad[0].where == f"{source}:2"
    with pytest.raises(DataError, match="1 of 2 rows are bad"):
        load(source, root)


def test_bad_rows_are_all_counted_and_leave_no_set(tmp_path: Path, root: Path) -> None:
    pairs = [("x", ""), *[("Hi", "Hello")] * 3, *[("x", "")] * 299]
    source = write(tmp_path / "train.jsonl", *pairs)
    with pytest.raises(DataError, match=r"300 of 303 rows are bad; repair(.*\n){6}.*and 295 more"):
        load(source, root)
    assert not entries(root)
    kept = load(source, root, skip=True)
    assert (len(kept), kept.facts.num_bad, len(kept.facts.bad)) == (3, 300, 100)


def test_a_source_without_usable_rows_is_an_error(tmp_path: Path, root: Path) -> None:
    source = write(tmp_path / "train.jsonl", ("x", ""), ("y", ""))
    with pytest.raises(DataError, match="2 of 2 rows are bad; no row can be used"):
        load(source, root, skip=True)
    assert not entries(root)


def test_where_the_storage_cannot_be_written_the_next_place_is_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = write(tmp_path / "train.jsonl", ("Hi", "Hello"))
    (tmp_path / "file").touch()
    with caplog.at_level(logging.WARNING):
        found = load(source, tmp_path / "file" / ".tokens", tmp_path / "local")
    assert found.directory.parent == tmp_path / "local"
    assert "tokens_root=" in caplog.text
    assert "unusable=" in caplog.text
    with pytest.raises(StorageError, match=r"written neither to .*file/.tokens.*LORAY_CACHE"):
        load(source, tmp_path / "file" / ".tokens")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    mount = tmp_path / "disk"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(mount)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    if done.returncode:
        pytest.skip(f"a tmpfs cannot be mounted here: {done.stderr.strip()}")
    yield mount
    subprocess.run(["umount", "-l", str(mount)], check=True, timeout=20)


@pytest.mark.chaos
def test_a_full_disk_is_told_and_nothing_is_left(tmp_path: Path, small_disk: Path) -> None:
    source = write(tmp_path / "train.jsonl", *[("Hi", "Hello " * 150)] * 300)
    with pytest.raises(StorageError, match="the disk or quota is full"):
        load(source, small_disk / ".tokens", tmp_path / "local")
    assert not entries(small_disk / ".tokens")
    assert not (tmp_path / "local").exists()


@pytest.mark.chaos
def test_a_set_on_read_only_storage_is_used_and_none_is_made_there(
    tmp_path: Path, small_disk: Path
) -> None:
    source = write(tmp_path / "train.jsonl", ("Hi", "Hello"))
    first = load(source, small_disk / ".tokens")
    command = ["mount", "-o", "remount,ro", str(small_disk)]
    subprocess.run(command, check=True, timeout=20)
    roots = small_disk / ".tokens", tmp_path / "local"
    assert load(source, *roots).directory == first.directory
    write(tmp_path / "train.jsonl", ("Hi", "Bye"))
    assert load(source, *roots).directory.parent == tmp_path / "local"


class Meddling(Encoder):
    """Lets something happen to the file while its rows are encoded."""

    def try_encode(self, example: Example) -> Encoded | BadRow:
        self.meddle()
        return super().try_encode(example)

    def meddle(self) -> None:
        raise NotImplementedError


def test_a_file_that_is_written_to_meanwhile_is_refused(tmp_path: Path, root: Path) -> None:
    source = write(tmp_path / "train.jsonl", ("Hi", "Hello"), ("a", "one"))

    class Growing(Meddling):
        def meddle(self) -> None:
            with Path(source).open("a") as file:
                file.write('{"prompt": "b", "completion": "two"}\n')

    with pytest.raises(DataError, match="was changed while it was tokenised"):
        token_cache.load(request(source, kind=Growing), [root])
    assert not entries(root)
    assert len(load(source, root)) == len(Path(source).read_text().splitlines())


def test_a_file_that_is_only_touched_meanwhile_is_taken(tmp_path: Path, root: Path) -> None:
    source = write(tmp_path / "train.jsonl", ("Hi", "Hello"))

    class Touching(Meddling):
        def meddle(self) -> None:
            os.utime(source)

    assert len(token_cache.load(request(source, kind=Touching), [root])) == 1


class Patient(Encoder):
    """Encodes when it is told to."""

    begun = threading.Event()
    go_on = threading.Event()

    def try_encode(self, example: Example) -> Encoded | BadRow:
        self.begun.set()
        assert self.go_on.wait(60)
        return super().try_encode(example)


def test_one_makes_a_set_while_the_other_waits(
    tmp_path: Path, root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = write(tmp_path / "train.jsonl", ("Hi", "Hello"))
    found: list[TokenSet] = []

    class First(Patient):
        begun, go_on = threading.Event(), threading.Event()

    def make() -> None:
        found.append(token_cache.load(request(source, kind=First), [root]))

    with caplog.at_level(logging.INFO):
        maker = threading.Thread(target=make)
        maker.start()
        assert First.begun.wait(60)
        with pytest.raises(ResourceError, match=r"another process has been tokenising.* for 0 s"):
            token_cache.load(request(source), [root], patience_s=0.1)
        releaser = threading.Timer(0.3, First.go_on.set)
        releaser.start()
        waited = load(source, root)
        maker.join(60)
        releaser.join(60)
    assert waited.directory == found[0].directory
    assert caplog.text.count("token_set=made") == 1
    assert "token_set=awaited" in caplog.text


MAKE = """
import sys
from pathlib import Path
import test_training_token_cache as room
from training import token_cache
class Slow(room.Patient):
    def try_encode(self, example):
        print("at it", flush=True)
        return super().try_encode(example)
token_cache.load(room.request(sys.argv[1], kind=Slow), [Path(sys.argv[2])])
"""


@pytest.mark.chaos
def test_what_a_killed_maker_left_is_removed_by_the_next(tmp_path: Path, root: Path) -> None:
    sources = [
        write(tmp_path / f"{name}.jsonl", ("Hi", name), ("a", "one")) for name in ("one", "two")
    ]
    makers = [
        subprocess.Popen(
            [sys.executable, "-c", MAKE, source, str(root)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        for source in sources
    ]
    try:
        for number, maker in enumerate(makers, start=1):
            wait_until(lambda count=number: len(entries(root)) >= count, maker)
        assert all(path.name.startswith(".tmp-tokens-") for path in entries(root))
        makers[0].send_signal(signal.SIGKILL)
        makers[0].wait(20)
        other = load(write(tmp_path / "three.jsonl", ("Hi", "three")), root)
        assert len(entries(root)) == 2  # the live one's, and the new set
        assert other.directory in entries(root)
        makers[1].send_signal(signal.SIGKILL)
        makers[1].wait(20)
        assert len(load(sources[1], root)) == 2  # the lock went with its owner
        assert not [path for path in entries(root) if path.name.startswith(".")]
    finally:
        for maker in makers:
            maker.kill()
            maker.communicate()
