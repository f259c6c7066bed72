"""Encoded examples -> the files of a token set, a block at a time.

A directory holds (numbers little-endian, without headers; `facts.json` says how many):

    ids-00000.i4, labels-00000.i4, ...  a piece each, cut between two examples
    offsets.i8      (N + 1,) example i is tokens offsets[i] to offsets[i + 1] of all pieces
    supervised.i4   (N,) tokens that are to be predicted
    flags.u1        (N,) 1: truncated, 2: has its end
    names.u1        the examples' ids, one after the other, in UTF-8
    name_ends.i8    (N + 1,) id i is bytes name_ends[i] to name_ends[i + 1]
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from training.examples import BadRow
from training.tokens import Encoded

PIECE_TOKENS = 64 << 20
"""Tokens in a piece: two files of 256 MiB."""
TRUNCATED, HAS_END = 1, 2
"""Bits of a flag."""
FACTS = "facts.json"
CHUNK = 1 << 18
"""Numbers looked at together where a whole file is gone through."""
_MAX_BAD = 100
"""Bad rows whose places are kept; all are counted."""
_INDEX = ("offsets.i8", "supervised.i4", "flags.u1", "names.u1", "name_ends.i8")
_KINDS = ("ids", "labels")
_PERCENTILES = {"p50": 50, "p90": 90, "p99": 99, "max": 100}


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """What is known of a token set without looking at its tokens."""

    num_examples: int
    num_tokens: int
    num_supervised: int
    """Tokens that are to be predicted."""
    num_truncated: int
    """Examples cut at max_length."""
    num_without_end: int
    """Examples not cut in which the model does not learn where to stop."""
    smallest_id: int
    """Of all tokens, at most 0."""
    largest_id: int
    """Of all tokens, at least -1."""
    length_percentiles: Mapping[str, int]
    """p50, p90, p99 and max, in tokens; empty without examples."""
    typical: int
    """Number of the first example of median length."""
    pieces: tuple[int, ...]
    """Number of the first example of each piece."""
    fingerprint: str
    """Hex sha256 over all ids, all labels and all offsets."""
    num_bad: int
    """Rows that were left out."""
    bad: tuple[BadRow, ...]
    """The first of them."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Block:
    """A few encoded examples end to end."""

    ids: NDArray[np.int32]
    labels: NDArray[np.int32]
    lengths: NDArray[np.int64]
    supervised: NDArray[np.int32]
    flags: NDArray[np.uint8]
    names: tuple[bytes, ...]
    bad: tuple[BadRow, ...]


def pack(items: Iterable[Encoded | BadRow]) -> Block:
    """Examples as one block, and the bad rows among them."""
    items = list(items)
    good = [item for item in items if isinstance(item, Encoded)]
    nothing = np.zeros(0, np.int32)
    return Block(
        ids=np.concatenate([nothing, *(e.input_ids for e in good)]),
        labels=np.concatenate([nothing, *(e.labels for e in good)]),
        lengths=np.array([len(e.input_ids) for e in good], np.int64),
        supervised=np.array([e.num_supervised for e in good], np.int32),
        flags=np.array([TRUNCATED * e.is_truncated + HAS_END * e.has_end for e in good], np.uint8),
        names=tuple(e.id.encode() for e in good),
        bad=tuple(item for item in items if isinstance(item, BadRow)),
    )


def write(directory: Path, blocks: Iterable[Block], *, piece_tokens: int = PIECE_TOKENS) -> Facts:
    """Fill an empty directory with a token set, holding one block in memory.

    A piece has at most `piece_tokens` tokens, or one block. Only where pieces begin depends on how
    the examples are cut into blocks.
    """
    tally = _Tally()
    with ExitStack() as stack, ExitStack() as piece:
        index = {name: stack.enter_context((directory / name).open("wb")) for name in _INDEX}
        for name in ("offsets.i8", "name_ends.i8"):
            index[name].write(bytes(8))
        files: dict[str, BinaryIO] = {}
        room = 0
        for block in blocks:
            if len(block.ids) > max(room, 0):
                piece.close()
                for kind in _KINDS:
                    path = directory / piece_name(kind, len(tally.pieces))
                    files[kind] = piece.enter_context(path.open("wb"))
                tally.pieces.append(tally.num_examples)
                room = piece_tokens
            if len(block.ids):
                files["ids"].write(_plain(block.ids, "<i4"))
                files["labels"].write(_plain(block.labels, "<i4"))
                room -= len(block.ids)
            _write_index(index, block, tally)
            tally.add(block)
    facts = _conclude(directory, tally)
    (directory / FACTS).write_text(json.dumps(asdict(facts)), encoding="utf-8")
    return facts


