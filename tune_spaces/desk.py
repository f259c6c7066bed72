"""A bench that many callers use at once: one thread trains, everybody else waits for an answer.

Plain Python; `actor.py` runs it under Ray. Torch is touched by the desk's own thread alone, so
joins, saves and evaluations happen between two turns.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

import torch

from cluster.errors import LorayError
from training import evaluate, examples, generation, scoring
from training.config import TrainRecipe
from training.examples import Example
from tune_spaces.bench import Bench, Progress, SeatShed

T = TypeVar("T")

log = logging.getLogger(__name__)

_IDLE_S = 0.05
_MAX_NEW_TOKENS = 256
_ANSWERED_TOGETHER = 25
"""Prompts that are answered in one batch, of whatever trials."""


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


def open_desk(
    recipe: TrainRecipe,
    directory: Path,
    *,
    threads: int,
    fill_window_s: float,
    told: Callable[[int], None],
) -> Desk:
    """The desk of a new bench on this process's device, with no seats as yet."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def make_bench() -> Bench:
        torch.set_num_threads(threads)  # of the desk's thread, which does all the work
        return Bench(recipe=recipe, directory=directory, device=device)

    return Desk(make_bench, seats=0, fill_window_s=fill_window_s, told=told)


def scores(
    bench: Bench, trials: Sequence[str], metric: str, source: str | None
) -> dict[str, dict[str, list[float]]]:
    """See BenchActor.scores."""
    data = bench.recipe.data
    where = source or data.eval
    assert where is not None
    rows = examples.read(where, format=data.format, on_bad_row=data.on_bad_row).examples
    adapters = {trial: bench.adapter_of(trial) for trial in trials}
    if metric == "eval_loss":
        return {trial: _losses(bench, adapter, rows) for trial, adapter in adapters.items()}
    return _answers(bench, adapters, rows, metric)


def _losses(bench: Bench, adapter: str, rows: Sequence[Example]) -> dict[str, list[float]]:
    encoded = [bench.data.encoder.encode(row) for row in rows]
    found = scoring.score_examples(bench.trunk, encoded, adapter=adapter)
    values = [loss / count for loss, count in zip(found.losses, found.counts, strict=True)]
    return {"values": values, "weights": [float(count) for count in found.counts]}


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
