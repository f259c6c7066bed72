"""Jobs on a real local cluster that asks for a token."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from local_cluster import LocalCluster, free_port, local_cluster

from cluster import jobs, session
from cluster.errors import ClusterError

REPOSITORY = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.ray


@pytest.fixture(scope="session")
def local_ray() -> Iterator[LocalCluster]:
    """A running cluster, its token in this process's environment."""
    with local_cluster() as cluster, session.environment(cluster.credentials):
        session.forget_token()
        yield cluster
    session.forget_token()


@pytest.fixture(scope="session")
def ray_cluster(local_ray: LocalCluster) -> str:
    """Address of the Jobs API of a running cluster."""
    return local_ray.jobs_address


def _submit(code: str, address: str, working_dir: Path, *arguments: str) -> str:
    return jobs.submit(["python", "-c", code, *arguments], address=address, working_dir=working_dir)


def _python(code: str, *arguments: str, **environment: str | None) -> "subprocess.Popen[str]":
    variables = {**os.environ, "PYTHONPATH": str(REPOSITORY), **environment}
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        env={name: value for name, value in variables.items() if value is not None},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


IN_A_JOB = """
import json
from pathlib import Path
from cluster import session
def names():
    import cluster, serving, training, tune_spaces
    return [str(m.__file__) for m in (cluster, serving, training, tune_spaces)]
with session.connect() as found:
    import ray
    there = ray.get(ray.remote(names).remote(), timeout=60)
    print(json.dumps({
        "driver": names(), "worker": there, "cpus": found.num_cpus, "nodes": found.num_nodes,
        "private": found.is_private, "here": str(Path.cwd()),
        "storage": str(session.storage_root("runs")),
    }))
"""


def test_job_from_any_directory_brings_our_packages_to_driver_and_worker(
    ray_cluster: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "recipe.yaml").write_text("name: x\n")
    job_id = _submit(IN_A_JOB, ray_cluster, tmp_path)
    assert jobs.follow(job_id, address=ray_cluster) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("{"))
    seen = json.loads(line)
    assert len(seen["driver"]) == 4
    assert all("py_modules" in path for path in [*seen["driver"], *seen["worker"]])
    assert (seen["cpus"], seen["nodes"], seen["private"]) == (2, 1, False)
    assert session.is_package_directory(Path(seen["here"]))
    assert seen["storage"] == str(Path.home() / "loray" / "runs")


