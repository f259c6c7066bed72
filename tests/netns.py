"""Machines of a test network: network namespaces on a switch, whose links can be cut or slowed.

All that is made lives in the namespaces: with them it is gone. The machines share this one's
files, processes and clock. A slow link is a pair of TAP devices with a relay in this process
between them, since many kernels come without `tc netem`.
"""

import ctypes
import fcntl
import heapq
import json
import os
import random
import select
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import psutil
import pytest

from cluster import offspring

ROOT = Path(__file__).resolve().parent.parent
PORT = 6379
_PREFIX = "lr"
_TUNSETIFF = 0x400454CA
_IFF_TAP, _IFF_NO_PI = 0x2, 0x1000
_STOP_S = 30.0
_CLONE_NEWNET = 0x40000000


@dataclass
class Host:
    """A machine of the network."""

    name: str
    space: str
    """Its network namespace."""
    ip: str
    port_name: str
    """The switch's end of its link."""
    switch: str
    directory: Path
    """Files of what runs there."""
    relay: "Relay | None" = None
    running: "list[subprocess.Popen[str]]" = field(default_factory=list)

    def start(
        self, words: Sequence[str], extra: Mapping[str, str] | None = None, log: str = "log"
    ) -> "subprocess.Popen[str]":
        """Run `python -m WORDS` there; what it says is appended to `<directory>/<log>`."""
        environment = {n: v for n, v in os.environ.items() if not n.startswith("RAY_")}
        environment |= {
            "RAY_AUTH_MODE": "token",
            "PYTHONWARNINGS": "ignore",
            "GLOO_SOCKET_IFNAME": "eth0",
            "RAY_AUTH_TOKEN_PATH": str(self.directory.parent / "token"),
            **(extra or {}),
        }
        paths = [(extra or {}).get("PYTHONPATH", ""), str(ROOT), str(ROOT / "tests")]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        with (self.directory / log).open("a") as output:
            module = [sys.executable, "-m", "own_processes", *words]
            ip = shutil.which("ip") or "ip"
            process = subprocess.Popen(
                offspring.ended_with_parent([ip, "netns", "exec", self.space, *module]),
                env=environment,
                cwd=self.directory,
                text=True,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.running.append(process)
        return process

    def enter(self) -> None:
        """Have the sockets that this thread opens from now on be of that machine."""
        libc = ctypes.CDLL(None, use_errno=True)
        with open(f"/run/netns/{self.space}") as space:
            failed = libc.setns(space.fileno(), _CLONE_NEWNET)
        assert not failed, os.strerror(ctypes.get_errno())

    def said(self, log: str = "log") -> str:
        """What the processes there have said so far."""
        path = self.directory / log
        return path.read_text() if path.exists() else ""

    def cut(self) -> None:
        """Pull the cable."""
        _ip("-n", self.switch, "link", "set", self.port_name, "down")

    def heal(self) -> None:
        """Put the cable back."""
        _ip("-n", self.switch, "link", "set", self.port_name, "up")

    def num_bytes(self) -> tuple[int, int]:
        """Bytes that the machine has sent and received."""
        shown = _ip("-n", self.switch, "-s", "-j", "link", "show", self.port_name)
        counters = json.loads(shown)[0]["stats64"]
        return counters["rx"]["bytes"], counters["tx"]["bytes"]

    def pids(self) -> list[int]:
        """Processes in the namespace."""
        return [int(pid) for pid in _ip("netns", "pids", self.space).split()]

    def processes(self, name: str) -> list[psutil.Process]:
        """Processes there whose name or title starts so."""
        found = []
        for pid in self.pids():
            with suppress(psutil.Error):
                process = psutil.Process(pid)
                title = (process.cmdline() or [""])[0]
                if process.name() == name or title.startswith(name):
                    found.append(process)
        return found


class Relay:
    """Carries packets between two TAP devices, late and with losses."""

    def __init__(self, near: str, far: str, *, seed: int = 0) -> None:
        self.delay_s = 0.0
        """One way."""
        self.loss = 0.0
        """Share of the packets that are dropped."""
        self._ends = [_open_tap(near), _open_tap(far)]
        self._random = random.Random(seed)
        self._wake, self._waker = os.pipe()
        self._thread = threading.Thread(target=self._carry, name="relay", daemon=True)
        self._thread.start()

    def close(self) -> None:
        os.close(self._waker)
        self._thread.join(10)
        for descriptor in (*self._ends, self._wake):
            os.close(descriptor)

    def _carry(self) -> None:
        waiting: list[tuple[float, int, int, bytes]] = []
        number = 0
        while True:
            pause = max(0.0, waiting[0][0] - time.monotonic()) if waiting else None
            ready, _, _ = select.select([*self._ends, self._wake], [], [], pause)
            if self._wake in ready:
                return
            for end in ready:
                with suppress(OSError):  # the device is down or gone
                    packet = os.read(end, 1 << 16)
                    if self._random.random() >= self.loss:
                        number += 1
                        other = self._ends[0] if end == self._ends[1] else self._ends[1]
                        due = time.monotonic() + self.delay_s
                        heapq.heappush(waiting, (due, number, other, packet))
            while waiting and waiting[0][0] <= time.monotonic():
                _, _, other, packet = heapq.heappop(waiting)
                with suppress(OSError):
                    os.write(other, packet)


@contextmanager
def network(*names: str, slow: Sequence[str] = ()) -> Iterator[dict[str, Host]]:
    """Machines of these names on one switch; those in `slow` have a relay. Nothing stays.

    Skips the test where this process may not make namespaces.
    """
    reason = _missing()
    if reason:
        pytest.skip(reason)
    _remove_stale()
    prefix = f"{_PREFIX}{os.getpid()}"
    directory = Path(tempfile.mkdtemp(prefix=f"{prefix}-", dir="/tmp"))
    switch = f"{prefix}-switch"
    hosts: dict[str, Host] = {}
    try:
        _ip("netns", "add", switch)
        _ip("-n", switch, "link", "add", "br0", "type", "bridge")
        _ip("-n", switch, "link", "set", "br0", "up")
        for number, name in enumerate(names, start=1):
            host = Host(
                name=name,
                space=f"{prefix}-{name}",
                ip=f"10.231.0.{number}",
                port_name=f"port{number}",
                switch=switch,
                directory=directory / name,
            )
            host.directory.mkdir()
            hosts[name] = host
            _connect(host, is_slow=name in slow)
        yield hosts
    finally:
        _end_processes(hosts)
        for host in hosts.values():
            if host.relay is not None:
                host.relay.close()
        for space in [switch, *(host.space for host in hosts.values())]:
            subprocess.run(["ip", "netns", "del", space], capture_output=True)
        shutil.rmtree(directory, ignore_errors=True)


def start_node(
    host: Host,
    *,
    head: Host | None = None,
    num_cpus: int = 1,
    extra: Mapping[str, str] | None = None,
    **options: str,
) -> "subprocess.Popen[str]":
    """Run `loray node start` there, with a store of 100 MB; joins `head`, or is it."""
    words = ["loray", "node", "start", f"--num-cpus={num_cpus}", f"--host={host.ip}"]
    words += [f"--temp-dir={host.directory / 'ray'}", "--object-store-bytes=104857600"]
    words += [f"--address={head.ip}:{PORT}"] if head else ["--head"]
    words += [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    return host.start(words, extra)


def wait_for(condition: Callable[[], object], timeout_s: float, what: str) -> float:
    """Seconds until the condition held."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < timeout_s, f"{what}: not within {timeout_s:.0f} s"
        time.sleep(0.1)
    return time.monotonic() - started


def _connect(host: Host, *, is_slow: bool) -> None:
    _ip("netns", "add", host.space)
    if is_slow:
        near, far = f"{_PREFIX}{os.getpid()}s", f"{_PREFIX}{os.getpid()}h"
        host.relay = Relay(near, far)
        _ip("link", "set", near, "netns", host.switch, "name", host.port_name)
        _ip("link", "set", far, "netns", host.space, "name", "eth0")
    else:
        words = ["type", "veth", "peer", "name", "eth0", "netns", host.space]
        _ip("-n", host.switch, "link", "add", host.port_name, *words)
    _ip("-n", host.switch, "link", "set", host.port_name, "master", "br0", "up")
    _ip("-n", host.space, "addr", "add", f"{host.ip}/24", "dev", "eth0")
    for device in ("lo", "eth0"):
        _ip("-n", host.space, "link", "set", device, "up")


def _open_tap(name: str) -> int:
    descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    request = struct.pack("16sH22x", name.encode(), _IFF_TAP | _IFF_NO_PI)
    fcntl.ioctl(descriptor, _TUNSETIFF, request)
    return descriptor


def _end_processes(hosts: Mapping[str, Host]) -> None:
    """Ask what was started to end; kill what is left in the namespaces."""
    running = [process for host in hosts.values() for process in host.running]
    deadline = time.monotonic() + _STOP_S
    for patience_s in (1.0, _STOP_S):  # asked twice, a node does not wait for its work
        for process in running:
            process.terminate()
        for process in running:
            with suppress(subprocess.TimeoutExpired):
                process.wait(min(patience_s, max(0.0, deadline - time.monotonic())))
    for host in hosts.values():
        with suppress(subprocess.CalledProcessError):
            for pid in host.pids():
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
    for process in running:
        process.wait(_STOP_S)


def _remove_stale() -> None:
    """Namespaces and files of test processes that were killed."""

    def is_stale(name: str) -> bool:
        owner = name.removeprefix(_PREFIX).partition("-")[0]
        return name.startswith(_PREFIX) and owner.isdigit() and not psutil.pid_exists(int(owner))

    for path in Path("/tmp").glob(f"{_PREFIX}*"):
        if is_stale(path.name):
            shutil.rmtree(path, ignore_errors=True)
    for line in _ip("netns", "list").splitlines():
        space = line.split()[0]
        if is_stale(space):
            for pid in _ip("netns", "pids", space).split():
                with suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            subprocess.run(["ip", "netns", "del", space], capture_output=True)


@cache
def _missing() -> str:
    """Why there can be no test network here; empty where there can."""
    if not sys.platform.startswith("linux") or shutil.which("ip") is None:
        return "needs Linux with iproute2 (the command `ip`)"
    if os.geteuid() != 0:
        return "needs root, to make network namespaces"
    probe = f"{_PREFIX}{os.getpid()}-probe"
    try:
        _ip("netns", "add", probe)
        _ip("-n", probe, "link", "add", "br0", "type", "bridge")
        _ip("-n", probe, "link", "add", "v0", "type", "veth", "peer", "name", "v1")
    except subprocess.CalledProcessError as error:
        return f"network namespaces cannot be made here: {error.stderr.strip()}"
    finally:
        subprocess.run(["ip", "netns", "del", probe], capture_output=True)
    return ""


def _ip(*words: str) -> str:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=True, timeout=30)
    return done.stdout
