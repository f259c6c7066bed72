"""Losses of supervised tokens only, in chunks.

The head is frozen, so the gradient of the loss with respect to the hidden states is taken in the
forward pass, chunk by chunk: the logits of the whole vocabulary never exist for more than one
chunk and are never recomputed (the idea of Liger's fused linear cross entropy, arXiv 2410.10989).

N supervised positions, H hidden size, V vocabulary, B rows, L row length.
"""

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from torch.nn import functional as F

from training.packing import MicroBatch

CHUNK = 256
"""Supervised positions whose logits exist at one time."""


class _FrozenHeadLoss(torch.autograd.Function):
    """Cross entropies (N,) of `hidden_NH @ weight_VH.T + bias_V`, differentiable in hidden.

    With them (N,) whether the target was the likeliest token.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        target_N: Tensor,
    ) -> tuple[Tensor, Tensor]:
        wants_grad = ctx.needs_input_grad[0]
        grad_NH = torch.empty_like(hidden_NH, dtype=torch.float32) if wants_grad else None
        loss_N = torch.empty(len(target_N), dtype=torch.float32, device=hidden_NH.device)
        hit_N = torch.empty(len(target_N), dtype=torch.bool, device=hidden_NH.device)
        for start in range(0, len(target_N), CHUNK):
            rows = slice(start, start + CHUNK)
            logits_NV = F.linear(hidden_NH[rows].to(weight_VH.dtype), weight_VH, bias_V).float()
            target = target_N[rows, None]
            hit_N[rows] = logits_NV.argmax(-1) == target_N[rows]
            norm_N = logits_NV.logsumexp(-1, keepdim=True)
            loss_N[rows] = (norm_N - logits_NV.gather(-1, target)).squeeze(-1)
            if grad_NH is not None:
                probs_NV = logits_NV.sub_(norm_N).exp_()
                probs_NV.scatter_add_(-1, target, torch.full_like(norm_N, -1.0))
                grad_NH[rows] = (probs_NV.to(weight_VH.dtype) @ weight_VH).float()
        ctx.grad_NH = grad_NH
        ctx.dtype = hidden_NH.dtype
        ctx.mark_non_differentiable(hit_N)
        return loss_N, hit_N

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None]:
        grad_N, _ = grad_outputs
        return (ctx.grad_NH * grad_N[:, None]).to(ctx.dtype), None, None, None


def shifted_targets(batch: MicroBatch) -> tuple[Tensor, Tensor]:
    """Flat positions (N,) that predict a supervised token, and those tokens (N,).

    Labels are not shifted: `labels[row, i]` is the token at i, predicted at i - 1.
    """
    target_BL = batch.labels_BL.roll(-1, dims=1)
    target_BL[:, -1] = -100
    position_N = (target_BL.reshape(-1) != -100).nonzero().squeeze(-1)
    return position_N, target_BL.reshape(-1)[position_N]


def model_inputs(batch: MicroBatch) -> dict[str, Tensor]:
    """What the Hugging Face forward takes for a micro-batch; a packed one has no mask."""
    inputs = {"input_ids": batch.input_ids_BL, "position_ids": batch.position_ids_BL}
    if batch.attention_mask_BL is not None:
        inputs["attention_mask"] = batch.attention_mask_BL
    return inputs


@dataclass(frozen=True, kw_only=True, slots=True)
class Objective:
    """How this model's loss is computed: through its bare head, or through its own logits."""

    model: PeftModel
    accepts_position_ids: bool
    uses_bare_head: bool
    """False where the model transforms its logits (soft caps, scales): found by `probe`."""
    engine: Callable[[MicroBatch], tuple[Tensor, Tensor]] | None = None
    """Computes `measure` in place of this process alone, where its base is cut up."""

    def through(self, engine: Callable[[MicroBatch], tuple[Tensor, Tensor]]) -> "Objective":
        """The same losses by way of `engine`, which holds the weights."""
        return replace(self, engine=engine)

    def losses(self, batch: MicroBatch) -> Tensor:
        """Cross entropies (N,) of the batch's supervised tokens, row by row, in fp32."""
        return self.measure(batch)[0]

    def measure(self, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """`losses`, and (N,) whether each of the tokens was the likeliest."""
        if self.engine is not None:
            return self.engine(batch)
        position_N, target_N = shifted_targets(batch)
        if self.uses_bare_head:
            hidden_NH = self._hidden(batch).flatten(0, 1)[position_N]
            head: Any = _bare(self.model).get_output_embeddings()
            both: Any = _FrozenHeadLoss.apply(hidden_NH, head.weight, head.bias, target_N)
            return both
        logits_NV = self.logits(batch).flatten(0, 1)[position_N]
        hit_N = logits_NV.detach().argmax(-1) == target_N
        return F.cross_entropy(logits_NV.float(), target_N, reduction="none"), hit_N

    def logits(self, batch: MicroBatch) -> Tensor:
        """The model's own logits (B, L, V)."""
        return self.model(**self._inputs(batch), use_cache=False).logits

    def _hidden(self, batch: MicroBatch) -> Tensor:
        backbone = _bare(self.model).get_decoder()
        return backbone(**self._inputs(batch), use_cache=False).last_hidden_state

    def _inputs(self, batch: MicroBatch) -> dict[str, Tensor]:
        inputs = model_inputs(batch)
        if not self.accepts_position_ids:
            inputs.pop("position_ids")
        return inputs


def probe(
    model: PeftModel, batch: MicroBatch, autocast: Callable[[], AbstractContextManager[None]]
) -> Objective:
    """Choose the bare head where it gives the model's own loss on `batch`, else its logits."""
    takes = "position_ids" in inspect.signature(_bare(model).forward).parameters
    own = Objective(model=model, accepts_position_ids=takes, uses_bare_head=False)
    bare = Objective(model=model, accepts_position_ids=takes, uses_bare_head=True)
    with torch.no_grad(), autocast():
        try:
            fits = torch.allclose(own.losses(batch).sum(), bare.losses(batch).sum(), rtol=1e-3)
        except (AttributeError, TypeError, NotImplementedError):  # no decoder or head to be had
            fits = False
    return bare if fits else own


def _bare(model: PeftModel) -> Any:
    """The Hugging Face model inside; PEFT types it as any module."""
    return model.get_base_model()
