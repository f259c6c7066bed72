"""A real Ray cluster with its dashboard, of one node or two, in processes of its own, for tests."""

import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import requests

_START_TIMEOUT_S = 90.0
_STOP_TIMEOUT_S = 30.0
_ADDRESS_FILE = "ray_current_cluster"
"""What `ray start` writes last (Ray 2.60)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LocalCluster:
    """Where the cluster answers."""

    jobs_address: str
    """http://host:port of the dashboard and the Jobs API."""
    gcs_address: str
    """host:port for drivers."""
    token: str
    """What it asks for."""
    join: Callable[[], "subprocess.Popen[bytes]"]
    """Starts one node more, and waits until it has joined; as `second`."""
    second: "subprocess.Popen[bytes] | None" = None
    """`ray start` of the node that is not the head, which may be ended; its processes follow."""

    @property
    def credentials(self) -> dict[str, str | None]:
        """Environment variables of a client that may use the cluster."""
        return {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": self.token,
            "RAY_AUTH_TOKEN_PATH": None,
            "RAY_ADDRESS": None,
        }

    @property
    def headers(self) -> dict[str, str]:
        """HTTP headers of a client that may use the Jobs API."""
        return {"Authorization": f"Bearer {self.token}"}


@contextmanager
def local_cluster(*, num_cpus: int = 2, has_two_nodes: bool = False) -> Iterator[LocalCluster]:
    """Start a cluster on random ports that asks for a token; nothing of it is left afterwards.

    num_cpus: of each node.
    """
    directory = Path(tempfile.mkdtemp(prefix="lr-", dir="/tmp"))
    token = secrets.token_hex(16)
    port = free_port()
    words = [
        *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--port=0"),
        *("--include-dashboard=true", f"--dashboard-port={port}", "--dashboard-host=127.0.0.1"),
        *("--dashboard-agent-listen-port=0", f"--temp-dir={directory}", f"--num-cpus={num_cpus}"),
        *("--object-store-memory=134217728", "--disable-usage-stats"),
    ]
    environment = {name: value for name, value in os.environ.items() if name[:4] != "RAY_"}
    path = os.pathsep.join([str(Path(sys.executable).parent), environment["PATH"]])
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token, "PATH": path}
    head = _start(words, environment, directory / "start.log")
    seen: set[psutil.Process] = set()
    nodes: list[subprocess.Popen[bytes]] = []
    try:
        address = f"http://127.0.0.1:{port}"
        _wait_until_up(head, address, token, directory)
        gcs_address = (directory / _ADDRESS_FILE).read_text().strip()

        def join() -> "subprocess.Popen[bytes]":
            words = [
                *(sys.executable, "-m", "ray.scripts.scripts", "start", "--block"),
                *(f"--address={gcs_address}", f"--temp-dir={directory}", f"--num-cpus={num_cpus}"),
                *("--dashboard-agent-listen-port=0", "--object-store-memory=134217728"),
            ]
            node = _start(words, environment, directory / f"node{len(nodes)}.log")
            nodes.append(node)
            _wait_until_joined(node, directory / f"node{len(nodes) - 1}.log")
            return node

        yield LocalCluster(
            jobs_address=address,
            gcs_address=gcs_address,
            token=token,
            join=join,
            second=join() if has_two_nodes else None,
        )
    finally:
        seen |= _processes_of(head, directory)
        head.terminate()
        with suppress(subprocess.TimeoutExpired):
            head.wait(_STOP_TIMEOUT_S)
        _, alive = psutil.wait_procs(seen, timeout=5)
        for process in {*alive, *_processes_of(head, directory)}:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        head.wait(_STOP_TIMEOUT_S)
        for node in nodes:
            node.wait(_STOP_TIMEOUT_S)
        _, alive = psutil.wait_procs(seen, timeout=10)
        left = alive or _processes_of(head, directory)
        shutil.rmtree(directory, ignore_errors=True)
        assert not left, f"processes of the test cluster are left: {left}"


def _start(words: list[str], env: dict[str, str], output: Path) -> "subprocess.Popen[bytes]":
    with output.open("wb") as log:
        return subprocess.Popen(
            words, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=output.parent
        )


def _wait_until_joined(node: "subprocess.Popen[bytes]", output: Path) -> None:
    deadline = time.monotonic() + _START_TIMEOUT_S
    while "Ray runtime started" not in output.read_text():
        if node.poll() is not None or time.monotonic() > deadline:
            raise AssertionError(f"the node did not start: {output.read_text()}")
        time.sleep(0.2)


def _wait_until_up(
    head: "subprocess.Popen[bytes]", address: str, token: str, directory: Path
) -> None:
    deadline = time.monotonic() + _START_TIMEOUT_S
    headers = {"Authorization": f"Bearer {token}"}
    while True:
        with suppress(requests.RequestException):
            answer = requests.get(f"{address}/api/jobs/", headers=headers, timeout=5)
            if answer.ok and (directory / _ADDRESS_FILE).exists():
                return
        if head.poll() is not None or time.monotonic() > deadline:
            raise AssertionError(f"Ray did not start: {(directory / 'start.log').read_text()}")
        time.sleep(0.2)


def _processes_of(head: "subprocess.Popen[bytes]", directory: Path) -> set[psutil.Process]:
    """Children of the head, and whoever was started with its directory on the command line."""
    found: set[psutil.Process] = set()
    with suppress(psutil.NoSuchProcess):
        found |= set(psutil.Process(head.pid).children(recursive=True))
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if str(directory) in " ".join(process.cmdline()):
                found.add(process)
    return {process for process in found if process.pid not in (head.pid, os.getpid())}


def free_port() -> int:
    """A TCP port of the loopback interface that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
