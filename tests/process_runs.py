"""Runs as plain processes, which outlive who started them and are found again by their files."""

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil
from processes import ROOT

from cluster import storage
from serving.runner import Room, RunState


def make_result(directory: Path, base: Path) -> Path:
    """A ready-made adapter with its manifest, as a run leaves it."""
    from test_training_adapter import make_adapter  # torch, which dispatchers need not

    bare = make_adapter(directory / "bare", base, seed=3)

    def write(target: Path) -> None:
        for path in bare.iterdir():
            if path.suffix != ".md":
                (target / path.name).write_bytes(path.read_bytes())

    storage.commit(directory / "adapter", write, attempt="1")
    return directory / "adapter"


class ProcessRuns:
    """As `serving.ray_runs`, with a directory in place of a cluster."""

    def __init__(
        self,
        directory: Path,
        adapter: Path,
        *,
        step_s: float = 0.02,
        free: Mapping[str, float] | None = None,
    ) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        self._words = [str(adapter), str(step_s)]
        self._free = dict(free or {"CPU": 64.0})

    def start(self, run_job: str, words: Sequence[str]) -> None:
        name = self._directory / run_job
        try:
            claim = os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        except FileExistsError:
            return
        command = [sys.executable, str(Path(__file__).parent / "fake_run.py"), words[1]]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        with (self._directory / f"{run_job}.log").open("wb") as log:
            process = subprocess.Popen(
                [*command, *self._words], start_new_session=True, env=environment,
                stdout=log, stderr=log,
            )  # fmt: skip
        os.write(claim, str(process.pid).encode())
        os.close(claim)
        process.returncode = 0  # we look after it by its pid; Popen would warn that it lives

    def state(self, run_job: str) -> RunState:
        process = self._process(run_job)
        if process is None:
            return "unknown" if not (self._directory / run_job).exists() else "ended"
        return "alive"

    def stop(self, run_job: str) -> None:
        process = self._process(run_job)
        if process is not None:
            process.kill()

    def room(self) -> Room:
        return Room(free=self._free, total=self._free)

    def started(self) -> list[str]:
        """Every run that was ever started."""
        return sorted(p.name for p in self._directory.iterdir() if p.suffix != ".log")

    def alive(self) -> list[str]:
        return [name for name in self.started() if self.state(name) == "alive"]

    def _process(self, run_job: str) -> psutil.Process | None:
        try:
            pid = int((self._directory / run_job).read_text())
            process = psutil.Process(pid)
            if process.status() == psutil.STATUS_ZOMBIE:
                os.waitpid(pid, os.WNOHANG)
                return None
            return process if "fake_run.py" in " ".join(process.cmdline()) else None
        except (FileNotFoundError, ValueError, psutil.Error, ChildProcessError):
            return None