def piece_name(kind: str, number: int) -> str:
    """The file of a piece's ids or labels."""
    return f"{kind}-{number:05}.i4"


@dataclass(kw_only=True, slots=True)
class _Tally:
    """The facts while they are gathered."""

    pieces: list[int] = field(default_factory=list)
    num_examples: int = 0
    num_tokens: int = 0
    num_supervised: int = 0
    num_truncated: int = 0
    num_without_end: int = 0
    smallest_id: int = 0
    largest_id: int = -1
    name_bytes: int = 0
    num_bad: int = 0
    bad: list[BadRow] = field(default_factory=list)
    by_length: NDArray[np.int64] = field(default_factory=lambda: np.zeros(1, np.int64))
    """How many examples there are of each length."""

    def add(self, block: Block) -> None:
        is_whole = (block.flags & TRUNCATED) == 0
        self.num_examples += len(block.lengths)
        self.num_tokens += len(block.ids)
        self.num_supervised += int(block.supervised.sum())
        self.num_truncated += int((~is_whole).sum())
        self.num_without_end += int((is_whole & ((block.flags & HAS_END) == 0)).sum())
        self.smallest_id = min(self.smallest_id, int(block.ids.min(initial=0)))
        self.largest_id = max(self.largest_id, int(block.ids.max(initial=-1)))
        self.name_bytes += sum(map(len, block.names))
        self.num_bad += len(block.bad)
        self.bad += block.bad[: _MAX_BAD - len(self.bad)]
        counts = np.bincount(block.lengths, minlength=len(self.by_length))
        counts[: len(self.by_length)] += self.by_length
        self.by_length = counts

    def length_at(self, rank: int) -> int:
        """The length at a place, from 0, in the order of lengths."""
        return int(np.searchsorted(np.cumsum(self.by_length), rank, side="right"))


def _write_index(files: Mapping[str, BinaryIO], block: Block, tally: _Tally) -> None:
    """One number or name for each example of a block; `tally` is of what came before it."""
    name_lengths = np.array([len(name) for name in block.names], np.int64)
    files["offsets.i8"].write(_plain(tally.num_tokens + np.cumsum(block.lengths), "<i8"))
    files["supervised.i4"].write(_plain(block.supervised, "<i4"))
    files["flags.u1"].write(_plain(block.flags, "u1"))
    files["names.u1"].write(b"".join(block.names))
    files["name_ends.i8"].write(_plain(tally.name_bytes + np.cumsum(name_lengths), "<i8"))


def _plain(numbers: NDArray[np.generic], dtype: str) -> bytes:
    return numbers.astype(dtype, copy=False).tobytes()


def _conclude(directory: Path, tally: _Tally) -> Facts:
    """The facts, once all files are written; reads them again for the fingerprint."""
    size = tally.num_examples
    digest = hashlib.sha256()
    pieces = [piece_name(kind, i) for kind in _KINDS for i in range(len(tally.pieces))]
    for name in (*pieces, "offsets.i8"):
        with (directory / name).open("rb") as file:
            while data := file.read(4 * CHUNK):
                digest.update(data)
    median = tally.length_at((size - 1) // 2)
    return Facts(
        num_examples=size,
        num_tokens=tally.num_tokens,
        num_supervised=tally.num_supervised,
        num_truncated=tally.num_truncated,
        num_without_end=tally.num_without_end,
        smallest_id=tally.smallest_id,
        largest_id=tally.largest_id,
        length_percentiles={
            # The first length that no fewer than this share of the others are below.
            name: tally.length_at(int(np.ceil((size - 1) * (percent / 100))))
            for name, percent in _PERCENTILES.items()
            if size
        },
        typical=_first_of_length(directory / "offsets.i8", median) if size else 0,
        pieces=tuple(tally.pieces),
        fingerprint=digest.hexdigest(),
        num_bad=tally.num_bad,
        bad=tuple(tally.bad),
    )


def _first_of_length(offsets: Path, length: int) -> int:
    """Number of the first example that has `length` tokens."""
    passed, last = 0, 0
    with offsets.open("rb") as file:
        file.seek(8)
        while len(chunk := np.fromfile(file, "<i8", CHUNK)):
            found = np.flatnonzero(np.diff(chunk, prepend=last) == length)
            if len(found):
                return passed + int(found[0])
            passed, last = passed + len(chunk), int(chunk[-1])
    raise AssertionError(f"no example of {length} tokens")
