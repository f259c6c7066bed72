"""Turns -> text, by the tokenizer's chat template or a named prompt template.

Tools and calls go through the chat template alone. Whether it has a place for them is found out
once, on a small conversation: many templates pass over what they do not know, and the model would
learn to call tools that it never sees.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, TypeAlias, cast

import jinja2
from transformers import PreTrainedTokenizerBase

from cluster.errors import DataError
from training.calls import Tool
from training.examples import Message

Template: TypeAlias = Literal["auto", "chat", "alpaca", "plain"]

_ALPACA = "Below is an instruction that describes a task. Write a response that appropriately completes the request."  # noqa: E501
_ALPACA_INPUT = "Below is an instruction that describes a task, paired with an input that provides further context. Write a response that appropriately completes the request."  # noqa: E501
_REFUSALS = (jinja2.TemplateError, TypeError, ValueError, IndexError, KeyError)
"""What a chat template raises for turns that it cannot render."""
_PROBE_CALL = {"name": "get_weather", "arguments": {"city": "Oslo"}}
_PROBE_TOOL: Tool = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}


class Unusable(Exception):
    """The reason why an example cannot be learned from."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Grasp:
    """What a chat template does with tools."""

    takes_objects: bool = True
    """Whether arguments of calls are given as objects rather than as text."""
    shows_tools: bool = False
    shows_calls: bool = False
    shows_calls_alone: bool = False
    """Without tools, for which a tokenizer may have another template."""
    refusal: str = ""
    """Why it renders no conversation with a call."""


