"""Strict YAML or JSON -> frozen dataclasses; `section.field=value` overrides; JSON Schema.

Sections are frozen keyword-only dataclasses. A field's type is one of: bool, int, float, str,
None, a Literal, a tuple of those or of sections, a section or None, or a union. Nothing is coerced
silently except an int where a float is asked, and numbers like `3e-4`, which YAML 1.1 reads as
text.
"""

import ast
import dataclasses
import difflib
import inspect
import json
import math
import textwrap
import types
import typing
from collections.abc import Hashable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import yaml

from cluster.errors import ConfigError

T = TypeVar("T")


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses duplicate keys instead of keeping the last one."""


def _mapping_without_duplicates(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        line = key_node.start_mark.line + 1
        if not isinstance(key, Hashable):
            raise ConfigError(f"a key is {_kind(key)} (line {line}); allowed: a word")
        if key in seen:
            raise ConfigError(f"key {key!r} stands twice (line {line}); keep one of them")
        seen.add(key)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping_without_duplicates)


def read(path: Path) -> dict[str, Any]:
    """The mapping in a YAML or JSON file.

    Raises ConfigError where the file is missing, empty, not a mapping or not parseable.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; name a recipe (YAML or JSON)") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as UTF-8 text ({error})") from None
    try:
        tree = _parse(text)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected a mapping of sections, found {_kind(tree)}")
    return tree


def _parse(text: str) -> Any:
    try:
        return yaml.load(text, _Loader)  # noqa: S506  (a SafeLoader subclass)
    except yaml.YAMLError as error:
        raise ConfigError(f"not valid YAML or JSON: {error}") from None
    except RecursionError:
        raise ConfigError("not valid YAML or JSON: it is nested too deeply") from None


def load(cls: type[T], path: Path, overrides: Sequence[str] = ()) -> T:
    """Read a file, apply `section.field=value` overrides in order, and build `cls`."""
    tree = read(path)
    for override in overrides:
        apply_override(cls, tree, override)
    return build(cls, tree, where=str(path))


def build(cls: type[T], tree: Mapping[str, Any], *, where: str) -> T:
    """Build dataclass `cls` from a plain mapping; `where` starts every error message."""
    return _section(cls, tree, where, "")


def plain(config: object) -> dict[str, Any]:
    """The inverse of `build`: nested dicts and lists, ready for JSON."""
    return json.loads(json.dumps(dataclasses.asdict(typing.cast(Any, config))))


