"""A run as a person watches it: a progress bar on a terminal, a line now and then elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from training import strategy
from training.events import Event

_LINE_EVERY_S = 10.0


def support() -> Table:
    """What goes together: each strategy beside each quantisation, over all other settings."""
    counts: dict[tuple[str, str], list[bool]] = {}
    for settings, refusal in strategy.combinations():
        key = settings["scale.strategy"], settings["model.quantization"]
        counts.setdefault(key, []).append(refusal is None)
    columns = strategy.AXES["model.quantization"]
    table = Table("scale.strategy", *columns, title="model.quantization")
    for kind in strategy.AXES["scale.strategy"]:
        cells = [counts[kind, column] for column in columns]
        words = ("yes" if all(c) else f"{sum(c)} of {len(c)}" if any(c) else "no" for c in cells)
        table.add_row(kind, *words)
    others = [f"{name}: {', '.join(axis)}" for name, axis in list(strategy.AXES.items())[2:]]
    table.caption = "of the combinations of " + "; ".join(others)
    return table


@contextmanager
def watching(console: Console | None = None) -> Iterator[Callable[[Event], None]]:
    """A watcher of a run's events that draws on stderr."""
    console = console or Console(stderr=True)
    columns = (
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.4f}  {task.fields[speed]:.0f} real tokens/s"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        yield _View(progress, console)


class _View:
    def __init__(self, progress: Progress, console: Console) -> None:
        self._progress = progress
        self._console = console
        self._task = progress.add_task("train", total=None, loss=float("nan"), speed=float("nan"))
        self._last_line_s = 0.0
        self._tokens = self._seconds = 0.0

    def __call__(self, event: Event) -> None:
        if event.kind == "step":
            self._step(event)
        elif event.kind == "started":
            step, total = int(event.number("from_step")), int(event.number("num_steps"))
            self._progress.update(self._task, completed=step, total=total)
            self._print(
                f"{'resuming after step ' + str(step) if step else 'training'}: {total} steps, "
                f"{int(event.number('trainable_parameters')):,} trainable parameters; "
                f"{event.text('note')}"
            )
        elif event.kind == "eval":
            best = " (best so far)" if event.fields.get("is_best") else ""
            step = int(event.number("step"))
            self._print(f"step {step}: eval loss {event.number('loss'):.4f}{best}")
        elif event.kind in ("warning", "failed"):
            self._print(f"{event.kind}: {event.text('message')}")

    def _step(self, event: Event) -> None:
        self._tokens += event.number("real_tokens")
        self._seconds += event.number("step_s")
        step, total = int(event.number("step")), int(event.number("num_steps"))
        loss, speed = event.number("loss"), self._tokens / max(self._seconds, 1e-9)
        self._progress.update(self._task, completed=step, total=total, loss=loss, speed=speed)
        now = time.monotonic()
        is_due = now - self._last_line_s > _LINE_EVERY_S or step == total
        if not self._console.is_terminal and is_due:
            self._last_line_s = now
            left_s = (total - step) * event.number("step_s")
            self._print(
                f"step {step}/{total}  loss {loss:.4f}  lr {event.number('lr'):.2e}  "
                f"{speed:.0f} real tokens/s  ETA {left_s:.0f} s"
            )

    def _print(self, line: str) -> None:
        self._console.print(line, highlight=False, soft_wrap=True, markup=False)
        sys.stderr.flush()
