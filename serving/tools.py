"""Tools into the prompt, and tool calls out of the generated text.

What is covered: the two ways in which most open models call tools,
hermes (ChatML models: Hermes, Qwen, SmolLM3), any number of
`<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, and
llama (Llama 3.1 to 3.3), the answer being `{"name": ..., "parameters": {...}}`, several of them
separated by `;`, with or without `<|python_tag|>`.
What is not covered: calls written as XML or Python (Qwen3-Coder, GLM, Pythonic Llama).
"""

import json
import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, Literal, NotRequired, TypeAlias, TypedDict, cast

import jinja2
import regex
from transformers import PreTrainedTokenizerBase

from cluster.errors import DataError

Format: TypeAlias = Literal["hermes", "llama"]
Turn: TypeAlias = dict[str, object]

MAX_CALL_CHARS = 65_536
"""Characters of one call's JSON; what is longer is content."""
_MAX_SPACE = 64
"""White space inside a call's frame, and what may be left out before one."""
_MARKERS: dict[Format, tuple[str, ...]] = {
    "hermes": ("<tool_call>", "</tool_call>"),
    "llama": ("<|python_tag|>",),
}
_S = rf"\s{{0,{_MAX_SPACE}}}"
# The regex module, not re: it also says whether a text may be the beginning of a match.
_OPENING: dict[Format, regex.Pattern[str]] = {
    "hermes": regex.compile(rf"<tool_call>{_S}\{{"),
    "llama": regex.compile(rf"<\|python_tag\|>{_S}\{{"),
}
"""What a call begins with, up to its first brace."""
_ADJACENT: dict[Format, regex.Pattern[str]] = {
    "hermes": regex.compile(rf"{_S}</tool_call>"),
    "llama": regex.compile(rf"{_S}(?:;{_S})?(?:<\|python_tag\|>{_S})?\{{"),
}
"""What may follow a call: the end of its frame, or the next call (Llama's first one, too)."""
_REFUSALS = (jinja2.TemplateError, TypeError, ValueError, IndexError, KeyError)
"""What a chat template raises for messages that it cannot render."""


class Function(TypedDict):
    """A function that the model may call."""

    name: str
    description: NotRequired[str]
    parameters: NotRequired[dict[str, object] | None]
    """JSON Schema of its arguments, an object; without it there are none."""


class Tool(TypedDict):
    """One entry of a request's `tools`."""

    type: Literal["function"]
    function: Function


@dataclass(frozen=True, kw_only=True, slots=True)
class ToolCall:
    """A call that the model has made."""

    id: str
    """`call_` and 24 letters or digits."""
    name: str
    """One of the request's tools."""
    arguments: str
    """A JSON object as text."""


