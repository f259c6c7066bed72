"""A bench as a Ray actor.

Whoever holds a handle of an actor loads the module of its class (Ray 2.60), and each trial of a
search is a process that holds one: what needs torch is imported only where a method runs.
"""

import functools
import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cluster import config
from cluster.errors import LorayError
from training.config import TrainRecipe
from training.events import EventLog

if TYPE_CHECKING:
    from tune_spaces.bench import Bench
    from tune_spaces.capacity import Capacity

log = logging.getLogger(__name__)

CALLERS = 128
"""Calls that may wait at one bench at the same time."""


class BenchActor:
    """The shell that Ray runs: plain dicts in, plain dicts out."""

    def __init__(
        self,
        recipe: Mapping[str, Any],
        directory: str,
        *,
        largest: Mapping[str, Any],
        seats: int | Literal["auto"],
        most: int,
        threads: int,
        fill_window_s: float,
        name: str,
    ) -> None:
        from tune_spaces import capacity, desk

        self._name = name
        self._log = EventLog(occupancy_file(Path(directory), name))
        self._tell(0)  # a restarted bench has lost its seats
        self._desk = desk.open_desk(
            config.build(TrainRecipe, recipe, where="search"),
            Path(directory),
            threads=threads,
            fill_window_s=fill_window_s,
            told=self._tell,
        )
        self._capacity: Capacity | None = None
        self._find = functools.partial(
            capacity.find,
            recipe=config.build(TrainRecipe, largest, where="search"),
            wanted=seats,
            most=most,
            kept=Path(directory) / f"seats-{name}.json",
        )

    def ready(self) -> dict[str, Any]:
        """The bench's Capacity, once the base is loaded and the seats are counted."""
        if self._capacity is None:  # also of a bench that was restarted, whose first call is a join
            found = self._desk.order(self._find)
            self._desk.seats, self._capacity = found.seats, found
        return asdict(self._capacity)

    def room(self, trial: str) -> tuple[int, int]:
        """Seats that other trials have, and seats in all."""
        self.ready()
        return sum(other != trial for other in self._desk.trials), self._desk.seats

    def join(
        self, trial: str, recipe: Mapping[str, Any], run_dir: str, taken: int | None = None
    ) -> tuple[int, int] | None:
        """See Desk.join."""
        self.ready()
        own = config.build(TrainRecipe, recipe, where=f"trial {trial}")
        return self._desk.join(trial, own, Path(run_dir), taken=taken)

    def train(self, trial: str, supervised_tokens: int) -> dict[str, Any]:
        """See Desk.train; the fields of a Progress."""
        return asdict(self._desk.train(trial, supervised_tokens))

    def save(self, trial: str, best_step: int | None = None) -> str:
        """See Bench.save."""
        return str(self._desk.order(lambda bench: bench.save(trial, best_step=best_step)))

    def save_all(self) -> None:
        """Commit a checkpoint of the last whole step of every trial that has a seat."""
        for trial in self._desk.trials:
            with suppress(LorayError):  # it has just left, or has nothing whole
                self.save(trial)

    def rewind(self, trial: str, step: int) -> str:
        """See Bench.rewind."""
        return str(self._desk.order(lambda bench: bench.rewind(trial, step)))

    def export(self, trial: str) -> str:
        """Commit the adapter to use; its directory."""
        return str(self._desk.order(lambda bench: bench.export(trial)))

    def adopt(self, source: str, target: str) -> None:
        """Replace a trial's checkpoints by those of another, and fence off its older seats."""
        from training import checkpoint

        self._desk.order(lambda _: checkpoint.adopt(Path(source), Path(target)))

    def leave(self, trial: str, attempt: int | None = None) -> None:
        """See Desk.leave."""
        self._desk.leave(trial, attempt)

    def clear(self) -> None:
        """Take all seats away: of trials whose processes did not live to give them back."""
        for trial in self._desk.order(lambda bench: bench.trials):
            self._desk.leave(trial)

    def base_loss(self) -> float | None:
        """Mean loss of a supervised token of the evaluation data under the bare base."""
        return self._desk.order(lambda bench: bench.eval_loss())

    def size(self) -> tuple[int, int]:
        """Examples of the training data, and their supervised tokens."""

        def count(bench: "Bench") -> tuple[int, int]:
            assert bench.data.train is not None
            return len(bench.data.train), bench.data.train.num_supervised

        return self._desk.order(count)

    def scores(self, trials: Sequence[str], metric: str, source: str | None) -> dict[str, Any]:
        """Each trial's score of each held-out example; the trial `base` is the bare base.

        `source` is other examples than the recipe's evaluation data. The values are lists in the
        order of the examples: mean losses of a supervised token with their weights, or what
        `training.evaluate` gives for one answer.
        """
        from tune_spaces import desk

        return self._desk.order(lambda bench: desk.scores(bench, trials, metric, source))

    def _tell(self, taken: int) -> None:
        from training import worker

        try:
            self._log.write("seats", taken=taken, peak_rss_bytes=worker.peak_rss_bytes())
        except OSError as error:  # a figure of the report is not worth a trial
            log.warning("bench=%s occupancy_not_written=%r", self._name, str(error))


def occupancy_file(directory: Path, bench: str) -> Path:
    """Events `seats` (taken from then on, peak_rss_bytes so far), which outlive the bench."""
    return directory / f"occupancy-{bench}.jsonl"
