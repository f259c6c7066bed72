"""Rows of the usual fine-tuning formats -> one Example type, with the place of everything bad.

What is covered: OpenAI `messages` (text only), alpaca, ShareGPT, prompt/completion and plain text,
out of JSONL, JSON, CSV and Parquet files, globs, `datasets.save_to_disk` directories and hub ids.
What is not covered: tool calls, images and audio (refused by name), compressed files, URLs.
"""

import csv
import glob as globbing
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Literal, TypeAlias, cast

from cluster.errors import DataError

Role: TypeAlias = Literal["system", "user", "assistant", "tool"]
Format: TypeAlias = Literal["auto", "messages", "alpaca", "sharegpt", "prompt_completion", "text"]
Source: TypeAlias = str | tuple[str, ...]

_KEYS: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "prompt_completion": ("prompt", "completion"),
    "text": ("text",),
}
"""Format -> keys it needs, in the order of detection (alpaca data often has `text` as well)."""
_ROLES = ("system", "user", "assistant", "tool")
_SHAREGPT_ROLES: dict[str, Role] = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "model", "bing", "bard"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function_response"), "tool"),
    "system": "system",
}
_UNSUPPORTED_IN_MESSAGE = (
    *("tool_calls", "function_call", "audio", "refusal", "name", "reasoning_content", "thinking"),
)
_UNSUPPORTED_IN_ROW = ("tools", "functions", "history", "images", "audios", "videos")
_EXTENSIONS = (".jsonl", ".ndjson", ".json", ".csv", ".parquet")
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?(:[\w.-]+)?")
_NUM_SHOWN = 5
_MAX_CSV_FIELD = 1 << 26
"""Characters in one CSV field; the csv module's own limit is 131,072."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: Role
    """Who speaks."""
    content: str
    """What is said; never empty."""
    context: str = ""
    """Alpaca's `input`; where a template has no place for it, see `full_content`."""
    weight: Literal[0, 1] | None = None
    """0: this assistant turn is not learned; 1 and None: it is."""

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


@dataclass(frozen=True, kw_only=True, slots=True)
class BadRow:
    """A row that cannot be learned from."""

    where: str
    """Path as the user gave it, and line or row number."""
    reason: str
    """What is wrong, what was expected."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rows:
    """Everything a source holds."""

    examples: tuple[Example, ...]
    """Usable rows, in the order of the source."""
    bad: tuple[BadRow, ...]
    """Rows that were skipped."""
    fingerprint: str
    """Hex sha256 over the contents of the source; file names do not count."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Place:
    """One file, saved dataset or hub dataset."""

    kind: Literal["file", "saved", "hub"]
    name: str
    """Path or hub id as the user gave it."""
    label: str
    """The shortest name that is unique among the places of a source."""


class _Bad(Exception):
    """The reason why a row is bad."""


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
    return Rows(examples=tuple(examples), bad=tuple(bad), fingerprint=fingerprint(source))


def stream(source: Source, *, format: Format = "auto") -> Iterator[Example | BadRow]:
    """The rows of a source one by one, without holding more than a batch of them in memory.

    With format="auto" the first row that has a known shape decides for all. Raises DataError where
    a place is missing, empty or unreadable; a bad row is yielded, not raised.
    """
    decided = None if format == "auto" else format
    for place in _places(source):
        num_rows = 0
        for number, row in _rows(place):
            num_rows += 1
            try:
                if isinstance(row, _Bad):
                    raise row
                shape = _shape_of(row, decided)
                decided = decided or shape
                yield _example(row, shape, f"{place.label}:{number}")
            except _Bad as error:
                yield BadRow(where=f"{place.name}:{number}", reason=str(error))
        if not num_rows:
            raise DataError(f"{place.name} holds no rows; give a file with at least one example")


def fingerprint(source: Source) -> str:
    """Hex sha256 over the contents of a source, whatever its files are called."""
    digest = hashlib.sha256()
    for place in _places(source):
        if place.kind == "file":
            digest.update(_file_digest(Path(place.name)))
        elif place.kind == "saved":
            root = Path(place.name).expanduser()
            for path in sorted(p for p in root.rglob("*") if p.is_file()):
                digest.update(str(path.relative_to(root)).encode() + b"\0" + _file_digest(path))
        else:
            for _, row in _rows(place):
                digest.update(json.dumps(row, sort_keys=True, default=str).encode() + b"\n")
    return digest.hexdigest()


