"""The frozen int8 linear layer: exact by row, with a backward that keeps no activation.

bitsandbytes 0.50.2 stores the weight as int8 `CB` with one scale a row, `SCB / 127`. Its own
forward rewrites the whole weight in 16 bits on every call, and on CUDA picks outlier columns over
all rows of the call, so that a neighbour's tokens change a row's output (about 2e-3). Here the
scale is applied to the output instead, and the input is not kept, since a frozen weight needs no
gradient. Same code on CPU and CUDA, save that fp32 on a CPU with int8 instructions goes through
`digits.py`.

T tokens, I input features, O output features.
"""

from typing import Any

import bitsandbytes as bnb
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training import digits

_INT8_MAX = 127.0


class _Int8Matmul(torch.autograd.Function):
    """`x_TI @ (weight_OI * scale_O).T`, differentiable in x only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_OI: Tensor, scale_O: Tensor) -> Tensor:
        ctx.save_for_backward(weight_OI, scale_O)
        return _product(x, weight_OI, scale_O)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        (grad,) = grad_outputs
        weight_OI, scale_O = ctx.saved_tensors
        if grad.dtype == torch.float16:
            return grad @ (weight_OI.to(grad.dtype) * scale_O.to(grad.dtype)[:, None]), None, None
        if _is_integer(grad):
            scaled = (grad * scale_O).view(-1, grad.shape[-1])
            return digits.matmul(scaled, weight_OI, None).view(*grad.shape[:-1], -1), None, None
        return (grad * scale_O.to(grad.dtype)) @ weight_OI.to(grad.dtype), None, None


def _product(x: Tensor, weight_OI: Tensor, scale_O: Tensor) -> Tensor:
    if x.dtype == torch.float16:  # an unscaled product leaves the range of fp16
        return F.linear(x, weight_OI.to(x.dtype) * scale_O.to(x.dtype)[:, None])
    if _is_integer(x):
        out = digits.matmul(x.reshape(-1, x.shape[-1]), weight_OI.t(), scale_O)
        return out.view(*x.shape[:-1], -1)
    return F.linear(x, weight_OI.to(x.dtype)).mul_(scale_O.to(x.dtype))


def _is_integer(x: Tensor) -> bool:
    """Whether a product is done in integer arithmetic."""
    is_fp32 = x.dtype == torch.float32 and x.device.type == "cpu"
    return is_fp32 and x.shape[-1] <= digits.MAX_FEATURES and digits.is_fast()


class Int8Linear(bnb.nn.Linear8bitLt):
    """A quantised `Linear8bitLt` with the exact forward of this module."""

    weight: Any  # Int8Params: a Parameter that carries SCB
    _scale_O: tuple[Tensor, Tensor] | None = None
    """SCB, and the scale that was made of it."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        if x.requires_grad:
            out: Tensor = _Int8Matmul.apply(x, self.weight.data, self._scale())
        else:
            out = _product(x, self.weight.data, self._scale())
        return out if self.bias is None else out + self.bias.to(out.dtype)

    def _scale(self) -> Tensor:
        scb = self.weight.SCB
        if self._scale_O is None or self._scale_O[0] is not scb:
            self._scale_O = scb, scb.view(-1) / _INT8_MAX
        return self._scale_O[1]


def adopt(model: nn.Module) -> int:
    """Give every quantised `Linear8bitLt` of a model the forward above; returns how many."""
    count = 0
    modules: Any = model.modules()
    for module in modules:
        if type(module) is bnb.nn.Linear8bitLt:
            weight: Any = module.weight
            assert weight.dtype == torch.int8, "adopt() wants weights that are quantised"
            assert weight.SCB is not None, "bitsandbytes moved the scale elsewhere"
            module.__class__ = Int8Linear
            count += 1
    return count
