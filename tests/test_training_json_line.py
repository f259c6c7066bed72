"""Lines of JSON from somebody else: bounded in length, depth and memory."""

import io
import re
import subprocess
import sys

import pytest

from training import json_line
from training.json_line import BadLine

DEEP = 10_000


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b'{"a": [NaN]}', "NaN is not JSON; write a number, or null"),
        (b'{"a": -Infinity}', "-Infinity is not JSON"),
        (b'{"a": 1e999}', "the number 1e999 is too large"),
        (b'{"a": 1, "b": 2, "a": 3}', "key 'a' stands twice in one object; keep one of them"),
        (b'{"a": ' + b"1" * 10_000 + b"}", "a whole number of thousands of digits"),
        (b'{"a": ', r"broken JSON: Expecting value \(column 7\)"),
        (b'{"a": "\xff"}', "not UTF-8 text .*at byte 7"),
        ('{"a": 1}'.encode("utf-16"), "not UTF-8 text"),
        (b"[" * DEEP + b"]" * DEEP, "nested too deeply: more than 100 lists and objects"),
        (b'{"a":' * DEEP + b"1" + b"}" * DEEP, "nested too deeply"),
        (b"[" * 101 + b"]" * 101, "nested too deeply"),
        (b"[" + b"[]," * 300_000 + b"1]", "more than 200,000 lists and objects; split the row"),
        (b'"' * 1_000_001, "more than 1,000,000 quotes; split the row"),
    ],
)
def test_what_is_no_usable_json_is_told(line: bytes, expected: str) -> None:
    found = json_line.parse(line)
    assert isinstance(found, BadLine)
    assert re.match(expected, found.reason)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b'{"a": [1, 2.5, null, true, "x"]}', {"a": [1, 2.5, None, True, "x"]}),
        (b'["' + b"[{" * 500 + b'", "\\"[[", "\\\\"]', ["[{" * 500, '"[[', "\\"]),
        (b"[[]" + b",[]" * 500 + b"]", [[]] * 501),
        (b"7", 7),
    ],
)
def test_brackets_in_texts_and_side_by_side_are_not_depth(line: bytes, expected: object) -> None:
    assert json_line.parse(line) == expected


def test_a_hundred_levels_are_read() -> None:
    assert not isinstance(json_line.parse(b"[" * 100 + b"]" * 100), BadLine)


def test_lines_are_numbered_and_long_ones_passed_over() -> None:
    file = io.BytesIO(b"\xef\xbb\xbf{}\r\n\n  \n" + b"x" * 40 + b"\n12345678\n123456789\r\n[]")
    found = list(json_line.lines(file, max_bytes=8))
    assert [number for number, _ in found] == [1, 4, 5, 6, 7]
    texts = [text for _, text in found if isinstance(text, bytes)]
    assert texts == [b"{}", b"12345678", b"[]"]
    bad = [text.reason for _, text in found if isinstance(text, BadLine)]
    assert bad == ["longer than 8 bytes, the longest line"] * 2


def test_a_line_of_a_hundred_megabytes_is_never_held() -> None:
    """In a process of its own, whose memory is its own, too."""
    code = """
import io, resource
from training import json_line

class Endless(io.RawIOBase):
    left = 100 << 20
    def readable(self): return True
    def readinto(self, buffer):
        size = min(len(buffer), self.left)
        buffer[:size] = bytes(size)
        self.left -= size
        return size

before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
found = [bad.reason for _, bad in json_line.lines(io.BufferedReader(Endless()))]
for line in (b"[" * 10_000 + b"]" * 10_000, b'{"a":' * 10_000, b'"\\\\"' * 2_000_000):
    found.append(json_line.parse(line).reason)
grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
assert grown < 50 << 10, grown
print(len(found), found[0])
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "4 longer than 8 MB, the longest line\n"
