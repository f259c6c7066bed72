"""A Ray session: the cluster that was named, or a private one on this machine.

A private Ray lives in a directory of its own, listens on the loopback interface only, asks for a
fresh random token, and is gone with its files when the `with` block ends.

What is not covered: Ray Client addresses (`ray://`) and the Jobs API (`http://`); a driver runs
on a node of its cluster, or is submitted to it as a job (`cluster.jobs`).
"""

import logging
import os
import secrets
import socket
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from cluster.errors import ClusterError, ConfigError
from cluster.remote import is_url
from cluster.scratch import Scratch

REPOSITORY = Path(__file__).resolve().parent.parent
"""The directory that holds our packages."""


def _package(name: str) -> Path:
    """The directory of a package of ours; Ray unpacks each into a directory of its own."""
    beside = REPOSITORY / name
    found = None if beside.is_dir() else find_spec(name)
    return Path(found.origin).parent if found is not None and found.origin else beside


PACKAGES = tuple(_package(name) for name in ("cluster", "training", "tune_spaces", "serving"))
"""What a Ray worker must be able to import."""

_PRIVATE = "LORAY_PRIVATE_RAY"
"""Set in every process of a private Ray, so that those inside know where they are."""
_PROBE_TIMEOUT_S = 5.0
_OBJECT_STORE_BYTES = 128 << 20
_MAX_TEMPORARY_ROOT = 24
"""We and Ray add up to 80 bytes for sockets, whose paths may have 107."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Session:
    """A live connection to Ray and what the cluster has."""

    address: str
    """host:port of the cluster's control service (GCS)."""
    is_private: bool
    """Started for the outermost session, and stopped with it."""
    num_cpus: int
    """CPU cores that Ray may use, over all nodes."""
    num_gpus: int
    """GPUs that Ray may use, over all nodes."""
    num_nodes: int
    """Nodes that are alive."""
    jobs_api: str | None = None
    """Of a private Ray: where it takes jobs."""

    def __str__(self) -> str:
        where = "private Ray on this machine" if self.is_private else f"Ray at {self.address}"
        return f"{where}: {self.num_nodes} nodes, {self.num_cpus} CPUs, {self.num_gpus} GPUs"


@contextmanager
def connect(
    address: str | None = None, *, num_cpus: int | None = None, has_jobs_api: bool = False
) -> Iterator[Session]:
    """Connect to `address`, else to RAY_ADDRESS (which a Ray job has), else start a private Ray.

    `address` is host:port, or `auto` for the cluster that `ray start` started on this machine.
    `num_cpus` is the number of CPU cores a private Ray may use; null is all of them.
    `has_jobs_api`: a private Ray takes jobs, on the loopback interface, with its token. Inside an
    open session, `connect()` yields that session and leaves it open. Raises ClusterError where the
    cluster cannot be reached within about 15 s, refuses the token, or cannot be started.
    """
    import ray

    if ray.is_initialized():
        if address is not None:
            raise ClusterError(
                f"this process is connected to Ray already; it cannot connect to {address!r} too. "
                "Close the first session, or leave the address out"
            )
        yield _report(is_private=_PRIVATE in os.environ)
        return
    address = address or os.environ.get("RAY_ADDRESS") or None
    if address in (None, "local"):
        with _private(num_cpus, has_jobs_api=has_jobs_api):
            yield _report(is_private=True)
        return
    if num_cpus is not None:
        raise ClusterError(
            f"num_cpus is {num_cpus} for the running cluster {address!r}, which has its own "
            "CPUs; leave num_cpus out, or leave the address out and unset RAY_ADDRESS"
        )
    with _existing(address):
        yield _report(is_private=False)


def storage_root(storage: str) -> Path:
    """The directory that a recipe's `storage` means, a path or `file:///path`, absolute.

    A relative path starts at the current directory. In a Ray job that directory is an unpacked
    package, which Ray deletes when the job is over: there it starts at $LORAY_HOME, by default
    ~/loray, on the node that runs the job, and a log line says so. Raises ConfigError for the URL
    of an object store.
    """
    if is_url(storage):
        raise ConfigError(
            f"storage is {storage!r}; object stores hold training runs only, so name a directory "
            "here that every node sees"
        )
    path = Path(storage.removeprefix("file://")).expanduser()
    if path.is_absolute():
        return path
    here = Path.cwd()
    if not is_package_directory(here):
        return here / path
    home = Path(os.environ.get("LORAY_HOME") or "~/loray").expanduser().absolute()
    _log.warning(
        "storage=%s resolved_to=%s node=%s reason='the working directory of a Ray job is deleted "
        "after it; set LORAY_HOME or give an absolute storage path to choose another place'",
        storage,
        home / path,
        socket.gethostname(),
    )
    return home / path


