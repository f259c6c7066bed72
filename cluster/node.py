"""Keeps one node of a Ray cluster running: starts it, watches it, starts it anew.

Ray nodes do not come back by themselves (2.60): a raylet that the head declared dead, because its
link was cut for a while, ends itself or hangs, and `ray start --block` ends with it or waits for
ever. The supervisor asks the head once a second whether this very start of the node is alive. If
the head says no, or the child ends, all that is left of the node is ended and it is started anew,
once the head answers again. On the head node the same holds for the head's own processes; with
Redis the head comes back with its state, without it as an empty cluster, to which the supervisors
of the other nodes bring their nodes at once.

What is not covered: a node that is cut off goes on with its work until its raylet notices (Ray
waits 60 s for a head that may be restarting). What it does meanwhile is fenced off in storage
(`cluster.ownership`).
"""

import logging
import os
import re
import secrets
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from cluster import members, offspring, session
from cluster.errors import ClusterError, ConfigError
from cluster.stale_leases import StaleLeases

HEAD_TIMINGS = {
    "RAY_health_check_initial_delay_ms": "0",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "4",
}
"""When the head declares a node dead; only its own control service (GCS) reads them (Ray 2.60).

A node that is gone without a word is noticed after at most 1 + 4 * 2 + 3 * 1 = 12 s; one whose
raylet was killed refuses the connection, which takes about 3 s. A link of 200 ms with 5 % loss
answers well within the 2 s of a check. An environment variable of the same name wins.
"""

_START_LABEL = "loray-start"
"""Label that tells this start of the node from every earlier one."""
_POLL_S = 1.0
_ASK_TIMEOUT_S = 2.0
_START_TIMEOUT_S = 60.0
_SILENT_HEAD_S = 20.0
"""After so long, the head's own supervisor takes a control service that says nothing for hung."""
_DRAIN_S = 35.0
"""For a node that is asked to stop; `ray start` (2.60) lets work move away for up to 30 s."""
_MIN_PAUSE_S, _MAX_PAUSE_S = 1.0, 15.0
_STEADY_S = 60.0
"""A node that was up for so long starts anew without a longer pause."""

_MAX_OUTPUT_BYTES = 4096
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeSettings:
    """What a node is started with."""

    address: str | None = None
    """host:port of the head; None makes this node the head."""
    host: str | None = None
    """This node's own address, which the others reach; None lets Ray choose."""
    port: int = 6379
    """Of the head's control service."""
    dashboard_host: str = "127.0.0.1"
    """Where the head's dashboard and Jobs API listen; they ask for the token."""
    dashboard_port: int = 8265
    redis: str | None = None
    """host:port of a Redis that keeps the head's state."""
    num_cpus: int | None = None
    """CPU cores that Ray may use; None is all of them."""
    num_gpus: int | None = None
    """GPUs that Ray may use; None is all of them."""
    object_store_bytes: int | None = None
    """Shared memory for objects; None lets Ray choose."""
    temp_dir: Path | None = None
    """Where Ray keeps its logs and sockets; None is /tmp/ray."""
    token_file: Path = field(default_factory=lambda: default_token_file())
    """Holds the cluster's token."""

    def __post_init__(self) -> None:
        for name, value in (("--address", self.address), ("--redis", self.redis)):
            if value is not None and not _is_host_port(value):
                raise ConfigError(f"{name} {value!r}: allowed: HOST:PORT, such as 10.0.0.1:6379")
        if self.address is not None and self.redis is not None:
            raise ConfigError("--redis is for the head (--head); the other nodes do not need it")

    @property
    def is_head(self) -> bool:
        """Whether this node runs the control service."""
        return self.address is None


def default_token_file() -> Path:
    """Where Ray looks for a token: RAY_AUTH_TOKEN_PATH, else ~/.ray/auth_token."""
    given = os.environ.get("RAY_AUTH_TOKEN_PATH")
    return Path(given).expanduser() if given else Path.home() / ".ray" / "auth_token"


