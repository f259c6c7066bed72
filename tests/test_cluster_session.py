"""The session: private Ray, addresses that lead nowhere, where storage goes."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import psutil
import pytest
from local_cluster import free_port

from cluster import jobs, session
from cluster.errors import ClusterError, ConfigError

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def _no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("RAY_")]:
        monkeypatch.delenv(name)


def _descendants(pid: int | None = None) -> set[psutil.Process]:
    return set(psutil.Process(pid).children(recursive=True))


@pytest.mark.ray
def test_private_session_is_loopback_only_asks_for_a_token_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    def packages() -> list[str]:  # Nested, so that Ray ships it by value.
        import cluster
        import serving
        import training
        import tune_spaces

        return [str(module.__file__) for module in (cluster, training, tune_spaces, serving)]

    def is_in_private_ray() -> bool:
        with session.connect() as nested:
            return nested.is_private

    monkeypatch.chdir(tmp_path)
    others = _descendants()
    packages()  # which sets a variable for torch
    before = dict(os.environ)
    with session.connect(num_cpus=2) as found:
        assert (found.is_private, found.num_cpus, found.num_nodes) == (True, 2, 1)
        assert str(found) == "private Ray on this machine: 1 nodes, 2 CPUs, 0 GPUs"
        token = Path(os.environ["RAY_AUTH_TOKEN_PATH"])
        assert (token.stat().st_mode & 0o777, len(token.read_text())) == (0o600, 64)
        assert token.parent.stat().st_mode & 0o777 == 0o700

        expected = [str(package / "__init__.py") for package in session.PACKAGES]
        assert packages() == expected
        assert ray.get(ray.remote(packages).remote(), timeout=60) == expected
        assert ray.get(ray.remote(is_in_private_ray).remote(), timeout=60)

        started = _descendants() - others
        listening = {
            connection.laddr.ip.removeprefix("::ffff:")
            for process in started
            for connection in process.net_connections("tcp")
            if connection.status == psutil.CONN_LISTEN
        }
        assert listening == {"127.0.0.1"}
        assert any("raylet" in process.name() for process in started)
    assert not ray.is_initialized()
    assert psutil.wait_procs(started, timeout=10)[1] == []
    assert not token.parent.exists()
    assert dict(os.environ) == before


DRIVER = """
import os, sys
from cluster import jobs, session
with session.connect(num_cpus=1):
    print(os.environ["RAY_AUTH_TOKEN_PATH"], flush=True)
    if sys.stdin.readline():
        raise ValueError("ends the block")
"""


def test_packages_are_found_also_where_each_has_a_directory_of_its_own(tmp_path: Path) -> None:
    """As in a worker of a cluster, from where the service submits its jobs."""
    unpacked = [
        tmp_path / f"_ray_pkg_{package.name}" / package.name for package in session.PACKAGES
    ]
    for package, copy in zip(session.PACKAGES, unpacked, strict=True):
        shutil.copytree(package, copy)
    roots = os.pathsep.join(str(copy.parent) for copy in unpacked)
    done = subprocess.run(
        [sys.executable, "-c", "from cluster.session import PACKAGES; print(*PACKAGES, sep='\\n')"],
        env={**os.environ, "PYTHONPATH": roots}, cwd=tmp_path,
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert done.stdout.splitlines() == [str(copy) for copy in unpacked]


@pytest.mark.ray
def test_a_private_ray_beside_another_takes_jobs() -> None:
    with ExitStack() as stack:
        with suppress(OSError):  # another Ray has it
            stack.enter_context(socket.create_server(("127.0.0.1", 52365)))
        found = stack.enter_context(session.connect(num_cpus=1, has_jobs_api=True))
        assert found.jobs_api is not None
        job = jobs.submit(["true"], address=found.jobs_api, working_dir=None)
        assert jobs.follow(job, address=found.jobs_api) == 0


@pytest.mark.ray
@pytest.mark.parametrize("end", ["exception", "ctrl-c"])
def test_private_ray_is_gone_after(end: str) -> None:
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER],
        cwd=REPOSITORY,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert driver.stdout is not None
    token = Path(driver.stdout.readline().strip())
    started = _descendants(driver.pid)
    assert token.exists()
    assert started
    if end == "ctrl-c":
        driver.send_signal(signal.SIGINT)
    _, errors = driver.communicate("now\n" if end == "exception" else None, timeout=60)
    assert ("KeyboardInterrupt" if end == "ctrl-c" else "ends the block") in errors
    assert psutil.wait_procs(started, timeout=10)[1] == []
    assert not token.parent.exists()


@contextmanager
def _listener() -> Iterator[int]:
    """A port that accepts connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0), backlog=8) as server:
        yield server.getsockname()[1]


