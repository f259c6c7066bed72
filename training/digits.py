"""Products of fp32 rows with int8 weights in integer arithmetic, on CPUs with int8 instructions.

A row is cut into three int8 digits, `x = step * (65536 high + 256 middle + low)`, which keeps 24
bits below its largest value: as many as fp32 has. Each digit's product with the weight is exact in
int32, and the three are joined in fp64. So a row's result is bitwise the same whatever other rows
are in the call, is as near to the true product as sums in fp32 are, and the weight is read as it is
stored, at a quarter of the bytes.

Wants torch's `_int_mm` (private name, 2.13), which is oneDNN's product. Without VNNI that one adds
pairs in int16 and saturates, so `is_fast` asks for it.

T rows, K features that are summed over, O output features; S is 3 T, the rows of all digits.
"""

import functools
import threading
from typing import NamedTuple

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

MAX_FEATURES = (2**31 - 1) // (128 * 127)
"""K up to which no sum of products leaves int32."""
_TOP = np.float32(127 * 65536)
_LARGEST = np.finfo(np.float32).max
_FINITE_BITS = np.int32(0x7F800000)
_ROWS = 256
"""At a time, so that digits and products stay in the cache of a core."""


@functools.cache
def is_fast() -> bool:
    """Whether this CPU multiplies int8 exactly and faster than fp32."""
    return torch.backends.mkldnn.is_available() and torch.cpu._is_vnni_supported()


def matmul(x_TK: Tensor, weight_KO: Tensor, scale_O: Tensor | None) -> Tensor:
    """`(x @ weight) * scale` (T, O). x and scale fp32, weight int8 with K <= MAX_FEATURES.

    A row that holds an infinity or a NaN comes out as NaN.
    """
    rows, features = x_TK.shape
    outputs = weight_KO.shape[1]
    out_TO = torch.empty(rows, outputs)
    x, out = x_TK.detach().contiguous().numpy(), out_TO.numpy()
    scale = np.ones(outputs, np.float32) if scale_O is None else scale_O.numpy()
    for start in range(0, rows, _ROWS):
        stop = min(start + _ROWS, rows)
        room = _scratch.room(stop - start, features, outputs)
        _cut(x[start:stop], room.digits, room.step_T)
        torch._int_mm(room.digits_SK, weight_KO, out=room.product_SO)
        _join(room.product, room.step_T, scale, out[start:stop])
    return out_TO


class _Room(NamedTuple):
    """Memory for one product, and the same seen by numpy."""

    digits_SK: Tensor
    product_SO: Tensor
    digits: NDArray[np.int8]
    product: NDArray[np.int32]
    step_T: NDArray[np.float64]


class _Scratch(threading.local):
    """Memory that is used again and again: taken anew, its page faults cost a sixth of the time."""

    def __init__(self) -> None:
        self._digits = torch.empty(0, dtype=torch.int8)
        self._product = torch.empty(0, dtype=torch.int32)
        self._rooms: dict[tuple[int, int, int], _Room] = {}

    def room(self, rows: int, features: int, outputs: int) -> _Room:
        """For `rows` rows, which have three digits each."""
        found = self._rooms.get((rows, features, outputs))
        if found is not None:
            return found
        size = 3 * rows
        if self._digits.numel() < size * features:
            self._digits = torch.empty(size * features, dtype=torch.int8)
            self._rooms.clear()
        if self._product.numel() < size * outputs:
            self._product = torch.empty(size * outputs, dtype=torch.int32)
            self._rooms.clear()
        digits_SK = self._digits[: size * features].view(size, features)
        product_SO = self._product[: size * outputs].view(size, outputs)
        made = _Room(digits_SK, product_SO, digits_SK.numpy(), product_SO.numpy(), np.empty(rows))
        self._rooms[rows, features, outputs] = made
        return made


_scratch = _Scratch()


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _cut(
    x_TK: NDArray[np.float32], digits_SK: NDArray[np.int8], step_T: NDArray[np.float64]
) -> None:
    """Write the high digits of all rows, then the middle, then the low ones, which count `step`."""
    rows = x_TK.shape[0]
    bits_TK = x_TK.view(np.int32)  # of positive numbers: ordered as they are, and vectorised
    for t in range(rows):
        peak_bits = np.int32(0)
        for k in range(x_TK.shape[1]):
            peak_bits = max(peak_bits, bits_TK[t, k] & np.int32(0x7FFFFFFF))
        if peak_bits >= _FINITE_BITS:
            step_T[t] = np.nan
            digits_SK[t::rows] = 0
            continue
        if peak_bits == 0:
            step_T[t] = 0.0
            digits_SK[t::rows] = 0
            continue
        peak = np.array([peak_bits], dtype=np.int32).view(np.float32)[0]
        inverse = min(_TOP / peak, _LARGEST)
        step_T[t] = 1 / np.float64(inverse)
        for k in range(x_TK.shape[1]):
            rest = np.int32(np.rint(x_TK[t, k] * inverse))
            digits_SK[2 * rows + t, k] = np.int8(rest)
            rest = (rest + np.int32(128)) >> np.int32(8)
            digits_SK[rows + t, k] = np.int8(rest)
            rest = (rest + np.int32(128)) >> np.int32(8)
            digits_SK[t, k] = np.int8(rest)


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _join(
    product_SO: NDArray[np.int32],
    step_T: NDArray[np.float64],
    scale_O: NDArray[np.float32],
    out_TO: NDArray[np.float32],
) -> None:
    """Add the products of the three digits."""
    rows = out_TO.shape[0]
    for t in range(rows):
        step = step_T[t]
        for o in range(out_TO.shape[1]):
            high, middle = np.float64(product_SO[t, o]), product_SO[rows + t, o]
            whole = (high * 256 + middle) * 256 + product_SO[2 * rows + t, o]
            out_TO[t, o] = np.float32(whole * step * scale_O[o])
