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
import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor

_FEW_TOKENS = 64
"""Up to which the calls that are saved weigh more than the products that are masked out."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Span:
    """Tokens `start:stop` of the flattened micro-batch belong to one example of one adapter."""

    adapter: str
    start: int
    stop: int
    key: tuple[int, ...] = ()
    """What the example's dropout stream is keyed by, beside the layer: (seed, step, example)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Factors:
    """What an adapter adds to one linear layer: `scaling * (x @ A.T) @ B.T`."""

    A_RI: Tensor
    B_OR: Tensor
    scaling: float


class Router:
    """Which adapter each token goes to, shared by a model's LoRA layers; else the active one."""

    def __init__(self, *, is_frozen: bool = False) -> None:
        """is_frozen: weights of a name never change; layers may keep what they made of them."""
        self.is_frozen = is_frozen
        self.spans: tuple[Span, ...] | None = None
        self.rows: tuple[str, ...] | None = None
        self._groups: list[tuple[str, int, int]] | None = None
        self._masks: dict[tuple[object, ...], Tensor] = {}

    @contextmanager
    def use(self, spans: tuple[Span, ...]) -> Iterator[None]:
        """Route by `spans` inside the block, backward included (checkpointing recomputes there)."""
        self.spans = spans
        self._groups = None
        try:
            yield
        finally:
            self.spans = None

    @contextmanager
    def by_row(self, adapters: Sequence[str]) -> Iterator[None]:
        """Route row i of every batch inside the block to adapters[i]; one name takes all rows."""
        self.rows = tuple(adapters)
        self._groups = None
        self._masks.clear()
        try:
            yield
        finally:
            self.rows = None

    def groups(self, tokens: int) -> list[tuple[str, int, int]] | None:
        """Runs (adapter, start, stop) of one adapter's tokens, of `tokens` in all; None: unrouted.

        Inside a block all forward passes are over the same number of tokens, or of one row each.
        """
        if self.spans is None and self.rows is None:
            return None
        if self._groups is None or (self.rows is not None and self._groups[-1][2] != tokens):
            self._masks.clear()
            spans = self.spans or _of_rows(self.rows or (), tokens // len(self.rows or (1,)))
            self._groups = _merge_neighbours(spans)
        return self._groups

    def foreign(
        self, stack: "_Stack", groups: list[tuple[str, int, int]], like_TS: Tensor
    ) -> Tensor:
        """(T, S) true where the hidden feature is another adapter's, shared by like layers."""
        mask_TS = self._masks.get(stack.key)
        if mask_TS is None:
            mask_TS = torch.ones_like(like_TS, dtype=torch.bool)
            for name, start, stop in groups:
                mask_TS[start:stop, stack.columns[name]] = False
            self._masks[stack.key] = mask_TS
        return mask_TS


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
    if torch.is_autocast_enabled(out.device.type):  # bitsandbytes' 4-bit layers go back to x's type
        out = out.to(torch.get_autocast_dtype(out.device.type))
    if out._is_view():  # so is bitsandbytes' 4-bit output; autograd forbids writing into it
        out = out.clone()
    x = x.to(out.dtype)  # under autocast the base has computed in half precision
    router: Router = layer._loray_router
    tokens = x.numel() // x.shape[-1]
    groups = router.groups(tokens)
    if groups is None:
        groups = [(name, 0, tokens) for name in layer.active_adapters]
    if router.spans is not None:
        x = _drop(layer, x, router.spans)
    groups = [group for group in groups if group[0] in names]
    if not groups:
        return out
    if router.is_frozen and len(groups) > 1 and tokens <= _FEW_TOKENS:
        return _add_stacked(layer, out, x, groups)
    weights: list[Tensor] = []
    for name, _, _ in groups:
        weights += [layer.lora_A[name].weight, layer.lora_B[name].weight]
    plan = [(start, stop, layer.scaling[name]) for name, start, stop in groups]
    routed: Any = _RoutedDelta.apply(out, x, plan, *weights)
    return routed


class _Stack:
    """The factors of several adapters of one layer as one pair; S is the sum of their ranks."""

    def __init__(self, layer: Any, names: Sequence[str], dtype: torch.dtype) -> None:
        factors = [(layer.lora_A[name].weight, layer.lora_B[name].weight) for name in names]
        self.A_IS = torch.cat([A_RI for A_RI, _ in factors]).to(dtype).t()
        scaled = [B * layer.scaling[n] for n, (_, B) in zip(names, factors, strict=True)]
        self.B_SO = torch.cat(scaled, dim=1).to(dtype).t()
        ranks = tuple(len(A_RI) for A_RI, _ in factors)
        stops = list(itertools.accumulate(ranks))
        self.columns = {
            name: slice(stop - rank, stop)
            for name, rank, stop in zip(names, ranks, stops, strict=True)
        }
        self.key = (*names, *ranks)


def _add_stacked(layer: Any, out: Tensor, x: Tensor, groups: list[tuple[str, int, int]]) -> Tensor:
    """All groups in two products instead of two for each: few tokens of many adapters.

    Every token meets every adapter of the stack, and all but its own are masked out in between.
    """
    stack = _stack_for(layer, {name for name, _, _ in groups}, out.dtype)
    h_TS = x.reshape(-1, x.shape[-1]) @ stack.A_IS
    # Not a product: what another adapter makes of this token may be infinite.
    h_TS.masked_fill_(layer._loray_router.foreign(stack, groups, h_TS), 0)
    out.view(-1, out.shape[-1]).addmm_(h_TS, stack.B_SO)
    return out


def _stack_for(layer: Any, names: set[str], dtype: torch.dtype) -> _Stack:
    """A stack of `names`, and of those before them while it is at most twice as wide.

    To make one costs as much as some steps, and traffic comes back to the adapters that it left.
    """
    old: _Stack | None = layer.__dict__.get("_loray_stack")
    have = old.columns.keys() if old is not None else set[str]()
    both = have | names
    if len(both) > 2 * len(names):
        both = names
    if old is not None and have == both:
        return old
    layer._loray_stack = _Stack(layer, sorted(both), dtype)
    return layer._loray_stack


def hang(model: PeftModel, name: str, factors: Mapping[str, Factors]) -> None:
    """Give layers of `model`, which `attach` has made ready, one more frozen adapter.

    factors: by the name of the layer in the base. Takes milliseconds, unlike PEFT's `add_adapter`,
    and touches nothing of the other adapters: peft 0.21's `lora_A`, `lora_B`, `scaling`.
    """
    for path, factor in factors.items():
        layer: Any = model.get_submodule(f"base_model.model.{path}")
        assert layer.forward.__func__ is _forward, f"{path} is not routed"
        layer.lora_A[name], layer.lora_B[name] = _Frozen(factor.A_RI), _Frozen(factor.B_OR)
        layer.scaling[name] = factor.scaling


@contextmanager
def bare(model: PeftModel) -> Iterator[None]:
    """Compute with the base alone inside the block, as if no adapter hung on it.

    Unlike PEFT's `disable_adapter`, leaves `requires_grad` alone: peft 0.21's `_disable_adapters`.
    """
    layers: list[Any] = [layer for layer in model.modules() if isinstance(layer, LoraLayer)]
    before = [layer._disable_adapters for layer in layers]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer, was_disabled in zip(layers, before, strict=True):
            layer._disable_adapters = was_disabled


def take_down(model: PeftModel, name: str) -> None:
    """Remove an adapter that `hang` has given."""
    for layer in model.modules():
        if isinstance(layer, LoraLayer) and name in layer.lora_A:
            own: Any = layer
            del own.lora_A[name], own.lora_B[name], own.scaling[name]
            stack: _Stack | None = own.__dict__.get("_loray_stack")
            if stack is not None and name in stack.columns:
                own._loray_stack = None


class _Frozen(torch.nn.Module):
    """What routing needs of a factor's layer; a Linear takes six times as long to make."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(weight, requires_grad=False)


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
