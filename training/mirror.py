"""A run whose storage is an object store: the store is the truth, each machine has a copy.

The run is trained in a local directory as any other; what lies there counts only once it is
published. Who writes what below <storage>/<name>:

recipe.json, stop-requested, leases/          the driver
attempts/<number>                             the first worker of each attempt, create-only
memory.json, events/, checkpoints/, adapter/  the first worker

A checkpoint is `checkpoints/step-<step>-<attempt>/`: an attempt that has been fenced off cannot
touch those of another. One that is damaged gets a `.broken` object that says why, and is left.

What is not covered: TensorBoard's files, which stay in the driver's copy, and training on while a
checkpoint is uploaded: the workers wait for it.
"""

import hashlib
import json
import logging
import os
import re
import shutil
import socket
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

from cluster import storage
from cluster.errors import StorageError
from cluster.lease import Lease
from cluster.remote import Remote, is_url
from training import checkpoint
from training.config import TrainRecipe
from training.segments import SegmentReader, SegmentWriter

_BROKEN = ".broken"
_NAME = re.compile(r"^step-(\d{6,})-(\d{6,})$")
_TICK_S = 1.0
_CLAIMS = 100
STOP = "stop-requested"

log = logging.getLogger(__name__)


class Mirror:
    """One process's view of a run in an object store. Methods raise StorageError."""

    @classmethod
    def of(cls, recipe: TrainRecipe) -> Self | None:
        """The mirror of a recipe's run; None where its storage is a directory."""
        return cls(recipe.storage, recipe.name) if is_url(recipe.storage) else None

    def __init__(self, storage_url: str, name: str) -> None:
        root = storage_url.rstrip("/")
        self.url = f"{root}/{name}"
        self.remote = Remote(self.url)
        key = hashlib.sha256(root.encode()).hexdigest()[:16]
        self.run_dir = (storage.cache_dir() / "runs" / key / name).absolute()
        self._attempt = 0
        self._segments: SegmentWriter | None = None
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._tick, name="mirror", daemon=True)

    # The driver

    def check(self) -> None:
        """Prove within seconds that the run can be kept there; see Remote.check."""
        Remote(self.url, tries=2, request_s=10.0).check()

    @contextmanager
    def held(self) -> Iterator[Lease]:
        """Own the run, with what it holds of the driver's here; the caller has the local lock."""
        with Lease(self.remote, self.run_dir) as lease:
            self.remote.remove([STOP])
            self.pull("recipe.json")
            yield lease

    def follow(self) -> SegmentReader:
        """A reader of the events to come; those so far become the local events.jsonl."""
        reader = SegmentReader(self.remote)
        storage.write_file(self.run_dir / "events.jsonl", reader.read_bytes())
        return reader

    def request_stop(self) -> None:
        """Ask the run to checkpoint after the current step and end."""
        self.remote.write(STOP, b"stop")

    def fetch_adapter(self) -> None:
        """Bring the run's adapter here; a local one that is not the store's is removed."""
        reason = self.remote.fetch("adapter", self.run_dir / "adapter")
        if reason is not None:
            log.warning("adapter=unusable url=%s/adapter reason=%r", self.url, reason)
            shutil.rmtree(self.run_dir / "adapter", ignore_errors=True)

    # Every worker

    def pull(self, name: str) -> None:
        """Make a small file what it is in the store, missing if it is missing there."""
        data = self.remote.read(name)
        storage.make_directory(self.run_dir)
        if data is None:
            (self.run_dir / name).unlink(missing_ok=True)
        else:
            storage.write_file(self.run_dir / name, data)

    def push(self, name: str) -> None:
        """Put a small local file into the store."""
        self.remote.write(name, (self.run_dir / name).read_bytes())

    def fetch_step(self, step: int) -> Path:
        """Bring the newest attempt's checkpoint of a step here, verified."""
        names = [n for n, found in self._published() if found == step]
        if not names:
            raise StorageError(f"{self.url} has no checkpoint of step {step} any more")
        final = checkpoint.directory(self.run_dir, step)
        reason = self.remote.fetch(f"checkpoints/{names[0]}", final)
        if reason is not None:
            raise StorageError(f"checkpoint {names[0]} of {self.url} is damaged: {reason}")
        return final

    # The first worker

    def begin(self) -> int:
        """Start a new attempt, which fences every earlier one off; its number."""
        body = {"host": socket.gethostname(), "pid": os.getpid(), "token": uuid.uuid4().hex}
        for _ in range(_CLAIMS):
            newest = self.remote.newest("attempts")
            if self.remote.claim("attempts", json.dumps(body).encode(), after=newest):
                break
        else:
            raise StorageError(f"{self.url}: {_CLAIMS} attempts in a row were taken by others")
        self._attempt = newest + 1
        storage.write_file(self.run_dir / "attempt", f"{self._attempt}\n".encode())
        (self.run_dir / STOP).unlink(missing_ok=True)
        self._segments = SegmentWriter(
            self.remote, self.run_dir / "events.jsonl", attempt=self._attempt
        )
        self._thread.start()
        return self._attempt

    def fetch_latest(self, on_broken: Callable[[str], None]) -> Path | None:
        """Bring the newest checkpoint that verifies here; it is the only one here afterwards.

        Damaged ones are marked and reported.
        """
        folder = self.run_dir / "checkpoints"
        storage.clean_leftovers(folder)
        for name, step in self._published():
            final = checkpoint.directory(self.run_dir, step)
            reason = self.remote.fetch(f"checkpoints/{name}", final)
            if reason is None:
                checkpoint.keep_only(self.run_dir, step)
                return final
            self.remote.write(f"checkpoints/{name}/{_BROKEN}", f"{reason}\n".encode())
            on_broken(f"checkpoint {name} is damaged ({reason}); marked as {_BROKEN}")
        checkpoint.keep_only(self.run_dir, None)
        return None

    def publish_checkpoint(self, path: Path, *, keep: int, best_step: int | None) -> None:
        """Commit a checkpoint in the store, and remove those that are not kept any longer."""
        self.flush()  # first, so that no event before a checkpoint is ever lost
        name = f"{path.name}-{self._attempt:06d}"
        self.remote.publish(path, f"checkpoints/{name}", is_fenced=self._is_fenced)
        self._prune(keep=keep, best_step=best_step)

    def publish_adapter(self) -> None:
        """Commit the local adapter in the store, in place of what is there."""
        self.remote.publish(self.run_dir / "adapter", "adapter", is_fenced=self._is_fenced)

    def flush(self) -> None:
        """Upload the events so far."""
        with self._lock:
            if self._segments is not None:
                self._segments.flush()

    def close(self) -> None:
        """Upload the last events and end; failing to is only logged."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()
        try:
            self.flush()
        except StorageError as error:
            log.warning("events=not_uploaded url=%s error=%r", self.url, str(error))

    def _tick(self) -> None:
        while not self._ended.wait(_TICK_S):
            try:
                self.flush()
                if self.remote.read(STOP) is not None:
                    (self.run_dir / STOP).touch()
            except StorageError as error:  # the next checkpoint raises it, if it lasts
                log.warning("events=late url=%s error=%r", self.url, str(error))

    def _prune(self, *, keep: int, best_step: int | None) -> None:
        """Remove what is not kept, and what earlier attempts left unfinished."""
        kept = {best_step, *sorted({step for _, step in self._published()})[-keep:]}
        for name, files in self._checkpoints().items():
            step, attempt = _numbers(name)
            is_unfinished = storage.MANIFEST not in files and attempt < self._attempt
            is_done_with = is_unfinished or (storage.MANIFEST in files and step not in kept)
            if is_done_with and _BROKEN not in files and not self._is_fenced():
                self.remote.retire(f"checkpoints/{name}")

    def _is_fenced(self) -> bool:
        return self.remote.newest("attempts") != self._attempt

    def _published(self) -> list[tuple[str, int]]:
        """Names and steps of the committed checkpoints that nobody found damaged, newest first."""
        whole = [
            name
            for name, files in self._checkpoints().items()
            if storage.MANIFEST in files and _BROKEN not in files
        ]
        return [(name, _numbers(name)[0]) for name in sorted(whole, key=_numbers, reverse=True)]

    def _checkpoints(self) -> dict[str, set[str]]:
        """What lies below each directory that is named as a checkpoint."""
        found: dict[str, set[str]] = {}
        for path in self.remote.sizes("checkpoints"):
            name, _, file = path.partition("/")
            if _NAME.match(name):
                found.setdefault(name, set()).add(file)
        return found


def _numbers(name: str) -> tuple[int, int]:
    """Step and attempt of a checkpoint's name."""
    match = _NAME.match(name)
    assert match is not None
    return int(match.group(1)), int(match.group(2))
