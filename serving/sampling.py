"""Logits -> the next token of each answer, by what its request asked for.

Every draw comes from the request's own generator, so an answer with a seed does not depend on who
else is in the batch. Log probabilities are those of the model, before penalties, temperature and
cuts.

B rows, V vocabulary.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from cluster.errors import LorayError, ModelError
from serving.schema import Sampling

_SEED_SPAN = 1 << 63
_GREEDY = 1e-5
"""A temperature below it leaves the likeliest token alone, and may be 0 in fp32."""


class Matcher(Protocol):
    """A grammar that an answer has to follow."""

    def mask(self) -> Tensor:
        """(V,) bool: the tokens that may come next."""
        ...

    def accept(self, token_id: int) -> None: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Scored:
    """A token and how likely the model found it."""

    id: int
    logprob: float | None = None
    """Natural logarithm; None where it was not asked for, and for the first token of a prompt."""
    top: tuple[tuple[int, float], ...] = ()
    """The likeliest tokens at its place, likeliest first."""


@dataclass(kw_only=True, slots=True)
class Picker:
    """The changing state of one answer's sampling."""

    sampling: Sampling
    matcher: Matcher | None = None
    generator: torch.Generator = field(default_factory=torch.Generator)
    """On CPU, wherever the model is: the same draws everywhere."""
    counts: Counter[int] = field(default_factory=Counter)
    """How often each token is in the answer so far."""

    def __post_init__(self) -> None:
        if self.sampling.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(self.sampling.seed % _SEED_SPAN)

    @property
    def is_plain(self) -> bool:
        """Whether the likeliest token is all that it wants."""
        asked = self.sampling
        changes = (asked.temperature, asked.presence_penalty, asked.frequency_penalty)
        return not any(changes) and not asked.logit_bias and self.matcher is None

    def choose(self, logits_V: Tensor) -> int:
        """The next token. logits_V: fp32 on CPU, which is changed."""
        asked = self.sampling
        if self.counts and (asked.presence_penalty or asked.frequency_penalty):
            ids = torch.tensor(list(self.counts))
            times = torch.tensor(list(self.counts.values()), dtype=torch.float32)
            logits_V[ids] -= asked.presence_penalty + asked.frequency_penalty * times
        for token_id, bias in asked.logit_bias.items():
            if token_id < len(logits_V):
                logits_V[token_id] += bias
        if self.matcher is not None:
            logits_V[~self.matcher.mask()] = -torch.inf
        if asked.temperature < _GREEDY:
            return int(logits_V.argmax())
        logits_V /= asked.temperature
        if asked.top_k:
            lowest = logits_V.topk(min(asked.top_k, len(logits_V))).values[-1]
            logits_V[logits_V < lowest] = -torch.inf
        probs_V = logits_V.softmax(-1)
        if asked.top_p < 1:
            sorted_V, order_V = probs_V.sort(descending=True)
            before_V = sorted_V.cumsum(-1) - sorted_V
            is_cut_V = before_V >= asked.top_p
            is_cut_V[0] = False  # the likeliest stays, also where top_p is 0 in fp32
            probs_V[order_V[is_cut_V]] = 0
        return int(torch.multinomial(probs_V, 1, generator=self.generator))

    def note(self, token_id: int) -> None:
        """Take a token into the answer."""
        self.counts[token_id] += 1
        if self.matcher is not None:
            self.matcher.accept(token_id)


def pick(logits_BV: Tensor, pickers: Sequence[Picker]) -> list[Scored | LorayError]:
    """The next token of each row, noted by its picker, or why its answer cannot go on."""
    highest_B, best_B = logits_BV.max(-1)
    best: list[int] = best_B.tolist()
    highest: list[float] = highest_B.tolist()
    found: list[Scored | LorayError] = []
    for row, picker in enumerate(pickers):
        if not math.isfinite(highest[row]):
            found.append(
                ModelError("the model's numbers are not finite here; use another adapter or prompt")
            )
            continue
        token_id = best[row]
        try:
            if not picker.is_plain:
                token_id = picker.choose(logits_BV[row].float().cpu().clone())
            picker.note(token_id)
        except LorayError as error:  # of a grammar; the other rows have nothing to do with it
            found.append(error)
            continue
        wanted = picker.sampling.num_logprobs
        if wanted is None:
            found.append(Scored(id=token_id))
        else:
            found += scored(logits_BV[row : row + 1], [token_id], num_top=wanted)
    return found


def scored(logits_NV: Tensor, ids: Sequence[int], *, num_top: int) -> list[Scored]:
    """Tokens that are given, row by row, with their log probabilities and the likeliest ones'."""
    logprobs_NV = logits_NV.float().log_softmax(-1)
    id_N = torch.tensor(ids, device=logits_NV.device)
    own_N: list[float] = logprobs_NV.gather(1, id_N[:, None])[:, 0].tolist()
    tops: list[tuple[tuple[int, float], ...]] = [()] * len(ids)
    if num_top:
        values_NK, ids_NK = logprobs_NV.topk(min(num_top, logprobs_NV.shape[1]))
        pairs = zip(ids_NK.tolist(), values_NK.tolist(), strict=True)
        tops = [tuple(zip(i, v, strict=True)) for i, v in pairs]
    return [Scored(id=i, logprob=o, top=t) for i, o, t in zip(ids, own_N, tops, strict=True)]
