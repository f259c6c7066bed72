"""What a chat and a completion have in common while they are answered."""

import secrets
import time
from collections.abc import Sequence
from typing import Literal

from transformers import PreTrainedTokenizerBase

from cluster import __version__
from serving import replies
from serving.replies import Head, TokenLogprob
from serving.sampling import Scored
from serving.service import Asked, Piece, Served
from serving.text import token_text


def head(kind: str, served: Served) -> Head:
    """What all chunks of an answer share."""
    return {
        "id": f"{kind}-{secrets.token_hex(12)}",
        "created": int(time.time()),
        "model": served.name,
        "system_fingerprint": f"loray-{__version__}",
    }


def usage(
    asked: Sequence[Asked], pieces: Sequence[tuple[int, Piece]], *, is_silent: bool = False
) -> replies.Usage:
    """Counts over all prompts; is_silent: the one token that the engine had to say is none."""
    ends = [piece for _, piece in pieces if piece.finish]
    return replies.usage_of(
        sum(len(one.prompt_ids) for one in asked),
        0 if is_silent else sum(piece.num_new for piece in ends),
        cached_tokens=sum(piece.num_cached for piece in ends if piece.choice == 0),
    )


def finish(pieces: Sequence[Piece]) -> Literal["stop", "length"]:
    """Why a choice ended."""
    reason = pieces[-1].finish
    assert reason is not None
    return reason


def logprob(tokenizer: PreTrainedTokenizerBase, one: Scored) -> TokenLogprob:
    """A token as both APIs report it."""
    text, data = token_text(tokenizer, one.id)
    top = [
        TokenLogprob(token=token, bytes=bytes_, logprob=value)
        for token_id, value in one.top
        for token, bytes_ in (token_text(tokenizer, token_id),)
    ]
    return TokenLogprob(token=text, bytes=data, logprob=one.logprob, top=top)
