"""Keys and values of the sequences in a batch, as columns that all rows share.

Row b holds one sequence, right-aligned: its newest token lies in the last column, and what lies
before its first one is nobody's and masked. This is what a left-padded batch of `generate` looks
like, so whatever architecture generates in batches runs here, and a step appends one column.
Sequences come and go by copies; a long one that comes late moves the others to the right.

What is covered: attention caches of transformers 5.23 (`Cache`, `CacheLayerMixin`: `update`,
`get_mask_sizes`, `get_seq_length`), full length also where a model attends to a window. What is
not covered: recurrent states (Mamba and kin), which `Columns.for_model` refuses.

B rows, H key-value heads, C columns, D head size, L layers.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from cluster.errors import ModelError

_GROWTH = 64
"""Columns that are allocated at a time."""
KeyValues = list[tuple[Tensor, Tensor]]
"""Of each layer, keys and values (H, tokens, D) of one sequence."""


class _Layer(CacheLayerMixin):
    """Keys and values (B, H, C, D) of one layer; the columns are counted by `Columns`."""

    is_sliding = False

    def __init__(self, columns: "Columns") -> None:
        super().__init__()
        self._columns = columns

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys = _empty(key_states, 0, 0)
        self.values = _empty(value_states, 0, 0)
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write the new columns behind the old; all columns of the rows (B, H, C, D)."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        rows, new = key_states.shape[0], key_states.shape[2]
        start, stop = self._columns.length, self._columns.length + new
        self.reserve(rows, stop)
        assert self.keys is not None
        assert self.values is not None
        self.keys[:rows, :, start:stop] = key_states
        self.values[:rows, :, start:stop] = value_states
        return self.keys[:rows, :, :stop], self.values[:rows, :, :stop]

    def reserve(self, rows: int, columns: int) -> None:
        """Make room; what is there stays."""
        assert self.keys is not None
        assert self.values is not None
        have_rows, _, have_columns, _ = self.keys.shape
        if rows <= have_rows and columns <= have_columns:
            return
        if columns > have_columns:
            columns = -(-columns // _GROWTH) * _GROWTH
        rows, columns = max(rows, have_rows), max(columns, have_columns)
        for name, old in (("keys", self.keys), ("values", self.values)):
            new = _empty(old, rows, columns)
            new[:have_rows, :, :have_columns] = old
            setattr(self, name, new)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._columns.length + query_length, 0

    def get_seq_length(self) -> int:
        return self._columns.length

    def get_max_length(self) -> int:
        return -1


class Columns(Cache):
    """The cache of a batch. Rows are numbered from 0 without gaps."""

    def __init__(self, num_layers: int) -> None:
        self.length = 0
        """Columns that are in use, before the forward pass that adds to them."""
        self.sizes: list[int] = []
        """Tokens of each row, which are its last columns."""
        super().__init__(layers=[_Layer(self) for _ in range(num_layers)])

    @classmethod
    def for_model(cls, model: PreTrainedModel) -> "Columns":
        """Raises ModelError for a model that keeps something else than keys and values."""
        config = model.config.get_text_config()
        kinds = set(getattr(config, "layer_types", None) or ())
        if kinds - {"full_attention", "sliding_attention", "chunked_attention"}:
            raise ModelError(
                f"{config.model_type} has layers of the kinds {', '.join(sorted(kinds))}; only "
                "models of attention layers can be served"
            )
        return cls(config.num_hidden_layers)

    def mask(self, num_new: int) -> Tensor:
        """(B, C + num_new), 1 where a column is of the row's sequence, its new ones included."""
        columns = torch.arange(self.length + num_new)
        first = torch.tensor([self.length - size for size in self.sizes])
        return (columns[None] >= first[:, None]).long()

    def advance(self, num_new: int) -> None:
        """Note that a forward pass has written `num_new` columns in every row."""
        self.length += num_new
        self.sizes = [size + num_new for size in self.sizes]

    def join(self, sequence: KeyValues, size: int) -> int:
        """Give a sequence of `size` tokens a row of its own; the row's number.

        Its keys and values are copied; with size 0 there are none.
        """
        if not self.sizes:
            self.length = 0
        if size > self.length:
            self._shift(size - self.length)
        row = len(self.sizes)
        for layer, (keys, values) in zip(self._attention(), sequence, strict=bool(size)):
            if not layer.is_initialized:
                layer.lazy_initialization(keys[None], values[None])
            layer.reserve(row + 1, self.length)
            start = self.length - size
            layer.keys[row, :, start : self.length] = keys
            layer.values[row, :, start : self.length] = values
            # Of who was here before, and not finite where an adapter broke the numbers.
            layer.keys[row, :, :start] = 0
            layer.values[row, :, :start] = 0
        self.sizes.append(size)
        return row

    def leave(self, row: int) -> int:
        """Give a row back; the number of the row that has moved to its place, or its own."""
        last = len(self.sizes) - 1
        if row != last:
            start = self.length - self.sizes[last]
            for layer in self._attention():
                for store in (layer.keys, layer.values):
                    store[row, :, start : self.length] = store[last, :, start : self.length]
            self.sizes[row] = self.sizes[last]
        self.sizes.pop()
        self._trim()
        return last

    def sequence(self, row: int, start: int = 0, stop: int | None = None) -> KeyValues:
        """Keys and values of tokens `start:stop` of a row's sequence, as views."""
        first = self.length - self.sizes[row]
        begin, end = first + start, self.length if stop is None else first + stop
        return [
            (layer.keys[row, :, begin:end], layer.values[row, :, begin:end])
            for layer in self._attention()
        ]

    def _attention(self) -> Any:
        return self.layers

    def _shift(self, by: int) -> None:
        """Move all columns to the right."""
        for layer in self._attention():
            if layer.is_initialized:
                layer.reserve(len(self.sizes), self.length + by)
                for store in (layer.keys, layer.values):
                    old = store[:, :, : self.length].clone()
                    store[:, :, by : by + self.length] = old
        self.length += by

    def _trim(self) -> None:
        """Drop columns on the left that no row has any more, once they are many."""
        free = self.length - max(self.sizes, default=0)
        if free < max(_GROWTH, self.length // 4):
            return
        self.length -= free
        for layer in self._attention():
            rows = len(self.sizes)
            for name in ("keys", "values"):
                store = getattr(layer, name)
                capacity = -(-max(self.length, 1) // _GROWTH) * _GROWTH
                new = _empty(store, store.shape[0], capacity)
                new[:rows, :, : self.length] = store[:rows, :, free : free + self.length]
                setattr(layer, name, new)


def joined(parts: Sequence[KeyValues]) -> KeyValues:
    """One sequence out of several that follow each other."""
    return [
        (torch.cat([k for k, _ in layer], dim=1), torch.cat([v for _, v in layer], dim=1))
        for layer in zip(*parts, strict=True)
    ]


def _empty(like: Tensor, rows: int, columns: int) -> Tensor:
    """(rows, H, columns, D) zeros: what is masked is multiplied by zero, and must be finite."""
    shape = (rows, like.shape[1], columns, like.shape[3])
    return torch.zeros(shape, dtype=like.dtype, device=like.device)
