"""The event log survives the death of its writer."""

from pathlib import Path

from training.events import EventLog, EventReader


def test_a_reader_gets_each_complete_line_once(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    reader = EventReader(path)
    assert list(reader.read()) == []
    log = EventLog(path, clock=lambda: 12.5)
    log.write("step", step=1, loss=float("nan"))
    (event,) = reader.read()
    assert (event.kind, event.time_s, event.fields) == ("step", 12.5, {"step": 1, "loss": None})
    with path.open("a") as file:
        file.write('{"event": "step", "ti')
    assert list(reader.read()) == []
    log.close()


def test_a_torn_line_is_closed_by_the_next_writer_and_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text('{"event":"started","time":1}\n{"event":"step","time":2,"lo')
    log = EventLog(path)
    log.write("finished", sync=True)
    log.close()
    assert [event.kind for event in EventReader(path).read()] == ["started", "finished"]
