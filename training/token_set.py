"""Many encoded examples in files that are mapped, and never read as a whole.

Reading an example touches its own pages and some around them, which all processes of a machine
share. Now and then they are unmapped, so that a process that goes through the whole set does not
seem to hold it. Files and their meaning: `training.token_files`.
"""

import json
import mmap
import tempfile
from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np
from numpy.typing import NDArray

from cluster.errors import StorageError
from training import encoding, examples, token_files
from training.examples import BadRow, Rows
from training.token_files import CHUNK, HAS_END, TRUNCATED, Facts
from training.tokens import Encoded, Encoder

_UNMAP_EVERY = 8
"""Examples. Linux maps more than is asked for (6.18, ext4: 0.7 MB an example), so that a process
seems to grow by the whole set: 194 of 208 MB. With 8 it is 9 MB, and 26 us an example, not 7."""


class TokenSet(Sequence[Encoded]):
    """The examples in a directory that `token_files.write` has filled; its arrays are read-only.

    Raises StorageError where a file is missing or has another size than `facts.json` says.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.facts = _read_facts(directory)
        self._files: list[mmap.mmap] = []
        self._num_read = 0
        size = self.facts.num_examples
        self._offsets = self._mapped("offsets.i8", size + 1)
        self._supervised = self._mapped("supervised.i4", size)
        self._flags = self._mapped("flags.u1", size)
        self._name_ends = self._mapped("name_ends.i8", size + 1)
        self._names = self._mapped("names.u1", int(self._name_ends[-1]))
        self._starts = [int(self._offsets[first]) for first in self.facts.pieces]
        sizes = np.diff([*self._starts, self.facts.num_tokens]).tolist()
        self._ids, self._labels = (
            [self._mapped(token_files.piece_name(kind, i), n) for i, n in enumerate(sizes)]
            for kind in ("ids", "labels")
        )

    def __len__(self) -> int:
        return self.facts.num_examples

    @overload
    def __getitem__(self, index: int) -> Encoded: ...
    @overload
    def __getitem__(self, index: slice) -> list[Encoded]: ...
    def __getitem__(self, index: int | slice) -> Encoded | list[Encoded]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        i = range(len(self))[index]
        self._num_read += 1
        if self._num_read % _UNMAP_EVERY == 0:
            for file in self._files:
                file.madvise(mmap.MADV_DONTNEED)  # views stay good: pages come back when touched
        piece = bisect_right(self.facts.pieces, i) - 1
        start, stop = (self._offsets[i : i + 2] - self._starts[piece]).tolist()
        first, last = self._name_ends[i : i + 2].tolist()
        flags = int(self._flags[i])
        return Encoded(
            id=self._names[first:last].tobytes().decode(),
            input_ids=self._ids[piece][start:stop],
            labels=self._labels[piece][start:stop],
            is_truncated=bool(flags & TRUNCATED),
            has_end=bool(flags & HAS_END),
            counted=int(self._supervised[i]),
        )

    @property
    def lengths(self) -> NDArray[np.int64]:
        """(N,) tokens of each example, in memory."""
        return np.diff(self._offsets)

    @property
    def longest(self) -> int:
        """Tokens of the longest example; 0 without examples."""
        return self.facts.length_percentiles.get("max", 0)

    @property
    def num_supervised(self) -> int:
        """Tokens that are to be predicted, in all examples."""
        return self.facts.num_supervised

    @property
    def fingerprint(self) -> str:
        """Hex sha256 over ids, labels and offsets."""
        return self.facts.fingerprint

    def num_outside(self, vocab_size: int) -> int:
        """Tokens whose id is not one of 0 to vocab_size - 1; looks at all only if there are any."""
        if self.facts.smallest_id == 0 and self.facts.largest_id < vocab_size:
            return 0
        chunks = (ids[i : i + CHUNK] for ids in self._ids for i in range(0, len(ids), CHUNK))
        return sum(int(((chunk < 0) | (chunk >= vocab_size)).sum()) for chunk in chunks)

    def _mapped(self, name: str, count: int) -> NDArray[Any]:
        """The numbers in a file, whose suffix is their type; nothing is read yet."""
        dtype = np.dtype(f"<{name.rpartition('.')[2]}")
        path = self.directory / name
        try:
            with path.open("rb") as file:
                found, expected = path.stat().st_size, count * dtype.itemsize
                whole = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if found else None
        except OSError as error:
            raise StorageError(f"{path} cannot be read ({error})") from None
        if found != expected:
            raise StorageError(
                f"{path} is truncated or grown: {found} bytes, {expected} were written"
            )
        if whole is None:
            return np.zeros(0, dtype)
        self._files.append(whole)
        return np.frombuffer(whole, dtype)


def tokenize(
    rows: Rows, encoder: Encoder, *, on_bad_row: Literal["error", "skip"] = "error"
) -> TokenSet:
    """Encode examples that are in memory; the files are gone once nobody has them mapped.

    With "error", raises DataError where one cannot be learned from.
    """
    block = encoding.encode([*rows.bad, *rows.examples], encoder)
    if block.bad and on_bad_row == "error":
        raise examples.bad_rows_error(
            block.bad, num_bad=len(block.bad), num_rows=len(block.names) + len(block.bad)
        )
    with tempfile.TemporaryDirectory(prefix="loray-tokens-") as scratch:
        token_files.write(Path(scratch), [block])
        return TokenSet(Path(scratch))


def _read_facts(directory: Path) -> Facts:
    path = directory / token_files.FACTS
    try:
        tree = json.loads(path.read_bytes())
        bad = tuple(BadRow(**row) for row in tree.pop("bad"))
        return Facts(**{**tree, "pieces": tuple(tree["pieces"]), "bad": bad})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise StorageError(f"{path} cannot be read ({error})") from None
