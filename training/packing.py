"""Examples -> micro-batches: rows of several examples that cannot see each other, or padded rows.

A packed row holds examples one after the other; `position_ids` restart at 0 with each, there is
no attention mask, and transformers builds the block-diagonal causal mask from the restarts. Not
every architecture does (ALiBi ignores positions): `parity_probe` finds out on the loaded model.

B rows, L row length, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from training.tokens import IGNORE, Encoded

_OVERHEAD_TOKENS = 128
"""What one more micro-batch costs, in tokens: between 2 CPU cores with a 135M model (about 50, for
unpacking the int8 weights) and a GPU (several hundred)."""
_QUADRATIC_TOKENS = 1536
"""Row length at which attention over the row costs as much as everything else (same machine)."""
_CAPACITIES = (1.0, 1.5, 2.0, 4.0)
"""Row lengths that are tried, in lengths of the longest example."""
_OPENERS = (0.0, 0.5, 0.75, 0.9)
"""Shortest example that may open a row, in row lengths; shorter ones fill gaps or wait."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Segment:
    """Where one example lies in a micro-batch."""

    example: int
    """Its position in the list given to `plan`."""
    row: int
    """Row, from 0."""
    start: int
    """First column."""
    stop: int
    """Column after the last one."""
    num_supervised: int
    """Its tokens that are to be predicted."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class MicroBatch:
    """What one forward pass gets. Labels are not shifted; -100 is not supervised."""

    input_ids_BL: Tensor
    """torch.long."""
    position_ids_BL: Tensor
    """torch.long; restart at 0 with every example of a packed row, and with its padding."""
    labels_BL: Tensor
    """torch.long; the first label of every example is -100."""
    attention_mask_BL: Tensor | None
    """torch.long ones and zeros; None where packed."""
    segments: tuple[Segment, ...]
    """Every example, in the order of rows and columns."""

    @property
    def num_real_tokens(self) -> int:
        """Tokens that belong to examples."""
        return sum(segment.stop - segment.start for segment in self.segments)

    @property
    def num_supervised_tokens(self) -> int:
        """Tokens that some earlier token of the same example is to predict."""
        return int((self.labels_BL[:, 1:] != IGNORE).sum())

    def to(self, device: torch.device | str) -> "MicroBatch":
        """The same micro-batch with its tensors on `device`."""
        mask_BL = self.attention_mask_BL
        return replace(
            self,
            input_ids_BL=self.input_ids_BL.to(device),
            position_ids_BL=self.position_ids_BL.to(device),
            labels_BL=self.labels_BL.to(device),
            attention_mask_BL=None if mask_BL is None else mask_BL.to(device),
        )


def plan(
    examples: Sequence[Encoded],
    *,
    micro_batch_tokens: int,
    is_packed: bool,
    pad_id: int,
    together: int = 1,
) -> list[MicroBatch]:
    """Spread examples over micro-batches of at most `micro_batch_tokens` tokens, padding included.

    together: so many examples in a row share a micro-batch. What is longer than the budget gets a
    micro-batch of its own. Longest first, by first-fit-decreasing; out of a few row lengths the
    cheapest plan is taken, where a token costs 1 + L / 1536 and a micro-batch 128. The same input
    gives the same plan.
    """
    assert micro_batch_tokens >= 1, micro_batch_tokens
    lengths = [len(example.input_ids) for example in examples]
    assert all(lengths), "an example without tokens"
    assert len(lengths) % together == 0, (len(lengths), together)
    firsts = range(0, len(lengths), together)
    units = [tuple(range(first, first + together)) for first in firsts]
    order = sorted(units, key=lambda unit: (-max(lengths[i] for i in unit), unit[0]))
    layouts = [
        _layout(order, lengths, micro_batch_tokens, capacity, opener, is_packed)
        for capacity in (_CAPACITIES if is_packed else _CAPACITIES[:1])
        for opener in _OPENERS
    ]
    best = min(layouts, key=lambda layout: _cost(layout, lengths))
    return [_build(rows, examples, is_packed=is_packed, pad_id=pad_id) for rows in best]


def join(batches: Sequence[MicroBatch], *, pad_id: int) -> MicroBatch:
    """The rows of several micro-batches, one below the other, padded to the widest.

    `example` of a segment is its position in its own micro-batch's list. One micro-batch comes
    back as it is.
    """
    if len(batches) == 1:
        return batches[0]
    width = max(batch.input_ids_BL.shape[1] for batch in batches)
    segments: list[Segment] = []
    num_rows = 0
    for batch in batches:
        segments += [replace(s, row=s.row + num_rows) for s in batch.segments]
        num_rows += len(batch.input_ids_BL)
    masks = [b.attention_mask_BL for b in batches if b.attention_mask_BL is not None]
    assert len(masks) in (0, len(batches)), "packed and padded rows do not go together"
    return MicroBatch(
        input_ids_BL=torch.cat([_widen(b.input_ids_BL, width, pad_id) for b in batches]),
        # New columns count from 0, a sequence of its own, which no example sees.
        position_ids_BL=torch.cat([_widen(b.position_ids_BL, width, None) for b in batches]),
        labels_BL=torch.cat([_widen(b.labels_BL, width, IGNORE) for b in batches]),
        attention_mask_BL=torch.cat([_widen(m, width, 0) for m in masks]) if masks else None,
        segments=tuple(segments),
    )


def parity_probe(
    logits_of: Callable[[MicroBatch], Tensor], *, vocab_size: int, pad_id: int
) -> float:
    """Largest difference between packed and separate sequences' logits, over the largest logit.

    Four fixed random sequences are packed into two rows, the second of them with padding.
    `logits_of` gives (B, L, V). About 1e-6 in fp32 where packing is exact; 1e-3 and more where a
    sequence sees its neighbour or the wrong positions; nan where the logits are not finite.
    """
    bits = np.random.Philox(key=20)
    examples = [_random_example(bits, size, vocab_size, pad_id) for size in (23, 9, 17, 12)]
    packed = _build([[0, 1], [2, 3]], examples, is_packed=True, pad_id=pad_id)
    with torch.no_grad():
        together_BLV = logits_of(packed)
        worst = torch.zeros((), dtype=torch.float32)
        scale = torch.zeros((), dtype=torch.float32)
        for segment in packed.segments:
            alone = _build([[segment.example]], examples, is_packed=False, pad_id=pad_id)
            alone_LV = logits_of(alone)[0].float().cpu()
            beside_LV = together_BLV[segment.row, segment.start : segment.stop].float().cpu()
            worst = torch.maximum(worst, (alone_LV - beside_LV).abs().max())
            scale = torch.maximum(scale, alone_LV.abs().max())
    return float(worst / scale)


def _widen(tensor_BL: Tensor, width: int, value: int | None) -> Tensor:
    """Columns of `value` on the right up to `width`; None counts them up from 0."""
    rows, before = tensor_BL.shape
    more = torch.arange(width - before, device=tensor_BL.device).expand(rows, -1)
    return torch.cat([tensor_BL, more if value is None else torch.full_like(more, value)], dim=1)


def _layout(
    order: list[tuple[int, ...]],
    lengths: list[int],
    budget: int,
    capacity: float,
    opener: float,
    is_packed: bool,
) -> list[list[list[int]]]:
    """Micro-batches of rows of example indices; the examples of a unit share a micro-batch."""
    layout: list[list[list[int]]] = []
    waiting = order
    while waiting:
        longest = max(lengths[index] for index in waiting[0])
        room = max(longest, min(int(capacity * longest), budget))
        max_rows = max(1, budget // room)
        rows: list[list[int]] = []
        free: list[int] = []
        left: list[tuple[int, ...]] = []
        for unit in waiting:
            is_first = not rows
            if len(rows) * room > budget:  # of one unit that is longer, which stays alone
                left.append(unit)
                continue
            before = len(rows)
            placed: list[int] = []
            for index in unit:
                size = lengths[index]
                fits = (row for row, space in enumerate(free) if space >= size)
                row = next(fits, None) if is_packed else None
                if row is None and (is_first or (len(rows) < max_rows and size >= opener * room)):
                    row = len(rows)
                    rows.append([])
                    free.append(room)
                if row is None:
                    break
                rows[row].append(index)
                free[row] -= size
                placed.append(row)
            if len(placed) < len(unit):  # there is no room for all of it
                for index, row in zip(unit, placed, strict=False):
                    rows[row].remove(index)
                    free[row] += lengths[index]
                del rows[before:], free[before:]
                left.append(unit)
        layout.append(rows)
        waiting = left
    return layout


def _cost(layout: list[list[list[int]]], lengths: list[int]) -> float:
    cost = 0.0
    for rows in layout:
        width = max(sum(lengths[index] for index in row) for row in rows)
        cost += _OVERHEAD_TOKENS + len(rows) * width * (1 + width / _QUADRATIC_TOKENS)
    return cost


def _build(
    rows: list[list[int]], examples: Sequence[Encoded], *, is_packed: bool, pad_id: int
) -> MicroBatch:
    width = max(sum(len(examples[index].input_ids) for index in row) for row in rows)
    shape = (len(rows), width)
    ids_BL = np.full(shape, pad_id, dtype=np.int64)
    labels_BL = np.full(shape, IGNORE, dtype=np.int64)
    positions_BL = np.broadcast_to(np.arange(width), shape).copy()
    mask_BL = np.zeros(shape, dtype=np.int64)
    segments: list[Segment] = []
    for row, members in enumerate(rows):
        start = 0
        for index in members:
            example = examples[index]
            stop = start + len(example.input_ids)
            ids_BL[row, start:stop] = example.input_ids
            labels_BL[row, start + 1 : stop] = example.labels[1:]
            positions_BL[row, start:stop] = np.arange(stop - start)
            mask_BL[row, start:stop] = 1
            count = int((labels_BL[row, start:stop] != IGNORE).sum())
            segments.append(
                Segment(example=index, row=row, start=start, stop=stop, num_supervised=count)
            )
            start = stop
        if is_packed:
            positions_BL[row, start:] = np.arange(width - start)
    return MicroBatch(
        input_ids_BL=torch.from_numpy(ids_BL),
        position_ids_BL=torch.from_numpy(positions_BL),
        labels_BL=torch.from_numpy(labels_BL),
        attention_mask_BL=None if is_packed else torch.from_numpy(mask_BL),
        segments=tuple(segments),
    )


def _random_example(bits: np.random.Philox, size: int, vocab_size: int, pad_id: int) -> Encoded:
    ids = (bits.random_raw(size) % vocab_size).astype(np.int32)
    ids[ids == pad_id] = (pad_id + 1) % vocab_size
    nothing = np.full(size, IGNORE, dtype=np.int32)
    return Encoded(id="probe", input_ids=ids, labels=nothing, is_truncated=False, has_end=False)