class Renderer:
    """The way from turns to text.

    template: auto is chat where the tokenizer has a chat template, else alpaca. Raises DataError
    for a template that this tokenizer cannot do.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: Template) -> None:
        has_chat = bool(tokenizer.chat_template)
        if template == "chat" and not has_chat:
            raise DataError(
                "data.template is chat, but the tokenizer has no chat template; "
                "use alpaca or plain, or auto"
            )
        self._tokenizer = tokenizer
        self.name: str = ("chat" if has_chat else "alpaca") if template == "auto" else template
        """chat, alpaca or plain."""
        self.eos = str(tokenizer.eos_token or "")
        """What ends an answer, but for a chat template."""
        self.bos = _added_bos(tokenizer)
        """What the tokenizer puts before every text."""
        if self.name != "chat" and not self.eos:
            raise DataError(
                f"template {self.name} ends answers with the tokenizer's eos token, "
                "but it has none; set eos_token in tokenizer_config.json"
            )

    def render(self, messages: Sequence[Message], tools: Sequence[Tool], *, is_prompt: bool) -> str:
        """The text of some turns; with is_prompt up to where the assistant's answer begins.

        Raises Unusable where the template refuses the turns, or would leave something out.
        """
        if self.name != "chat":
            if tools or any(message.calls for message in messages):
                raise Unusable(
                    f"template {self.name} has no place for tools; use a chat template that has"
                )
            if self.name == "alpaca":
                return self.bos + _alpaca(messages, is_prompt, self.eos)
            return self.bos + _plain(messages, self.eos)
        is_parsed = self._require_grasp(messages, tools)
        turns = [_as_turn(message, is_parsed=is_parsed) for message in messages]
        try:
            return self._apply(turns, tools, is_prompt=is_prompt)
        except _REFUSALS as error:
            roles = ", ".join(message.role for message in messages)
            raise Unusable(f"the chat template refuses the turns ({roles}): {error}") from None

    def _require_grasp(self, messages: Sequence[Message], tools: Sequence[Tool]) -> bool:
        """Whether calls are rendered with parsed arguments; raises Unusable for what is lost."""
        has_calls = any(message.calls for message in messages)
        if not tools and not has_calls:
            return True
        grasp = self._grasp
        if grasp.refusal:
            raise Unusable(f"the tokenizer's chat template refuses tools: {grasp.refusal}")
        if tools and not grasp.shows_tools:
            raise Unusable(
                "the tokenizer's chat template has no place for tools, so the model would not see "
                "them; use a base whose template has, or take tools out of the row"
            )
        if has_calls and not (grasp.shows_calls if tools else grasp.shows_calls_alone):
            raise Unusable(
                "the tokenizer's chat template has no place for tool_calls, so they would not be "
                "learned; use a base whose template has, or write them into the content"
            )
        return grasp.takes_objects

    @cached_property
    def _grasp(self) -> _Grasp:
        refusal = ""
        for takes_objects in (True, False):
            arguments = _PROBE_CALL["arguments"] if takes_objects else '{"city": "Oslo"}'
            call = {"type": "function", "function": {**_PROBE_CALL, "arguments": arguments}}
            bare: list[dict[str, object]] = [
                {"role": "user", "content": "Weather?"},
                {"role": "assistant", "content": ""},
                {"role": "tool", "content": "Rain.", "tool_call_id": "call00001"},
                {"role": "assistant", "content": "It rains."},
            ]
            turns = [*bare]
            turns[1] = {**bare[1], "tool_calls": [{"id": "call00001", **call}]}
            try:
                text = self._apply(turns, [_PROBE_TOOL], is_prompt=False)
            except _REFUSALS as error:
                refusal = refusal or str(error) or type(error).__name__
                continue
            return _Grasp(
                takes_objects=takes_objects,
                shows_tools=not self._gives(text, turns, []),
                shows_calls=not self._gives(text, bare, [_PROBE_TOOL]),
                shows_calls_alone=self._tells_apart(turns, bare),
            )
        return _Grasp(refusal=refusal)

    def _gives(
        self, text: str, turns: Sequence[Mapping[str, object]], tools: Sequence[Tool]
    ) -> bool:
        try:
            return self._apply(turns, tools, is_prompt=False) == text
        except _REFUSALS:
            return False

    def _tells_apart(
        self, turns: Sequence[Mapping[str, object]], others: Sequence[Mapping[str, object]]
    ) -> bool:
        try:
            return not self._gives(self._apply(turns, [], is_prompt=False), others, [])
        except _REFUSALS:
            return False

    def _apply(
        self, turns: Sequence[Mapping[str, object]], tools: Sequence[Tool], *, is_prompt: bool
    ) -> str:
        text = self._tokenizer.apply_chat_template(
            cast(list[dict[str, str]], list(turns)),
            tools=cast(list[dict[str, object]], list(tools)) or None,  # pyright: ignore[reportArgumentType]
            tokenize=False,
            add_generation_prompt=is_prompt,
        )
        return cast(str, text)


def _as_turn(message: Message, *, is_parsed: bool) -> dict[str, object]:
    turn: dict[str, object] = {"role": message.role, "content": message.full_content}
    if message.calls:
        turn["tool_calls"] = [call.as_turn(is_parsed=is_parsed) for call in message.calls]
    if message.name:
        turn["name"] = message.name
    if message.call_id:
        turn["tool_call_id"] = message.call_id
    return turn


def _added_bos(tokenizer: PreTrainedTokenizerBase) -> str:
    """The bos token where the tokenizer puts one before every text, else an empty string."""
    ids = cast(list[int], tokenizer("", return_attention_mask=False)["input_ids"])
    is_added = bool(ids) and ids[0] == tokenizer.bos_token_id
    return str(tokenizer.bos_token) if is_added else ""


def _alpaca(messages: Sequence[Message], is_prompt: bool, eos: str) -> str:
    """Stanford Alpaca's prompt; a system turn takes the place of its first paragraph.

    Further turns repeat the headings: an extension of ours.
    """
    has_input = any(message.context for message in messages)
    parts = [_ALPACA_INPUT if has_input else _ALPACA]
    for message in messages:
        if message.role == "system":
            parts[0] = message.content
        elif message.role == "user":
            parts.append(f"### Instruction:\n{message.content}")
            parts += [f"### Input:\n{message.context}"] if message.context else []
        elif message.role == "assistant":
            parts.append(f"### Response:\n{message.content}{eos}")
        else:
            raise Unusable(
                f"template alpaca has no place for a {message.role} turn; use a chat template"
            )
    return "\n\n".join([*parts, "### Response:\n"] if is_prompt else parts)


def _plain(messages: Sequence[Message], eos: str) -> str:
    """Prompt and answer as they are; a blank line between two turns that are no answers."""
    text = ""
    is_after_prompt = False
    for message in messages:
        is_answer = message.role == "assistant"
        if is_after_prompt and not is_answer:
            text += "\n\n"
        text += f"{message.content}{eos}" if is_answer else message.full_content
        is_after_prompt = not is_answer
    return text
