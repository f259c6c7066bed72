"""What the doctor makes of facts that are made up, and what it finds in a real cluster."""

from dataclasses import replace
from pathlib import Path

import pytest
from netns import network, start_node, wait_for

import loray
from cluster import command, doctor, facts
from cluster.facts import Facts, Network
from cluster.survey import Visit

GIB = 1 << 30
VERSIONS = {
    "python": "3.11.7", "ray": "2.60.0", "torch": "2.13.0", "transformers": "5.23.0",
    "peft": "0.21.2", "bitsandbytes": "0.50.2", "deepspeed": None, "loray": "0.1.0",
}  # fmt: skip
FACTS = Facts(
    versions=VERSIONS,
    num_gpus_of_torch=2,
    max_open_files=65536,
    shm_bytes=8 * GIB,
    free_memory_bytes=20 * GIB,
    memory_bytes=32 * GIB,
    free_disk_bytes=50 * GIB,
    disk_bytes=100 * GIB,
    has_token=True,
    open_to_all=("raylet:40001",),
    unreachable=(),
    storage_problems=(),
)
NETWORK = Network(
    latency_ms=1.0, to_mbit_s=900.0, from_mbit_s=900.0, clock_skew_s=0.01, clock_error_s=0.001
)
VISIT = Visit(
    host="10.0.0.2",
    is_head=False,
    is_driver=False,
    num_gpus=2,
    object_store_bytes=8 * GIB,
    facts=FACTS,
    network=NETWORK,
)


def judge(**changes: object) -> list[doctor.Finding]:
    return doctor.judge([replace(VISIT, facts=replace(FACTS, **changes))], VERSIONS)  # pyright: ignore


def judge_network(**changes: float) -> list[doctor.Finding]:
    return doctor.judge([replace(VISIT, network=replace(NETWORK, **changes))], VERSIONS)


def test_a_healthy_node_has_no_findings() -> None:
    assert doctor.judge([VISIT, replace(VISIT, host="10.0.0.3")], VERSIONS) == []
    assert judge(storage_problems=None, num_gpus_of_torch=None) == []


@pytest.mark.parametrize(
    ("changes", "what", "do"),
    [
        ({"versions": {**VERSIONS, "torch": "2.12.0"}}, "torch is 2.12.0, the driver's is 2.13.0",
         "Install torch==2.13.0"),
        ({"versions": {**VERSIONS, "peft": None}}, "peft is missing", "Install peft==0.21.2"),
        ({"versions": {**VERSIONS, "python": "3.12.1"}}, "python is 3.12.1", "Install python"),
        ({"has_token": False}, "asks for no token, and whoever reaches raylet:40001",
         "loray node start"),
        ({"unreachable": ("10.0.0.3:41",)}, "cannot connect to 10.0.0.3:41", "reach each other"),
        ({"storage_problems": ("files cannot be locked (x)",)}, "storage: files cannot be locked",
         "Mount the same directory"),
        ({"num_gpus_of_torch": 0}, "Ray counts 2 GPUs, torch sees 0", "CUDA build of torch"),
        ({"free_disk_bytes": GIB}, "1.0 GiB are free where Ray keeps its files", "--temp-dir"),
    ],
)  # fmt: skip
def test_what_must_be_fixed_says_how(changes: dict[str, object], what: str, do: str) -> None:
    (finding,) = judge(**changes)
    assert finding.level == "fix"
    assert finding.host == "10.0.0.2"
    assert what in finding.what
    assert do in finding.do
    assert str(finding) == f"fix 10.0.0.2: {finding.what}. {finding.do}"


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"versions": {**VERSIONS, "python": "3.11.9"}}, "python is 3.11.9, the driver's 3.11.7"),
        ({"versions": {**VERSIONS, "deepspeed": "0.19.8"}}, "deepspeed is 0.19.8, the driver has"),
        ({"versions": {**VERSIONS, "loray": "0.2.0"}}, "loray is 0.2.0"),
        ({"num_gpus_of_torch": 3}, "torch sees 3 GPUs, Ray counts 2"),
        ({"max_open_files": 1024}, "1024 files"),
        ({"shm_bytes": GIB // 16}, "shared memory has 0.1 GiB"),
        ({"free_memory_bytes": GIB}, "1.0 GiB of memory are free"),
    ],
)
def test_what_should_be_better_is_a_warning(changes: dict[str, object], what: str) -> None:
    (finding,) = judge(**changes)
    assert finding.level == "warn"
    assert what in finding.what


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"clock_skew_s": -2.5}, "its clock is -2.5 s off"),
        ({"latency_ms": 80.0}, "a call takes 80 ms"),
        ({"to_mbit_s": 90.0}, "90 Mbit/s to it"),
        ({"from_mbit_s": 90.0}, "90 Mbit/s from it"),
    ],
)
def test_a_slow_link_or_a_wrong_clock_is_a_warning(changes: dict[str, float], what: str) -> None:
    (finding,) = judge_network(**changes)
    assert finding.level == "warn"
    assert what in finding.what


