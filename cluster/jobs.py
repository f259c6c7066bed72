"""Ray Jobs: submit a command to a cluster, follow its log to the end, stop it.

The Jobs API runs whatever it is given, so a cluster should ask for a token: set
RAY_AUTH_MODE=token and RAY_AUTH_TOKEN (or RAY_AUTH_TOKEN_PATH) here as on the cluster.

What is not covered: data files named in `.gitignore` or `.rayignore` are not uploaded with the
working directory; give such data by an absolute path that the cluster sees.
"""

import asyncio
import logging
import shlex
import sys
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from cluster.errors import ClusterError, LorayError
from cluster.session import PACKAGES, environment

if TYPE_CHECKING:  # Ray takes a second to import, which a typing error in a recipe must not cost.
    from ray.job_submission import JobStatus, JobSubmissionClient

EXCLUDES = (".git", ".venv", "venv", "runs", "dist", "build", ".*_cache", ".hypothesis")
"""Not uploaded with a working directory, wherever they lie in it."""

_REQUEST_TIMEOUT_S = (10.0, 60.0)
"""To connect, and between two packets of an answer."""
_SILENCE_S = 20.0
"""After so long without output, ask whether the job is still there."""
_END_TIMEOUT_S = 30.0
"""For a job whose log has ended, or that was asked to stop, to reach its final state."""
_RECONNECTS = 3

_log = logging.getLogger(__name__)


