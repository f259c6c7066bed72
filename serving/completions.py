"""A completion request on its way, of one prompt or several, and its answer's shape."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from transformers import PreTrainedTokenizerBase

from serving import forms, problems, replies
from serving.replies import Head
from serving.sampling import Scored
from serving.schema import CompletionRequest
from serving.service import Asked, Piece, Served


@dataclass(kw_only=True, slots=True)
class Completion:
    """One completion request, of one prompt or several, on its way to its answer."""

    body: CompletionRequest
    served: Served
    asked: list[Asked]
    head: Head
    echoed: list[str]
    """The text of each prompt, where it is to be given back."""
    offsets: dict[int, int] = field(default_factory=dict)
    """Choice, over all prompts -> characters so far."""

    @classmethod
    def read(cls, body: CompletionRequest, served: Served, key: str) -> "Completion":
        """Prompts as ids."""
        sampling = body.sampling()
        is_scored = body.echo and body.logprobs is not None
        vocab_size = len(served.tokenizer)
        asked: list[Asked] = []
        echoed: list[str] = []
        for prompt in body.prompts:
            ids: list[int] = prompt if isinstance(prompt, list) else _ids(served.tokenizer, prompt)
            if not ids:
                raise problems.invalid("prompt", "it is empty; give at least one token")
            if max(ids) >= vocab_size:
                raise problems.invalid(
                    "prompt", f"token id {max(ids)} is not in the vocabulary of {vocab_size}"
                )
            asked.append(
                Asked(
                    prompt_ids=ids,
                    sampling=sampling,
                    num_choices=body.num_choices,
                    num_prompt_logprobs=body.logprobs if is_scored else None,
                    key=key,
                    param="prompt",
                )
            )
            text = prompt if isinstance(prompt, str) else _decode(served.tokenizer, ids)
            echoed.append(text if body.echo else "")
        return cls(
            body=body, served=served, asked=asked, head=forms.head("cmpl", served), echoed=echoed
        )

    def whole(self, pieces: Sequence[tuple[int, Piece]]) -> replies.TextCompletion:
        """The whole answer."""
        choices: list[replies.TextChoice] = []
        for number in range(len(self.asked)):
            scores = [p for i, piece in pieces if i == number for p in piece.prompt]
            for choice in range(self.body.num_choices):
                own = [p for i, p in pieces if i == number and p.choice == choice]
                text = "".join(piece.text for piece in own)
                scored = [token for piece in own for token in piece.tokens]
                if self.body.max_tokens == 0:  # the engine has to say something
                    text, scored = "", []
                choices.append(
                    self._choice(
                        number, choice, text, scored, scores, forms.finish(own), is_first=True
                    )
                )
        usage = forms.usage(self.asked, pieces, is_silent=self.body.max_tokens == 0)
        return replies.text_completion(self.head, choices, usage=usage)

    def opening(self) -> list[replies.TextCompletion]:
        """Nothing."""
        return []

    def chunks(self, number: int, piece: Piece) -> list[replies.TextCompletion]:
        """What is to be sent of a piece."""
        index = number * self.body.num_choices + piece.choice
        is_first = index not in self.offsets and not piece.prompt
        if piece.prompt:
            self._kept_scores[number] = piece.prompt
            return []
        text, scored = piece.text, piece.tokens
        if self.body.max_tokens == 0:
            text, scored = "", ()
        if not (text or scored or piece.finish or is_first):
            return []
        choice = self._choice(
            number, piece.choice, text, scored, self._kept_scores.get(number, ()),
            piece.finish, is_first=is_first,
        )  # fmt: skip
        has_usage = self.body.has_usage_chunk
        return [replies.text_completion(self.head, [choice], has_usage=has_usage)]

    def usage_chunk(self, pieces: Sequence[tuple[int, Piece]]) -> replies.TextCompletion:
        """The last chunk of a stream that asked for it."""
        usage = forms.usage(self.asked, pieces, is_silent=self.body.max_tokens == 0)
        return replies.text_completion(self.head, [], usage=usage)

    _kept_scores: dict[int, tuple[Scored, ...]] = field(default_factory=dict)

    def _choice(
        self,
        number: int,
        choice: int,
        text: str,
        scored: Sequence[Scored],
        prompt_scores: Sequence[Scored],
        finish: Literal["stop", "length"] | None,
        *,
        is_first: bool,
    ) -> replies.TextChoice:
        index = number * self.body.num_choices + choice
        if is_first:
            text = self.echoed[number] + text
            scored = [*prompt_scores, *scored] if self.body.echo else scored
        logprobs = None
        if self.body.logprobs is not None:
            tokens = [forms.logprob(self.served.tokenizer, one) for one in scored]
            offset, offsets = self.offsets.get(index, 0), []
            for token in tokens:
                offsets.append(offset)
                offset += len(token.token)
            self.offsets[index] = offset
            logprobs = replies.text_logprobs(tokens, offsets=offsets)
        else:
            self.offsets[index] = 0
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text).input_ids


def _decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    text = tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text
