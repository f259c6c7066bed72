"""The supervisor of a node: what it refuses, and a head of its own on the loopback interface."""

import os
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import chaos
import psutil
import pytest
import requests
from local_cluster import free_port
from processes import wait_until

import loray
from cluster import command, node
from cluster.errors import ConfigError


def settings(token_file: Path, **options: object) -> node.NodeSettings:
    return node.NodeSettings(token_file=token_file, **options)  # pyright: ignore


def test_the_head_makes_a_token_that_only_its_owner_reads(tmp_path: Path) -> None:
    path = tmp_path / "ray" / "token"
    assert node.require_token(settings(path))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    token = path.read_text()
    assert len(token) == 64
    assert not node.require_token(settings(path))
    assert path.read_text() == token


def test_a_token_that_others_can_read_is_closed(tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text("0" * 64)
    path.chmod(0o644)
    assert not node.require_token(settings(path))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_node_without_the_heads_token_is_told_where_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="copy the head's token there"):
        node.require_token(settings(tmp_path / "token", address="10.0.0.1:6379"))
    assert not (tmp_path / "token").exists()


def test_an_empty_token_is_refused(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("\n")
    with pytest.raises(ConfigError, match="is empty"):
        node.require_token(settings(tmp_path / "token"))


@pytest.mark.parametrize("address", ["head", "10.0.0.1", ":6379", "10.0.0.1:0", "10.0.0.1:port"])
def test_an_address_that_is_not_host_and_port_is_refused(tmp_path: Path, address: str) -> None:
    for name in ("address", "redis"):
        with pytest.raises(ConfigError, match="allowed: HOST:PORT"):
            settings(tmp_path / "token", **{name: address})


def test_redis_is_for_the_head_alone(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="for the head"):
        settings(tmp_path, address="10.0.0.1:6379", redis="10.0.0.1:6380")


@pytest.mark.parametrize("words", [(), ("--head", "--address", "10.0.0.1:6379")])
def test_a_node_is_either_the_head_or_joins_one(
    words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.run(loray.app, ["node", "start", *words]) == 1
    assert "one of --head and --address" in capsys.readouterr().err


def test_only_the_head_has_the_timings_and_a_variable_of_the_same_name_wins(
    tmp_path: Path,
) -> None:
    base = {"RAY_health_check_period_ms": "5000", "RAY_ADDRESS": "x:1", "RAY_AUTH_TOKEN": "secret"}
    env = node.environment(settings(tmp_path / "token", redis="r:6380"), base)
    assert env["RAY_health_check_period_ms"] == "5000"
    assert env["RAY_health_check_timeout_ms"] == "2000"
    assert env["RAY_REDIS_ADDRESS"] == "r:6380"
    assert (env["RAY_AUTH_MODE"], env["RAY_AUTH_TOKEN_PATH"]) == ("token", str(tmp_path / "token"))
    assert not {"RAY_ADDRESS", "RAY_AUTH_TOKEN"} & set(env)
    env = node.environment(settings(tmp_path / "token", address="h:6379"), {})
    assert not any(name.startswith("RAY_health_check") for name in env)


def test_a_dead_node_is_noticed_within_15_s_by_the_shipped_timings() -> None:
    period_ms, timeout_ms, threshold = (
        int(node.HEAD_TIMINGS[f"RAY_health_check_{name}"])
        for name in ("period_ms", "timeout_ms", "failure_threshold")
    )
    assert period_ms + threshold * timeout_ms + (threshold - 1) * period_ms < 15_000


@pytest.fixture
def head(tmp_path: Path) -> "Iterator[subprocess.Popen[str]]":
    """`loray node start --head` on free ports of the loopback interface; its log is `log`."""
    temp_dir = tempfile.mkdtemp(prefix="lr-", dir="/tmp")  # sockets have short paths
    words = ["loray", "node", "start", "--head", "--host=127.0.0.1", f"--port={free_port()}"]
    words += [f"--dashboard-port={free_port()}", "--num-cpus=1", f"--temp-dir={temp_dir}"]
    words += ["--object-store-bytes=104857600", f"--token-file={tmp_path / 'token'}"]
    environment = {n: v for n, v in os.environ.items() if not n.startswith("RAY_")}
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", *words],
            env={**environment, "PYTHONPATH": str(Path(loray.__file__).parent)},
            cwd=tmp_path,
            text=True,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        left = offspring_of(process)
        process.kill()
        process.wait(30)
        for other in left:
            if other.is_running():
                other.kill()
        subprocess.run(["rm", "-rf", temp_dir], check=True)


def offspring_of(process: "subprocess.Popen[str]") -> list[psutil.Process]:
    try:
        return psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def port_of(process: "subprocess.Popen[str]", name: str) -> int:
    words = process.args
    assert isinstance(words, list)
    return next(int(w.partition("=")[2]) for w in map(str, words) if w.startswith(f"--{name}="))


def wait_until_up(process: "subprocess.Popen[str]", log: Path, times: int) -> None:
    wait_until(lambda: log.read_text().count("event=node_up") >= times, process)


@pytest.mark.ray
@pytest.mark.chaos
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds orphans on Linux only")
@pytest.mark.parametrize(
    "number",
    [
        signal.SIGKILL,
        # `ray start` goes on without it
        pytest.param(signal.SIGTERM, marks=chaos.full),
        # it hangs, and the head declares it dead
        pytest.param(signal.SIGSTOP, marks=chaos.full),
    ],
)
def test_a_node_whose_raylet_is_lost_comes_back_and_ends_without_a_trace(
    head: "subprocess.Popen[str]", tmp_path: Path, number: signal.Signals
) -> None:
    log = tmp_path / "log"
    wait_until_up(head, log, 1)
    before = offspring_of(head)
    raylet = next(process for process in before if process.name() == "raylet")
    raylet.send_signal(number)
    killed = time.monotonic()
    wait_until_up(head, log, 2)
    assert time.monotonic() - killed < 60
    assert psutil.wait_procs(before, timeout=1)[1] == []
    after = offspring_of(head)
    assert any(process.name() == "raylet" for process in after)
    head.send_signal(signal.SIGTERM)
    assert head.wait(60) == 0, log.read_text()
    assert psutil.wait_procs(after, timeout=1)[1] == []
    lines = log.read_text().splitlines()
    events = [word for line in lines for word in line.split() if word.startswith("event=")]
    hiccups = ("event=head_silent", "event=head_answers")  # on a busy machine it may take 2 s
    events = [event for event in events if event not in hiccups]
    expected = ("token_made", "node_up", "node_down", "node_restarts", "node_up", "node_stopped")
    assert events == [f"event={name}" for name in expected]
    assert (tmp_path / "token").read_text() not in log.read_text()


@pytest.mark.ray
@pytest.mark.chaos
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="children follow on Linux only")
def test_a_head_asks_for_its_token_and_ends_with_a_supervisor_that_is_killed(
    head: "subprocess.Popen[str]", tmp_path: Path
) -> None:
    wait_until_up(head, tmp_path / "log", 1)
    address = f"127.0.0.1:{port_of(head, 'port')}"
    jobs = f"http://127.0.0.1:{port_of(head, 'dashboard-port')}/api/jobs/"
    token = (tmp_path / "token").read_text()
    assert requests.get(jobs, timeout=30).status_code == 401
    headers = {"Authorization": f"Bearer {token}"}
    assert requests.get(jobs, headers=headers, timeout=30).json() == []
    code = "import sys; from cluster import members; print(members.ask(sys.argv[1], timeout_s=9))"
    for known, answer in (("0" * 64, "UNAUTHENTICATED"), (token, "is_alive=True")):
        environment = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": known}
        environment["PYTHONPATH"] = str(Path(loray.__file__).parent)
        words = [sys.executable, "-c", code, address]
        done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=60)
        assert answer in done.stdout + done.stderr
    before = offspring_of(head)
    head.kill()
    assert psutil.wait_procs(before, timeout=30)[1] == []
