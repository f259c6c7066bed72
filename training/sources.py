"""Where rows come from: files, globs, saved datasets and hub ids, and the rows in them.

What is covered: JSONL, JSON, CSV and Parquet files, `datasets.save_to_disk` directories, hub ids.
What is not covered: compressed files, URLs.
"""

import csv
import glob as globbing
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Literal, TypeAlias, cast

from cluster.errors import DataError
from training import json_line
from training.json_line import BadLine
from training.shapes import Bad, kind_of

Source: TypeAlias = str | tuple[str, ...]
Row: TypeAlias = Mapping[str, object] | Bad

MAX_LINE_BYTES = 64 << 20
"""Of a line of JSON; uploaded files have a lower limit."""
_EXTENSIONS = (".jsonl", ".ndjson", ".json", ".csv", ".parquet")
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?(:[\w.-]+)?")
_MAX_CSV_FIELD = 1 << 26
"""Characters in one CSV field; the csv module's own limit is 131,072."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """One file, saved dataset or hub dataset."""

    kind: Literal["file", "saved", "hub"]
    name: str
    """Path or hub id as the user gave it."""
    label: str
    """The shortest name that is unique among the places of a source."""


def fingerprint(source: Source) -> str:
    """Hex sha256 over the contents of a source, whatever its files are called."""
    digest = hashlib.sha256()
    for place in places(source):
        if place.kind == "file":
            digest.update(_file_digest(Path(place.name)))
        elif place.kind == "saved":
            root = Path(place.name).expanduser()
            for path in sorted(p for p in root.rglob("*") if p.is_file()):
                digest.update(str(path.relative_to(root)).encode() + b"\0" + _file_digest(path))
        else:
            for _, row in rows(place):
                digest.update(json.dumps(row, sort_keys=True, default=str).encode() + b"\n")
    return digest.hexdigest()


def state(source: Source) -> list[tuple[str, int, int, int, int]]:
    """What changes when a file of a source is written to; nothing is read. Empty for hub ids."""
    paths: list[Path] = []
    for place in places(source):
        path = Path(place.name).expanduser()
        if place.kind == "file":
            paths.append(path)
        elif place.kind == "saved":
            paths += sorted(p for p in path.rglob("*") if p.is_file())
    stats = [(str(path), path.stat()) for path in paths]
    return [(name, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for name, s in stats]


def labels(source: Source) -> list[str]:
    """The names that example ids of this source start with, one a file or dataset."""
    return [place.label for place in places(source)]


def places(source: Source) -> list[Place]:
    """Where a source lies. Raises DataError for what does not exist or cannot be read."""
    parts = (source,) if isinstance(source, str) else source
    if not parts:
        raise DataError("the list of data sources is empty; name at least one file or dataset")
    found = [entry for part in parts for entry in _resolve(part)]
    short = [Path(name).name if kind != "hub" else name for kind, name in found]
    return [
        Place(kind=kind, name=name, label=label if short.count(label) == 1 else name)
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


def rows(place: Place) -> Iterator[tuple[int, Row]]:
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


def _jsonl_rows(path: Path) -> Iterator[tuple[int, Row]]:
    with _open(path) as file:
        for number, line in json_line.lines(file, max_bytes=MAX_LINE_BYTES):
            yield number, row_of(line)


def row_of(line: bytes | BadLine) -> Row:
    """The row on a line of JSON, or why there is none."""
    value = line if isinstance(line, BadLine) else json_line.parse(line)
    return Bad(value.reason, code="data_type") if isinstance(value, BadLine) else _mapping(value)


def _mapping(row: object) -> Row:
    if isinstance(row, dict):
        return cast(Mapping[str, object], row)
    return Bad(f"expected an object with named fields, found {kind_of(row)}", code="data_type")


def _json_rows(path: Path) -> Iterator[tuple[int, Row]]:
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
        raise DataError(f"{path}: expected an array of objects, found {kind_of(tree)}")
    for number, row in enumerate(tree, start=1):
        yield number, _mapping(row)


def _csv_rows(path: Path) -> Iterator[tuple[int, Row]]:
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
                    yield (
                        line,
                        Bad(
                            f"more or fewer fields than the header has ({names})", code="data_type"
                        ),
                    )
                else:
                    yield line, cast(Mapping[str, object], row)
                line = reader.line_num + 1
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as UTF-8 text ({error})") from None
    except csv.Error as error:
        raise DataError(f"{path}:{line}: broken CSV: {error}") from None


def _parquet_rows(path: Path) -> Iterator[tuple[int, Row]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            batches = (batch.to_pylist() for batch in file.iter_batches(batch_size=1024))
            yield from enumerate(chain.from_iterable(batches), start=1)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable Parquet file ({error})") from None


def _saved_rows(name: str) -> Iterator[tuple[int, Row]]:
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


def _hub_rows(name: str) -> Iterator[tuple[int, Row]]:
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


def _open(path: Path):
    try:
        return path.open("rb")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error})") from None


def _file_digest(path: Path) -> bytes:
    with _open(path) as stream:
        return hashlib.file_digest(stream, "sha256").digest()


def _brief(error: Exception) -> str:
    return (
        f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200] if str(error) else ''}"
    )
