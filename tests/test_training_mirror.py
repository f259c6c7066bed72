"""A run in an object store as its processes see it, on machines that share nothing else."""

import json
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from processes import wait_until

from cluster import ownership, storage
from cluster.errors import FencedError, StorageError
from training import checkpoint, segments
from training.events import EventLog
from training.mirror import STOP, Mirror
from training.segments import SegmentReader, SegmentWriter

if TYPE_CHECKING:
    from s3_server import Request, S3Server

URL = "s3://bucket/runs"

Machine = Callable[[str], Mirror]


@pytest.fixture
def on(s3: "S3Server", tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """The run as it is seen from a machine of some name."""
    assert s3.endpoint

    def mirror(machine: str) -> Mirror:
        monkeypatch.setenv("LORAY_CACHE", str(tmp_path / machine))
        found = Mirror(URL, "one")
        storage.make_directory(found.run_dir)
        return found

    return mirror


def begin(mirror: Mirror) -> int:
    with closing(EventLog(mirror.run_dir / "events.jsonl")):
        return mirror.begin()


def save(
    mirror: Mirror, step: int, attempt: int, *, keep: int = 2, best: int | None = None
) -> Path:
    """A checkpoint as the first worker makes it."""

    def write(directory: Path) -> None:
        (directory / "weights").write_bytes(bytes([step, attempt]) * 1000)
        (directory / "state.json").write_text(json.dumps({"step": step}))

    final = checkpoint.directory(mirror.run_dir, step)
    storage.commit(final, write, attempt=str(attempt))
    checkpoint.prune(mirror.run_dir, keep=keep, best_step=best)
    mirror.publish_checkpoint(final, keep=keep, best_step=best)
    return final


def committed(s3: "S3Server") -> list[str]:
    names = [key.split("/") for key in s3.objects("runs/one/checkpoints")]
    return sorted(parts[3] for parts in names if parts[-1] == storage.MANIFEST)


def raised(messages: list[str]) -> Callable[[str], None]:
    return messages.append


def test_the_newest_checkpoint_comes_to_a_machine_that_has_none(
    s3: "S3Server", on: Machine
) -> None:
    first = on("first")
    with closing(first):
        attempt = begin(first)
        for step in (1, 2, 3):
            save(first, step, attempt)
    assert committed(s3) == ["step-000002-000001", "step-000003-000001"]
    second = on("second")
    assert second.run_dir != first.run_dir
    warnings: list[str] = []
    found = second.fetch_latest(warnings.append)
    assert found == checkpoint.directory(second.run_dir, 3)
    assert storage.verify(found) == storage.verify(checkpoint.directory(first.run_dir, 3))
    assert not warnings


def test_what_is_only_on_this_machine_does_not_count(on: Machine) -> None:
    mirror = on("machine")
    with closing(mirror):
        attempt = begin(mirror)
        save(mirror, 1, attempt)
        ahead = checkpoint.directory(mirror.run_dir, 2)  # committed here, killed before the upload
        storage.commit(ahead, lambda path: (path / "weights").write_text("w") and None, attempt="1")
    found = on("machine").fetch_latest(raised([]))
    assert found == checkpoint.directory(mirror.run_dir, 1)
    assert not ahead.exists()


def test_a_local_directory_without_a_run_in_the_store_is_emptied(
    s3: "S3Server", on: Machine
) -> None:
    mirror = on("machine")
    with closing(mirror):
        save(mirror, 1, begin(mirror))
    for key in s3.objects():
        s3.delete(key)
    fresh = on("machine")
    assert fresh.fetch_latest(raised([])) is None
    assert not list((fresh.run_dir / "checkpoints").glob("step-*"))
    fresh.pull("recipe.json")
    assert not (fresh.run_dir / "recipe.json").exists()


@pytest.mark.parametrize("how", ["truncated", "flipped", "missing", "swapped"])
def test_a_damaged_checkpoint_is_marked_and_the_next_older_is_used(
    s3: "S3Server", on: Machine, how: str
) -> None:
    mirror = on("first")
    with closing(mirror):
        attempt = begin(mirror)
        for step in (1, 2):
            save(mirror, step, attempt)
    newest, older = (f"runs/one/checkpoints/step-00000{step}-000001" for step in (2, 1))
    weights = s3.get(f"{newest}/weights")
    if how == "missing":
        s3.delete(f"{newest}/weights")
    else:
        damage = {"truncated": weights[:-1], "flipped": b"\0" + weights[1:]}
        s3.put(f"{newest}/weights", damage.get(how) or s3.get(f"{older}/weights"))
    messages: list[str] = []
    second = on("second")
    found = second.fetch_latest(messages.append)
    assert found == checkpoint.directory(second.run_dir, 1)
    assert len(messages) == 1
    assert "checkpoint step-000002-000001 is damaged" in messages[0]
    assert b"weights" in s3.get(f"{newest}/.broken")
    third = on("third")  # nobody tries it again, and the others agree
    assert third.fetch_latest(messages.append) == checkpoint.directory(third.run_dir, 1)
    assert len(messages) == 1
    with pytest.raises(StorageError, match="no checkpoint of step 2"):
        third.fetch_step(2)


@pytest.mark.chaos
@pytest.mark.parametrize("is_done", [False, True])
def test_a_failure_at_any_object_leaves_the_older_checkpoint_in_use(
    s3: "S3Server", on: Machine, is_done: bool
) -> None:
    """403 is not tried again, so that it stops the writer there, as its death would."""
    number, was_whole = 0, False
    while not was_whole:
        for key in s3.objects():
            s3.delete(key)
        writer = on(f"writer {number} {is_done}")
        attempt = begin(writer)
        save(writer, 1, attempt)
        seen: list[str] = []

        def stop(request: "Request", seen: list[str] = seen, number: int = number) -> int | None:
            if request.method == "PUT" and "step-000002" in request.key:
                if request.is_done == is_done:
                    seen.append(request.key)
                return 403 if len(seen) > number else None
            return None

        s3.fault = stop
        try:
            save(writer, 2, attempt)
            was_whole = True
        except StorageError as error:
            assert "the store refuses" in str(error)  # noqa: PT017
        s3.fault = None
        writer.close()
        found = on(f"reader {number} {is_done}").fetch_latest(raised([]))
        assert found is not None
        is_there = was_whole or (is_done and seen[-1].endswith(storage.MANIFEST))
        assert found.name == ("step-000002" if is_there else "step-000001")
        number += 1
    assert number == 4  # two files and the marker, then all of it


def test_a_fenced_attempt_publishes_nothing_and_removes_nothing(
    s3: "S3Server", on: Machine
) -> None:
    old, new = on("first"), on("second")
    with closing(old), closing(new):
        for step in (1, 2):
            save(old, step, begin(old) if step == 1 else 1)
        assert begin(new) == 2
        before = s3.objects("runs/one/checkpoints")
        with pytest.raises(FencedError, match="superseded by a newer attempt"):
            save(old, 3, 1)
        storage.commit(old.run_dir / "adapter", lambda path: None, attempt="1")
        with pytest.raises(FencedError, match="superseded"):
            old.publish_adapter()
        assert s3.objects("runs/one/checkpoints") == before
        assert not s3.objects("runs/one/adapter")


def test_an_attempt_fences_those_on_its_own_machine_too(on: Machine) -> None:
    first, second = on("machine"), on("machine")
    with closing(first), closing(second):
        attempts = begin(first), begin(second)
    assert attempts == (1, 2)
    assert not ownership.is_current_attempt(first.run_dir, 1)
    assert ownership.is_current_attempt(second.run_dir, 2)


def test_pruning_keeps_the_newest_and_the_best_and_clears_what_was_left_unfinished(
    s3: "S3Server", on: Machine
) -> None:
    s3.put("runs/one/checkpoints/step-000009-000000/weights", b"left by a killed attempt")
    s3.put("runs/one/checkpoints/notes.txt", b"a person's")
    mirror = on("machine")
    with closing(mirror):
        attempt = begin(mirror)
        for step in range(1, 6):
            save(mirror, step, attempt, best=2 if step >= 2 else None)
    assert committed(s3) == [f"step-00000{step}-000001" for step in (2, 4, 5)]
    left = {key.split("/")[3] for key in s3.objects("runs/one/checkpoints")}
    assert left == {*committed(s3), "notes.txt"}
    assert on("other").fetch_step(2).name == "step-000002"


def test_workers_elsewhere_take_the_newest_attempts_checkpoint_of_a_step(on: Machine) -> None:
    first, second, third = on("first"), on("second"), on("third")
    with closing(first), closing(second):
        save(first, 4, begin(first))
        third.fetch_step(4)
        save(second, 4, begin(second))
    found = third.fetch_step(4)
    assert storage.verify(found) == storage.verify(checkpoint.directory(second.run_dir, 4))


def test_an_adapter_damaged_in_the_store_is_not_used_here_either(
    s3: "S3Server", on: Machine
) -> None:
    worker, driver = on("worker"), on("driver")
    with closing(worker):
        begin(worker)
        storage.commit(
            worker.run_dir / "adapter",
            lambda path: path.joinpath("weights").write_bytes(b"w" * 100) and None,
            attempt="1",
        )
        worker.publish_adapter()
    driver.fetch_adapter()
    storage.verify(driver.run_dir / "adapter")
    s3.delete("runs/one/adapter/manifest.json")
    driver.fetch_adapter()
    assert not (driver.run_dir / "adapter").exists()


def test_a_request_to_stop_reaches_the_first_worker(s3: "S3Server", on: Machine) -> None:
    driver, worker = on("driver"), on("worker")
    with closing(worker):
        (worker.run_dir / STOP).touch()  # of an earlier time
        begin(worker)
        assert not (worker.run_dir / STOP).exists()
        driver.request_stop()
        wait_until((worker.run_dir / STOP).exists)
    assert s3.objects("runs/one/stop-requested")


def test_events_arrive_once_and_in_order_over_segments_and_attempts(
    on: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segments, "_SEGMENT_BYTES", 150)
    worker, driver = on("worker"), on("driver")
    reader = SegmentReader(driver.remote)
    seen: list[tuple[int, float]] = []
    path = worker.run_dir / "events.jsonl"
    path.write_bytes(b'{"event":"step","time":1,"attempt":0,"step":0}\n{"torn')

    def read() -> None:
        seen.extend((int(e.number("attempt")), e.number("step")) for e in reader.read())

    for attempt in (1, 2):
        with closing(EventLog(path)) as log:
            writer = SegmentWriter(worker.remote, path, attempt=attempt)
            for step in range(7):
                log.write("step", attempt=attempt, step=step)
                if step % 3 != 1:
                    writer.flush()
                if step % 2:
                    read()
            writer.flush()
            writer.flush()
    read()
    assert seen == [(attempt, step) for attempt in (1, 2) for step in range(7)]
    driver.follow()
    history = (driver.run_dir / "events.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in history if line] == [*range(7)] * 2


def test_a_segment_that_grew_while_it_was_listed_is_read_to_its_end(
    s3: "S3Server", on: Machine
) -> None:
    reader = SegmentReader(on("driver").remote)

    def line(step: int) -> bytes:
        return b'{"event":"step","time":1,"step":%d}\n' % step

    s3.put("runs/one/events/000001-000001.jsonl", line(1))
    assert [e.number("step") for e in reader.read()] == [1]
    s3.put("runs/one/events/000001-000002.jsonl", line(3))

    def grow(request: "Request") -> None:
        if request.key == "" and request.is_done:  # the list is made; then
            s3.fault = None
            s3.put("runs/one/events/000001-000001.jsonl", line(1) + line(2))

    s3.fault = grow
    assert [e.number("step") for e in reader.read()] == [2, 3]


def test_a_zombies_late_events_do_not_come_between(on: Machine) -> None:
    old, new, driver = on("first"), on("second"), on("driver")
    reader = SegmentReader(driver.remote)
    logs = {}
    for mirror, attempt in ((old, 1), (new, 2)):
        path = mirror.run_dir / "events.jsonl"
        logs[attempt] = (EventLog(path), SegmentWriter(mirror.remote, path, attempt=attempt))
        logs[attempt][0].write("started", attempt=attempt)
        logs[attempt][1].flush()
    assert [e.number("attempt") for e in reader.read()] == [1, 2]
    logs[1][0].write("finished", attempt=1)
    logs[1][1].flush()
    assert list(reader.read()) == []
    for log, _ in logs.values():
        log.close()


def test_events_that_could_not_be_uploaded_come_later(s3: "S3Server", on: Machine) -> None:
    worker = on("worker")
    path = worker.run_dir / "events.jsonl"
    with closing(EventLog(path)) as log:
        writer = SegmentWriter(worker.remote, path, attempt=1)
        log.write("step", step=1)
        s3.fault = lambda _: 403
        with pytest.raises(StorageError):
            writer.flush()
        s3.fault = None
        log.write("step", step=2)
        writer.flush()
    assert [e.number("step") for e in SegmentReader(worker.remote).read()] == [1, 2]
