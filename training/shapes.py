"""The shapes of a row: which keys it has, and what may stand under them.

Errors name the place in the row and never quote what is said in it; each has a code, of which the
first seven are those of OpenAI's cookbook (Chat_finetuning_data_prep).
"""

from collections.abc import Collection, Iterator, Mapping
from typing import Literal, TypeAlias, cast

from cluster.config import nearest

Shape: TypeAlias = Literal[
    "messages", "preference", "sharegpt", "alpaca", "prompt_completion", "text"
]
Role: TypeAlias = Literal["system", "user", "assistant", "tool"]
Code: TypeAlias = Literal[
    "data_type",
    "missing_messages_list",
    "message_missing_key",
    "message_unrecognized_key",
    "unrecognized_role",
    "missing_content",
    "example_missing_assistant_message",
    "unknown_format",
    "unsupported_content",
    "invalid_weight",
    "invalid_tools",
    "invalid_tool_calls",
    "invalid_preference",
    "invalid_text",
    "missing_prompt",
    "cannot_be_encoded",
]

KEYS: Mapping[Shape, tuple[str, ...]] = {
    "messages": ("messages",),
    "preference": ("input",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "prompt_completion": ("prompt", "completion"),
    "text": ("text",),
}
"""Shape -> keys it needs, in the order of detection (alpaca data often has `text` as well)."""
PREFERRED = ("preferred_output", "preferred_completion")
"""The answer that is to become likelier: OpenAI's guide calls it the one, its API the other."""
NON_PREFERRED = ("non_preferred_output", "non_preferred_completion")

OPENAI_ROLES: Mapping[str, Role] = {
    "system": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "function": "tool",  # the deprecated name
}
SHAREGPT_ROLES: Mapping[str, Role] = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "model", "bing", "bard"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function_response"), "tool"),
    "system": "system",
}
_MESSAGE_KEYS: Mapping[str, tuple[str, ...]] = {
    "system": ("role", "content", "name"),
    "user": ("role", "content", "name"),
    "assistant": ("role", "content", "name", "weight", "tool_calls", "function_call"),
    "tool": ("role", "content", "name", "tool_call_id"),
    "function": ("role", "content", "name"),
}
_UNSUPPORTED_IN_MESSAGE = ("audio", "refusal", "reasoning_content", "thinking")
_UNSUPPORTED_IN_ROW = ("history", "images", "audios", "videos")


class Bad(Exception):
    """The reason why a row is bad."""

    def __init__(self, reason: str, *, code: Code) -> None:
        super().__init__(reason)
        self.code: Code = code


def shape_of(row: Mapping[str, object], decided: Shape | None) -> Shape:
    """The shape of a row; it must be `decided` where that is given. Raises Bad."""
    given = {key for key, value in row.items() if value is not None}
    shapes: list[Shape] = [shape for shape in KEYS if _has(given, shape)]
    if decided in shapes:
        return decided
    seen = ", ".join(sorted(str(key)[:40] for key in given)[:20]) or "none"
    if decided is None and shapes:
        return shapes[0]
    if decided is None:
        known = "; ".join(f"{shape}: {_needs(shape)}" for shape in KEYS)
        raise Bad(
            f"unknown format: keys are {seen}; expected one of: {known}", code="unknown_format"
        )
    mixed = f" (it looks like {shapes[0]}; one source has one format)" if shapes else ""
    code = "missing_messages_list" if decided == "messages" else "unknown_format"
    raise Bad(
        f"not in the format {decided}, which needs {_needs(decided)}: keys are {seen}{mixed}",
        code=code,
    )


def require_supported(row: Mapping[str, object]) -> None:
    """Raise Bad for a row with parts that would be left out."""
    for key in _UNSUPPORTED_IN_ROW:
        if row.get(key):
            raise Bad(
                f"{key!r} is not supported; remove it, or write it into the messages",
                code="unsupported_content",
            )


def entries(
    row: Mapping[str, object], key: str, at: str = ""
) -> Iterator[tuple[str, Mapping[str, object]]]:
    """Place and object of each turn in a list of them. Raises Bad."""
    found, name = row.get(key), f"{at}{key}"
    if found == []:
        raise Bad(f"{name} is empty; expected a list of turns", code="missing_messages_list")
    if not isinstance(found, list):
        raise Bad(
            f"{name} is {kind_of(found)}; expected a list of turns", code="missing_messages_list"
        )
    for number, entry in enumerate(found):
        place = f"{name}[{number}]"
        if not isinstance(entry, dict):
            raise Bad(f"{place} is {kind_of(entry)}; expected an object", code="data_type")
        for unsupported in _UNSUPPORTED_IN_MESSAGE:
            if entry.get(unsupported):
                raise Bad(
                    f"{place}.{unsupported} is not supported; write it into the content, or "
                    "remove it",
                    code="unsupported_content",
                )
        yield place, cast(Mapping[str, object], entry)


