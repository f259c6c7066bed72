"""Events reach the other tools."""

from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from training import sinks
from training.events import Event


def test_tensorboard_gets_the_figures_of_every_step(tmp_path: Path) -> None:
    with sinks.opened(("tensorboard",), tmp_path) as watch:
        for step in (1, 2):
            watch(Event(kind="step", time_s=0.0, fields={"step": step, "loss": 1.0 / step}))
        watch(Event(kind="eval", time_s=0.0, fields={"step": 2, "loss": 0.25}))
        watch(Event(kind="finished", time_s=0.0))
    found = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(s.step, s.value) for s in found.Scalars("train/loss")] == [(1, 1.0), (2, 0.5)]
    assert [s.value for s in found.Scalars("eval/loss")] == [0.25]


def test_no_sink_writes_nothing(tmp_path: Path) -> None:
    with sinks.opened((), tmp_path) as watch:
        watch(Event(kind="step", time_s=0.0, fields={"step": 1}))
    assert list(tmp_path.iterdir()) == []
