"""Visits every node of a cluster: an actor pinned to each gathers its facts and is timed."""

import shutil
import socket
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster import facts
from cluster.errors import StorageError
from cluster.facts import Facts, Network

_VISIT_TIMEOUT_S = 120.0
_NUM_PINGS = 10
_PAYLOAD_BYTES = 8 << 20
_SEEN_TIMEOUT_S = 10.0
"""A file of another node may take a while to be seen (NFS caches directories for seconds)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Visit:
    """What was found on a node."""

    host: str
    is_head: bool
    is_driver: bool
    """The driver runs there."""
    num_gpus: int
    """GPUs that Ray counts."""
    object_store_bytes: int
    facts: Facts | None
    network: Network | None
    failure: str = ""
    """Why the node could not be visited."""


class Guest:
    """Runs on a node for the time of a visit."""

    def gather(self, servers: list[tuple[str, int]], **options: Any) -> Facts:
        import ray

        temp_dir = ray._private.worker._global_node.get_temp_dir_path()  # pyright: ignore
        return facts.gather(servers, temp_dir, **options)

    def now(self) -> float:
        return time.time()

    def take(self, payload: bytes) -> int:
        return len(payload)

    def give(self, num_bytes: int) -> bytes:
        return bytes(num_bytes)


def visit_all(storage: Path | None, *, clock: Callable[[], float] = time.time) -> list[Visit]:
    """Visit each node that is alive, one after the other; needs an open session.

    storage: a directory that all nodes should share. clock: the driver's. Raises StorageError
    where the driver itself cannot write there.
    """
    import ray

    nodes = [node for node in ray.nodes() if node["Alive"]]
    servers = [
        (str(node["NodeManagerAddress"]), int(node[port]))
        for node in nodes
        for port in ("NodeManagerPort", "ObjectManagerPort")
    ]
    shared = storage / f".loray-doctor-{uuid.uuid4().hex}" if storage else None
    lock = None
    try:
        if shared is not None:
            lock = facts.open_storage(shared, socket.gethostname())
        visits = [_visit(node, servers, shared, clock) for node in nodes]
        if shared is not None:
            visits = _look_back(visits, shared)
        return visits
    except OSError as error:
        raise StorageError(
            f"the driver cannot write and lock in {storage} ({error}); name a directory that all "
            "nodes share, on a file system with flock (local, NFS 4, Lustre with -o flock)"
        ) from error
    finally:
        if lock is not None:
            lock.release()
        if shared is not None:
            shutil.rmtree(shared, ignore_errors=True)


def _visit(
    node: dict[str, Any],
    servers: list[tuple[str, int]],
    storage: Path | None,
    clock: Callable[[], float],
) -> Visit:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    resources = node["Resources"]
    num_gpus = int(resources.get("GPU", 0))
    is_driver = node["NodeID"] == ray.get_runtime_context().get_node_id()
    about: dict[str, Any] = {
        "host": node["NodeManagerAddress"],
        "is_head": "node:__internal_head__" in resources,
        "is_driver": is_driver,
        "num_gpus": num_gpus,
        "object_store_bytes": int(resources.get("object_store_memory", 0)),
    }
    pinned: Any = NodeAffinitySchedulingStrategy(node_id=node["NodeID"], soft=False)
    guest: Any = ray.remote(num_cpus=0, scheduling_strategy=pinned)(Guest).remote()
    try:
        options = {"has_gpus": num_gpus > 0, "storage": storage}
        found: Any = ray.get(guest.gather.remote(servers, **options), timeout=_VISIT_TIMEOUT_S)
        network = _measure(guest, clock, is_driver=is_driver)
        return Visit(**about, facts=found, network=network)
    except Exception as error:  # whatever stops a node from being visited is the finding
        failure = f"{type(error).__name__}: {str(error).strip().splitlines()[-1:]}"
        return Visit(**about, facts=None, network=None, failure=failure)
    finally:
        ray.kill(guest)


def _measure(guest: Any, clock: Callable[[], float], *, is_driver: bool) -> Network:
    import ray

    best: tuple[float, float] | None = None
    for _ in range(_NUM_PINGS):
        sent, started = clock(), time.perf_counter()
        there: Any = ray.get(guest.now.remote(), timeout=_VISIT_TIMEOUT_S)
        trip_s = time.perf_counter() - started
        if best is None or trip_s < best[0]:
            best = trip_s, there - (sent + trip_s / 2)
    assert best is not None
    trip_s, skew_s = best
    rates: list[float | None] = [None, None]
    if not is_driver:
        started = time.perf_counter()
        ray.get(guest.take.remote(ray.put(bytes(_PAYLOAD_BYTES))), timeout=_VISIT_TIMEOUT_S)
        sent_s = time.perf_counter() - started
        started = time.perf_counter()
        ray.get(guest.give.remote(_PAYLOAD_BYTES), timeout=_VISIT_TIMEOUT_S)
        got_s = time.perf_counter() - started
        rates = [_PAYLOAD_BYTES * 8e-6 / max(s - trip_s, 1e-3) for s in (sent_s, got_s)]
    return Network(
        latency_ms=trip_s * 1e3,
        to_mbit_s=rates[0],
        from_mbit_s=rates[1],
        clock_skew_s=skew_s,
        clock_error_s=trip_s / 2,
    )


def _look_back(visits: list[Visit], shared: Path) -> list[Visit]:
    """Whether the driver sees what the nodes have written."""
    from dataclasses import replace

    writers = [v for v in visits if v.facts is not None and not v.facts.storage_problems]
    deadline = time.monotonic() + _SEEN_TIMEOUT_S
    while facts.num_files_seen(shared) < len(writers) and time.monotonic() < deadline:
        time.sleep(0.1)
    if facts.num_files_seen(shared) >= len(writers):
        return visits
    problem = "not every node's file is seen by the driver"
    return [
        replace(v, facts=replace(v.facts, storage_problems=(problem,)))
        if v in writers and v.facts is not None and not v.is_driver
        else v
        for v in visits
    ]
