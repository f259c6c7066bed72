"""Lines of JSON from somebody else's file, within bounds of length and depth.

What is covered: lines longer than allowed (passed over, never held), bytes that are not UTF-8,
nesting (counted before anything is parsed), NaN and Infinity, numbers of thousands of digits, and
a key that stands twice, of which json would keep the last.
What is not covered: files of one JSON value over many lines.
"""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np

MAX_LINE_BYTES = 8 << 20
"""Longest line, its end not counted."""
MAX_DEPTH = 100
"""Lists and objects around a value."""
MAX_QUOTES = 1_000_000
"""Quotes on a line, escaped ones too."""
MAX_LISTS = 200_000
"""Lists and objects on a line; an empty list takes 30 times the memory of its two characters."""
_BOM = b"\xef\xbb\xbf"
_CHUNK_BYTES = 1 << 20
# Possessive, and the last quote may be missing: every byte is looked at once, whatever comes.
_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"?', re.DOTALL)
_NO_BRACKETS = bytes(byte for byte in range(256) if byte not in b"[]{}")
_STEPS = np.zeros(256, np.int8)
_STEPS[list(b"[{")] = 1
_STEPS[list(b"]}")] = -1


@dataclass(frozen=True, kw_only=True, slots=True)
class BadLine:
    """A line that holds no usable JSON."""

    reason: str
    """What is wrong with it."""


def lines(
    file: BinaryIO, *, max_bytes: int = MAX_LINE_BYTES
) -> Iterator[tuple[int, bytes | BadLine]]:
    """Number, from 1, and bytes of each line that is not blank, without its end.

    Holds one line; the rest of one that is longer than `max_bytes` is read and forgotten. A byte
    order mark before the first line is left out.
    """
    number = 0
    while line := file.readline(max_bytes + 3):
        number += 1
        if number == 1:
            line = line.removeprefix(_BOM)
        text = line.removesuffix(b"\n").removesuffix(b"\r")
        if len(text) > max_bytes:
            del text
            _pass_over(file, line)
            yield number, BadLine(reason=f"longer than {_size(max_bytes)}, the longest line")
        elif text.strip():
            yield number, text


def parse(line: bytes, *, max_depth: int = MAX_DEPTH) -> object | BadLine:
    """The value on a line, or what is wrong with it."""
    if line.count(b'"') > MAX_QUOTES:
        return BadLine(reason=f"more than {MAX_QUOTES:,} quotes; split the row")
    brackets = _brackets(line)
    if _depth(brackets) > max_depth:
        return BadLine(reason=f"nested too deeply: more than {max_depth} lists and objects")
    if len(brackets) > 2 * MAX_LISTS:
        return BadLine(reason=f"more than {MAX_LISTS:,} lists and objects; split the row")
    try:
        return json.loads(
            line.decode(),
            parse_constant=_refuse_constant,
            parse_float=_finite,
            object_pairs_hook=_without_duplicates,
        )
    except UnicodeDecodeError as error:
        return BadLine(reason=f"not UTF-8 text ({error.reason} at byte {error.start})")
    except json.JSONDecodeError as error:
        return BadLine(reason=f"broken JSON: {error.msg} (column {error.colno})")
    except _Refused as error:
        return BadLine(reason=str(error))
    except ValueError:  # Python's limit on the digits of a whole number
        return BadLine(reason="a whole number of thousands of digits; write it as text")


def _brackets(line: bytes) -> bytes:
    """The brackets of a line that are not in strings."""
    if line.count(b"[") + line.count(b"{") <= 1:  # as plain rows have; no search for strings then
        return b""
    return _STRING.sub(b"", line).translate(None, _NO_BRACKETS)


def _depth(brackets: bytes) -> int:
    """Lists and objects around the innermost value."""
    depth, deepest = 0, 0
    for start in range(0, len(brackets), _CHUNK_BYTES):
        chunk = np.frombuffer(brackets, np.uint8, min(_CHUNK_BYTES, len(brackets) - start), start)
        depths = depth + np.cumsum(_STEPS[chunk], dtype=np.int32)
        depth, deepest = int(depths[-1]), max(deepest, int(depths.max()))
    return deepest


class _Refused(Exception):
    """JSON that Python would take, and nobody else."""


def _refuse_constant(name: str) -> float:
    raise _Refused(f"{name} is not JSON; write a number, or null")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise _Refused(f"the number {text[:20]} is too large")
    return number


def _without_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise _Refused(f"key {twice[:40]!r} stands twice in one object; keep one of them")
    return found


def _pass_over(file: BinaryIO, line: bytes) -> None:
    """Read up to the end of the line that begins with `line`."""
    while line and not line.endswith(b"\n"):
        line = file.readline(_CHUNK_BYTES)


def _size(num_bytes: int) -> str:
    return f"{num_bytes >> 20} MB" if num_bytes >= 1 << 20 else f"{num_bytes} bytes"
