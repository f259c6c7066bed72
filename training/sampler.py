"""The global order of examples, a function of (seed, step) alone: never of the number of workers.

`Order` knows all examples; `StreamOrder` reads them as they are needed and shuffles within blocks.
"""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from cluster.errors import DataError
from training import examples
from training.examples import BadRow, Example, Format
from training.sources import Source
from training.tokens import Encoded

T = TypeVar("T")
Encode: TypeAlias = Callable[[Sequence[Example]], Sequence[Encoded | BadRow]]
"""Each row encoded, or why it cannot be learned from."""

_log = logging.getLogger(__name__)


class Order:
    """Which examples make up the global batch of each step.

    Positions run over the epochs' permutations laid end to end. With `epochs`, exactly
    round(epochs * num_examples) examples (at least one) are seen and the last batch may be
    shorter; with `max_steps`, which wins, every batch is full.
    """

    def __init__(
        self,
        num_examples: int,
        global_batch_size: int,
        seed: int,
        *,
        epochs: float,
        max_steps: int | None,
    ) -> None:
        assert num_examples >= 1, num_examples
        assert global_batch_size >= 1, global_batch_size
        self._num_examples = num_examples
        self._batch_size = global_batch_size
        self._seed = seed
        self._permutations: dict[int, NDArray[np.intp]] = {}
        self.num_seen = (
            max_steps * global_batch_size if max_steps else max(1, round(epochs * num_examples))
        )
        """Examples in all steps together, repetitions included."""
        self.num_steps = math.ceil(self.num_seen / global_batch_size)
        """Optimiser steps in all."""

    def batch(self, step: int) -> list[int]:
        """Example indices of the global batch of `step` (from 0), in order."""
        assert 0 <= step < self.num_steps, (step, self.num_steps)
        first = step * self._batch_size
        last = min(first + self._batch_size, self.num_seen)
        return [self._at(position) for position in range(first, last)]

    def _at(self, position: int) -> int:
        epoch, index = divmod(position, self._num_examples)
        if epoch not in self._permutations:
            self._permutations = {epoch: permutation(self._num_examples, self._seed, epoch)}
        return int(self._permutations[epoch][index])


class StreamOrder:
    """Global batches out of a stream, shuffled within blocks; starts again where the data ends.

    A block is `block_size` usable examples, fewer at the end of the data; its order is a function
    of (seed, number of the block). Bad rows raise DataError, or are counted in `num_bad` and
    logged. `skip` reads and encodes what it passes over, so that it lands exactly.
    """

    def __init__(
        self,
        source: Source,
        encode: Encode,
        *,
        global_batch_size: int,
        seed: int,
        max_steps: int,
        format: Format = "auto",
        on_bad_row: Literal["error", "skip"] = "error",
        block_size: int = 1024,
    ) -> None:
        assert global_batch_size >= 1, global_batch_size
        assert block_size >= 1, block_size
        self._source: Source = source
        self._encode = encode
        self._batch_size = global_batch_size
        self._seed = seed
        self._format: Format = format
        self._on_bad_row = on_bad_row
        self._block_size = block_size
        self._stream = self._shuffled()
        self._step = 0
        self.num_bad = 0
        """Bad rows passed over so far; a second reading of the data counts them again."""
        self.num_steps = max_steps
        """Optimiser steps in all."""

    def __iter__(self) -> Iterator[list[Encoded]]:
        return self

    def __next__(self) -> list[Encoded]:
        if self._step >= self.num_steps:
            raise StopIteration
        self._step += 1
        return [next(self._stream) for _ in range(self._batch_size)]

    def skip(self, step: int) -> None:
        """Go to the batch of `step` (from 0), forward or back."""
        assert 0 <= step <= self.num_steps, (step, self.num_steps)
        if step < self._step:
            self._stream = self._shuffled()
            self._step = 0
        while self._step < step:
            next(self)

    def _shuffled(self) -> Iterator[Encoded]:
        number = 0
        while True:
            num_before = number
            for block in self._blocks():
                for index in permutation(len(block), self._seed, number):
                    yield block[index]
                number += 1
            if number == num_before:
                raise DataError(
                    f"{self._source}: none of the {self.num_bad} rows can be used; "
                    "see the log for the reasons"
                )

    def _blocks(self) -> Iterator[list[Encoded]]:
        stream = examples.stream(self._source, format=self._format)
        block: list[Encoded] = []
        # Never more rows than the block has room for: it ends where reading one by one would end.
        while rows := self._take(stream, self._block_size - len(block)):
            usable = [row for row in rows if isinstance(row, Example)]
            encoded = iter(self._encode(usable) if usable else ())
            for row in rows:
                item = next(encoded) if isinstance(row, Example) else row
                if isinstance(item, BadRow):
                    self._note(item)
                else:
                    block.append(item)
            if len(block) == self._block_size:
                yield block
                block = []
        if block:
            yield block

    def _take(
        self, stream: Iterator[Example | BadRow], num_examples: int
    ) -> list[Example | BadRow]:
        """The next rows, with up to so many examples; fewer where many rows are bad."""
        rows: list[Example | BadRow] = []
        for row in stream:
            rows.append(row)
            num_examples -= isinstance(row, Example)
            if not num_examples or len(rows) == 4 * self._block_size:
                break
        return rows

    def _note(self, bad: BadRow) -> None:
        if self._on_bad_row == "error":
            raise DataError(
                f"{bad.where}: {bad.reason}; repair the row, or set data.on_bad_row: skip"
            )
        self.num_bad += 1
        _log.warning("bad_row=%s reason=%r num_bad=%d", bad.where, bad.reason, self.num_bad)


def share(batch: Sequence[T], rank: int, world_size: int, *, together: int = 1) -> list[T]:
    """What worker `rank` of `world_size` gets of a global batch: every world_size-th item.

    together: so many items in a row are dealt as one. The shares of all workers are the batch; some
    are empty where it is smaller than world_size.
    """
    assert 0 <= rank < world_size, (rank, world_size)
    assert len(batch) % together == 0, (len(batch), together)
    if together == 1:
        return list(batch[rank::world_size])
    firsts = range(rank * together, len(batch), world_size * together)
    return [item for first in firsts for item in batch[first : first + together]]


def permutation(size: int, seed: int, epoch: int) -> NDArray[np.intp]:
    """A permutation of range(size) out of (seed, epoch).

    Sorted raw Philox words: numpy promises the bit stream for all versions (NEP 19), but not
    `Generator.permutation`.
    """
    words = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64)).random_raw(size)
    return np.argsort(words, kind="stable")
