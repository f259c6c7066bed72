"""Temporary directories of processes that end, and of those that are killed."""

import subprocess
import sys
from pathlib import Path

from cluster.scratch import Scratch

_HOLD = """
import sys
from pathlib import Path
from cluster.scratch import Scratch
scratch = Scratch(Path(sys.argv[1]))
(scratch.path / "file").write_text("left")
print(scratch.path, flush=True)
input()
"""


def test_a_scratch_directory_is_private_and_goes_with_what_is_in_it(tmp_path: Path) -> None:
    scratch = Scratch(tmp_path)
    assert scratch.path.stat().st_mode & 0o777 == 0o700
    (scratch.path / "file").write_text("x")
    scratch.remove()
    assert not list(tmp_path.iterdir())


def test_what_a_killed_process_leaves_is_swept_by_the_next_and_the_living_keep_theirs(
    tmp_path: Path,
) -> None:
    held = subprocess.Popen(
        [sys.executable, "-c", _HOLD, str(tmp_path)],
        cwd=Path(__file__).resolve().parent.parent,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert held.stdout is not None
    left = Path(held.stdout.readline().strip())
    (tmp_path / "loray-of-somebody-else").mkdir()
    Scratch(tmp_path).remove()
    assert (left / "file").exists()
    held.kill()
    held.communicate(timeout=20)
    Scratch(tmp_path).remove()
    assert [path.name for path in tmp_path.iterdir()] == ["loray-of-somebody-else"]