def state(source: Source) -> list[tuple[str, int, int, int, int]]:
    """What changes when a file of a source is written to; nothing is read. Empty for hub ids."""
    paths: list[Path] = []
    for place in _places(source):
        path = Path(place.name).expanduser()
        if place.kind == "file":
            paths.append(path)
        elif place.kind == "saved":
            paths += sorted(p for p in path.rglob("*") if p.is_file())
    stats = [(str(path), path.stat()) for path in paths]
    return [(name, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for name, s in stats]


def labels(source: Source) -> list[str]:
    """The names that example ids of this source start with, one a file or dataset."""
    return [place.label for place in _places(source)]


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


def _places(source: Source) -> list[_Place]:
    """Where a source lies. Raises DataError for what does not exist or cannot be read."""
    parts = (source,) if isinstance(source, str) else source
    if not parts:
        raise DataError("the list of data sources is empty; name at least one file or dataset")
    found = [entry for part in parts for entry in _resolve(part)]
    short = [Path(name).name if kind != "hub" else name for kind, name in found]
    return [
        _Place(kind=kind, name=name, label=label if short.count(label) == 1 else name)
        for (kind, name), label in zip(found, short, strict=True)
    ]


def _resolve(source: str) -> list[tuple[Literal["file", "saved", "hub"], str]]:
    path = Path(source).expanduser()
    if path.is_file():
        if path.suffix.lower() not in _EXTENSIONS:
            raise DataError(
                f"{source}: cannot tell what is in a {path.suffix or 'nameless'!r} file; "
                f"allowed: {', '.join(_EXTENSIONS)}"
            )
        return [("file", str(path))]
    if path.is_dir():
        if any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
            return [("saved", str(path))]
        raise DataError(
            f"{source} is a directory, but not one that datasets.save_to_disk wrote; "
            f"name its files with a glob such as {source.rstrip('/')}/*.jsonl"
        )
    if globbing.has_magic(source):
        names = sorted(globbing.glob(str(path), recursive=True))
        matches = [name for name in names if os.path.isfile(name)]
        if not matches:
            raise DataError(f"{source}: no file matches; the working directory is {Path.cwd()}")
        return [place for name in matches for place in _resolve(name)]
    if "://" in source:
        raise DataError(f"{source}: URLs are not read; download it and name the file")
    is_path = source.startswith((".", "/", "~")) or re.search(r"\.[A-Za-z]\w*$", source)
    if is_path or not _HUB_ID.fullmatch(source):
        raise DataError(f"{source}: no such file; the working directory is {Path.cwd()}")
    return [("hub", source)]


def _rows(place: _Place) -> Iterator[tuple[int, Mapping[str, object] | _Bad]]:
    """Line or row number from 1, and the row."""
    if place.kind == "saved":
        return _saved_rows(place.name)
    if place.kind == "hub":
        return _hub_rows(place.name)
    path = Path(place.name)
    try:
        is_empty = path.stat().st_size == 0
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error})") from None
    if is_empty:
        raise DataError(f"{path} is empty (0 bytes); give a file with at least one example")
    readers = {".json": _json_rows, ".csv": _csv_rows, ".parquet": _parquet_rows}
    return readers.get(path.suffix.lower(), _jsonl_rows)(path)


def _jsonl_rows(path: Path) -> Iterator[tuple[int, Mapping[str, object] | _Bad]]:
    with _open(path) as lines:
        for number, line in enumerate(lines, start=1):
            text = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if text.strip():
                yield number, _parsed(text)


def _parsed(line: bytes) -> Mapping[str, object] | _Bad:
    try:
        row = json.loads(line.decode())
    except UnicodeDecodeError as error:
        return _Bad(f"not UTF-8 text ({error.reason} at byte {error.start})")
    except json.JSONDecodeError as error:
        return _Bad(f"broken JSON: {error.msg} (column {error.colno})")
    except RecursionError:
        return _Bad("broken JSON: nested too deeply")
    return _mapping(row)


def _mapping(row: object) -> Mapping[str, object] | _Bad:
    if isinstance(row, dict):
        return cast(Mapping[str, object], row)
    return _Bad(f"expected an object with named fields, found {_kind(row)}")


