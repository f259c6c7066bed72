"""The rows of a stream, tokenised once: each worker its part, and all know all.

Which rows can be used, and how many tokens a batch supervises, depends on the tokens of all rows;
so workers exchange the tokens of whole blocks: 8 bytes a token, in one all-reduce for a thousand
examples. The gradients of as many examples are a hundred all-reduces of megabytes each.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from cluster.errors import DataError
from training.examples import BadRow, Example
from training.strategy import Workers
from training.tokens import Encoded, Encoder

_TRUNCATED, _HAS_END = 1, 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Encoders:
    """The encoders of all workers; each must be called with the same rows at the same time."""

    encoder: Encoder
    workers: Workers
    device: torch.device
    """Where tensors of the process group are."""

    def __call__(self, rows: Sequence[Example]) -> list[Encoded | BadRow]:
        """Each row encoded, or why it cannot be learned from.

        Raises DataError where another worker has other rows.
        """
        if self.workers.size == 1:
            return [self.encoder.try_encode(row) for row in rows]
        self._require_same(rows)
        mine = range(self.workers.rank, len(rows), self.workers.size)
        done = {i: self.encoder.try_encode(rows[i]) for i in mine}
        good = {i: e for i, e in done.items() if isinstance(e, Encoded)}
        about_N2 = np.zeros((len(rows), 2), np.int32)
        for i, e in good.items():
            flags = _TRUNCATED * e.is_truncated + _HAS_END * e.has_end
            about_N2[i] = len(e.input_ids), flags
        about_N2 = self._sum(about_N2)
        ends = np.cumsum(about_N2[:, 0])
        tokens_2T = np.zeros((2, int(ends[-1])), np.int32)
        for i, e in good.items():
            tokens_2T[:, ends[i] - len(e.input_ids) : ends[i]] = e.input_ids, e.labels
        tokens_2T = self._sum(tokens_2T)
        return [
            _encoded(row.id, tokens_2T[:, end - length : end], flags)
            if length
            else self.encoder.try_encode(row)  # for the reason, which is not exchanged
            for row, end, (length, flags) in zip(
                rows, ends.tolist(), about_N2.tolist(), strict=True
            )
        ]

    def _require_same(self, rows: Sequence[Example]) -> None:
        text = "\0".join(f"{row.id}\0{row.text}\0{row.messages}\0{row.tools}" for row in rows)
        about = np.array([len(rows), zlib.crc32(text.encode())], np.int64)
        if (self._sum(about) != self.workers.size * about).any():
            raise DataError(
                f"worker {self.workers.rank} reads other rows from {rows[0].id} on than another "
                "worker: put the data where all nodes read the same files"
            )

    def _sum(self, numbers: np.ndarray) -> np.ndarray:
        tensor = torch.tensor(numbers, device=self.device)  # a copy: it is summed in place
        self.workers.sum_([tensor])
        return tensor.cpu().numpy()


def _encoded(row_id: str, tokens_2L: np.ndarray, flags: int) -> Encoded:
    return Encoded(
        id=row_id,
        input_ids=tokens_2L[0].copy(),
        labels=tokens_2L[1].copy(),
        is_truncated=bool(flags & _TRUNCATED),
        has_end=bool(flags & _HAS_END),
    )
