"""What a node is like, gathered on the node itself in plain Python; judged in `cluster.doctor`."""

import os
import platform
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import psutil
from filelock import FileLock, Timeout

LIBRARIES = ("ray", "torch", "transformers", "peft", "bitsandbytes", "deepspeed", "loray")
_CONNECT_TIMEOUT_S = 3.0
_TORCH_TIMEOUT_S = 60.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Network:
    """A node as the driver sees it over the network."""

    latency_ms: float
    """Of the quickest of some calls there and back."""
    to_mbit_s: float | None
    """Of an object from the driver's node to this one; None on the driver's own node."""
    from_mbit_s: float | None
    """The other way round."""
    clock_skew_s: float
    """This node's clock minus the driver's."""
    clock_error_s: float
    """How far off that may be."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """A node as it sees itself."""

    versions: dict[str, str | None]
    """Of Python and LIBRARIES; None where one is not installed."""
    num_gpus_of_torch: int | None
    """GPUs that torch sees; None where there is no sign of any."""
    max_open_files: int
    shm_bytes: int
    """Size of /dev/shm; 0 where there is none."""
    free_memory_bytes: int
    memory_bytes: int
    free_disk_bytes: int
    """Where Ray keeps its files."""
    disk_bytes: int
    has_token: bool
    """Ray asks for a token."""
    open_to_all: tuple[str, ...]
    """`name:port` of Ray's servers here that listen on more than the loopback interface."""
    unreachable: tuple[str, ...]
    """host:port of other nodes' servers that this node cannot connect to."""
    storage_problems: tuple[str, ...] | None
    """What does not work in the shared directory; None where none was named."""


def gather(
    servers: Sequence[tuple[str, int]],
    temp_dir: str,
    *,
    has_gpus: bool,
    storage: Path | None,
) -> Facts:
    """The facts of the machine that this runs on.

    servers: host and port of every node's servers. temp_dir: where Ray keeps its files. has_gpus:
    Ray counts GPUs here. storage: the directory that `open_storage` made.
    """
    memory, disk = psutil.virtual_memory(), shutil.disk_usage(temp_dir)
    shm = Path("/dev/shm")  # noqa: S108
    wants_gpus = has_gpus or Path("/dev/nvidia0").exists()
    return Facts(
        versions=versions(),
        num_gpus_of_torch=_num_gpus_of_torch() if wants_gpus else None,
        max_open_files=_max_open_files(),
        shm_bytes=shutil.disk_usage(shm).total if shm.exists() else 0,
        free_memory_bytes=memory.available,
        memory_bytes=memory.total,
        free_disk_bytes=disk.free,
        disk_bytes=disk.total,
        has_token=os.environ.get("RAY_AUTH_MODE", "").lower() == "token",
        open_to_all=_open_to_all(),
        unreachable=tuple(f"{host}:{port}" for host, port in servers if not _reaches(host, port)),
        storage_problems=None if storage is None else check_storage(storage, time.time_ns()),
    )


def versions() -> dict[str, str | None]:
    """Versions of Python and LIBRARIES as they are installed here."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def open_storage(directory: Path, driver: str) -> FileLock:
    """Make the directory that nodes check, with a file in it and a lock; the lock, held."""
    directory.mkdir(parents=True)
    (directory / "driver").write_text(driver, encoding="utf-8")
    lock = FileLock(directory / "lock", blocking=False, fallback_to_soft=False)
    lock.acquire()
    return lock


def check_storage(directory: Path, nonce: int) -> tuple[str, ...]:
    """What does not work in a directory that `open_storage` made on another machine."""
    problems: list[str] = []
    if not (directory / "driver").exists():
        return ("a file that the driver has written is not seen",)
    name = f"{socket.gethostname()}-{os.getpid()}-{nonce}"
    try:
        with (directory / name).open("w", encoding="utf-8") as stream:
            stream.write(name)
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        problems.append(f"a file cannot be written and synced ({error})")
    try:
        with FileLock(directory / "lock", blocking=False, fallback_to_soft=False):
            problems.append("a lock (flock) that the driver holds is given away a second time")
    except Timeout:
        pass
    except OSError as error:
        problems.append(f"files cannot be locked ({error})")
    return tuple(problems)


def num_files_seen(directory: Path) -> int:
    """How many nodes' files are in a directory that `open_storage` made."""
    return sum(path.name not in ("driver", "lock") for path in directory.iterdir())


def _max_open_files() -> int:
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return sys.maxsize if soft == resource.RLIM_INFINITY else soft


def _num_gpus_of_torch() -> int:
    """In a process of its own: Ray hides the GPUs from one that has reserved none."""
    code = "import torch; print(torch.cuda.device_count())"
    env = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    try:
        done = subprocess.run(  # noqa: S603  (words of our own)
            [sys.executable, "-c", code],
            env=env,
            capture_output=True,
            text=True,
            timeout=_TORCH_TIMEOUT_S,
        )
        return int(done.stdout) if done.returncode == 0 else 0
    except (subprocess.TimeoutExpired, ValueError):
        return 0


def _open_to_all() -> tuple[str, ...]:
    found = set()
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            name = process.name()
            if name not in ("gcs_server", "raylet") and "ray" not in " ".join(process.cmdline()):
                continue
            for connection in process.net_connections("tcp"):
                host = connection.laddr[0].removeprefix("::ffff:") if connection.laddr else ""
                is_loopback = host.startswith("127.") or host == "::1"
                if connection.status == psutil.CONN_LISTEN and not is_loopback:
                    found.add(f"{name.split()[0]}:{connection.laddr[1]}")
    return tuple(sorted(found))


def _reaches(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), _CONNECT_TIMEOUT_S).close()
    except OSError:
        return False
    return True