def require_token(settings: NodeSettings) -> bool:
    """See that there is a token which others on this machine cannot read; whether it was made.

    The head makes one where there is none. Raises ConfigError where another node has none, or the
    file is empty.
    """
    path = settings.token_file
    try:
        if not path.read_text(encoding="ascii").strip():
            raise ConfigError(f"{path} is empty; remove it, or put the cluster's token there")
        if path.stat().st_mode & 0o077:  # ray.init (2.60) makes it 0644
            path.chmod(0o600)
            _log.warning("event=token_closed path=%s reason='others could read it'", path)
        return False
    except FileNotFoundError:
        if not settings.is_head:
            raise ConfigError(
                f"{path}: no such file; copy the head's token there (mode 0600), or name it by "
                "--token-file. The head's `loray node start --head` says where it is"
            ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be used as a token file ({error})") from None
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
        with os.fdopen(descriptor, "w") as stream:
            stream.write(secrets.token_hex(32))
    except OSError as error:
        raise ConfigError(f"{path} cannot be written ({error}); choose --token-file") from None
    return True


def command(settings: NodeSettings, start_id: str) -> list[str]:
    """The `ray start` that is the child; it stays in the foreground."""
    words = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block"]
    if settings.is_head:
        words += ["--head", f"--port={settings.port}", "--include-dashboard=true"]
        words += [f"--dashboard-host={settings.dashboard_host}"]
        words += [f"--dashboard-port={settings.dashboard_port}"]
        words += ["--disable-usage-stats"]
    else:
        words += [f"--address={settings.address}"]
    words += ["--dashboard-agent-listen-port=0", f"--labels={_START_LABEL}={start_id}"]
    for name, value in (
        ("node-ip-address", settings.host),
        ("num-cpus", settings.num_cpus),
        ("num-gpus", settings.num_gpus),
        ("object-store-memory", settings.object_store_bytes),
        ("temp-dir", settings.temp_dir),
    ):
        if value is not None:
            words.append(f"--{name}={value}")
    return words


def environment(settings: NodeSettings, base: Mapping[str, str]) -> dict[str, str]:
    """Environment of the node's processes: our timings, the token, Redis."""
    env = {k: v for k, v in base.items() if k not in ("RAY_ADDRESS", "RAY_AUTH_TOKEN")}
    if settings.is_head:
        env = {**HEAD_TIMINGS, **env}
    env |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(settings.token_file.absolute())}
    env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), env.get("PATH", "")])
    if settings.redis is not None:
        env["RAY_REDIS_ADDRESS"] = settings.redis
    return env


