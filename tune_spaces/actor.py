"""A bench that many callers use at once: one thread trains, everybody else waits for an answer.

`Desk` is plain Python; `BenchActor` is its thin shell under Ray. Torch is touched by the desk's own
thread alone, so joins, saves and evaluations happen between two turns.
"""

import functools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch

from cluster import config
from cluster.errors import LorayError
from training import checkpoint, evaluate, examples, generation, worker
from training.config import TrainRecipe
from training.events import EventLog
from training.examples import Example
from tune_spaces import capacity
from tune_spaces.bench import Bench, Progress, SeatShed
from tune_spaces.capacity import Capacity

T = TypeVar("T")

log = logging.getLogger(__name__)

_IDLE_S = 0.05
_MAX_NEW_TOKENS = 256
_ANSWERED_TOGETHER = 25
"""Prompts that are answered in one batch, of whatever trials."""
CALLERS = 128
"""Calls that may wait at one bench at the same time."""


class Desk:
    """Takes orders for a bench, and answers each as soon as it is done."""

    def __init__(
        self,
        make_bench: Callable[[], Bench],
        *,
        seats: int,
        fill_window_s: float,
        clock: Callable[[], float] = time.time,
        told: Callable[[int], None] = lambda taken: None,
    ) -> None:
        """told: called with the number of seats taken whenever one was taken or given back."""
        self._make_bench = make_bench
        self.seats = seats
        """Trials that may have a seat at the same time."""
        self.trials: tuple[str, ...] = ()
        """Those that have one."""
        self._fill_window_s = fill_window_s
        self._clock = clock
        self._told = told
        self._orders: deque[tuple[Callable[[Bench], Any], Future[Any]]] = deque()
        self._waiting: dict[str, Future[Progress]] = {}
        self._changed = threading.Condition()
        self._is_closed = False
        self._error: BaseException | None = None
        self._first_join_s: float | None = None
        self._thread = threading.Thread(target=self._run, name="bench", daemon=True)
        self._thread.start()

    def order(self, what: Callable[[Bench], T]) -> T:
        """Do something with the bench between two turns; what it returns or raises comes back."""
        future: Future[T] = Future()
        with self._changed:
            if self._error is not None:
                raise self._error
            self._orders.append((what, future))
            self._changed.notify()
        return future.result()

    def join(
        self, trial: str, recipe: TrainRecipe, run_dir: Path, *, taken: int | None = None
    ) -> tuple[int, int] | None:
        """Seat a trial: the supervised tokens that it has seen, and which of its seats this is.

        None where no seat is free, or others have more seats than `taken` meanwhile.
        """

        def do(bench: Bench) -> tuple[int, int] | None:
            others = sum(other != trial for other in bench.trials)
            if others >= self.seats or (taken is not None and others > taken):
                return None
            tokens = bench.join(trial, recipe, run_dir)
            self._note(bench)
            return tokens, bench.attempt_of(trial)

        return self.order(do)

    def leave(self, trial: str, attempt: int | None = None) -> None:
        """Take a trial's seat away, if it has one; with `attempt`, only if it has that one."""

        def do(bench: Bench) -> None:
            if trial in bench.trials and attempt in (None, bench.attempt_of(trial)):
                bench.leave(trial)
                self._note(bench)

        self.order(do)

    def train(self, trial: str, supervised_tokens: int) -> Progress:
        """Train a trial until it has seen that many supervised tokens, and evaluate it."""
        future: Future[Progress] = Future()

        def do(bench: Bench) -> None:
            bench.ask(trial, supervised_tokens=supervised_tokens)
            self._waiting[trial] = future

        self.order(do)
        return future.result()

    def close(self) -> None:
        """Stop after the current turn; whoever waits is told."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        self._thread.join(60)

    def _note(self, bench: Bench) -> None:
        if self._first_join_s is None:
            self._first_join_s = self._clock()
        self.trials = bench.trials
        self._told(len(self.trials))

    def _run(self) -> None:
        try:
            self._serve(self._make_bench())
            error: BaseException = LorayError("the bench was closed")
        except BaseException as broken:  # everybody who waits is told, none waits for ever
            log.exception("bench=broken")
            error = broken
        with self._changed:
            self._error = error
            futures = [future for _, future in self._orders] + list(self._waiting.values())
        for future in futures:
            future.set_exception(error)

    def _serve(self, bench: Bench) -> None:
        while not self._is_closed:
            self._take_orders(bench)
            self._answer(bench)
            if bench.has_work and not self._is_filling(bench):
                bench.turn()
                continue
            with self._changed:
                if not self._orders and not self._is_closed:
                    self._changed.wait(_IDLE_S)

    def _take_orders(self, bench: Bench) -> None:
        while self._orders:
            what, future = self._orders.popleft()
            try:
                future.set_result(what(bench))
            except BaseException as error:  # it belongs to whoever gave the order
                future.set_exception(error)

    def _answer(self, bench: Bench) -> None:
        for trial, future in list(self._waiting.items()):
            if trial not in bench.trials:
                future.set_exception(LorayError(f"trial {trial} has left its seat"))
            elif bench.is_ready(trial):
                try:
                    future.set_result(bench.collect(trial))
                except Exception as error:  # its own, its neighbours go on
                    if isinstance(error, SeatShed):  # so many do not fit
                        self.seats = max(1, len(bench.trials) - 1)
                    future.set_exception(error)
            else:
                continue
            del self._waiting[trial]

    def _is_filling(self, bench: Bench) -> bool:
        """Whether to wait a little for more seats, so that the first do not travel alone."""
        if self._fill_window_s <= 0 or self._first_join_s is None:
            return False
        is_over = self._clock() - self._first_join_s >= self._fill_window_s
        if is_over or len(bench.trials) >= self.seats:
            self._fill_window_s = 0.0
        return self._fill_window_s > 0


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
        self._name = name
        self._recipe = config.build(TrainRecipe, recipe, where="search")
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

        def make_bench() -> Bench:
            torch.set_num_threads(threads)  # of the desk's thread, which does all the work
            return Bench(recipe=self._recipe, directory=Path(directory), device=device)

        self._log = EventLog(occupancy_file(Path(directory), name))
        self._tell(0)  # a restarted bench has lost its seats
        self._desk = Desk(make_bench, seats=0, fill_window_s=fill_window_s, told=self._tell)
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

    def rewind(self, trial: str, step: int) -> str:
        """See Bench.rewind."""
        return str(self._desk.order(lambda bench: bench.rewind(trial, step)))

    def export(self, trial: str) -> str:
        """Commit the adapter to use; its directory."""
        return str(self._desk.order(lambda bench: bench.export(trial)))

    def adopt(self, source: str, target: str) -> None:
        """Replace a trial's checkpoints by those of another, and fence off its older seats."""
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

        def count(bench: Bench) -> tuple[int, int]:
            assert bench.data.train is not None
            return len(bench.data.train), bench.data.train.num_supervised

        return self._desk.order(count)

    def scores(self, trials: Sequence[str], metric: str, source: str | None) -> dict[str, Any]:
        """Each trial's score of each held-out example; the trial `base` is the bare base.

        `source` is other examples than the recipe's evaluation data. The values are lists in the
        order of the examples: mean losses of a supervised token with their weights, or what
        `training.evaluate` gives for one answer.
        """
        return self._desk.order(lambda bench: _scores(bench, trials, metric, source))

    def _tell(self, taken: int) -> None:
        try:
            self._log.write("seats", taken=taken, peak_rss_bytes=worker.peak_rss_bytes())
        except OSError as error:  # a figure of the report is not worth a trial
            log.warning("bench=%s occupancy_not_written=%r", self._name, str(error))


