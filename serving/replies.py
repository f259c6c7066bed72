"""Answers in OpenAI's shapes: the same pieces make whole ones and streams."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NotRequired, TypeAlias

from typing_extensions import TypedDict  # pydantic takes typing's from 3.12 on only

_MIN_LOGPROB = -9999.0
"""JSON has no minus infinity; OpenAI writes this."""
FinishReason: TypeAlias = Literal["stop", "length", "tool_calls"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenLogprob:
    """One token and how likely the model found it."""

    token: str
    bytes: list[int] | None
    """None where the token stands for no bytes."""
    logprob: float | None
    """Natural logarithm; None for the first token of a prompt."""
    top: Sequence["TokenLogprob"] = ()
    """The likeliest tokens at its place, likeliest first."""


class TopLogprob(TypedDict):
    token: str
    logprob: float
    bytes: list[int] | None


class ChatLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(TypedDict):
    """The tokens of a chat's answer, or of a chunk of it."""

    content: list[ChatLogprob]
    refusal: None


class TextLogprobs(TypedDict):
    """The tokens of a completion, column by column."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class FunctionCall(TypedDict):
    name: str
    arguments: str


class ToolCall(TypedDict):
    id: str
    type: Literal["function"]
    function: FunctionCall


class ToolCallDelta(ToolCall):
    """A call of a tool in a stream; it comes whole."""

    index: int


class AssistantAnswer(TypedDict):
    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: NotRequired[list[ToolCall]]


class Delta(TypedDict, total=False):
    role: Literal["assistant"]
    content: str
    tool_calls: list[ToolCallDelta]


class ChatChoice(TypedDict):
    index: int
    message: AssistantAnswer
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class ChatChunkChoice(TypedDict):
    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None


class TextChoice(TypedDict):
    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: FinishReason | None


class PromptDetails(TypedDict):
    cached_tokens: int


class Usage(TypedDict):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


class Head(TypedDict):
    """What all chunks of an answer have in common."""

    id: str
    created: int
    model: str
    system_fingerprint: str


class ChatCompletion(Head):
    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: Usage


class ChatCompletionChunk(Head):
    object: Literal["chat.completion.chunk"]
    choices: list[ChatChunkChoice]
    usage: NotRequired[Usage | None]


class TextCompletion(Head):
    object: Literal["text_completion"]
    choices: list[TextChoice]
    usage: NotRequired[Usage | None]


class AdapterInfo(TypedDict):
    rank: int


class AliasInfo(TypedDict):
    versions: list[str]
    """The models that answer."""


class ModelObject(TypedDict):
    """A base model, an adapter on one, or an alias."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | None
    adapter: NotRequired[AdapterInfo]
    alias: NotRequired[AliasInfo]


class ModelList(TypedDict):
    object: Literal["list"]
    data: list[ModelObject]


class ModelDeleted(TypedDict):
    id: str
    object: Literal["model"]
    deleted: Literal[True]


def usage_of(prompt_tokens: int, completion_tokens: int, *, cached_tokens: int = 0) -> Usage:
    """Counts of all prompts and of all choices; cached_tokens is a part of prompt_tokens."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }


def chat_logprobs(tokens: Sequence[TokenLogprob]) -> ChatLogprobs:
    """Of the answer's tokens, in order."""
    content: list[ChatLogprob] = [
        {**_top(one), "top_logprobs": [_top(top) for top in one.top]} for one in tokens
    ]
    return {"content": content, "refusal": None}


def text_logprobs(tokens: Sequence[TokenLogprob], *, offsets: Sequence[int]) -> TextLogprobs:
    """Of the tokens in order; offsets: where each one begins in the choice's text, in characters.

    Beside the likeliest tokens stands the one that was chosen. Of tokens that read alike, such as
    halves of characters, the likeliest counts.
    """
    tops: list[dict[str, float] | None] = []
    for one in tokens:
        likely = sorted((*one.top, one), key=_finite)
        tops.append(None if one.logprob is None else {top.token: _finite(top) for top in likely})
    return {
        "tokens": [one.token for one in tokens],
        "token_logprobs": [None if one.logprob is None else _finite(one) for one in tokens],
        "top_logprobs": tops,
        "text_offset": list(offsets),
    }


def chat_completion(head: Head, choices: list[ChatChoice], usage: Usage) -> ChatCompletion:
    """A whole answer."""
    return {**head, "object": "chat.completion", "choices": choices, "usage": usage}


def chat_chunk(
    head: Head, choices: list[ChatChunkChoice], *, has_usage: bool, usage: Usage | None = None
) -> ChatCompletionChunk:
    """A piece of an answer. has_usage: whether usage is spoken of, as null until the end."""
    chunk: ChatCompletionChunk = {**head, "object": "chat.completion.chunk", "choices": choices}
    return {**chunk, "usage": usage} if has_usage else chunk


def text_completion(
    head: Head, choices: list[TextChoice], *, has_usage: bool = True, usage: Usage | None = None
) -> TextCompletion:
    """A completion, or a piece of it with has_usage as in `chat_chunk`."""
    chunk: TextCompletion = {**head, "object": "text_completion", "choices": choices}
    return {**chunk, "usage": usage} if has_usage else chunk


def base_object(name: str, *, created: int, owned_by: str) -> ModelObject:
    """A base model or a merged one."""
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": owned_by,
        "root": name,
        "parent": None,
    }


def adapter_object(name: str, *, base: str, rank: int, created: int, owned_by: str) -> ModelObject:
    """An adapter on the base model of that name."""
    whole = base_object(name, created=created, owned_by=owned_by)
    return {**whole, "root": base, "parent": base, "adapter": {"rank": rank}}


def alias_object(name: str, *, versions: Sequence[str], created: int, owned_by: str) -> ModelObject:
    """A name that stands for models."""
    whole = base_object(name, created=created, owned_by=owned_by)
    return {**whole, "alias": {"versions": [*versions]}}


def _top(one: TokenLogprob) -> TopLogprob:
    return {"token": one.token, "logprob": _finite(one), "bytes": one.bytes}


def _finite(one: TokenLogprob) -> float:
    return _MIN_LOGPROB if one.logprob is None else max(one.logprob, _MIN_LOGPROB)
