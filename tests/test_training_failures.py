"""Whether a failed worker is started again, and what is told in the end."""

import pickle
from pathlib import Path

import pytest
from ray.exceptions import ActorDiedError, RayTaskError
from ray.train import FailureConfig
from ray.train.v2._internal.exceptions import (
    WorkerGroupStartupFailedError,
    WorkerGroupStartupTimeoutError,
    WorkerHealthCheckFailedError,
)
from ray.train.v2._internal.execution.failure_handling import FailureDecision
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

from cluster.errors import ResourceError, StorageError
from training import failures, memory
from training.failures import FailurePolicy
from training.loop import ToldToEnd

# Ray 2.60 warns itself when it copies its own data context.
pytestmark = pytest.mark.filterwarnings("ignore:`use_.*` is deprecated:DeprecationWarning")


def policy(run_dir: Path, max_failures: int = 1) -> FailurePolicy:
    return FailurePolicy(FailureConfig(max_failures=max_failures), run_dir)


def failed(error: Exception, text: str = "a worker died") -> WorkerGroupError:
    """As it comes back from a controller in another process."""
    return pickle.loads(pickle.dumps(WorkerGroupError(text, {1: error})))


def test_an_error_that_a_retry_cannot_mend_ends_the_run_and_is_told(tmp_path: Path) -> None:
    full = failed(StorageError("the disk is full"))
    assert policy(tmp_path).make_decision(full) == FailureDecision.RAISE
    told = failures.reason(full)
    assert isinstance(told, StorageError)
    assert str(told) == "the disk is full"
    assert failures.reason(failed(ValueError("a bug"))) is None
    assert failures.reason(None) is None


def test_other_failures_are_tried_again_as_often_as_the_recipe_says(tmp_path: Path) -> None:
    decide = policy(tmp_path, max_failures=2).make_decision
    decisions = [decide(failed(ValueError("a bug"))) for _ in range(3)]
    assert decisions == [FailureDecision.RETRY, FailureDecision.RETRY, FailureDecision.RAISE]
    assert not memory.was_killed(tmp_path)


@pytest.mark.parametrize(
    "death",
    [
        ActorDiedError(),
        RayTaskError("setup", "connection refused", OSError("connection refused")),
        WorkerGroupStartupFailedError("a worker failed to initialize"),
    ],
)
def test_a_worker_that_dies_before_it_trains_is_a_failed_worker(
    tmp_path: Path, death: Exception
) -> None:
    decide = policy(tmp_path, max_failures=2).make_decision
    decisions = [decide(ControllerError(death)) for _ in range(3)]
    assert decisions == [FailureDecision.RETRY, FailureDecision.RETRY, FailureDecision.RAISE]


def test_who_waits_for_room_waits_and_a_fault_of_ray_itself_ends_the_run(tmp_path: Path) -> None:
    decide = policy(tmp_path, max_failures=0).make_decision
    for _ in range(5):
        waiting = ControllerError(WorkerGroupStartupTimeoutError(num_workers=2))
        assert decide(waiting) == FailureDecision.RETRY
    assert decide(ControllerError(ValueError("a bug of Ray"))) == FailureDecision.RAISE


def test_a_notice_uses_up_no_retry(tmp_path: Path) -> None:
    decide = policy(tmp_path, max_failures=0).make_decision
    for _ in range(5):
        assert decide(failed(ToldToEnd("step 5"))) == FailureDecision.RETRY
    assert decide(failed(ValueError("a bug"))) == FailureDecision.RAISE


@pytest.mark.parametrize("by", ["ray", "kernel", "neither"])
def test_a_worker_that_was_killed_for_memory_is_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    decide = policy(tmp_path).make_decision
    if by == "kernel":
        monkeypatch.setattr(memory, "num_kernel_kills", lambda: 10**9)
    words = "1 worker(s) were killed due to the node running low on memory."
    text = words if by == "ray" else "connection error code 2. End of file."
    death = failed(WorkerHealthCheckFailedError(text, RuntimeError(text)), text)
    assert decide(death) == FailureDecision.RETRY
    assert memory.was_killed(tmp_path) == (by != "neither")


def test_after_a_kill_for_memory_micro_batches_are_halved_down_to_one_example(
    tmp_path: Path,
) -> None:
    plan = memory.MemoryPlan(
        is_packed=True, micro_batch_tokens=4096, gradient_checkpointing=False, pad_id=0
    )
    for tokens in (800, 400, 300):
        memory.note_kill(tmp_path)
        plan = memory.shrink(tmp_path, plan, longest_tokens=300, most_tokens=1600)
        assert plan.micro_batch_tokens == tokens
        assert memory.stored(tmp_path) == plan
        assert not memory.was_killed(tmp_path)
    memory.note_kill(tmp_path)
    with pytest.raises(ResourceError, match=r"one example .*Lower data\.max_length"):
        memory.shrink(tmp_path, plan, longest_tokens=300, most_tokens=1600)


def test_the_kernel_counts_its_kills() -> None:
    assert memory.num_kernel_kills() >= 0