def is_package_directory(directory: Path) -> bool:
    """Whether Ray unpacked this directory for a job, and will delete it."""
    names = directory.parts
    return "runtime_resources" in names or any(name.startswith("_ray_pkg_") for name in names)


@contextmanager
def _existing(address: str) -> Iterator[None]:
    import ray

    bootstrap = _bootstrap_address(address)
    _probe(bootstrap, given=address)
    _show_token(bootstrap)
    # A job's own runtime_env already brings the packages; elsewhere they are uploaded.
    is_job = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ
    runtime_env = None if is_job else {"py_modules": [str(path) for path in PACKAGES]}
    try:
        _init(address=bootstrap, runtime_env=runtime_env)
        yield
    finally:
        ray.shutdown()


def _bootstrap_address(address: str) -> str:
    """host:port as Ray resolves it: a loopback name becomes the address of this node."""
    from ray._private import services

    if "://" in address:
        raise ClusterError(
            f"Ray address {address!r} is not one that a driver can use; allowed: host:port or "
            "auto. From outside the cluster, submit the run as a job: "
            "--submit --address http://HOST:8265"
        )
    if address == "auto":
        try:
            return services.canonicalize_bootstrap_address_or_die("auto")
        except ConnectionError:
            raise ClusterError(
                "no Ray cluster runs on this machine, which address 'auto' asks for; start one "
                "with `ray start --head`, or unset RAY_ADDRESS to use a private one"
            ) from None
    host, colon, port = address.rpartition(":")
    if not (colon and host and port.isdigit() and 0 < int(port) < 1 << 16):
        raise ClusterError(f"Ray address {address!r} is not usable; allowed: host:port or auto")
    try:
        return f"{services.resolve_ip_for_localhost(host)}:{port}"
    except OSError as error:
        raise ClusterError(f"Ray address {address!r} cannot be resolved ({error})") from None


def _probe(address: str, *, given: str) -> None:
    """Say hello in HTTP/2 and wait for the answer: ray.init would try for two minutes (2.60)."""
    host, _, port = address.rpartition(":")
    hello = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))
    reason = "it does not speak gRPC"
    try:
        with socket.create_connection((host.strip("[]"), int(port)), _PROBE_TIMEOUT_S) as stream:
            stream.settimeout(_PROBE_TIMEOUT_S)
            if os.environ.get("RAY_USE_TLS", "0") in ("1", "true"):
                return
            stream.sendall(hello)
            if stream.recv(9)[3:4] == b"\x04":
                return
    except OSError as error:
        reason = str(error)
    raise ClusterError(
        f"Ray at {given} ({address}) cannot be reached: {reason}. Check that the head node is up "
        "(`ray status` there), the port is its GCS port (6379 by default) and no firewall is in "
        "between; or leave the address out and unset RAY_ADDRESS to use this machine alone"
    )


def _show_token(address: str) -> None:
    """Be refused at once: ray.init (2.60) would offer a wrong token for 20 s."""
    from ray import _raylet

    raylet: Any = _raylet  # A compiled module without type stubs.
    try:
        raylet.GcsClient(address=address)
    except Exception as error:
        if "authentic" not in f"{type(error).__name__} {error}".lower():
            raise ClusterError(
                f"Ray at {address} cannot be used: {_first_line(error)}. Check `ray status` on "
                "the head node, and that both sides run the same Ray"
            ) from error
        raise ClusterError(
            f"Ray at {address} refuses this process's token. Set RAY_AUTH_MODE=token, and "
            "RAY_AUTH_TOKEN_PATH to the file with the cluster's token"
        ) from None


