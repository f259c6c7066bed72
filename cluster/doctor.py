"""What the facts of a cluster's nodes mean: findings, each with what to do. Pure.

What is not covered: whether a node is fast enough for a given run; that is `scripts/bench`.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from cluster.facts import Facts, Network
from cluster.survey import Visit

_MAX_SKEW_S = 1.0
_MAX_LATENCY_MS = 50.0
_MIN_MBIT_S = 500.0
_MIN_OPEN_FILES = 4096
_MIN_FREE_MEMORY = 0.1
_MIN_FREE_DISK = 0.05
"""Ray (2.60) gives a node no more work from here on."""
_MUST_BE_EQUAL = ("python", "ray", "torch", "transformers", "peft", "bitsandbytes", "deepspeed")


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """Something about a node that is not as it should be."""

    level: Literal["fix", "warn"]
    """`fix`: work on the cluster fails or is unsafe until it is done."""
    host: str
    what: str
    do: str

    def __str__(self) -> str:
        return f"{self.level} {self.host}: {self.what}. {self.do}"


def judge(visits: Sequence[Visit], own_versions: Mapping[str, str | None]) -> list[Finding]:
    """What should be changed, what must be fixed first.

    own_versions: of the driver, to which the nodes are compared.
    """
    found: list[Finding] = []
    for visit in visits:
        if visit.facts is None:
            do = "Look at `loray node`'s log there and at `ray status`"
            failure = f"could not be visited ({visit.failure})"
            found.append(Finding(level="fix", host=visit.host, what=failure, do=do))
            continue
        for level, what, do in (
            *_versions(visit.facts, own_versions),
            *_safety(visit.facts),
            *_storage(visit.facts),
            *_resources(visit, visit.facts),
            *(_network(visit.network) if visit.network else ()),
        ):
            found.append(Finding(level=level, host=visit.host, what=what, do=do))
    return sorted(found, key=lambda finding: finding.level != "fix")


_Verdict = tuple[Literal["fix", "warn"], str, str]


def _versions(facts: Facts, own: Mapping[str, str | None]) -> Iterator[_Verdict]:
    for name in _MUST_BE_EQUAL:
        here, there = own.get(name), facts.versions.get(name)
        if here == there:
            continue
        is_patch = name == "python" and _minor(here) == _minor(there)
        if is_patch:
            yield "warn", f"python is {there}, the driver's {here}", "Use one patch release"
        elif here is None:
            do = f"Install {name} on the driver too, or remove it there, so that all are alike"
            yield "warn", f"{name} is {there}, the driver has none", do
        else:
            do = f"Install {name}=={here} there: pip install -c constraints.txt"
            yield "fix", f"{name} is {there or 'missing'}, the driver's is {here}", do
    here, there = own.get("loray"), facts.versions.get("loray")
    if there is not None and here != there:
        do = "Jobs bring the driver's own; install one version where the command is used"
        yield "warn", f"loray is {there}, the driver's is {here}", do


def _safety(facts: Facts) -> Iterator[_Verdict]:
    if not facts.has_token:
        open_to_all = ", ".join(facts.open_to_all) or "its ports"
        yield (
            "fix",
            f"Ray asks for no token, and whoever reaches {open_to_all} runs code there",
            "Start the nodes with `loray node start`, or with RAY_AUTH_MODE=token",
        )
    if facts.unreachable:
        yield (
            "fix",
            f"it cannot connect to {', '.join(facts.unreachable)}",
            "Let the cluster's nodes reach each other on all TCP ports, and nobody else",
        )


def _storage(facts: Facts) -> Iterator[_Verdict]:
    for problem in facts.storage_problems or ():
        do = "Mount the same directory on every node (NFS 4, or Lustre with -o flock)"
        yield "fix", f"storage: {problem}", do


def _resources(visit: Visit, facts: Facts) -> Iterator[_Verdict]:
    seen = facts.num_gpus_of_torch
    if seen is not None and seen < visit.num_gpus:
        do = "Install the CUDA build of torch and a driver that fits it (`nvidia-smi`)"
        yield "fix", f"Ray counts {visit.num_gpus} GPUs, torch sees {seen}", do
    if seen is not None and seen > visit.num_gpus:
        do = f"Start the node with --num-gpus={seen} to use them"
        yield "warn", f"torch sees {seen} GPUs, Ray counts {visit.num_gpus}", do
    if facts.max_open_files < _MIN_OPEN_FILES:
        do = "Set LimitNOFILE=65536 in its systemd unit, or `ulimit -n 65536`"
        yield "warn", f"a process may open {facts.max_open_files} files only", do
    if facts.shm_bytes < visit.object_store_bytes:
        yield (
            "warn",
            f"shared memory has {_gib(facts.shm_bytes)}, less than the object store's "
            f"{_gib(visit.object_store_bytes)}, so that Ray uses the disk",
            "Enlarge it (docker: --shm-size), or lower --object-store-bytes",
        )
    if facts.free_memory_bytes < _MIN_FREE_MEMORY * facts.memory_bytes:
        do = "End what else runs there; Ray kills workers from 95 % on"
        yield "warn", f"{_gib(facts.free_memory_bytes)} of memory are free", do
    if facts.free_disk_bytes < _MIN_FREE_DISK * facts.disk_bytes:
        do = "Free space there, or start the node with another --temp-dir"
        yield "fix", f"{_gib(facts.free_disk_bytes)} are free where Ray keeps its files", do


def _network(network: Network) -> Iterator[_Verdict]:
    if abs(network.clock_skew_s) - network.clock_error_s > _MAX_SKEW_S:
        do = "Let both follow a time server (chrony, systemd-timesyncd)"
        yield "warn", f"its clock is {network.clock_skew_s:+.1f} s off the driver's", do
    if network.latency_ms > _MAX_LATENCY_MS:
        do = "Training across it is slow: use nodes that are near each other"
        yield "warn", f"a call takes {network.latency_ms:.0f} ms", do
    for rate, way in ((network.to_mbit_s, "to"), (network.from_mbit_s, "from")):
        if rate is not None and rate < _MIN_MBIT_S:
            do = "Loading and gradients wait for it; check the link, or train on one node"
            yield "warn", f"{rate:.0f} Mbit/s {way} it", do


def _minor(version: str | None) -> str:
    return (version or "").rpartition(".")[0]


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.1f} GiB"
