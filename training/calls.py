"""Tools that a conversation offers, and the calls that an assistant makes of them.

What is covered: OpenAI's `tools` and `tool_calls`, and the deprecated `functions` and
`function_call`, which are read as their successors.
What is not covered: custom (free-form) tools, which open models' chat templates do not have.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias, cast

from training import json_line
from training.shapes import Bad, kind_of, label, text

Tool: TypeAlias = Mapping[str, object]
"""`{"type": "function", "function": {"name", "description"?, "parameters"?, "strict"?}}`."""

MAX_TOOLS = 128
"""Tools of a row, and calls of a turn."""
_NAME = re.compile(r"[a-zA-Z0-9_.-]{1,64}")
_CALL_KEYS = ("name", "arguments")
_FUNCTION_KEYS = ("name", "description", "parameters", "strict")


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """An assistant's call of one function."""

    name: str
    """Of the function."""
    arguments: str
    """A JSON object as text, as the assistant wrote it."""
    id: str = ""
    """By which a tool's turn answers; empty where there is none."""

    def as_turn(self, *, is_parsed: bool) -> dict[str, object]:
        """As chat templates take it; with is_parsed the arguments are an object, not text."""
        arguments = json.loads(self.arguments) if is_parsed else self.arguments
        call: dict[str, object] = {
            "type": "function",
            "function": {"name": self.name, "arguments": arguments},
        }
        return {"id": self.id, **call} if self.id else call


def tools_of(row: Mapping[str, object], at: str = "") -> tuple[Tool, ...]:
    """The tools that a row offers, in OpenAI's present form. Raises Bad."""
    functions = row.get("functions")
    tools = row.get("tools")
    if functions and tools:
        raise _bad(f"{at}functions stands beside {at}tools, which replaces it; keep tools")
    is_parallel = row.get("parallel_tool_calls")
    if is_parallel is not None and not isinstance(is_parallel, bool):
        raise _bad(f"{at}parallel_tool_calls is {kind_of(is_parallel)}; allowed: true or false")
    if functions:
        found = _listed(functions, f"{at}functions")
        return tuple(
            {"type": "function", "function": _function(one, f"{at}functions[{i}]")}
            for i, one in enumerate(found)
        )
    if not tools:
        return ()
    offered: list[Tool] = []
    for number, tool in enumerate(_listed(tools, f"{at}tools")):
        place = f"{at}tools[{number}]"
        kind = _object(tool, place).get("type")
        if kind != "function":
            raise _bad(f"{place}.type is {label(kind)}; only 'function' is supported")
        unknown = [key for key, value in _object(tool, place).items() if value is not None]
        _require_keys(unknown, ("type", "function"), place)
        function = _function(_object(tool, place).get("function"), f"{place}.function")
        offered.append({"type": "function", "function": function})
    return tuple(offered)


def calls_of(entry: Mapping[str, object], at: str) -> tuple[Call, ...]:
    """The calls of an assistant's turn. Raises Bad."""
    calls, call = entry.get("tool_calls"), entry.get("function_call")
    if calls and call:
        raise _bad_call(f"{at} has both tool_calls and function_call; keep tool_calls")
    if call:
        return (_call(call, f"{at}.function_call", call_id=""),)
    if not calls:
        return ()
    found: list[Call] = []
    for number, item in enumerate(_listed(calls, f"{at}.tool_calls")):
        place = f"{at}.tool_calls[{number}]"
        body = _object(item, place)
        if body.get("type", "function") != "function":
            raise _bad_call(f"{place}.type is {label(body['type'])}; allowed: 'function'")
        given = [key for key, value in body.items() if value is not None]
        _require_keys(given, ("id", "type", "function", "index"), place)
        call_id = body.get("id")
        if call_id is not None:
            call_id = text(call_id, f"{place}.id")
        found.append(_call(body.get("function"), f"{place}.function", call_id=call_id or ""))
    return tuple(found)


def name_of(entry: Mapping[str, object], key: str, at: str) -> str:
    """A name or id in a turn; empty where it is not given. Raises Bad."""
    found = entry.get(key)
    return "" if found is None else text(found, f"{at}.{key}")


def _call(call: object, at: str, *, call_id: str) -> Call:
    body = _object(call, at)
    _require_keys([key for key, value in body.items() if value is not None], _CALL_KEYS, at)
    name = _name(body, at)
    arguments = body.get("arguments")
    if not isinstance(arguments, str):
        raise _bad_call(f"{at}.arguments is {kind_of(arguments)}; expected a JSON object as text")
    tree = json_line.parse(text(arguments, f"{at}.arguments").encode())
    if not isinstance(tree, dict):
        raise _bad_call(f"{at}.arguments is no JSON object in a text; expected one such as '{{}}'")
    return Call(name=name, arguments=arguments, id=call_id)


def _function(function: object, at: str) -> Mapping[str, object]:
    body = _object(function, at)
    given = {key: value for key, value in body.items() if value is not None}
    _require_keys(list(given), _FUNCTION_KEYS, at)
    _name(body, at)
    if "description" in given:
        text(given["description"], f"{at}.description", may_be_empty=True)
    if "parameters" in given:
        _object(given["parameters"], f"{at}.parameters")
    if not isinstance(given.get("strict", False), bool):
        raise _bad(f"{at}.strict is {kind_of(given['strict'])}; allowed: true or false")
    return given


def _name(body: Mapping[str, object], at: str) -> str:
    name = body.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise _bad(
            f"{at}.name is {label(name)}; expected 1 to 64 letters, digits, '_', '-' and '.'"
        )
    return name


def _listed(value: object, at: str) -> list[object]:
    if not isinstance(value, list):
        raise _bad(f"{at} is {kind_of(value)}; expected a list")
    if len(value) > MAX_TOOLS:
        raise _bad(f"{at} has {len(value)} entries; allowed: up to {MAX_TOOLS}")
    return value


def _object(value: object, at: str) -> Mapping[str, object]:
    if not isinstance(value, dict):
        raise _bad(f"{at} is {kind_of(value)}; expected an object")
    return cast(Mapping[str, object], value)


def _require_keys(given: list[str], valid: tuple[str, ...], at: str) -> None:
    for key in given:
        if key not in valid:
            raise _bad(f"{at}: unknown key {str(key)[:40]!r}. Valid: {', '.join(valid)}")


def _bad(reason: str) -> Bad:
    return Bad(reason, code="invalid_tools")


def _bad_call(reason: str) -> Bad:
    return Bad(reason, code="invalid_tool_calls")
