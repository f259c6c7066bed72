"""An example -> token ids and labels, by the tokenizer's chat template or a named prompt template.

The whole conversation is rendered once and tokenised once; character offsets say which tokens are
supervised. Where a turn of the assistant begins follows from the template itself: what it renders
up to there, generation prompt included, must be the beginning of what it renders in full. A token
that would straddle that place, or would be another one if nothing followed, is split off there,
so that training sees the very prompt that generation gives.

Special tokens written as text (`<|im_end|>`) in tools and in system, user and tool turns become
ordinary tokens, so that data cannot pretend to be the template. In assistant turns and plain text
they are part of what is learned, and stay special.

Labels are built here and never derived from the pad id. They are not shifted: the loss compares
position i with label i + 1, so the first label of every example is -100.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from cluster.errors import DataError
from training.calls import Tool
from training.examples import BadRow, Example, Message
from training.templates import Renderer, Template, Unusable

IGNORE = -100
"""Label of a token that is not supervised (torch's cross entropy ignores it)."""

Ids: TypeAlias = NDArray[np.int32]
Mask: TypeAlias = Literal["completion", "all", "last_turn"]
Span: TypeAlias = tuple[int, int]
"""First character, character after the last."""

_MASKED = "\U0010fffd"
"""Stands for each character of a special token in quoted text; private use, so in no template."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Encoded:
    """One example as tokens."""

    id: str
    """The example's id."""
    input_ids: Ids
    """(L,) token ids, L at least 1."""
    labels: Ids
    """(L,) the same ids where supervised, -100 elsewhere and at position 0; not shifted."""
    is_truncated: bool
    """Whether tokens beyond max_length were cut off."""
    has_end: bool
    """Whether each supervised turn ends in a supervised token that makes the model stop."""
    counted: int | None = None
    """Supervised tokens, where that is known without looking at the labels."""

    @property
    def num_supervised(self) -> int:
        """Tokens that are to be predicted."""
        return int((self.labels != IGNORE).sum()) if self.counted is None else self.counted


class Encoder:
    """The way from an example to ids and labels, and from a prompt to ids.

    template: see `templates.Renderer`.
    mask: completion is all assistant turns but those of weight 0; last_turn only the last.
    Raises DataError for a template that this tokenizer cannot do.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        template: Template = "auto",
        mask: Mask = "completion",
        max_length: int = 1024,
        stop_ids: frozenset[int],
    ) -> None:
        self._tokenizer = tokenizer
        self._has_offsets = bool(tokenizer.is_fast)
        self._renderer = Renderer(tokenizer, template)
        self.template_name = self._renderer.name
        """chat, alpaca or plain."""
        self.mask: Mask = mask
        self.max_length = max_length
        self.stop_ids = stop_ids
        added = tokenizer.added_tokens_decoder.values()
        names = {
            *filter(None, tokenizer.all_special_tokens),
            *(token.content for token in added if token.special),
        }
        specials = sorted(names, key=lambda name: (-len(name), name))
        self._special = re.compile("|".join(map(re.escape, specials)) or r"(?!)")

    def key(self) -> dict[str, object]:
        """Everything but the tokenizer that decides what `encode` gives; plain JSON."""
        return {
            "template": self.template_name,
            "chat_template": self._tokenizer.chat_template,
            "mask": self.mask,
            "max_length": self.max_length,
            "stop_ids": sorted(self.stop_ids),
        }

    def encode(self, example: Example) -> Encoded:
        """Token ids and labels. Raises DataError where nothing of the example can be learned."""
        encoded = self.try_encode(example)
        if isinstance(encoded, BadRow):
            raise DataError(f"{encoded.where}: {encoded.reason}")
        return encoded

    def try_encode(self, example: Example) -> Encoded | BadRow:
        """Token ids and labels, or why nothing of the example can be learned."""
        try:
            return self._encode(example, self.mask)
        except Unusable as error:
            return BadRow(where=example.id, reason=str(error))

    def encode_row(self, example: Example) -> tuple[Encoded, ...] | BadRow:
        """What is trained of a row: one example, or of a preference two that differ in the answer.

        In a preference the last turn alone is supervised, and the preferred one comes first.
        """
        if example.rejected is None:
            found = self.try_encode(example)
            return found if isinstance(found, BadRow) else (found,)
        other = replace(example, messages=(*example.messages[:-1], example.rejected))
        try:
            pair = tuple(self._encode(one, "last_turn") for one in (example, other))
        except Unusable as error:
            return BadRow(where=example.id, reason=str(error))
        names = ("preferred", "other")
        return tuple(
            replace(one, id=f"{one.id} ({name})") for one, name in zip(pair, names, strict=True)
        )

    def prompt_ids(self, example: Example) -> list[int]:
        """What the model is given to answer: all before the last assistant turn (or all turns).

        Raises DataError for plain text, and where the template refuses the turns.
        """
        if not example.messages:
            raise DataError(f"{example.id}: plain text has no prompt; give messages")
        last = _last_assistant(example.messages)
        messages = example.messages if last is None else example.messages[:last]
        return self.next_turn_ids(messages, where=example.id, tools=example.tools)

    def next_turn_ids(
        self, messages: tuple[Message, ...], *, where: str, tools: tuple[Tool, ...] = ()
    ) -> list[int]:
        """What the model is given to go on after `messages`. Raises DataError as `prompt_ids`."""
        example = Example(id=where, messages=messages, tools=tools)
        try:
            text = self._render(example, is_prompt=True)
            return self._tokenise(text, self._quoted(example, text, is_prompt=True), ())[0].tolist()
        except Unusable as error:
            raise DataError(f"{where}: {error}") from None

    def prompt_ids_of_text(self, user_text: str, system: str | None = None) -> list[int]:
        """What the model is given to answer one user turn. Raises DataError as `prompt_ids`."""
        spoken = (Message(role="system", content=system),) if system else ()
        messages = (*spoken, Message(role="user", content=user_text))
        return self.prompt_ids(Example(id="prompt", messages=messages))

    def reference(self, example: Example) -> str:
        """The last assistant turn as a decoded answer would read: without special tokens.

        Raises DataError where there is none, or where the template refuses its calls.
        """
        last = _last_assistant(example.messages)
        if last is None:
            raise DataError(f"{example.id}: no assistant turn to compare an answer with")
        if not example.messages[last].calls:
            return self._special.sub("", example.messages[last].content)
        try:
            text = self._render(example, is_prompt=False)
            start, stop = self._span(example, last, text)
        except Unusable as error:
            raise DataError(f"{example.id}: {error}") from None
        return self._special.sub("", text[start:stop]).strip()

    def _encode(self, example: Example, mask: Mask) -> Encoded:
        if example.text is not None:
            text = f"{self._renderer.bos}{example.text}{self._renderer.eos}"
            spans, quoted = [(0, len(text))], ()
        else:
            text = self._render(example, is_prompt=False)
            spans = self._spans(example, text, mask)
            quoted = self._quoted(example, text, is_prompt=False)
        ids, starts = self._tokenise(text, quoted, spans)
        labels = np.full(len(ids), IGNORE, dtype=np.int32)
        has_end = True
        for start, stop in spans:
            first, last = np.searchsorted(starts, (start, stop)).tolist()
            length = self._through_end(ids[first:last])
            has_end = has_end and length is not None and first + length <= self.max_length
            until = last if length is None else first + length
            labels[first:until] = ids[first:until]
        if mask == "all":
            labels[:] = ids
        labels[:1] = IGNORE
        num_supervised = int((labels != IGNORE).sum())
        ids, labels = ids[: self.max_length], labels[: self.max_length]
        if not (labels != IGNORE).any():
            raise Unusable(
                f"all {num_supervised} supervised tokens lie beyond max_length {self.max_length}; "
                "raise data.max_length or shorten the prompt"
                if num_supervised
                else "no token is supervised: every assistant turn in question has weight 0"
            )
        return Encoded(
            id=example.id,
            input_ids=ids,
            labels=labels,
            is_truncated=len(starts) > self.max_length,
            has_end=has_end,
        )

    def _render(self, example: Example, *, is_prompt: bool) -> str:
        return self._renderer.render(example.messages, example.tools, is_prompt=is_prompt)

    def _spans(self, example: Example, text: str, mask: Mask) -> list[Span]:
        """Where the supervised turns lie in `text`, which is all messages rendered."""
        if mask == "all":
            return [(0, len(text))]
        messages = example.messages
        turns = [i for i, message in enumerate(messages) if message.role == "assistant"]
        chosen = turns[-1:] if mask == "last_turn" else turns
        return [self._span(example, i, text) for i in chosen if messages[i].weight != 0]

    def _span(self, example: Example, turn: int, text: str) -> Span:
        if turn == 0:
            raise Unusable(
                "the first turn is the assistant's, with no prompt before it; "
                "put a user turn first, or give it weight 0"
            )
        messages = example.messages
        before = replace(example, messages=messages[:turn])
        through = replace(example, messages=messages[: turn + 1])
        head = self._render(before, is_prompt=True)
        whole = self._render(through, is_prompt=False) if turn + 1 < len(messages) else text
        if not text.startswith(whole):
            raise Unusable(
                f"the chat template changes turn {turn} once later turns follow it, so it cannot "
                "be learned there; set data.mask: last_turn, or give each answer a row of its own"
            )
        if not whole.startswith(head):
            raise Unusable(
                f"the chat template does not begin turn {turn} with its own generation prompt; "
                "repair the tokenizer's chat template, or set data.template: alpaca"
            )
        return len(head), len(whole)

    def _quoted(self, example: Example, text: str, *, is_prompt: bool) -> tuple[Span, ...]:
        """Where special tokens stand in what system, user and tools say, and in what there is."""
        masked = replace(
            example,
            messages=tuple(
                message if message.role == "assistant" else self._masked(message)
                for message in example.messages
            ),
            tools=cast(tuple[Tool, ...], self._masked_tree(example.tools)),
        )
        if masked == example:
            return ()
        twin = self._render(masked, is_prompt=is_prompt)
        runs = [match.span() for match in re.finditer(f"{_MASKED}+", twin)]
        same = (a == b or b == _MASKED for a, b in zip(text, twin, strict=False))
        if len(twin) != len(text) or not all(same):
            raise Unusable(
                "a special token in the text of a turn cannot be told from the template's"
            )
        return tuple(runs)

    def _masked(self, message: Message) -> Message:
        return replace(
            message,
            content=self._masked_text(message.content),
            context=self._masked_text(message.context),
            name=self._masked_text(message.name),
            call_id=self._masked_text(message.call_id),
        )

    def _masked_tree(self, tree: object) -> object:
        """JSON with special tokens masked in keys and texts."""
        if isinstance(tree, str):
            return self._masked_text(tree)
        if isinstance(tree, dict):
            return {self._masked_text(k): self._masked_tree(v) for k, v in tree.items()}
        if isinstance(tree, list | tuple):
            return type(tree)(self._masked_tree(item) for item in tree)
        return tree

    def _masked_text(self, text: str) -> str:
        return self._special.sub(lambda match: _MASKED * len(match[0]), text)

    def _tokenise(
        self, text: str, quoted: Sequence[Span], spans: Sequence[Span]
    ) -> tuple[Ids, NDArray[np.int64]]:
        """Ids and the first character of each; no token lies across the start of a span."""
        cuts = {0, len(text), *(edge for span in quoted for edge in span)}
        if not self._has_offsets:  # No offsets: every span is a piece of its own.
            cuts.update(edge for span in spans for edge in span)
        ids, starts, stops = self._pieces(text, sorted(cuts), set(quoted))
        index = np.searchsorted(starts, [start for start, _ in spans])
        across = {
            start
            for (start, _), i in zip(spans, index.tolist(), strict=True)
            if i
            and (stops[i - 1] != start or self._reads_ahead(text, start, ids[:i], cuts, quoted))
        }
        if across - cuts:
            ids, starts, stops = self._pieces(text, sorted(cuts | across), set(quoted))
        return ids, starts

    def _reads_ahead(
        self, text: str, start: int, ids: Ids, cuts: set[int], quoted: Sequence[Span]
    ) -> bool:
        """Whether `ids`, the tokens before `start`, would be others if nothing followed.

        GPT-2's pattern takes a run of white space whole only where nothing follows it.
        """
        if start < 2 or not text[start - 2 : start].isspace():
            return False
        before = sorted({start, *(cut for cut in cuts if cut < start)})
        return not np.array_equal(self._pieces(text, before, set(quoted))[0], ids)

    def _pieces(
        self, text: str, cuts: Sequence[int], quoted: set[Span]
    ) -> tuple[Ids, NDArray[np.int64], NDArray[np.int64]]:
        """Ids, first and last + 1 character of each, of the pieces of `text` between the cuts."""
        ids: list[int] = []
        offsets: list[Span] = []
        for start, stop in pairwise(cuts):
            entry = self._tokenizer(
                text[start:stop],
                add_special_tokens=False,
                split_special_tokens=any(a <= start and stop <= b for a, b in quoted),
                return_offsets_mapping=self._has_offsets,
                return_attention_mask=False,
                verbose=False,
            )
            piece = cast(list[int], entry["input_ids"])
            ids += piece
            if self._has_offsets:
                where = cast(list[Span], entry["offset_mapping"])
                # Trimmed offsets may put a last white-space token behind its piece.
                offsets += [(min(start + a, stop - 1), start + b) for a, b in where]
            else:
                offsets += [(start, stop)] * len(piece)
        bounds = np.array(offsets, dtype=np.int64).reshape(-1, 2)
        return np.array(ids, np.int32), np.maximum.accumulate(bounds[:, 0]), bounds[:, 1]

    def _through_end(self, ids: Ids) -> int | None:
        """Tokens of a turn through the one that makes the model stop, or None without one.

        After it there may be white space, such as ChatML's newline, which is not learned.
        """
        found = np.flatnonzero(np.isin(ids, list(self.stop_ids)))
        if not len(found):
            return None
        length = int(found[-1]) + 1
        rest = str(self._tokenizer.decode(ids[length:].tolist())) if length < len(ids) else ""
        return None if rest.strip() else length


def _last_assistant(messages: Sequence[Message]) -> int | None:
    turns = [i for i, message in enumerate(messages) if message.role == "assistant"]
    return turns[-1] if turns else None