def occupancy_file(directory: Path, bench: str) -> Path:
    """Events `seats` (taken from then on, peak_rss_bytes so far), which outlive the bench."""
    return directory / f"occupancy-{bench}.jsonl"


def _scores(
    bench: Bench, trials: Sequence[str], metric: str, source: str | None
) -> dict[str, dict[str, list[float]]]:
    data = bench.recipe.data
    where = source or data.eval
    assert where is not None
    rows = examples.read(where, format=data.format, on_bad_row=data.on_bad_row).examples
    adapters = {trial: bench.adapter_of(trial) for trial in trials}
    if metric == "eval_loss":
        return {trial: _losses(bench, adapter, rows) for trial, adapter in adapters.items()}
    return _answers(bench, adapters, rows, metric)


def _losses(bench: Bench, adapter: str, rows: Sequence[Example]) -> dict[str, list[float]]:
    trunk = bench.trunk
    with trunk.router.by_row([adapter]):
        sums, counts = evaluate.losses(trunk.base, trunk.model, rows, bench.data.encoder)
    values = [total / count for total, count in zip(sums, counts, strict=True)]
    return {"values": values, "weights": [float(count) for count in counts]}


def _answers(
    bench: Bench, adapters: Mapping[str, str], rows: Sequence[Example], metric: str
) -> dict[str, dict[str, list[float]]]:
    """All trials' answers to all examples, mixed in the same batches."""
    trunk, encoder = bench.trunk, bench.data.encoder
    names = [name for name in adapters.values() for _ in rows]
    with trunk.base.autocast():
        answers = generation.generate(
            trunk.model,
            trunk.base.tokenizer,
            [encoder.prompt_ids(row) for _ in adapters for row in rows],
            max_new_tokens=_MAX_NEW_TOKENS,
            stop_ids=encoder.stop_ids,
            batch_size=_ANSWERED_TOGETHER,
            pad_id=trunk.memory.pad_id,
            route=lambda numbers: trunk.router.by_row([names[number] for number in numbers]),
        )
    references = [encoder.reference(row) for row in rows]
    found: dict[str, dict[str, list[float]]] = {}
    for number, trial in enumerate(adapters):
        own = answers[number * len(rows) : (number + 1) * len(rows)]
        scores = [evaluate.score(a, r)[metric] for a, r in zip(own, references, strict=True)]
        found[trial] = {"values": scores, "weights": [1.0] * len(rows)}
    return found
