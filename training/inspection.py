"""What the examples look like as tokens, before any of them is trained on."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from cluster.errors import DataError
from training.examples import BadRow
from training.token_set import TokenSet
from training.tokens import IGNORE, Encoded, Encoder

_MAX_WITHOUT_END = 0.01
"""Share of the whole examples whose end may go unlearned."""
_NUM_BAD_SHOWN = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class DataReport:
    """Figures about a token set, and one of its examples."""

    num_examples: int
    """Examples that will be trained on; of a preference, both answers count."""
    num_tokens: int
    """Their tokens."""
    num_supervised: int
    """Tokens that are to be predicted."""
    length_percentiles: dict[str, int]
    """p50, p90, p99 and max, in tokens; empty without examples."""
    num_truncated: int
    """Examples cut at max_length."""
    num_without_end: int
    """Examples not cut in which the model does not learn where to stop."""
    num_out_of_vocabulary: int
    """Tokens whose id the model has no embedding for."""
    largest_id: int
    """Largest token id; -1 without examples."""
    vocab_size: int | None
    """Rows of the model's embedding, where known."""
    max_length: int
    """Longest example allowed, in tokens."""
    template: str
    """chat, alpaca or plain."""
    mask: str
    """completion, all or last_turn."""
    num_bad: int
    """Rows that were left out."""
    bad: tuple[BadRow, ...]
    """The first of them."""
    num_sequences: int
    """2 where an example and the next are a preference, else 1."""
    sample: str
    """One example, decoded, its supervised parts between ⟦ and ⟧; empty without examples."""

    @property
    def _num_shown(self) -> str:
        if self.num_sequences == 1:
            return f"{self.num_examples:,}"
        return f"{self.num_examples // self.num_sequences:,} preferences"

    def lines(self) -> list[str]:
        """The report for a terminal."""
        whole = self.num_examples - self.num_truncated
        lengths = ", ".join(f"{name} {size}" for name, size in self.length_percentiles.items())
        out = [
            f"examples      {self._num_shown} ({self.num_tokens:,} tokens), "
            f"template {self.template}, mask {self.mask}",
            f"length        {lengths or 'none'} (max_length {self.max_length})",
            f"truncated     {_percent(self.num_truncated, self.num_examples)}",
            f"supervised    {_percent(self.num_supervised, self.num_tokens)} of tokens",
            f"without end   {_percent(self.num_without_end, whole)} of examples not truncated",
            f"bad rows      {self.num_bad}" + (" (left out)" if self.bad else ""),
        ]
        out += [f"  {row.where}: {row.reason}" for row in self.bad[:_NUM_BAD_SHOWN]]
        if self.num_bad > _NUM_BAD_SHOWN:
            out.append(f"  and {self.num_bad - _NUM_BAD_SHOWN} more")
        if self.sample:
            out += ["one example, supervised between ⟦ and ⟧:", *self.sample.splitlines()]
        return out


def inspect(
    tokens: TokenSet,
    encoder: Encoder,
    tokenizer: PreTrainedTokenizerBase,
    *,
    vocab_size: int | None = None,
    num_sequences: int = 1,
) -> DataReport:
    """Measure a token set; `vocab_size` is the rows of the model's embedding.

    num_sequences: of one example, see `ObjectiveConfig`.
    """
    facts = tokens.facts
    return DataReport(
        num_examples=facts.num_examples,
        num_tokens=facts.num_tokens,
        num_supervised=facts.num_supervised,
        length_percentiles=dict(facts.length_percentiles),
        num_truncated=facts.num_truncated,
        num_without_end=facts.num_without_end,
        num_out_of_vocabulary=tokens.num_outside(vocab_size or len(tokenizer)),
        largest_id=facts.largest_id,
        vocab_size=vocab_size,
        max_length=encoder.max_length,
        template=encoder.template_name,
        mask=encoder.mask,
        num_bad=facts.num_bad,
        bad=facts.bad,
        num_sequences=num_sequences,
        sample=_marked(tokens[facts.typical], tokenizer) if len(tokens) else "",
    )


def refuse(report: DataReport) -> None:
    """Raise DataError for data that would train nothing, or something broken."""
    bad = f"; {report.num_bad} bad rows were left out" if report.bad else ""
    if not report.num_examples:
        first = f", the first of them {_shown(report.bad[0])}" if report.bad else ""
        raise DataError(f"there are no examples to train on{bad}{first}")
    if not report.num_supervised:
        raise DataError(
            f"0 % of {report.num_tokens} tokens are supervised: nothing would be learned; "
            f"look at data.mask ({report.mask}) and at the weights of the assistant turns"
        )
    if report.num_truncated == report.num_examples:
        raise DataError(
            f"every example is longer than data.max_length ({report.max_length} tokens), so the "
            "model would never see an end; raise data.max_length"
        )
    if report.num_out_of_vocabulary:
        raise DataError(
            f"{report.num_out_of_vocabulary} tokens are outside the model's vocabulary: the "
            f"largest id is {report.largest_id}, the model has {report.vocab_size}; "
            "use the tokenizer that belongs to the model"
        )
    whole = report.num_examples - report.num_truncated
    if report.num_without_end > _MAX_WITHOUT_END * whole:
        raise DataError(
            f"{report.num_without_end} of {whole} examples do not teach the model where to stop: "
            "no end token is supervised after the answer. The chat template ends turns with a "
            "token that neither the tokenizer's eos_token nor generation_config's eos_token_id "
            "names: add it there, or set data.template: alpaca"
        )


def _marked(example: Encoded, tokenizer: PreTrainedTokenizerBase) -> str:
    is_supervised = example.labels != IGNORE
    edges = np.flatnonzero(np.diff(is_supervised)) + 1
    parts: list[str] = []
    for start, stop in zip([0, *edges], [*edges, len(is_supervised)], strict=True):
        text = _decoded(example.input_ids[start:stop].tolist(), tokenizer)
        parts.append(f"⟦{text}⟧" if is_supervised[start] else text)
    return "".join(parts)


def _decoded(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    known = [token_id for token_id in ids if 0 <= token_id < len(tokenizer)]
    return str(tokenizer.decode(known))


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} % ({part:,})" if whole else "none"


def _shown(row: BadRow) -> str:
    return f"{row.where}: {row.reason}"