def test_ray_job_submit_runs_a_copy_of_this_repository(ray_cluster: str, tmp_path: Path) -> None:
    for package in session.PACKAGES:
        shutil.copytree(package, tmp_path / package.name, ignore=shutil.ignore_patterns("*.pyc"))
    ray = [sys.executable, "-m", "ray.scripts.scripts"]
    words = ["job", "submit", "--address", ray_cluster, "--working-dir", "."]
    done = subprocess.run(
        [*ray, *words, "--", "python", "-c", IN_A_JOB],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    line = next(line for line in done.stdout.splitlines() if line.startswith("{"))
    seen = json.loads(line)
    assert all("_ray_pkg_" in path for path in [*seen["driver"], *seen["worker"]])


def test_arguments_arrive_unchanged(
    ray_cluster: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["two words", "it's", '"quoted"', "$HOME;`true`", "a=b\nc", ""]
    code = "import json, sys; print(json.dumps(sys.argv[1:]))"
    job_id = _submit(code, ray_cluster, tmp_path, *words)
    assert jobs.follow(job_id, address=ray_cluster) == 0
    assert json.dumps(words) in capsys.readouterr().out


def test_working_directory_goes_along_without_caches_and_runs(
    ray_cluster: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("data/train.jsonl", "runs/x/big", ".venv/y", ".git/z", ".ruff_cache/w"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("{}")
    code = "from pathlib import Path; print(*(p for p in Path().rglob('*') if p.is_file()))"
    job_id = _submit(code, ray_cluster, tmp_path)
    assert jobs.follow(job_id, address=ray_cluster) == 0
    assert "data/train.jsonl\n" in capsys.readouterr().out


def test_failed_job_returns_its_exit_code_and_one_message(
    ray_cluster: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job_id = _submit("print('about to fail'); raise SystemExit(3)", ray_cluster, tmp_path)
    assert jobs.follow(job_id, address=ray_cluster) == 3
    captured = capsys.readouterr()
    assert "about to fail" in captured.out
    assert f"job {job_id} failed: Job entrypoint command failed with exit code 3\n" in captured.err
    assert "INFO" not in captured.err
    assert f"ray job logs --address {ray_cluster} {job_id}" in captured.err


FOLLOW = "import sys; from cluster import jobs; jobs.follow(sys.argv[1], address=sys.argv[2])"


def test_ctrl_c_detaches_and_stop_ends_the_job(
    ray_cluster: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wait = "import threading; print('waiting', flush=True); threading.Event().wait(120)"
    job_id = _submit(wait, ray_cluster, tmp_path)
    follower = _python(FOLLOW, job_id, ray_cluster)
    assert follower.stdout is not None
    while "waiting" not in (line := follower.stdout.readline()):
        assert line, "the log ended early"
    follower.send_signal(signal.SIGINT)
    _, errors = follower.communicate(timeout=30)
    assert "KeyboardInterrupt" in errors
    jobs.stop(job_id, address=ray_cluster)
    assert jobs.follow(job_id, address=ray_cluster) != 0
    assert f"job {job_id} was stopped" in capsys.readouterr().err
    jobs.stop(job_id, address=ray_cluster)


def test_unknown_job_is_an_error(ray_cluster: str) -> None:
    with pytest.raises(ClusterError, match="raysubmit_none"):
        jobs.stop("raysubmit_none", address=ray_cluster)


CATCH = """
import sys
from cluster.errors import ClusterError
try:
    {call}
except ClusterError as error:
    print("refused:", error)
"""


@pytest.mark.parametrize(
    ("mode", "token"), [(None, None), ("token", "0" * 32)], ids=["no token", "wrong token"]
)
def test_jobs_api_without_the_token_says_what_to_set(
    ray_cluster: str, mode: str | None, token: str | None
) -> None:
    code = CATCH.format(call="from cluster import jobs; jobs.stop('x', address=sys.argv[1])")
    process = _python(code, ray_cluster, RAY_AUTH_MODE=mode, RAY_AUTH_TOKEN=token)
    output, errors = process.communicate(timeout=60)
    assert "refused:" in output, errors
    assert "RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN" in output
    assert "0" * 32 not in output


@pytest.mark.parametrize(
    ("mode", "token"), [(None, None), ("token", "0" * 32)], ids=["no token", "wrong token"]
)
def test_driver_without_the_token_is_told_what_to_set(
    local_ray: LocalCluster, mode: str | None, token: str | None
) -> None:
    code = CATCH.format(
        call="from cluster import session; session.connect(sys.argv[1]).__enter__()"
    )
    process = _python(code, local_ray.gcs_address, RAY_AUTH_MODE=mode, RAY_AUTH_TOKEN=token)
    output, errors = process.communicate(timeout=30)
    assert "refused:" in output, errors
    assert "RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH" in output


def test_driver_outside_a_job_uploads_our_packages(
    local_ray: LocalCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with session.connect(local_ray.gcs_address) as found:
        import ray

        assert (found.is_private, found.num_cpus) == (False, 2)

        def where() -> str:
            import training

            return str(training.__file__)

        assert "py_modules" in ray.get(ray.remote(where).remote(), timeout=60)
        with pytest.raises(ClusterError, match="connected to Ray already"):
            session.connect(local_ray.gcs_address).__enter__()
        with session.connect() as same:
            assert same == found
        assert ray.is_initialized()
    assert not ray.is_initialized()


def test_jobs_api_that_is_down_is_an_error_that_says_what_to_check(tmp_path: Path) -> None:
    address = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(ClusterError, match="head node is up"):
        _submit("", address, tmp_path)


@pytest.mark.parametrize("address", ["127.0.0.1:8265", "ray://127.0.0.1:10001", "", "auto"])
def test_address_that_is_no_jobs_api_is_refused(address: str, tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match="allowed: the cluster's dashboard"):
        _submit("", address, tmp_path)