@contextmanager
def _private(num_cpus: int | None, *, has_jobs_api: bool) -> Iterator[None]:
    """A Ray for this process alone. Nothing is left of it: no process, no file, no setting."""
    import ray

    root = tempfile.gettempdir()
    root = root if len(os.fsencode(root)) <= _MAX_TEMPORARY_ROOT else "/tmp"  # noqa: S108
    scratch = Scratch(Path(root))
    directory = scratch.path
    try:
        token = directory / "token"
        descriptor = os.open(token, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
        with os.fdopen(descriptor, "w") as stream:
            stream.write(secrets.token_hex(32))
        path = os.pathsep.join(filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH"))))
        variables = {
            _PRIVATE: "1",
            "PYTHONBREAKPOINT": os.environ.get("PYTHONBREAKPOINT"),  # ray.init sets it.
            "PYTHONPATH": path,
            "RAY_ADDRESS": None,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": None,
            "RAY_AUTH_TOKEN_PATH": str(token),
            # The controller runs in this process, whose logging is not Ray's to set up.
            "RAY_TRAIN_ENABLE_CONTROLLER_STRUCTURED_LOGGING": "0",
            "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # Nobody takes this machine away.
            # On two cores each process that wakes up takes time from the training (2.60).
            "RAY_enable_metrics_collection": "0",
            "RAY_prestart_worker_first_driver": "0",
            "RAY_raylet_report_resources_period_milliseconds": "1000",
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        with environment(variables), _loopback_only():
            forget_token()
            try:
                with _free_agent_port():
                    _init(
                        address="local",
                        num_cpus=num_cpus,
                        include_dashboard=has_jobs_api,
                        dashboard_host="127.0.0.1",
                        object_store_memory=_OBJECT_STORE_BYTES,
                        _temp_dir=str(directory / "r"),  # Ray 2.60 opens it to everybody.
                    )
                _end_idle_servers(has_jobs_api=has_jobs_api)
                yield
            finally:
                ray.shutdown()
    finally:
        scratch.remove()
        forget_token()


def _end_idle_servers(*, has_jobs_api: bool) -> None:
    """End the API server, which has nothing to serve, and the log monitor, which tells nobody.

    Ray 2.60 starts both whatever `include_dashboard` and `log_to_driver` say.
    """
    from ray._private import worker

    node: Any = worker._global_node
    if not has_jobs_api:
        node.kill_dashboard()
    node.kill_log_monitor()


def _init(**options: Any) -> None:
    import ray

    try:
        ray.init(logging_level=logging.WARNING, log_to_driver=False, **options)
    except (Exception, SystemExit) as error:  # 2.60 ends the process where the GCS goes silent.
        raise ClusterError(
            f"Ray at {options['address']} cannot be started or reached: "
            f"{type(error).__name__}: {_first_line(error)}. Check `ray status` on the head node, "
            "free memory and /dev/shm, and that both sides run the same Ray and Python"
        ) from error


def _report(*, is_private: bool) -> Session:
    import ray
    from ray._private import worker

    resources = ray.cluster_resources()
    url = worker.get_dashboard_url() if is_private else None
    return Session(
        address=ray.get_runtime_context().gcs_address,
        is_private=is_private,
        num_cpus=int(resources.get("CPU", 0)),
        num_gpus=int(resources.get("GPU", 0)),
        num_nodes=sum(bool(node["Alive"]) for node in ray.nodes()),
        jobs_api=f"http://{url}" if url else None,
    )


@contextmanager
def environment(variables: Mapping[str, str | None]) -> Iterator[None]:
    """Environment variables for the time of the block; None unsets one."""
    before = {name: os.environ.get(name) for name in variables}
    for name, value in variables.items():
        _set_variable(name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            _set_variable(name, value)


def _set_variable(name: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value


@contextmanager
def _loopback_only() -> Iterator[None]:
    """Bind Ray's servers to 127.0.0.1.

    Ray 2.60 turns any loopback address it is given into the node's own and then listens on all
    interfaces, save where RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0, which it reads when imported.
    """
    from ray._private import ray_constants

    name = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        with environment({name: "0"}):
            yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


@contextmanager
def _free_agent_port() -> Iterator[None]:
    """Have the agent of a Ray node that is started in the block listen on a port that is free.

    Ray (2.60) has it listen on 52365, for which `ray.init` has no word. Where another Ray of this
    machine has that port, the agent lives on without a server, and no job ever starts.
    """
    from ray._private import parameter

    before: Any = parameter.RayParams
    parameter.RayParams = partial(before, dashboard_agent_listen_port=0)  # pyright: ignore
    try:
        yield
    finally:
        parameter.RayParams = before


def forget_token() -> None:
    """Make Ray read RAY_AUTH_* again; it keeps the token and its mode for the process's life."""
    from ray import _raylet

    raylet: Any = _raylet  # A compiled module without type stubs.
    raylet.Config.initialize("")
    raylet.AuthenticationTokenLoader.instance().reset_cache()


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else "no further message"