def test_a_clock_that_cannot_be_compared_is_not_blamed() -> None:
    assert judge_network(clock_skew_s=1.5, clock_error_s=0.8) == []


def test_what_must_be_fixed_comes_first_and_a_node_that_is_not_visited_must() -> None:
    slow = replace(VISIT, network=replace(NETWORK, latency_ms=80.0))
    lost = replace(VISIT, host="10.0.0.9", facts=None, network=None, failure="GetTimeoutError")
    levels = [(f.level, f.host) for f in doctor.judge([slow, lost], VERSIONS)]
    assert levels == [("fix", "10.0.0.9"), ("warn", "10.0.0.2")]


def test_storage_that_is_not_shared_is_told(tmp_path: Path) -> None:
    lock = facts.open_storage(tmp_path / "shared", "driver")
    try:
        assert facts.check_storage(tmp_path / "shared", 1) == ()
        assert facts.num_files_seen(tmp_path / "shared") == 1
        (problem,) = facts.check_storage(tmp_path / "another", 2)
        assert "not seen" in problem
    finally:
        lock.release()
    (problem,) = facts.check_storage(tmp_path / "shared", 3)
    assert "given away a second time" in problem


def test_the_doctor_wants_a_recipe_or_a_cluster(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.run(loray.app, ["doctor"]) == 2
    assert command.run(loray.app, ["doctor", "--address", "10.0.0.1:6379"]) == 2
    assert "--cluster" in capsys.readouterr().err


WRONG_CLOCK = """
import time
real = time.time
time.time = lambda: real() + 30
"""


@pytest.mark.ray
def test_the_doctor_finds_the_node_that_is_not_like_the_others(tmp_path: Path) -> None:
    """Node b has another peft and a clock that is 30 s ahead, both by way of its PYTHONPATH."""
    shadow = tmp_path / "shadow"
    (shadow / "peft-0.1.0.dist-info").mkdir(parents=True)
    metadata = "Metadata-Version: 2.1\nName: peft\nVersion: 0.1.0\n"
    (shadow / "peft-0.1.0.dist-info" / "METADATA").write_text(metadata)
    (shadow / "sitecustomize.py").write_text(WRONG_CLOCK)
    with network("a", "b") as hosts:
        a, b = hosts["a"], hosts["b"]
        start_node(a)
        wait_for(lambda: "event=node_up" in a.said(), 60, "head")
        start_node(b, head=a, extra={"PYTHONPATH": str(shadow)})
        wait_for(lambda: "event=node_up" in b.said(), 60, "node b")
        words = ["loray", "doctor", "--cluster", f"--address={a.ip}:6379"]
        words += [f"--storage={tmp_path}"]
        examined = a.start(words, {"COLUMNS": "250"}, log="doctor")
        status, said = examined.wait(120), a.said("doctor")
        assert status == 1, said
        own = facts.versions()["peft"]
        assert f"fix {b.ip}: peft is 0.1.0, the driver's is {own}" in said
        assert f"warn {b.ip}: its clock is +30." in said
        assert f"{a.ip} (head) *" in said
        findings = [line for line in said.splitlines() if line.startswith(("fix", "warn"))]
        assert not any("storage" in line or "connect" in line for line in findings), said
        assert not list(tmp_path.glob(".loray-doctor-*"))