def submit(
    entrypoint: list[str],
    *,
    address: str,
    working_dir: Path | None,
    job_id: str | None = None,
) -> str:
    """Start a job that runs `entrypoint` in an uploaded copy of `working_dir`; returns its id.

    Our packages go along where `working_dir` does not hold them. `address` is the Jobs API, such
    as http://127.0.0.1:8265. job_id: an id of your own, under which nothing was submitted before.
    Raises ClusterError where the cluster cannot be reached, refuses the
    token, or the directory is too large to upload.
    """
    runtime_env: dict[str, Any] = {}
    if working_dir is not None:
        runtime_env = {"working_dir": str(working_dir), "excludes": list(EXCLUDES)}
    is_whole = working_dir is not None and all(
        (working_dir / package.name / "__init__.py").is_file() for package in PACKAGES
    )
    if not is_whole:
        runtime_env["py_modules"] = [str(package) for package in PACKAGES]
    with _explained(address):
        return _client(address).submit_job(
            entrypoint=shlex.join(entrypoint), runtime_env=runtime_env, submission_id=job_id
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """A job, as the Jobs API says."""

    is_over: bool
    node: str | None
    """Id of the node that its driver was put on; None before it was."""


def find(job_id: str, *, address: str) -> Found | None:
    """How a job is; None where the cluster knows of none by this id.

    A head that has come back with the state of the one before says of jobs that ended with that one
    that they run, until it is asked for more than their state (Ray 2.60, job_agent.py: the manager
    is made then): compare `node` with the nodes that are alive.
    """
    with _explained(address):
        client = _client(address)
        try:
            details = client.get_job_info(job_id)
        except RuntimeError as error:
            if "does not exist" in str(error):  # Ray 2.60 answers 404 in words only
                return None
            raise
        if details.status == "PENDING":
            client.get_job_logs(job_id)  # for one that never gets a node: see above
        return Found(is_over=details.status.is_terminal(), node=details.driver_node_id)


def ask_to_stop(job_id: str, *, address: str) -> None:
    """Have a job end soon (SIGTERM, then SIGKILL); nothing happens where it has ended."""
    with _explained(address):
        _client(address).stop_job(job_id)


def follow(job_id: str, *, address: str) -> int:
    """Copy the job's log to stdout until the job ends; 0 where it succeeded, else its exit code.

    A failure is also told in one line on stderr. Ctrl-C raises KeyboardInterrupt and leaves the
    job running: follow it again or `stop` it. Raises ClusterError where the cluster is lost.
    """
    with _explained(address):
        client = _client(address)
        asyncio.run(_copy_log(client, job_id))
        status = _wait_for_end(client, job_id, address)
        if status == "SUCCEEDED":
            return 0
        details = client.get_job_info(job_id)
        what = "was stopped" if status == "STOPPED" else "failed"
        # The message goes on with the end of the log, which has just been shown.
        why = (details.message or "no reason given").partition(", last available logs")[0]
        print(
            f"job {job_id} {what}: {' '.join(why.split())[:500]}\n"
            f"whole log: ray job logs --address {address} {job_id}",
            file=sys.stderr,
            flush=True,
        )
        return details.driver_exit_code or 1


def stop(job_id: str, *, address: str) -> None:
    """Stop a job and wait until it has ended; nothing happens where it has ended already.

    Raises ClusterError where the cluster cannot be reached or the job does not end within 30 s.
    """
    with _explained(address):
        client = _client(address)
        client.stop_job(job_id)
        _wait_for_end(client, job_id, address)


def _client(address: str) -> "JobSubmissionClient":
    """Ray's client with a time limit on every request (2.60 waits for ever)."""
    from ray.job_submission import JobSubmissionClient

    if not address.startswith(("http://", "https://")):
        raise ClusterError(
            f"Jobs API address {address!r} is not usable; allowed: the cluster's dashboard as "
            "http://HOST:8265 or https://HOST"
        )

    for name in ("job.sdk", "dashboard_sdk"):  # They announce every upload and every socket.
        logging.getLogger(f"ray.dashboard.modules.{name}").setLevel(logging.WARNING)

    class Client(JobSubmissionClient):
        def _do_request(self, method: str, endpoint: str, **options: Any) -> Any:
            return super()._do_request(method, endpoint, timeout=_REQUEST_TIMEOUT_S, **options)

    # Ray 2.60 lets RAY_ADDRESS win over the address that it is given, unless this is set.
    with environment({"RAY_API_SERVER_ADDRESS": address}):
        client = Client(address)
    if client._ssl_context is None:  # aiohttp 3.14 warns of Ray's None, which means the same.
        client._ssl_context = True
    return client


async def _copy_log(client: "JobSubmissionClient", job_id: str) -> None:
    """Write the log to stdout as it grows; a lost connection is taken up where it broke off."""
    num_written = 0
    for attempt in range(_RECONNECTS + 1):
        num_seen = 0
        try:
            async for text in _chunks(client, job_id):
                new = text[max(0, num_written - num_seen) :]
                num_seen += len(text)
                num_written += len(new)
                sys.stdout.write(new)
                sys.stdout.flush()
            return
        except (RuntimeError, OSError) as error:
            if attempt == _RECONNECTS:
                raise
            _log.warning("job=%s log_lost=%r reconnect=%d", job_id, str(error), attempt + 1)


async def _chunks(client: "JobSubmissionClient", job_id: str) -> AsyncGenerator[str, None]:
    """Pieces of the log. In silence, see every 20 s that the job lives: no answer raises."""
    stream = cast(AsyncGenerator[str, None], client.tail_job_logs(job_id))
    while True:
        piece = asyncio.ensure_future(anext(stream, None))
        try:
            while not (await asyncio.wait({piece}, timeout=_SILENCE_S))[0]:
                status = await asyncio.to_thread(client.get_job_status, job_id)
                if status.is_terminal():
                    return
        finally:
            piece.cancel()
        text = await piece
        if text is None:
            return
        yield text


def _wait_for_end(client: "JobSubmissionClient", job_id: str, address: str) -> "JobStatus":
    deadline = time.monotonic() + _END_TIMEOUT_S
    while not (status := client.get_job_status(job_id)).is_terminal():
        if time.monotonic() > deadline:
            raise ClusterError(
                f"job {job_id} at {address} is still {status} after {_END_TIMEOUT_S:.0f} s; look "
                f"at it with `ray job status --address {address} {job_id}`"
            )
        time.sleep(0.2)
    return status


@contextmanager
def _explained(address: str) -> Iterator[None]:
    """Turn what Ray and HTTP raise into one ClusterError that says what to do."""
    from ray.exceptions import AuthenticationError

    try:
        yield
    except LorayError:
        raise
    except AuthenticationError as error:
        raise ClusterError(
            f"the Jobs API at {address} refuses this client: {str(error).splitlines()[0]}. Set "
            "RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN to the cluster's token (or "
            "RAY_AUTH_TOKEN_PATH to the file that holds it)"
        ) from None
    except OSError as error:  # ConnectionError, and everything that requests raises.
        raise ClusterError(
            f"the Jobs API at {address} cannot be reached ({type(error).__name__}). Check that "
            "the head node is up, that the address is its dashboard (http://HOST:8265) and that "
            "no firewall is in between"
        ) from error
    except (RuntimeError, ValueError) as error:
        raise ClusterError(f"the Jobs API at {address} refused: {error}") from error