Event: TypeAlias = str | ToolCall
"""A piece of content, never empty, or a whole call."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Parsed:
    """An answer taken apart."""

    content: str | None
    """Text around the calls; None where there is nothing but calls."""
    calls: tuple[ToolCall, ...]
    """In the order of the text."""


def format_of(tokenizer: PreTrainedTokenizerBase) -> Format | None:
    """How a model calls tools, by what its chat template tells it; None: not in a known way."""
    if not tokenizer.chat_template:
        return None
    template = tokenizer.get_chat_template(tools=[{}])
    if "<tool_call>" in template and re.search(r'"arguments\\?"', template):
        return "hermes"
    return "llama" if "ipython" in template and '"parameters"' in template else None


def marker_ids(tokenizer: PreTrainedTokenizerBase, format: Format) -> frozenset[int]:
    """Special tokens that the text must show for its calls to be found."""
    return frozenset(
        token_id
        for token_id, token in tokenizer.added_tokens_decoder.items()
        if token.special and token.content in _MARKERS[format]
    )


def parse(text: str, tools: Sequence[Tool], format: Format, *, random: Random) -> Parsed:
    """The calls in a whole answer; what is no valid call of one of the tools stays content.

    White space before a call, and at the end of an answer that has calls, is left out.
    """
    return ToolStream(tools, format, random=random).whole(text)


class ToolStream:
    """Takes an answer apart while it comes in; the same for every way of cutting it to pieces.

    What may still be a call is held back, at most MAX_CALL_CHARS and the frame around them.
    """

    def __init__(self, tools: Sequence[Tool], format: Format, *, random: Random) -> None:
        self._names = frozenset(tool["function"]["name"] for tool in tools)
        self._format: Format = format
        self._random = random
        self._rest = ""
        self._is_adjacent = format == "llama"
        self._scan: _Scan | None = None
        self._space = ""
        self._has_calls = False

    def push(self, text: str) -> list[Event]:
        """What is certain with some more text."""
        self._rest += text
        return self._events(is_last=False)

    def finish(self) -> list[Event]:
        """What is left at the end of the answer; a call that is not whole is content."""
        events = [*self._events(is_last=True), *self._content(self._rest)]
        return events if self._has_calls or not self._space else [*events, self._space]

    def whole(self, text: str) -> Parsed:
        """What a whole answer comes to, where nothing of it was pushed before."""
        events = [*self.push(text), *self.finish()]
        content = "".join(event for event in events if isinstance(event, str))
        calls = tuple(event for event in events if isinstance(event, ToolCall))
        return Parsed(content=content or (None if calls else ""), calls=calls)

    def _events(self, *, is_last: bool) -> list[Event]:
        events: list[Event] = []
        while self._rest:
            step = self._next_in_call() if self._scan else self._next_in_text(is_last)
            if step is None:
                break
            events += step
        return events

    def _next_in_text(self, is_last: bool) -> list[Event] | None:
        """One step outside of calls; None where only more text can tell."""
        adjacent, self._is_adjacent = self._is_adjacent, False
        pattern = (_ADJACENT if adjacent else _OPENING)[self._format]
        find = pattern.match if adjacent else pattern.search
        match = find(self._rest, partial=not is_last)
        if match is None:
            return [] if adjacent else self._content(self._take(len(self._rest)))
        if match.partial:
            self._is_adjacent = adjacent
            return self._content(self._take(match.start())) or None
        if adjacent and self._format == "hermes":
            self._take(match.end())
            return []
        content = self._content(self._take(match.start()))
        self._scan = _Scan(match.end() - match.start() - 1)
        return content

    def _next_in_call(self) -> list[Event] | None:
        """One step within what may be a call; None where only more text can tell."""
        assert self._scan
        start, outcome = self._scan.start, self._scan.feed(self._rest)
        if outcome == "open":
            return None
        text, self._scan = self._take(self._scan.stop), None
        call = self._call(text[start:]) if outcome == "closed" else None
        if call is None:
            return self._content(text)
        self._space = ""
        self._is_adjacent = self._has_calls = True
        return [call]

    def _call(self, text: str) -> ToolCall | None:
        """The call that a JSON object stands for, None where it is none."""
        try:
            body = json.loads(text, parse_constant=_refuse_constant)
            name, found = body.get("name"), body.get("arguments", body.get("parameters"))
            arguments = json.dumps(found, ensure_ascii=False, allow_nan=False)
            arguments.encode()  # Lone surrogates are no text.
        except (ValueError, RecursionError):
            return None
        if not isinstance(found, dict) or not isinstance(name, str) or name not in self._names:
            return None
        letters = self._random.choices(string.ascii_letters + string.digits, k=24)
        return ToolCall(id=f"call_{''.join(letters)}", name=name, arguments=arguments)

    def _take(self, length: int) -> str:
        text, self._rest = self._rest[:length], self._rest[length:]
        return text

    def _content(self, text: str) -> list[Event]:
        """Content to be sent now; white space at its end waits for what follows."""
        text = self._space + text
        num_waiting = min(len(text) - len(text.rstrip()), _MAX_SPACE)
        length = len(text) - num_waiting
        self._space = text[length:]
        return [text[:length]] if length else []


class _Scan:
    """Finds the end of a JSON object, without reading any character twice."""

    def __init__(self, start: int) -> None:
        self.start = start
        """Where its first brace stands."""
        self.stop = start
        """After the last character that was read."""
        self._depth = 0
        self._is_quoted = False
        self._is_escaped = False

    def feed(self, text: str) -> Literal["open", "closed", "broken"]:
        """Read on in `text`, which has grown at its end."""
        limit = self.start + MAX_CALL_CHARS
        for letter in text[self.stop : limit]:
            if letter == "<" and not self._is_quoted:
                return "broken"  # No JSON, but perhaps the end of this frame or the next one.
            self.stop += 1
            if self._is_quoted:
                self._is_quoted = letter != '"' or self._is_escaped
                self._is_escaped = letter == "\\" and not self._is_escaped
            else:
                self._is_quoted = letter == '"'
                self._depth += (letter == "{") - (letter == "}")
                if not self._depth:
                    return "closed"
        return "open" if len(text) < limit else "broken"


def render_tools(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, object]],
    tools: Sequence[Tool],
) -> list[Turn]:
    """OpenAI's messages as `tokenizer.apply_chat_template(..., tools=tools)` takes them.

    messages: content is text or None. Arguments of earlier calls become objects, unless the
    template joins them as text.
    Raises DataError where arguments are no JSON object, where the template refuses the messages,
    and where it has no place for tools or calls, so that they would be lost.
    """
    refusal: Exception | None = None
    for is_parsed in (True, False):
        turns = [_turn(i, message, is_parsed) for i, message in enumerate(messages)]
        try:
            text = _render(tokenizer, turns, tools)
        except _REFUSALS as error:
            refusal = refusal or error
            continue
        if tools and _is_same(tokenizer, turns, (), text):
            raise DataError(
                "this model's chat template has no place for tools; ask without `tools`, "
                "or serve a model that was trained for them"
            )
        bare = [{key: turn[key] for key in turn if key != "tool_calls"} for turn in turns]
        if bare != turns and _is_same(tokenizer, bare, tools, text):
            raise DataError(
                "this model's chat template has no place for the `tool_calls` of assistant "
                "messages; write them into the content instead"
            )
        return turns
    raise DataError(f"this model's chat template refuses the messages: {refusal}")


def _turn(index: int, message: Mapping[str, object], is_parsed: bool) -> Turn:
    """One message; with is_parsed the arguments of its calls are objects, not text."""
    turn: Turn = {**message, "content": message.get("content") or ""}
    if message.get("tool_calls"):
        calls = cast(Sequence[Mapping[str, object]], message["tool_calls"])
        where = f"messages[{index}].tool_calls"
        turn["tool_calls"] = [
            {**call, "function": _function(call, f"{where}[{i}]", is_parsed)}
            for i, call in enumerate(calls)
        ]
    return turn


def _function(call: Mapping[str, object], where: str, is_parsed: bool) -> dict[str, object]:
    function = cast(Mapping[str, object], call["function"])
    try:
        arguments = json.loads(str(function["arguments"]), parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        raise DataError(f"{where}.function.arguments is no JSON object in a text")
    return {**function, "arguments": arguments if is_parsed else function["arguments"]}


def _render(
    tokenizer: PreTrainedTokenizerBase, turns: Sequence[Turn], tools: Sequence[Tool]
) -> str:
    text = tokenizer.apply_chat_template(
        cast(list[dict[str, str]], turns),
        tools=cast(Any, list(tools) or None),
        add_generation_prompt=True,
        tokenize=False,
    )
    return cast(str, text)


def _is_same(
    tokenizer: PreTrainedTokenizerBase, turns: Sequence[Turn], tools: Sequence[Tool], text: str
) -> bool:
    """Whether the template renders these turns and tools as `text`, too."""
    try:
        return _render(tokenizer, turns, tools) == text
    except _REFUSALS:
        return False


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON")