class Supervisor:
    """One node, kept running until `stop`; `run` blocks.

    tell: takes each event and its fields.
    """

    def __init__(self, settings: NodeSettings, tell: Callable[..., None]) -> None:
        self._settings = settings
        self._tell = tell
        self._stop = threading.Event()
        self._hurry = threading.Event()
        self._pause_s = _MIN_PAUSE_S
        self._is_head_silent = False
        host = settings.host or ("127.0.0.1" if settings.is_head else "")
        self._head = settings.address or f"{host}:{settings.port}"

    def stop(self, *_: object) -> None:
        """End the node, the second time at once; may be called by a signal handler."""
        if self._stop.is_set():
            self._hurry.set()
        self._stop.set()

    def run(self) -> None:
        """Start the node again and again until `stop`; nothing of it is left afterwards."""
        offspring.adopt_orphans()
        path = str(self._settings.token_file)
        variables = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": None, "RAY_AUTH_TOKEN_PATH": path}
        with session.environment(variables):
            session.forget_token()
            self._run()
            self._tell("node_stopped")

    def _run(self) -> None:
        while not self._stop.is_set():
            if not self._settings.is_head and not self._wait_for_head():
                break
            started = time.monotonic()
            with tempfile.TemporaryFile() as output:
                reason = self._run_once(output)
                if self._stop.is_set():
                    break
                was_steady = time.monotonic() - started > _STEADY_S
                self._pause_s = _MIN_PAUSE_S if was_steady else self._pause_s
                self._tell("node_down", reason=reason, said=_last_line(output))
            self._tell("node_restarts", in_s=self._pause_s)
            self._stop.wait(self._pause_s)
            self._pause_s = min(self._pause_s * 2, _MAX_PAUSE_S)

    def _run_once(self, output: IO[bytes]) -> str:
        """Start the node and watch it; why it is over, when all of it has ended."""
        start_id = secrets.token_hex(8)
        started = time.monotonic()
        env = environment(self._settings, os.environ)
        child = offspring.start(command(self._settings, start_id), env, output)
        try:
            return self._watch(child, start_id, started)
        finally:
            grace_s = _DRAIN_S if self._stop.is_set() else 0.0  # what failed has nothing to save
            left = offspring.end(child, grace_s=grace_s, hurry=self._hurry)
            if left:
                self._tell("processes_left", pids=",".join(map(str, left)))
            _forget_address(self._settings.temp_dir)

    def _watch(self, child: "subprocess.Popen[bytes]", start_id: str, started: float) -> str:
        heard = started
        raylet = stale_leases = None
        while not self._stop.wait(_POLL_S):
            offspring.bury(spare=child.pid)
            if child.poll() is not None:
                return f"ray start ended with status {child.returncode}"
            now = time.monotonic()
            found = self._find(start_id, is_starting=raylet is None)
            if raylet is not None and not raylet.is_running():
                return "the raylet has ended"
            if found is not None and not found.is_alive:
                return f"the head declared it dead: {found.why_dead or 'no reason given'}"
            if found is not None and raylet is None and (raylet := offspring.find("raylet")):
                seconds = round(now - started, 1)
                self._tell("node_up", node=found.node_id, host=found.host, after_s=seconds)
            if found is None and raylet is not None and not self._is_head_silent:
                return "the head does not know it: another head has taken over"
            heard = heard if self._is_head_silent else now
            if self._is_head_silent:  # what answers again may be another head
                stale_leases = StaleLeases() if raylet is not None else None
            elif stale_leases is not None and (ended := stale_leases.end()):
                self._tell("idle_workers_ended", pids=",".join(map(str, ended)))
            if raylet is None and now - started > _START_TIMEOUT_S:
                return f"not up after {_START_TIMEOUT_S:.0f} s"
            if self._settings.is_head and raylet and now - heard > _SILENT_HEAD_S:
                return f"the control service said nothing for {_SILENT_HEAD_S:.0f} s"
        return "asked to stop"

    def _find(self, start_id: str, *, is_starting: bool) -> members.Member | None:
        """This start of the node in the head's table; None too where the head is silent."""
        try:
            table = members.ask(self._head, timeout_s=_ASK_TIMEOUT_S)
        except ClusterError as error:
            if not self._is_head_silent and not (is_starting and self._settings.is_head):
                self._tell("head_silent", head=self._head, reason=str(error))
            self._is_head_silent = True
            return None
        if self._is_head_silent and not (is_starting and self._settings.is_head):
            self._tell("head_answers", head=self._head)
        self._is_head_silent = False
        return next((row for row in table if row.labels.get(_START_LABEL) == start_id), None)

    def _wait_for_head(self) -> bool:
        """Until the head answers; False where asked to stop. `ray start` would take a minute."""
        while not self._stop.is_set():
            self._find("", is_starting=False)
            if not self._is_head_silent:
                return True
            self._stop.wait(_POLL_S)
        return False


def _forget_address(temp_dir: Path | None) -> None:
    """Remove what `ray start` (2.60) leaves: a head that finds its own address does not start."""
    from ray._private.utils import get_ray_address_file

    Path(get_ray_address_file(temp_dir and str(temp_dir))).unlink(missing_ok=True)


def _last_line(output: IO[bytes]) -> str:
    """What `ray start` said last that tells something."""
    output.seek(max(0, output.seek(0, os.SEEK_END) - _MAX_OUTPUT_BYTES))
    text = _COLOUR.sub("", output.read().decode(errors="replace"))
    lines = [line.strip() for line in text.splitlines() if line.strip(" -")]
    return lines[-1] if lines else ""


def _is_host_port(value: str) -> bool:
    host, colon, port = value.rpartition(":")
    return bool(colon and host and port.isdigit() and 0 < int(port) < 1 << 16)
