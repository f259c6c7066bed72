"""Which driver a run in an object store belongs to: a lease, since there is no flock.

A driver creates the next numbered object in `leases/`, which only one can, and writes it again
every few seconds. The highest number holds the run until it has been silent for `ttl_s`, by the
store's own clock. A holder that could not renew in time regards the lease as lost before anybody
may take it.

The driver of one machine also holds the flock of the run's local directory, where `.lease` keeps
the token of its lease. Who has that flock and reads that token knows that the lease was left by a
driver that is dead, and need not wait.
"""

import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

from cluster import storage
from cluster.errors import RunInUseError, StorageError
from cluster.remote import Remote

_FOLDER = "leases"
_TTL_S = 60.0
_RENEW_S = 5.0
_CLOCK_STEP_S = 1.0
"""S3 tells times in whole seconds."""

_log = logging.getLogger(__name__)


class Lease:
    """The right to drive the run at `remote`: `with RunLock(run_dir), Lease(remote, run_dir):`.

    run_dir: the run's local directory, whose lock the caller holds. Entering raises RunInUseError
    where another driver renewed its lease within `ttl_s`, StorageError where the store fails.
    """

    def __init__(
        self,
        remote: Remote,
        run_dir: Path,
        *,
        ttl_s: float = _TTL_S,
        renew_s: float = _RENEW_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._remote = remote
        self._token_file = run_dir / ".lease"
        self._ttl_s = ttl_s
        self._renew_s = renew_s
        self._clock = clock
        self._number = 0
        self._renewed_s = 0.0
        self._is_taken = False
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)
        started = datetime.now(UTC).isoformat(timespec="seconds")
        self._token = uuid.uuid4().hex
        self._body = json.dumps(
            {
                "token": self._token,
                "pid": os.getpid(),
                "host": socket.gethostname(),
                "started": started,
            }
        ).encode()

    def __enter__(self) -> Self:
        newest = self._remote.newest(_FOLDER)
        if newest:
            self._require_silent(newest)
        # First the token: what is left of a driver that is killed in between is its own.
        storage.write_file(self._token_file, self._token.encode())
        self._renewed_s = self._clock()
        if not self._remote.claim(_FOLDER, self._body, after=newest):
            raise RunInUseError(
                f"{self._remote.url} was taken by another driver at this moment; wait until it "
                "ends or stop it, or choose another name for this run"
            )
        self._number = newest + 1
        with suppress(StorageError):  # leftovers: they are below our number
            self._remote.remove(f"{_FOLDER}/{number:06d}" for number in range(1, newest + 1))
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        try:
            self._remote.remove([self._object(self._number)])
        except StorageError as error:
            _log.warning("lease=kept expires_in_s=%g reason=%r", self._ttl_s, str(error))
            return
        self._token_file.unlink(missing_ok=True)

    def require(self) -> None:
        """Raise where this driver does not hold the run any more."""
        if self._is_taken:
            raise RunInUseError(
                f"{self._remote.url} was taken over by another driver while this one was silent; "
                "it goes on there. Nothing to do here"
            )
        if self._has_lapsed(self._clock()):
            raise StorageError(
                f"{self._remote.url}: the store could not be reached for {0.9 * self._ttl_s:.0f} s "
                "to renew the lease on this run, so that another driver may take it over. "
                "Everything committed is intact; the same command resumes"
            )

    def _keep(self) -> None:
        impatient = Remote(self._remote.url, tries=1)  # the next round is the next try
        while not self._ended.wait(self._renew_s):
            now = self._clock()
            if self._has_lapsed(now):  # renewing it now could step on who has taken the run over
                return
            try:
                impatient.write(self._object(self._number), self._body)
                self._is_taken = impatient.newest(_FOLDER) > self._number
            except StorageError as error:
                _log.warning("lease=not_renewed number=%d error=%r", self._number, str(error))
                continue
            if self._is_taken:
                return
            self._renewed_s = now

    def _has_lapsed(self, now: float) -> bool:
        return now - self._renewed_s > 0.9 * self._ttl_s

    def _require_silent(self, number: int) -> None:
        body = self._remote.read(self._object(number))
        if body is None:
            return
        try:
            owner = json.loads(body)
            who = f"process {owner['pid']} on {owner['host']}, which started {owner['started']}"
        except (ValueError, KeyError, TypeError):
            owner, who = {}, "another process"
        if self._token_file.exists() and owner.get("token") == self._token_file.read_text():
            return
        age_s = self._remote.age_s(self._object(number))
        if age_s < self._ttl_s + _CLOCK_STEP_S:
            raise RunInUseError(
                f"{self._remote.url} is in use by {who} and was renewed {age_s:.0f} s ago; wait "
                f"until it ends or stop it (one that was killed is forgotten after "
                f"{self._ttl_s:.0f} s of silence), or choose another name for this run"
            )

    def _object(self, number: int) -> str:
        return f"{_FOLDER}/{number:06d}"