def role(entry: Mapping[str, object], key: str, roles: Mapping[str, Role], at: str) -> Role:
    """Who speaks in a turn. Raises Bad."""
    name = entry.get(key)
    if isinstance(name, str) and name in roles:
        return roles[name]
    if name is None:
        keys = ", ".join(str(key)[:40] for key in list(entry)[:20])
        raise Bad(f"{at} has no {key!r} (keys: {keys})", code="message_missing_key")
    allowed = ", ".join(roles)
    raise Bad(
        f"{at}: unknown role {str(name)[:40]!r}; allowed: {allowed}", code="unrecognized_role"
    )


def require_known_keys(entry: Mapping[str, object], at: str) -> None:
    """Raise Bad where one of OpenAI's messages has a key that its role does not have."""
    speaker = str(entry["role"])
    valid = _MESSAGE_KEYS[speaker]
    for key, value in entry.items():
        if value is None or key in valid or key in _UNSUPPORTED_IN_MESSAGE:
            continue
        if key == "weight":
            raise Bad(
                f"{at}.weight stands on {a_turn(speaker)}; only assistant turns have it",
                code="invalid_weight",
            )
        raise Bad(
            f"{at}: unknown key {str(key)[:40]!r} in {a_turn(speaker)}."
            f"{nearest(str(key)[:40], valid)} Valid: {', '.join(valid)}",
            code="message_unrecognized_key",
        )


def weight(entry: Mapping[str, object], speaker: Role, at: str) -> Literal[0, 1] | None:
    """Whether an assistant turn is learned, where it says so. Raises Bad."""
    found = entry.get("weight")
    if found is None:
        return None
    if isinstance(found, bool) or found not in (0, 1):
        raise Bad(f"{at}.weight is {str(found)[:40]}; allowed: 0 or 1", code="invalid_weight")
    if speaker != "assistant":
        raise Bad(
            f"{at}.weight stands on {a_turn(speaker)}; only assistant turns have it",
            code="invalid_weight",
        )
    return 1 if found else 0


def content(value: object, at: str, *, may_be_empty: bool = False) -> str:
    """Text, or the text of a list of text parts. Raises Bad."""
    if not isinstance(value, list):
        return text(value, at, may_be_empty=may_be_empty)
    texts: list[str] = []
    for number, part in enumerate(value):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text":
            shown = f"of type {label(kind)}" if isinstance(part, dict) else kind_of(part)
            raise Bad(
                f"{at}[{number}] is {shown}; only text parts are supported",
                code="unsupported_content",
            )
        part_text = cast(dict[str, object], part).get("text")
        texts.append(text(part_text, f"{at}[{number}].text", may_be_empty=may_be_empty))
    return text("".join(texts), at, may_be_empty=may_be_empty)


def text(value: object, at: str, *, may_be_empty: bool = False) -> str:
    """Text with something in it. Raises Bad."""
    if value is None or (isinstance(value, str) and not value.strip() and not may_be_empty):
        raise Bad(f"{at} is empty; expected text", code="missing_content")
    if not isinstance(value, str):
        raise Bad(f"{at} is {kind_of(value)}; expected text", code="missing_content")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise Bad(
            f"{at} has half of a surrogate pair, which is not a character", code="invalid_text"
        ) from None
    return value


def kind_of(value: object) -> str:
    """What a value is, for an error; what a text says is nobody's business."""
    names = {dict: "an object", list: "a list", type(None): "nothing", str: "text"}
    is_plain = isinstance(value, bool | int | float)
    shown = f" {str(value)[:40]!r}" if is_plain else ""
    return f"{names.get(type(value), type(value).__name__)}{shown}"


def label(value: object) -> str:
    """A value that should be a name out of a few, for an error."""
    return repr(value[:40]) if isinstance(value, str) else kind_of(value)


def a_turn(speaker: str) -> str:
    """`a user turn`, for an error."""
    return f"{'an' if speaker == 'assistant' else 'a'} {speaker} turn"


def answer_of(row: Mapping[str, object], names: tuple[str, ...]) -> str:
    """The key under which a preference row has an answer. Raises Bad."""
    found = [name for name in names if row.get(name) is not None]
    if len(found) != 1:
        raise Bad(
            f"{' and '.join(found) or 'neither ' + ' nor '.join(names)} in the row; expected "
            f"one of {', '.join(names)}",
            code="invalid_preference",
        )
    return found[0]


def _has(given: Collection[str], shape: Shape) -> bool:
    if shape == "preference":
        return "input" in given and any(key in given for key in (*PREFERRED, *NON_PREFERRED))
    return all(key in given for key in KEYS[shape])


def _needs(shape: Shape) -> str:
    if shape == "preference":
        return f"input + {PREFERRED[0]} + {NON_PREFERRED[0]}"
    return " + ".join(KEYS[shape])
