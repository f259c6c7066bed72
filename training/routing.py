"""Many adapters, one base: each LoRA layer adds each adapter's delta over its own tokens.

PEFT holds the named adapters (`lora_A[name]`, `lora_B[name]`, `scaling[name]`); this module
replaces the forward of its LoRA layers by one that takes the step's spans over the flattened
tokens. One adapter over all tokens is the case of a plain fine-tune.

Dropout is drawn from a stream keyed by (seed, step, layer, example), token by token: it does not
depend on packing, neighbours, workers or recomputation, and resumes without saved state.

T tokens of a micro-batch (flattened rows), I input features, O output features, R rank.
What is not covered: DoRA, whose layers keep PEFT's forward.
"""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Span:
    """Tokens `start:stop` of the flattened micro-batch belong to one example of one adapter."""

    adapter: str
    start: int
    stop: int
    key: tuple[int, ...] = ()
    """What the example's dropout stream is keyed by, beside the layer: (seed, step, example)."""


class Router:
    """Which adapter each token goes to, shared by a model's LoRA layers; else the active one."""

    def __init__(self) -> None:
        self.spans: tuple[Span, ...] | None = None
        self.rows: tuple[str, ...] | None = None

    @contextmanager
    def use(self, spans: tuple[Span, ...]) -> Iterator[None]:
        """Route by `spans` inside the block, backward included (checkpointing recomputes there)."""
        self.spans = spans
        try:
            yield
        finally:
            self.spans = None

    @contextmanager
    def by_row(self, adapters: Sequence[str]) -> Iterator[None]:
        """Route row i of every batch inside the block to adapters[i]; one name takes all rows."""
        self.rows = tuple(adapters)
        try:
            yield
        finally:
            self.rows = None


def attach(model: PeftModel, router: Router) -> None:
    """Replace the forward of the plain LoRA layers of `model`, which share `router` from then on.

    Wants to be called again when an adapter was added: it may have come with layers of its own.
    """
    modules: Any = model.named_modules()
    for name, layer in modules:
        if isinstance(layer, LoraLayer) and not layer.lora_variant:  # a variant is DoRA
            own: Any = layer
            own._loray_router = router
            own._loray_key = _seed((name,))
            own.forward = MethodType(_forward, layer)


def _forward(layer: Any, x: Tensor) -> Tensor:
    out = layer.base_layer(x)
    names = layer.lora_A.keys()
    if layer.disable_adapters or layer.merged or not names:
        return out
    if out._is_view():  # bitsandbytes' 4-bit output; autograd forbids writing into it
        out = out.clone()
    x = x.to(out.dtype)  # under autocast the base has computed in half precision
    router: Router = layer._loray_router
    tokens = x.numel() // x.shape[-1]
    if router.spans is not None:
        groups = _merge_neighbours(router.spans)
        x = _drop(layer, x, router.spans)
    elif router.rows is not None:
        groups = _merge_neighbours(_of_rows(router.rows, tokens // len(router.rows)))
    else:
        groups = [(name, 0, tokens) for name in layer.active_adapters]
    groups = [group for group in groups if group[0] in names]
    if not groups:
        return out
    weights: list[Tensor] = []
    for name, _, _ in groups:
        weights += [layer.lora_A[name].weight, layer.lora_B[name].weight]
    plan = [(start, stop, layer.scaling[name]) for name, start, stop in groups]
    routed: Any = _RoutedDelta.apply(out, x, plan, *weights)
    return routed


def _merge_neighbours(spans: tuple[Span, ...]) -> list[tuple[str, int, int]]:
    """Runs of one adapter's tokens, padding in between included: one product for each run."""
    groups: list[tuple[str, int, int]] = []
    for span in sorted(spans, key=lambda s: s.start):
        if groups and groups[-1][0] == span.adapter:
            groups[-1] = (span.adapter, groups[-1][1], span.stop)
        else:
            groups.append((span.adapter, span.start, span.stop))
    return groups


def _of_rows(adapters: tuple[str, ...], length: int) -> tuple[Span, ...]:
    return tuple(
        Span(adapter=adapter, start=row * length, stop=(row + 1) * length)
        for row, adapter in enumerate(adapters)
    )


def _drop(layer: Any, x: Tensor, spans: tuple[Span, ...]) -> Tensor:
    rates = {
        name: layer.lora_dropout[name].p
        for name in layer.lora_A
        if isinstance(layer.lora_dropout[name], torch.nn.Dropout)
    }
    if not layer.training or not any(rates.values()):
        return x
    keep_TI = torch.ones(x.numel() // x.shape[-1], x.shape[-1], device=x.device, dtype=x.dtype)
    for span in spans:
        rate = rates.get(span.adapter, 0.0)
        if rate:
            key = (*span.key, layer._loray_key)
            generator = torch.Generator(device=x.device).manual_seed(_seed(key))
            rows = keep_TI[span.start : span.stop]
            rows.copy_(torch.rand(rows.shape, generator=generator, device=x.device) >= rate)
            rows.div_(1 - rate)
    return x * keep_TI.view_as(x)


def _seed(key: tuple[int | str, ...]) -> int:
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class _RoutedDelta(torch.autograd.Function):
    """`out[span] += scaling * (x[span] @ A.T) @ B.T` for each span, in place.

    One node instead of PEFT's five: nothing of width O is allocated, only x and the (T, R) hidden
    products are kept for the backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any,
        out: Tensor,
        x: Tensor,
        plan: list[tuple[int, int, float]],
        *weights: Tensor,
    ) -> Tensor:
        out_TO, x_TI = out.view(-1, out.shape[-1]), x.reshape(-1, x.shape[-1])
        hidden: list[Tensor] = []
        for (start, stop, scaling), A_RI, B_OR in zip(
            plan, weights[::2], weights[1::2], strict=True
        ):
            h_TR = x_TI[start:stop] @ A_RI.to(x.dtype).t()
            out_TO[start:stop].addmm_(h_TR, B_OR.to(x.dtype).t(), alpha=scaling)
            hidden.append(h_TR)
        ctx.plan = plan
        ctx.save_for_backward(x, *hidden, *weights)
        ctx.mark_dirty(out)
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grad_outputs
        plan = ctx.plan
        x, *rest = ctx.saved_tensors
        hidden, weights = rest[: len(plan)], rest[len(plan) :]
        grad_TO, x_TI = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        wants_x = ctx.needs_input_grad[1]
        grad_TI = torch.zeros_like(x_TI) if wants_x else None
        weight_grads: list[Tensor | None] = []
        for (start, stop, scaling), h_TR, A_RI, B_OR in zip(
            plan, hidden, weights[::2], weights[1::2], strict=True
        ):
            g_TO = grad_TO[start:stop]
            g_TR = (g_TO @ B_OR.to(g_TO.dtype)).mul_(scaling)
            weight_grads.append((g_TR.t() @ x_TI[start:stop]).to(A_RI.dtype))
            weight_grads.append((g_TO.t() @ h_TR).mul_(scaling).to(B_OR.dtype))
            if grad_TI is not None:
                torch.mm(g_TR, A_RI.to(g_TR.dtype), out=grad_TI[start:stop])
        return grad, None if grad_TI is None else grad_TI.view_as(x), None, *weight_grads
