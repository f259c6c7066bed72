"""A search as a person watches it: a table of trials on a terminal, a line a report elsewhere."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from training.events import Event
from tune_spaces.schedulers import TOKENS, mode_of

_MAX_ROWS = 24
"""Trials in the table; of more, those that still run and the best of the rest."""


@contextmanager
def watching(console: Console | None = None) -> Iterator[Callable[[Event], None]]:
    """A watcher of a search's events that draws on stderr."""
    console = console or Console(stderr=True)
    view = _View(console=console)
    if not console.is_terminal:
        yield view.tell
        return
    with Live(view.draw(), console=console, refresh_per_second=4) as live:

        def watch(event: Event) -> None:
            view.tell(event)
            live.update(view.draw())

        yield watch


@dataclass(kw_only=True, slots=True)
class _View:
    console: Console
    metric: str = "eval_loss"
    budget: float = 1.0
    total: int = 1
    rows: dict[str, Event] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    stopped: set[str] = field(default_factory=set)
    progress: Progress = field(init=False)

    def __post_init__(self) -> None:
        self.progress = Progress(
            TextColumn("[bold]search"),
            BarColumn(),
            TextColumn(
                "{task.percentage:.0f} %  {task.fields[ended]} of {task.total} trials ended"
            ),
            TimeRemainingColumn(),
            console=self.console,
        )
        self.progress.add_task("search", total=1, ended=0)

    def tell(self, event: Event) -> None:
        """Take in one event, and say what is worth a line of its own."""
        trial = event.text("trial")
        if event.kind == "started":
            self.metric, self.budget = event.text("metric"), event.number("budget")
            self.total = int(event.number("trials"))
        elif event.kind == "trial_failed":
            self.failed[trial] = event.text("message")
            self._print(f"trial {trial} failed: {event.text('message')}")
        elif event.kind == "stopped":
            self.stopped.add(trial)
            self._print(f"trial {trial} stopped: {event.text('reason')}")
        elif event.kind == "result":
            self.failed.pop(trial, None)
            self.rows[trial] = event
            if event.text("reason"):
                self._print(f"trial {trial} stopped: {event.text('reason')}")
            elif not self.console.is_terminal:
                self._print(self._line(event))
        done = [self._done(name) for name in self.rows]
        ended = sum(share >= 1 for share in done)
        self.progress.update(
            self.progress.task_ids[0], total=self.total, completed=sum(done), ended=ended
        )

    def draw(self) -> Group:
        """The table over the progress bar."""
        table = Table(box=None, pad_edge=False)
        for column in ("trial", "state", "rank", "lr", "tokens", "loss", self.metric):
            table.add_column(column, justify="left" if column in ("trial", "state") else "right")
        best = self._best()
        order = sorted(self.rows, key=lambda name: (self._done(name) >= 1, self._rank(name)))
        for name in order[:_MAX_ROWS]:
            event = self.rows[name]
            table.add_row(
                name,
                self._state(name),
                str(event.fields["rank"]),
                f"{event.number('learning_rate'):.2e}",
                str(event.fields[TOKENS]),
                f"{event.number('train_loss'):.4f}",
                f"{event.number('value'):.4f}",
                style="bold green" if name == best else None,
            )
        return Group(table, self.progress)

    def _line(self, event: Event) -> str:
        end = "  finished" if event.fields["is_finished"] else ""
        return (
            f"trial {event.text('trial')}  rank {event.fields['rank']}  "
            f"lr {event.number('learning_rate'):.2e}  {event.fields[TOKENS]} tokens  "
            f"loss {event.number('train_loss'):.4f}  "
            f"{self.metric} {event.number('value'):.4f}{end}"
        )

    def _state(self, name: str) -> str:
        event = self.rows[name]
        if name in self.failed:
            return "failed"
        if event.fields["is_finished"]:
            return "finished"
        return "stopped" if name in self.stopped or event.text("reason") else "running"

    def _done(self, name: str) -> float:
        if self._state(name) != "running":
            return 1.0
        return min(0.99, self.rows[name].number(TOKENS) / self.budget)

    def _rank(self, name: str) -> float:
        """Smaller is better; what is not finite comes last."""
        value = self.rows[name].number("value")
        signed = value if mode_of(self.metric) == "min" else -value
        return signed if value == value else float("inf")

    def _best(self) -> str | None:
        names = [n for n in self.rows if self._rank(n) < float("inf")]
        return min(names, key=self._rank, default=None)

    def _print(self, line: str) -> None:
        self.console.print(line, highlight=False, soft_wrap=True, markup=False)
        sys.stderr.flush()
