"""Whose a run in an object store is: refused, released, expired, taken over, lost."""

import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from processes import wait_until

from cluster.errors import RunInUseError, StorageError
from cluster.lease import Lease
from cluster.remote import Remote

if TYPE_CHECKING:
    from s3_server import S3Server

URL = "s3://bucket/runs/one"


@pytest.fixture
def machines(tmp_path: Path) -> tuple[Path, Path]:
    """The run's local directory on two machines."""
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
    return tmp_path / "first", tmp_path / "second"


def test_a_second_driver_is_refused_and_told_who_has_the_run(
    s3: "S3Server", machines: tuple[Path, Path]
) -> None:
    with Lease(Remote(URL), machines[0]) as lease:
        with (
            pytest.raises(RunInUseError, match=r"in use by process \d+ on .*, which started"),
            Lease(Remote(URL), machines[1]),
        ):
            pass
        lease.require()
    assert s3.objects() == []
    with Lease(Remote(URL), machines[1]) as lease:
        lease.require()
    assert not list(machines[0].iterdir())


def test_a_lease_is_renewed_while_it_is_held(s3: "S3Server", machines: tuple[Path, Path]) -> None:
    with Lease(Remote(URL), machines[0], renew_s=0.05):
        s3.requests.clear()
        wait_until(lambda: len(s3.puts()) >= 3)
    assert set(s3.puts()) == {"runs/one/leases/000001"}


def test_a_silent_driver_is_taken_over_after_the_time_of_the_store(
    s3: "S3Server", machines: tuple[Path, Path]
) -> None:
    lost = Lease(Remote(URL), machines[0], ttl_s=2.0, renew_s=1000.0)
    with lost:
        with pytest.raises(RunInUseError), Lease(Remote(URL), machines[1], ttl_s=2.0):
            pass
        wait_until(lambda: Remote(URL).age_s("leases/000001") >= 3.0)
        with Lease(Remote(URL), machines[1], ttl_s=2.0) as taken:
            taken.require()
            with pytest.raises(StorageError, match="could not be reached for 2 s"):
                lost.require()


def test_who_was_taken_over_hears_of_it_and_does_not_take_it_back(
    s3: "S3Server", machines: tuple[Path, Path]
) -> None:
    with Lease(Remote(URL), machines[0], renew_s=0.05) as lease:
        s3.put("runs/one/leases/000002", b"{}")

        def is_told() -> bool:
            try:
                lease.require()
            except RunInUseError:
                return True
            return False

        wait_until(is_told)
    assert s3.objects() == ["runs/one/leases/000002"]


def test_a_driver_that_was_silent_too_long_does_not_renew(
    s3: "S3Server", machines: tuple[Path, Path]
) -> None:
    now = [0.0]
    with Lease(Remote(URL), machines[0], renew_s=0.05, clock=lambda: now[0]) as lease:
        lease.require()
        now[0] = 55.0  # as after a suspension
        time.sleep(0.2)
        s3.requests.clear()
        time.sleep(0.2)
        assert s3.puts() == []
        with pytest.raises(StorageError, match="same command resumes"):
            lease.require()


def test_a_store_that_is_gone_loses_the_lease(s3: "S3Server", machines: tuple[Path, Path]) -> None:
    with Lease(Remote(URL), machines[0], ttl_s=1.0, renew_s=0.05) as lease:
        s3.fault = lambda _: 503

        def is_lost() -> bool:
            try:
                lease.require()
            except StorageError:
                return True
            return False

        wait_until(is_lost)
        s3.fault = None


def test_a_driver_killed_on_this_machine_is_not_waited_for(
    s3: "S3Server", machines: tuple[Path, Path]
) -> None:
    dead = Lease(Remote(URL), machines[0], renew_s=1000.0)
    dead.__enter__()  # and it never leaves
    with Lease(Remote(URL), machines[0]) as lease:
        lease.require()
    assert s3.objects() == []


def test_of_two_drivers_at_the_same_moment_one_has_the_run(
    s3: "S3Server", machines: tuple[Path, Path]
) -> None:
    gate, done = threading.Barrier(2), threading.Barrier(2)
    outcomes: list[str] = []

    def drive(machine: Path) -> None:
        lease = Lease(Remote(URL), machine)
        gate.wait(10)
        try:
            with lease:
                outcomes.append("has it")
                done.wait(30)
        except RunInUseError:
            outcomes.append("refused")
            done.wait(30)

    threads = [threading.Thread(target=drive, args=(machine,)) for machine in machines]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(outcomes) == ["has it", "refused"]
    assert s3.objects() == []