def test_address_where_nobody_listens_is_an_error_within_seconds() -> None:
    address = f"127.0.0.1:{free_port()}"
    started = time.monotonic()
    with pytest.raises(ClusterError, match="cannot be reached") as caught:
        session.connect(address).__enter__()
    assert time.monotonic() - started < 15
    assert address in str(caught.value)
    assert "unset RAY_ADDRESS" in str(caught.value)


def test_server_that_says_nothing_is_an_error_within_seconds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from ray._private import ray_constants

    monkeypatch.setattr(ray_constants, "ENABLE_RAY_CLUSTER", False)  # Keeps 127.0.0.1 as it is.
    started = time.monotonic()
    with _listener() as port:
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")
        with pytest.raises(ClusterError, match="cannot be reached: timed out"):
            session.connect().__enter__()
    assert time.monotonic() - started < 15


@pytest.mark.parametrize(
    "address",
    ["http://127.0.0.1:8265", "ray://127.0.0.1:10001", "head", "head:port", "head:0", ":1"],
)
def test_address_that_a_driver_cannot_use_says_which_it_can(address: str) -> None:
    with pytest.raises(ClusterError, match=r"allowed: host:port or\sauto"):
        session.connect(address).__enter__()


def test_address_auto_without_a_cluster_says_how_to_start_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray._private import services

    def find_none() -> set[str]:
        return set()

    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.setattr(services, "find_gcs_addresses", find_none)
    with pytest.raises(ClusterError, match="ray start --head"):
        session.connect("auto").__enter__()


def test_num_cpus_of_a_running_cluster_is_refused() -> None:
    with pytest.raises(ClusterError, match="num_cpus is 2"):
        session.connect("127.0.0.1:6379", num_cpus=2).__enter__()


def test_storage_is_relative_to_the_current_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LORAY_HOME", "/elsewhere")
    assert session.storage_root("runs") == tmp_path / "runs"
    assert session.storage_root("/mnt/shared") == Path("/mnt/shared")
    assert session.storage_root("~/runs") == Path.home() / "runs"
    assert session.storage_root("file:///mnt/shared") == Path("/mnt/shared")


def test_an_object_store_is_not_taken_for_a_directory() -> None:
    with pytest.raises(ConfigError, match="object stores hold training runs only"):
        session.storage_root("s3://bucket/runs")


@pytest.mark.parametrize(
    ("home", "root"), [(None, Path.home() / "loray"), ("/data", Path("/data"))]
)
def test_storage_inside_a_job_package_goes_where_ray_does_not_delete_it(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    home: str | None,
    root: Path,
) -> None:
    package = tmp_path / "runtime_resources" / "working_dir_files" / "_ray_pkg_0123456789abcdef"
    package.mkdir(parents=True)
    monkeypatch.chdir(package)
    if home:
        monkeypatch.setenv("LORAY_HOME", home)
    else:
        monkeypatch.delenv("LORAY_HOME", raising=False)
    assert session.storage_root("runs") == root / "runs"
    assert f"resolved_to={root / 'runs'}" in caplog.text
