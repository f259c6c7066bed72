"""Rows of the usual fine-tuning formats -> one Example type, with the place of everything bad.

What is covered: OpenAI's `messages` with tools and calls, its preference rows, alpaca, ShareGPT,
prompt/completion and plain text.
What is not covered: images and audio (refused by name).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, cast

from cluster.errors import DataError
from training import calls, shapes, sources
from training.calls import Call, Tool
from training.shapes import Bad, Code, Role, Shape
from training.sources import Source

Format: TypeAlias = Literal["auto"] | Shape

_NUM_SHOWN = 5
_PREFERENCE_HINT = (
    "a preference (input with two answers); set objective.kind: dpo to learn from preferences"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: Role
    """Who speaks; OpenAI's deprecated `function` is a tool."""
    content: str
    """What is said; empty only in a turn that calls, and in a tool's answer."""
    context: str = ""
    """Alpaca's `input`; where a template has no place for it, see `full_content`."""
    weight: Literal[0, 1] | None = None
    """0: this assistant turn is not learned; 1 and None: it is."""
    calls: tuple[Call, ...] = ()
    """What an assistant's turn calls."""
    name: str = ""
    """Of the speaker, or of the tool that answers."""
    call_id: str = ""
    """Of the call that a tool's turn answers."""

    @property
    def full_content(self) -> str:
        """The content, then the context after a blank line where there is one."""
        return f"{self.content}\n\n{self.context}" if self.context else self.content


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """One conversation, or one plain text."""

    id: str
    """File and line (or row number, from 1), such as `train.jsonl:17`."""
    messages: tuple[Message, ...] = ()
    """At least one of them an assistant turn; empty where `text` is given."""
    text: str | None = None
    """Plain text to learn from as it is."""
    tools: tuple[Tool, ...] = ()
    """What the conversation may call."""
    rejected: Message | None = None
    """Of a preference: the answer that is to become less likely than the last of `messages`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BadRow:
    """A row that cannot be learned from."""

    where: str
    """Path as the user gave it, and line or row number."""
    reason: str
    """What is wrong, what was expected."""
    code: Code = "cannot_be_encoded"


@dataclass(frozen=True, kw_only=True, slots=True)
class Rows:
    """Everything a source holds."""

    examples: tuple[Example, ...]
    """Usable rows, in the order of the source."""
    bad: tuple[BadRow, ...]
    """Rows that were skipped."""
    fingerprint: str
    """Hex sha256 over the contents of the source; file names do not count."""


def read(
    source: Source, *, format: Format = "auto", on_bad_row: Literal["error", "skip"] = "error"
) -> Rows:
    """All examples of a source.

    Raises DataError where a place is missing, empty or unreadable, where no row is usable, and,
    with on_bad_row="error", where any row is bad (the first few are listed with their reasons).
    """
    examples: list[Example] = []
    bad: list[BadRow] = []
    for item in stream(source, format=format):
        if isinstance(item, Example):
            examples.append(item)
        else:
            bad.append(item)
    if bad and (on_bad_row == "error" or not examples):
        raise bad_rows_error(bad, num_bad=len(bad), num_rows=len(examples) + len(bad))
    return Rows(examples=tuple(examples), bad=tuple(bad), fingerprint=sources.fingerprint(source))


def stream(source: Source, *, format: Format = "auto") -> Iterator[Example | BadRow]:
    """The rows of a source one by one, without holding more than a batch of them in memory.

    With format="auto" the first row that has a known shape decides for all; preferences are read
    only with format="preference", since they are trained in another way. Raises DataError where
    a place is missing, empty or unreadable; a bad row is yielded, not raised.
    """
    decided = None if format == "auto" else format
    for place in sources.places(source):
        num_rows = 0
        for number, row in sources.rows(place):
            num_rows += 1
            try:
                if isinstance(row, Bad):
                    raise row
                shape = shapes.shape_of(row, decided)
                if shape == "preference" and decided is None:
                    raise Bad(_PREFERENCE_HINT, code="invalid_preference")
                decided = decided or shape
                yield example_of(row, shape, f"{place.label}:{number}")
            except Bad as error:
                where = f"{place.name}:{number}"
                yield BadRow(where=where, reason=str(error), code=error.code)
        if not num_rows:
            raise DataError(f"{place.name} holds no rows; give a file with at least one example")


def bad_rows_error(bad: Sequence[BadRow], *, num_bad: int, num_rows: int) -> DataError:
    """The error about `num_bad` bad rows out of `num_rows`; `bad` are the first of them."""
    lines = [f"  {row.where}: {row.reason}" for row in bad[:_NUM_SHOWN]]
    if num_bad > _NUM_SHOWN:
        lines.append(f"  and {num_bad - _NUM_SHOWN} more")
    advice = (
        "repair them, or set data.on_bad_row: skip to leave them out"
        if num_bad < num_rows
        else "no row can be used: repair the data, or name its shape with data.format"
    )
    listing = "\n".join(lines)
    return DataError(f"{num_bad} of {num_rows} rows are bad; {advice}\n{listing}")


def example_of(row: Mapping[str, object], shape: Shape, example_id: str) -> Example:
    """The example in a row of a shape. Raises Bad."""
    if shape == "text":
        return Example(id=example_id, text=shapes.text(row["text"], "text"))
    shapes.require_supported(row)
    if shape == "preference":
        return _preference(row, example_id)
    messages = {
        "messages": _openai,
        "sharegpt": _sharegpt,
        "alpaca": _alpaca,
        "prompt_completion": _prompt_completion,
    }[shape](row)
    if row.get("system"):
        content = shapes.text(row["system"], "system")
        messages.insert(0, Message(role="system", content=content))
    if not any(message.role == "assistant" for message in messages):
        roles = ", ".join(message.role for message in messages)
        raise Bad(
            f"no assistant turn to learn from (roles: {roles})",
            code="example_missing_assistant_message",
        )
    tools = calls.tools_of(row)
    return Example(id=example_id, messages=tuple(messages), tools=tools)


def _preference(row: Mapping[str, object], example_id: str) -> Example:
    prompt = row["input"]
    if not isinstance(prompt, dict):
        raise Bad(f"input is {shapes.kind_of(prompt)}; expected an object", code="data_type")
    prompt = cast(Mapping[str, object], prompt)
    messages = _openai(prompt, "input.")
    if messages[-1].role not in ("user", "tool"):
        raise Bad(
            f"input ends with {shapes.a_turn(messages[-1].role)}; expected a user's or a tool's, "
            "which the answers answer",
            code="invalid_preference",
        )
    chosen, rejected = (_answer(row, names) for names in (shapes.PREFERRED, shapes.NON_PREFERRED))
    if chosen == rejected:
        raise Bad("both answers are the same; nothing is preferred", code="invalid_preference")
    return Example(
        id=example_id,
        messages=(*messages, chosen),
        tools=calls.tools_of(prompt, "input."),
        rejected=rejected,
    )


def _answer(row: Mapping[str, object], names: tuple[str, ...]) -> Message:
    key = shapes.answer_of(row, names)
    turns = _openai(row, "", key)
    if [turn.role for turn in turns] != ["assistant"]:
        roles = ", ".join(turn.role for turn in turns)
        raise Bad(f"{key} has turns of {roles}; expected one of assistant", code="data_type")
    if turns[0].weight is not None:
        raise Bad(f"{key}[0].weight has no meaning in a preference", code="invalid_weight")
    return turns[0]


def _openai(row: Mapping[str, object], at: str = "", key: str = "messages") -> list[Message]:
    return [_openai_turn(entry, place) for place, entry in shapes.entries(row, key, at)]


def _openai_turn(entry: Mapping[str, object], at: str) -> Message:
    speaker = shapes.role(entry, "role", shapes.OPENAI_ROLES, at)
    shapes.require_known_keys(entry, at)
    called = calls.calls_of(entry, at) if speaker == "assistant" else ()
    found = entry.get("content")
    if "content" not in entry and not called:
        keys = ", ".join(str(key)[:40] for key in list(entry)[:20])
        raise Bad(f"{at} has no 'content' (keys: {keys})", code="message_missing_key")
    is_void = found is None and (bool(called) or entry["role"] == "function")
    may_be_empty = bool(called) or speaker == "tool"
    return Message(
        role=speaker,
        content=""
        if is_void
        else shapes.content(found, f"{at}.content", may_be_empty=may_be_empty),
        weight=shapes.weight(entry, speaker, at),
        calls=called,
        name=calls.name_of(entry, "name", at),
        call_id=calls.name_of(entry, "tool_call_id", at),
    )


def _sharegpt(row: Mapping[str, object]) -> list[Message]:
    turns: list[Message] = []
    for at, entry in shapes.entries(row, "conversations"):
        for key in ("tool_calls", "function_call", "name"):
            if entry.get(key):
                raise Bad(
                    f"{at}.{key} is not supported in ShareGPT's format; write the row as messages",
                    code="unsupported_content",
                )
        speaker = shapes.role(entry, "from", shapes.SHAREGPT_ROLES, at)
        content = shapes.text(entry.get("value"), f"{at}.value")
        weight = shapes.weight(entry, speaker, at)
        turns.append(Message(role=speaker, content=content, weight=weight))
    return turns


def _alpaca(row: Mapping[str, object]) -> list[Message]:
    context = row.get("input") or ""
    return [
        Message(
            role="user",
            content=shapes.text(row["instruction"], "instruction"),
            context=shapes.text(context, "input") if context != "" else "",
        ),
        Message(role="assistant", content=shapes.text(row["output"], "output")),
    ]


def _prompt_completion(row: Mapping[str, object]) -> list[Message]:
    return [
        Message(role="user", content=shapes.text(row["prompt"], "prompt")),
        Message(role="assistant", content=shapes.text(row["completion"], "completion")),
    ]
