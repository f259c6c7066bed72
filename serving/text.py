"""Token ids -> text, one id at a time, as `tokenizer.decode` of all of them would read.

A token's text depends on its neighbours in two ways only. Byte-level vocabularies, and the byte
tokens (`<0xE4>`) of the others, may split a character: bytes wait until it is whole. Elsewhere a
leading space or the like depends on the token before, so a token's text is what it adds to that
one. Thus every id costs the same, however long the answer is.

What is covered: every tokenizer with a Rust backend, and what else decodes in this way.
What is not covered: Python tokenizers that look further back, such as sentencepiece's own.
"""

import re
from codecs import utf_8_decode
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import lru_cache

from transformers import PreTrainedTokenizerBase

_REPLACEMENT = "\ufffd"
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_PLAIN_BYTES = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
_OTHER_BYTES = sorted({*range(0x100)} - {*_PLAIN_BYTES})
_LETTER_BYTES = {chr(byte): byte for byte in _PLAIN_BYTES} | {
    chr(0x100 + i): byte for i, byte in enumerate(_OTHER_BYTES)
}
"""GPT-2's letter of each byte: itself where it is printable, else one from U+0100 on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Delta:
    """What one more token adds to the answer."""

    text: str
    """Text that is safe to send: whole characters, and no beginning of a stop string."""
    is_stopped: bool
    """Whether the answer ends here, by an end token or right before a stop string."""


class Detokenizer:
    """The text of one answer.

    stop: none of them empty. Where several occur, the one that is whole first ends the answer,
    and of those that end at the same character the longest.
    stop_ids: tokens that end the answer and are no part of it.
    visible_ids: special tokens to be shown all the same, such as those around a tool call.

    All deltas together are `tokenizer.decode(ids, skip_special_tokens=True,
    clean_up_tokenization_spaces=False)` up to the first stop, but for one thing: where a run of
    byte tokens is not UTF-8, tokenizers gives up all its bytes; here its whole characters, which
    may have been sent, stand.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        stop: Sequence[str] = (),
        stop_ids: Collection[int],
        visible_ids: Collection[int] = (),
    ) -> None:
        assert all(stop), "an empty stop string ends every answer"
        self._vocabulary = _vocabulary(tokenizer)
        self._stop = tuple(stop)
        self._longest_stop = max(map(len, stop), default=0)
        self._stop_ids = frozenset(stop_ids)
        self._hidden_ids = self._vocabulary.special_ids.difference(visible_ids)
        self._before: str | None = None
        self._bytes = b""
        self._held = ""
        self._is_over = False
        self.num_chars = 0
        """Characters so far, held ones too: the offset at which the next token's text begins."""

    def push(self, token_id: int) -> Delta:
        """Take the next token. Nothing may follow a delta that is stopped."""
        assert not self._is_over, "the answer is over"
        if token_id in self._stop_ids:
            return self._release(self._broken(), is_last=True, is_stopped=True)
        token = None if token_id in self._hidden_ids else self._vocabulary.token(token_id)
        return self._release("" if token is None else self._decode(token))

    def finish(self) -> Delta:
        """What was held back, where the answer ends without an end token."""
        assert not self._is_over, "the answer is over"
        return self._release(self._broken(), is_last=True)

    def _decode(self, token: str) -> str:
        """The text that a token makes whole."""
        vocabulary, before, self._before = self._vocabulary, self._before, token
        data = vocabulary.bytes_of(token)
        # Llama's decoder strips the text's first space, even one that is a byte token.
        if data is None or (before is None and data == b" "):
            return self._broken() + vocabulary.addition(before, token)
        text, self._bytes = vocabulary.characters(self._bytes + data)
        return text

    def _broken(self) -> str:
        """The text of bytes that no longer can become a character."""
        text, self._bytes = self._vocabulary.characters(self._bytes, is_last=True)
        return text

    def _release(self, text: str, *, is_last: bool = False, is_stopped: bool = False) -> Delta:
        self.num_chars += len(text)
        text = self._held + text
        found = [(at + len(stop), at) for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            text, is_stopped = text[: min(found)[1]], True
        self._is_over = is_last or is_stopped
        length = len(text) - (0 if self._is_over else self._num_held(text))
        self._held = text[length:]
        return Delta(text=text[:length], is_stopped=is_stopped)

    def _num_held(self, text: str) -> int:
        """Characters at the end of `text` that a stop string may begin with."""
        for num in range(min(len(text), self._longest_stop - 1), 0, -1):
            if any(stop.startswith(text[-num:]) for stop in self._stop):
                return num
        return 0


def token_text(tokenizer: PreTrainedTokenizerBase, token_id: int) -> tuple[str, list[int] | None]:
    """What logprobs call `token` and `bytes`: one token's text within an answer, and its bytes.

    Bytes that are no UTF-8 by themselves read U+FFFD in the text. Special tokens are shown.
    An id without a token (models round their vocabulary up) is an empty text without bytes.
    """
    vocabulary = _vocabulary(tokenizer)
    token = vocabulary.token(token_id)
    if token is None:
        return "", None
    if token_id in vocabulary.special_ids:
        return token, list(token.encode())
    data = vocabulary.bytes_of(token)
    if data is None:
        data = vocabulary.addition("a", token).encode()
    return data.decode(errors="replace"), list(data)


class _Vocabulary:
    """What the tokens of one tokenizer stand for."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._join = tokenizer.convert_tokens_to_string
        self._is_byte_level = self._join(["a", "Ġ"]) == "a "
        self._has_byte_tokens = self._join(["a", "<0xC3>", "<0xA9>"]) == "aé"
        added = tokenizer.added_tokens_decoder.items()
        self.special_ids = frozenset(token_id for token_id, token in added if token.special)

    def token(self, token_id: int) -> str | None:
        """A token as the vocabulary writes it."""
        token = self._tokenizer.convert_ids_to_tokens(token_id)
        return token if isinstance(token, str) else None

    def bytes_of(self, token: str) -> bytes | None:
        """The bytes of a token that stands for bytes, None for one that stands for text."""
        if self._is_byte_level:
            try:
                return bytes(_LETTER_BYTES[letter] for letter in token)
            except KeyError:  # An added token, which is text.
                return token.encode()
        match = _BYTE_TOKEN.fullmatch(token) if self._has_byte_tokens else None
        return bytes.fromhex(match[1]) if match else None

    def addition(self, before: str | None, token: str) -> str:
        """What a token of text adds to the one before it (None: it is the first)."""
        if before is None:
            return self._join([token])
        return self._join([before, token])[len(self._join([before])) :]

    def characters(self, data: bytes, *, is_last: bool = False) -> tuple[str, bytes]:
        """The characters in `data`, and the bytes at its end that may become one more.

        What is no UTF-8 reads U+FFFD: one for each byte token, else one for each broken character.
        """
        text = ""
        while True:
            try:
                more, length = utf_8_decode(data, "strict", is_last)
                return text + more, data[length:]
            except UnicodeDecodeError as error:
                num_lost = error.end - error.start if self._has_byte_tokens else 1
                text += data[: error.start].decode() + _REPLACEMENT * num_lost
                data = data[error.end :]


@lru_cache(maxsize=8)
def _vocabulary(tokenizer: PreTrainedTokenizerBase) -> _Vocabulary:
    return _Vocabulary(tokenizer)