def _json_rows(path: Path) -> Iterator[tuple[int, Mapping[str, object] | _Bad]]:
    try:
        with _open(path) as stream:
            tree = json.loads(stream.read().decode("utf-8-sig"))
    except (UnicodeDecodeError, RecursionError) as error:
        raise DataError(f"{path}: not JSON in UTF-8 ({error})") from None
    except json.JSONDecodeError as error:
        is_lines = error.msg == "Extra data"
        hint = "; one object a line is JSON Lines: call the file .jsonl" if is_lines else ""
        raise DataError(
            f"{path}:{error.lineno}: broken JSON: {error.msg} (column {error.colno}){hint}"
        ) from None
    if not isinstance(tree, list):
        raise DataError(f"{path}: expected an array of objects, found {_kind(tree)}")
    for number, row in enumerate(tree, start=1):
        yield number, _mapping(row)


def _csv_rows(path: Path) -> Iterator[tuple[int, Mapping[str, object] | _Bad]]:
    csv.field_size_limit(_MAX_CSV_FIELD)
    line = 1
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.DictReader(stream, strict=True)
            names = ", ".join(reader.fieldnames or ())
            line = reader.line_num + 1
            for row in reader:
                cells = cast(dict[str | None, object], row)
                if None in cells or None in cells.values():
                    yield line, _Bad(f"more or fewer fields than the header has ({names})")
                else:
                    yield line, cast(Mapping[str, object], row)
                line = reader.line_num + 1
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as UTF-8 text ({error})") from None
    except csv.Error as error:
        raise DataError(f"{path}:{line}: broken CSV: {error}") from None


