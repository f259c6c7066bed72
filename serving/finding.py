"""What a file for fine-tuning holds: `python -m serving.finding FILE MAX_BYTES` prints it as JSON.

Run as a process, it ends with the one that started it, and takes no more than its share.
"""

import json
import os
import resource
import sys
import threading
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from cluster.errors import DataError

_PROBLEMS = 10
"""How many are told."""
_MAX_DETAILS_CHARS = 8000
_LOWEST_PRIORITY = 19


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """What was found."""

    examples: int
    """Lines that can be used."""
    details: str | None
    """The first problems, with the numbers of their lines; None: there are none."""
    warning: str | None = None
    """What can be trained on, but may not be meant."""


def look_into(path: Path) -> Finding:
    """Check every line of a file."""
    from training import finetuning_data  # numpy, which who only wants a Finding does not need

    try:
        method = method_of(path)
        found = finetuning_data.check(path, method=method, minimum=1, max_problems=_PROBLEMS)
    except DataError as error:
        return Finding(examples=0, details=str(error)[:_MAX_DETAILS_CHARS])
    if found.is_ok:
        warning = "; ".join(found.warnings)[:_MAX_DETAILS_CHARS] or None
        return Finding(examples=found.examples, details=None, warning=warning)
    if not found.num_problems:
        return Finding(examples=0, details="The file has no examples.")
    lines = [
        f"Line {problem.line}: {problem.message}" if problem.line else problem.message
        for problem in found.problems
    ]
    more = found.num_problems - len(lines)
    details = "; ".join([*lines, *([f"and {more} more"] if more else [])])
    return Finding(examples=found.examples, details=details[:_MAX_DETAILS_CHARS])


def method_of(path: Path) -> Literal["supervised", "dpo"]:
    """How the first line says that it is to be trained on."""
    from training import json_line

    with path.open("rb") as file:
        _, line = next(json_line.lines(file), (0, b"null"))
    row = json_line.parse(line) if isinstance(line, bytes) else None
    return "dpo" if isinstance(row, dict) and "input" in row else "supervised"


def _end_with_parent() -> None:
    os.read(sys.stdin.fileno(), 1)
    os._exit(1)


def main(argv: list[str]) -> int:
    """The door; returns the exit status."""
    path, max_bytes = Path(argv[0]), int(argv[1])
    os.nice(_LOWEST_PRIORITY)
    resource.setrlimit(resource.RLIMIT_AS, (max_bytes, max_bytes))
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        found = look_into(path)
    except (MemoryError, RecursionError) as error:
        details = f"The file cannot be checked within the memory that a file has: {error!r}."
        found = Finding(examples=0, details=details)
    print(json.dumps(asdict(found)), flush=True)
    return 0


if __name__ == "__main__":
    os._exit(main(sys.argv[1:]))  # the thread that waits for the parent is in a system call