def difference(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Lines `section.field: old -> new` for every leaf in which two plain configs differ."""
    lines: list[str] = []
    for key in sorted({*old, *new}):
        before, after = old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            lines += difference(before, after, f"{prefix}{key}.")
        elif before != after:
            lines.append(f"{prefix}{key}: {json.dumps(before)} -> {json.dumps(after)}")
    return lines


def schema(cls: type) -> dict[str, Any]:
    """JSON Schema (2020-12) of a config class, field docstrings as descriptions."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **_schema_of(cls)}


def nearest(word: str, words: Sequence[str]) -> str:
    """` Did you mean 'x'?` where one of `words` is close to `word`, else an empty string."""
    close = difflib.get_close_matches(word, words, n=1, cutoff=0.6)
    return f" Did you mean {close[0]!r}?" if close else ""


def apply_override(cls: type, tree: dict[str, Any], override: str) -> None:
    """Set one `section.field=value`, a field of `cls`, in a tree that `build` takes."""
    name, equals, text = override.partition("=")
    if not equals or not name:
        raise ConfigError(f"override {override!r}: expected section.field=value")
    try:
        value = _parse(text) if text else ""
    except ConfigError as error:
        raise ConfigError(f"override {override[:200]!r}: {error}") from None
    *sections, field = name.split(".")
    here: type = cls
    node = tree
    for section in sections:
        kinds = _hints(here)
        _known(section, list(kinds), f"override {override!r}", "section")
        here = typing.cast(type, _section_in(kinds[section]) or kinds[section])
        if not dataclasses.is_dataclass(here):
            raise ConfigError(f"override {override!r}: {section!r} is a field, not a section")
        if not isinstance(node.get(section), dict):
            node[section] = {}
        node = node[section]
    _known(field, list(_hints(here)), f"override {override!r}", "field")
    node[field] = value


def _section(cls: type[T], tree: object, where: str, path: str) -> T:
    if tree is None:
        tree = {}
    at = f"{where}: {path.rstrip('.')}" if path else where
    if not isinstance(tree, Mapping):
        raise ConfigError(f"{at}: expected a mapping of fields, found {_kind(tree)}")
    hints = _hints(cls)
    values: dict[str, Any] = {}
    for key, raw in tree.items():
        _known(str(key), list(hints), at, "key")
        values[key] = _value(hints[key], raw, where, f"{path}{key}")
    required = [
        field.name
        for field in dataclasses.fields(typing.cast(Any, cls))
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    for name in required:
        if name not in values:
            raise ConfigError(f"{at}: {path}{name} is missing; it has no default")
    try:
        return cls(**values)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def _known(key: str, valid: list[str], where: str, noun: str) -> None:
    if key not in valid:
        names = ", ".join(valid)
        raise ConfigError(f"{where}: unknown {noun} {key!r}.{nearest(key, valid)} Valid: {names}")


def _value(kind: Any, raw: object, where: str, path: str) -> Any:
    section = _section_in(kind)
    if section is not None:
        if raw is None and section is not kind:
            return None
        return _section(section, raw, where, f"{path}.")
    if typing.get_origin(kind) is tuple and dataclasses.is_dataclass(typing.get_args(kind)[0]):
        section = typing.cast(type, typing.get_args(kind)[0])
        if not isinstance(raw, list | tuple):
            raise ConfigError(f"{where}: {path} is {_kind(raw)}; allowed: a list of mappings")
        return tuple(
            _section(section, item, where, f"{path}[{number}].") for number, item in enumerate(raw)
        )
    for option in _options(kind):
        found, value = _match(option, raw)
        if found:
            if isinstance(value, float) and not math.isfinite(value):
                raise ConfigError(f"{where}: {path} is {value}; give a finite number")
            return value
    raise ConfigError(f"{where}: {path} is {raw!r}; allowed: {_describe(kind)}")


def _section_in(kind: Any) -> type | None:
    """The section that a field is, or may be beside None."""
    return next((one for one in _options(kind) if dataclasses.is_dataclass(one)), None)  # pyright: ignore[reportReturnType]


def _match(kind: Any, raw: object) -> tuple[bool, Any]:
    if kind is type(None):
        return raw is None, None
    origin = typing.get_origin(kind)
    if origin is typing.Literal:
        choices = typing.get_args(kind)
        same = [c for c in choices if c == raw and type(c) is type(raw)]
        # YAML 1.1 reads a bare `on` or `off` as a boolean.
        if not same and isinstance(raw, bool):
            same = [c for c in choices if c == ("on" if raw else "off")]
        return bool(same), same[0] if same else None
    if origin is tuple:
        if not isinstance(raw, list | tuple):
            return False, None
        matches = [_match_any(typing.get_args(kind)[0], item) for item in raw]
        return all(found for found, _ in matches), tuple(value for _, value in matches)
    if kind is float:
        if isinstance(raw, str):
            try:
                return True, float(raw)
            except ValueError:
                return False, None
        is_number = isinstance(raw, int | float) and not isinstance(raw, bool)
        return is_number, float(typing.cast(float, raw)) if is_number else None
    return type(raw) is kind, raw


def _match_any(kind: Any, raw: object) -> tuple[bool, Any]:
    for option in _options(kind):
        found, value = _match(option, raw)
        if found:
            return True, value
    return False, None


def _options(kind: Any) -> tuple[Any, ...]:
    is_union = typing.get_origin(kind) in (typing.Union, types.UnionType)
    return typing.get_args(kind) if is_union else (kind,)


def _describe(kind: Any) -> str:
    names: list[str] = []
    for option in _options(kind):
        origin = typing.get_origin(option)
        if origin is typing.Literal:
            names += [str(choice) for choice in typing.get_args(option)]
        elif origin is tuple:
            names.append(f"a list of {_describe(typing.get_args(option)[0])}")
        else:
            names.append(
                {type(None): "null", str: "text", float: "a number"}.get(option)
                or {int: "a whole number", bool: "true or false"}[option]
            )
    return " | ".join(names)


def _kind(value: object) -> str:
    return "nothing" if value is None else f"{type(value).__name__} {str(value)[:40]!r}"


@cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _schema_of(kind: Any) -> dict[str, Any]:
    if dataclasses.is_dataclass(kind):
        docs = field_docs(typing.cast(type, kind))
        properties: dict[str, Any] = {}
        for field in dataclasses.fields(kind):
            entry = _schema_of(_hints(typing.cast(type, kind))[field.name])
            if field.default is not dataclasses.MISSING:
                entry["default"] = json.loads(json.dumps(field.default))
            if docs.get(field.name):
                entry["description"] = docs[field.name]
            properties[field.name] = entry
        required = [
            f.name
            for f in dataclasses.fields(kind)
            if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        ]
        out = {"type": "object", "properties": properties, "additionalProperties": False}
        return {**out, "required": required} if required else out
    options = _options(kind)
    if len(options) > 1:
        return {"anyOf": [_schema_of(option) for option in options]}
    origin = typing.get_origin(kind)
    if origin is typing.Literal:
        return {"enum": list(typing.get_args(kind))}
    if origin is tuple:
        return {"type": "array", "items": _schema_of(typing.get_args(kind)[0])}
    names = {type(None): "null", str: "string", float: "number", int: "integer", bool: "boolean"}
    return {"type": names[kind]}


def field_docs(cls: type) -> dict[str, str]:
    """The docstring under each field of a dataclass, read from its source."""
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    assert isinstance(body, ast.ClassDef)
    docs: dict[str, str] = {}
    for field, after in zip(body.body, body.body[1:], strict=False):
        if not (isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)):
            continue
        if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            docs[field.target.id] = " ".join(str(after.value.value).split())
    return docs