def _parquet_rows(path: Path) -> Iterator[tuple[int, Mapping[str, object] | _Bad]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            batches = (batch.to_pylist() for batch in file.iter_batches(batch_size=1024))
            yield from enumerate(chain.from_iterable(batches), start=1)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable Parquet file ({error})") from None


def _saved_rows(name: str) -> Iterator[tuple[int, Mapping[str, object] | _Bad]]:
    import datasets

    try:
        saved = datasets.load_from_disk(name)
    except Exception as error:
        raise DataError(f"{name}: not a readable saved dataset ({_brief(error)})") from None
    if isinstance(saved, datasets.DatasetDict):
        if "train" not in saved:
            splits = ", ".join(map(str, saved))
            raise DataError(f"{name} has no split `train` (it has {splits}); name {name}/<split>")
        saved = saved["train"]
    yield from enumerate(cast(Iterable[Mapping[str, object]], saved), start=1)


def _hub_rows(name: str) -> Iterator[tuple[int, Mapping[str, object] | _Bad]]:
    import datasets

    repo, _, split = name.partition(":")
    try:
        rows = datasets.load_dataset(repo, split=split or "train", streaming=True)
        yield from enumerate(cast(Iterable[Mapping[str, object]], rows), start=1)
    except Exception as error:
        raise DataError(
            f"{name}: there is no such file here, and the hub dataset cannot be loaded "
            f"({_brief(error)}); check the name, the split (name:split) and the network"
        ) from None


def _shape_of(row: Mapping[str, object], decided: str | None) -> str:
    given = {key for key, value in row.items() if value is not None}
    shapes = [shape for shape, keys in _KEYS.items() if given.issuperset(keys)]
    if decided in shapes:
        return cast(str, decided)
    seen = ", ".join(sorted(map(str, given))) or "none"
    if decided is None and shapes:
        return shapes[0]
    if decided is None:
        known = "; ".join(f"{shape}: {' + '.join(keys)}" for shape, keys in _KEYS.items())
        raise _Bad(f"unknown format: keys are {seen}; expected one of: {known}")
    needed = " + ".join(_KEYS[decided])
    mixed = f" (it looks like {shapes[0]}; one source has one format)" if shapes else ""
    raise _Bad(f"not in the format {decided}, which needs {needed}: keys are {seen}{mixed}")


def _example(row: Mapping[str, object], shape: str, example_id: str) -> Example:
    if shape == "text":
        return Example(id=example_id, text=_text(row["text"], "text"))
    for key in _UNSUPPORTED_IN_ROW:
        if row.get(key):
            raise _Bad(f"{key!r} is not supported; remove it, or write it into the messages")
    messages = {
        "messages": _openai,
        "sharegpt": _sharegpt,
        "alpaca": _alpaca,
        "prompt_completion": _prompt_completion,
    }[shape](row)
    if row.get("system"):
        messages.insert(0, Message(role="system", content=_text(row["system"], "system")))
    if not any(message.role == "assistant" for message in messages):
        roles = ", ".join(message.role for message in messages)
        raise _Bad(f"no assistant turn to learn from (roles: {roles})")
    return Example(id=example_id, messages=tuple(messages))


def _openai(row: Mapping[str, object]) -> list[Message]:
    return [
        Message(
            role=_role(entry, "role", {role: cast(Role, role) for role in _ROLES}, at),
            content=_content(entry.get("content"), f"{at}.content"),
            weight=_weight(entry, at),
        )
        for at, entry in _entries(row, "messages")
    ]


def _sharegpt(row: Mapping[str, object]) -> list[Message]:
    return [
        Message(
            role=_role(entry, "from", _SHAREGPT_ROLES, at),
            content=_text(entry.get("value"), f"{at}.value"),
            weight=_weight({**entry, "role": _SHAREGPT_ROLES.get(str(entry["from"]))}, at),
        )
        for at, entry in _entries(row, "conversations")
    ]


def _alpaca(row: Mapping[str, object]) -> list[Message]:
    context = row.get("input") or ""
    return [
        Message(
            role="user",
            content=_text(row["instruction"], "instruction"),
            context=_text(context, "input") if context != "" else "",
        ),
        Message(role="assistant", content=_text(row["output"], "output")),
    ]


def _prompt_completion(row: Mapping[str, object]) -> list[Message]:
    return [
        Message(role="user", content=_text(row["prompt"], "prompt")),
        Message(role="assistant", content=_text(row["completion"], "completion")),
    ]


def _entries(row: Mapping[str, object], key: str) -> Iterator[tuple[str, Mapping[str, object]]]:
    entries = row[key]
    if entries == []:
        raise _Bad(f"{key} is empty; expected a list of turns")
    if not isinstance(entries, list):
        raise _Bad(f"{key} is {_kind(entries)}; expected a list of turns")
    for number, entry in enumerate(entries):
        at = f"{key}[{number}]"
        if not isinstance(entry, dict):
            raise _Bad(f"{at} is {_kind(entry)}; expected an object")
        for name in _UNSUPPORTED_IN_MESSAGE:
            if entry.get(name):
                raise _Bad(f"{at}.{name} is not supported; write it into the content, or remove it")
        yield at, cast(Mapping[str, object], entry)


def _role(entry: Mapping[str, object], key: str, roles: Mapping[str, Role], at: str) -> Role:
    name = entry.get(key)
    if isinstance(name, str) and name in roles:
        return roles[name]
    if name is None:
        raise _Bad(f"{at} has no {key!r} (keys: {', '.join(map(str, entry))})")
    raise _Bad(f"{at}: unknown role {str(name)[:40]!r}; allowed: {', '.join(roles)}")


def _weight(entry: Mapping[str, object], at: str) -> Literal[0, 1] | None:
    weight = entry.get("weight")
    if weight is None:
        return None
    if isinstance(weight, bool) or weight not in (0, 1):
        raise _Bad(f"{at}.weight is {weight!r}; allowed: 0 or 1")
    if entry.get("role") != "assistant":
        raise _Bad(
            f"{at}.weight stands on a {entry.get('role')} turn; only assistant turns have it"
        )
    return 1 if weight else 0


def _content(content: object, at: str) -> str:
    if not isinstance(content, list):
        return _text(content, at)
    texts: list[str] = []
    for number, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else _kind(part)
        if kind != "text":
            raise _Bad(f"{at}[{number}] is of type {kind}; only text parts are supported")
        texts.append(_text(cast(dict[str, object], part).get("text"), f"{at}[{number}].text"))
    return _text("".join(texts), at)


def _text(value: object, at: str) -> str:
    if value is None or (isinstance(value, str) and not value.strip()):
        raise _Bad(f"{at} is empty; expected text")
    if not isinstance(value, str):
        raise _Bad(f"{at} is {_kind(value)}; expected text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise _Bad(f"{at} has half of a surrogate pair, which is not a character") from None
    return value


def _open(path: Path):
    try:
        return path.open("rb")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error})") from None


def _file_digest(path: Path) -> bytes:
    with _open(path) as stream:
        return hashlib.file_digest(stream, "sha256").digest()


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", type(None): "nothing", str: "text"}
    shown = "" if isinstance(value, dict | list) or value is None else f" {str(value)[:40]!r}"
    return f"{names.get(type(value), type(value).__name__)}{shown}"


def _brief(error: Exception) -> str:
    return (
        f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200] if str(error) else ''}"
    )
