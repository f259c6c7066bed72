"""An uploaded fine-tuning file, checked line by line before anything is trained on it.

What is covered: OpenAI's chat lines (weights, tools, calls), prompt/completion lines and preference
lines; files that are no text at all; everything that can be said of a line without a tokenizer.
What is not covered: what only the base's chat template knows (turns that it refuses, examples that
are too long); a run says that of its own.

Nothing here imports torch, and one line at a time is in memory.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Literal, TypeAlias, TypedDict

from cluster.errors import DataError
from training import examples, json_line, shapes, sources
from training.examples import Example
from training.shapes import Bad, Code, Shape

Method: TypeAlias = Literal["supervised", "dpo"]
Param: TypeAlias = Literal["training_file", "validation_file"]

MINIMUM_EXAMPLES = 10
_SHAPES: Mapping[Method, tuple[Shape, ...]] = {
    "supervised": ("messages", "prompt_completion"),
    "dpo": ("preference",),
}
_ROW_KEYS: Mapping[Shape, tuple[str, ...]] = {
    "messages": ("messages", "tools", "parallel_tool_calls", "functions", "system"),
    "prompt_completion": ("prompt", "completion", "system"),
    "preference": ("input", *shapes.PREFERRED, *shapes.NON_PREFERRED),
}
_HEAD_BYTES = 4096
_MAGIC: tuple[tuple[bytes, str], ...] = (
    (b"PK\x03\x04", "a zip archive (or an Office file), not JSON Lines; unpack it"),
    (b"PK\x05\x06", "an empty zip archive, not JSON Lines"),
    (b"\x1f\x8b", "compressed with gzip; unpack it"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd; unpack it"),
    (b"PAR1", "a Parquet file, not JSON Lines; convert it"),
    (b"%PDF", "a PDF file, not JSON Lines"),
    (b"\xff\xfe", "UTF-16 text; save it as UTF-8"),
    (b"\xfe\xff", "UTF-16 text; save it as UTF-8"),
)
_ARRAY_HINT = "the file seems to be one JSON array: write one object a line"
_EXPECTED: Mapping[Method, str] = {
    "supervised": "no 'messages' (and no 'prompt' with 'completion') in the line",
    "dpo": f"no 'input' with '{shapes.PREFERRED[0]}' and '{shapes.NON_PREFERRED[0]}' in the line",
}
_NUM_SHOWN = 3


class JobError(TypedDict):
    """A fine-tuning job's `error`."""

    code: str
    message: str
    param: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """One line that cannot be trained on."""

    line: int
    """Number from 1; 0 is the file as a whole."""
    code: Code
    message: str
    """Where in the line, what is wrong, what was expected; no text of the example."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """What a file holds."""

    examples: int
    """Lines that can be trained on."""
    problems: tuple[Problem, ...]
    """The first of them, in the order of lines."""
    num_problems: int
    warnings: tuple[str, ...]
    """What can be trained on, but may not be meant."""
    format: Shape | None
    """As `data.format` of a recipe takes it; None where no line has shown one."""
    minimum: int
    """Examples that there have to be."""
    param: Param
    """What the file is for."""

    @property
    def is_ok(self) -> bool:
        """Whether a run can be started on it."""
        return not self.num_problems and self.examples >= self.minimum

    @property
    def error(self) -> JobError | None:
        """A job's error, in OpenAI's words where they are known."""
        file = self.param.replace("_", " ").capitalize()
        if self.num_problems:
            shown = "; ".join(_shown(problem) for problem in self.problems[:_NUM_SHOWN])
            more = self.num_problems - len(self.problems[:_NUM_SHOWN])
            rest = f"; and {more} more" if more else ""
            return {
                "code": f"invalid_{self.param}",
                "message": f"{file} has {self.num_problems} problem(s). {shown}{rest}",
                "param": self.param,
            }
        if self.examples < self.minimum:
            return {
                "code": "invalid_n_examples",
                "message": f"{file} has {self.examples} example(s), but must have at least "
                f"{self.minimum} examples",
                "param": self.param,
            }
        return None


def check(
    path: Path,
    *,
    method: Method,
    minimum: int = MINIMUM_EXAMPLES,
    param: Param = "training_file",
    max_line_bytes: int = json_line.MAX_LINE_BYTES,
    max_problems: int = 100,
) -> Check:
    """Read a file and tell everything that is wrong with it.

    max_problems: how many are listed; all are counted. Raises DataError where the file cannot be
    read at all.
    """
    tally = _Tally(method=method, max_problems=max_problems)
    try:
        with path.open("rb") as file:
            kind = _not_lines(file)
            if kind:
                tally.note(0, Bad(f"the file is {kind}", code="data_type"))
            else:
                _read(file, tally, max_line_bytes)
    except OSError as error:
        raise DataError(f"{param}: the file cannot be read ({error.strerror})") from None
    return Check(
        examples=tally.num_examples,
        problems=tuple(tally.problems),
        num_problems=tally.num_problems,
        warnings=tuple(tally.warnings()),
        format=tally.format,
        minimum=minimum,
        param=param,
    )


def _not_lines(file: BinaryIO) -> str:
    """What a file is that holds no lines of JSON; empty where it may."""
    head = file.read(_HEAD_BYTES)
    file.seek(0)
    for magic, kind in _MAGIC:
        if head.startswith(magic):
            return kind
    if b"\0" in head:
        is_wide = head[1::2].count(0) > len(head) // 4 or head[::2].count(0) > len(head) // 4
        is_text = is_wide and len(head.replace(b"\0", b"")) > len(head) // 3
        return "UTF-16 text; save it as UTF-8" if is_text else "binary, not JSON Lines"
    return ""


def _read(file: BinaryIO, tally: "_Tally", max_line_bytes: int) -> None:
    for number, line in json_line.lines(file, max_bytes=max_line_bytes):
        tally.num_blank += number - tally.last_line - 1
        tally.last_line = number
        try:
            row = sources.row_of(line)
            if isinstance(row, Bad):
                if number == 1 and isinstance(line, bytes) and line.lstrip().startswith(b"["):
                    row = Bad(f"{row}; {_ARRAY_HINT}", code=row.code)
                raise row
            tally.add(row)
        except Bad as bad:
            tally.note(number, bad)


@dataclass(kw_only=True, slots=True)
class _Tally:
    """What is known of a file so far."""

    method: Method
    max_problems: int
    format: Shape | None = None
    num_examples: int = 0
    num_problems: int = 0
    problems: list[Problem] = field(default_factory=list)
    last_line: int = 0
    num_blank: int = 0
    num_without_system: int = 0
    num_without_user: int = 0
    unused: set[str] = field(default_factory=set)
    """Keys of rows that nothing is made of."""

    def note(self, line: int, bad: Bad) -> None:
        self.num_problems += 1
        if len(self.problems) < self.max_problems:
            self.problems.append(Problem(line=line, code=bad.code, message=str(bad)))

    def add(self, row: Mapping[str, object]) -> None:
        """Count a row. Raises Bad."""
        shape = self._shape(row)
        self.format = self.format or shape
        example = examples.example_of(row, shape, "")
        _require_learnable(example)
        self.num_examples += 1
        roles = {message.role for message in example.messages}
        self.num_without_system += "system" not in roles
        self.num_without_user += "user" not in roles
        if len(self.unused) < 20:
            known = _ROW_KEYS[shape]
            self.unused.update(str(key)[:40] for key in row if key not in known)

    def warnings(self) -> list[str]:
        out: list[str] = []
        total = self.num_examples
        if self.num_blank:
            out.append(f"{self.num_blank} empty line(s) were passed over")
        if self.format != "prompt_completion" and 0 < self.num_without_system < total:
            out.append(
                f"{self.num_without_system} of {total} examples have no system message, the others "
                "have one"
            )
        if self.num_without_user:
            out.append(f"{self.num_without_user} of {total} examples have no user message")
        if self.unused:
            out.append(f"keys that are not used: {', '.join(sorted(self.unused))}")
        return out

    def _shape(self, row: Mapping[str, object]) -> Shape:
        """The shape of a row, one that the method takes. Raises Bad."""
        allowed = _SHAPES[self.method]
        try:
            shape = shapes.shape_of(row, self.format)
        except Bad as bad:
            if self.format is not None:
                raise
            first: Code = "missing_messages_list" if self.method == "supervised" else bad.code
            raise Bad(f"{_EXPECTED[self.method]}; {_keys(row)}", code=first) from None
        if shape in allowed:
            return shape
        if self.method == "dpo":
            raise Bad(f"{_EXPECTED['dpo']}; {_keys(row)}", code="invalid_preference")
        if shape == "preference":
            raise Bad(
                "a preference; it is trained with method dpo, not supervised",
                code="missing_messages_list",
            )
        raise Bad(f"{_EXPECTED['supervised']}; {_keys(row)}", code="missing_messages_list")


def _require_learnable(example: Example) -> None:
    """Raise Bad for what a run would refuse whatever the tokenizer."""
    answers = [m for m in example.messages if m.role == "assistant" and m.weight != 0]
    if not answers:
        raise Bad(
            "every assistant message has weight 0: nothing would be learned",
            code="example_missing_assistant_message",
        )
    if example.messages[0] is answers[0]:
        raise Bad(
            "messages[0] is the assistant's, with no prompt before it; put a user message first, "
            "or give it weight 0",
            code="missing_prompt",
        )


def _keys(row: Mapping[str, object]) -> str:
    return f"keys are {', '.join(sorted(str(key)[:40] for key in row)[:20]) or 'none'}"


def _shown(problem: Problem) -> str:
    return f"Line {problem.line}: {problem.message}" if problem.line else problem.message
