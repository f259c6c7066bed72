"""What the failure of a worker means: end and say why, start again, start again with less memory.

Ray Train (2.60) starts again `scale.max_failures` times whatever has happened. An error that a
retry cannot mend is to end a run at once, a notice to leave is no failure, and a worker that was
killed for memory would be killed again.
"""

import logging
from pathlib import Path

from ray.exceptions import RayError
from ray.train import FailureConfig, TrainingFailedError
from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError
from ray.train.v2._internal.execution.failure_handling import FailureDecision
from ray.train.v2._internal.execution.failure_handling.default import DefaultFailurePolicy
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

from cluster.errors import LorayError
from training import memory
from training.loop import ToldToEnd

log = logging.getLogger(__name__)

_KILLED_BY_RAY = "low on memory"
"""In the words of Ray's own memory monitor (2.60)."""


class FailurePolicy(DefaultFailurePolicy):
    """Ray Train's, but for what is known of a run's own errors."""

    def __init__(self, config: FailureConfig, run_dir: Path) -> None:
        """run_dir: of a run that the process in which this decides can write to."""
        super().__init__(config)
        self._run_dir = run_dir
        self._num_kills = memory.num_kernel_kills()

    def make_decision(self, training_failed_error: TrainingFailedError) -> FailureDecision:
        """End where a worker has said why; start again, at no cost, where one was told to end."""
        if reason(training_failed_error) is not None:
            return FailureDecision.RAISE
        failures = _failures(training_failed_error)
        if any(isinstance(failure, ToldToEnd) for failure in failures):
            log.warning("starting_again=%s reason='a worker was told to end'", self._run_dir.name)
            return FailureDecision.RETRY
        if _is_of_starting(training_failed_error):  # else Ray ends the run, or tries for ever
            training_failed_error = WorkerGroupError(str(training_failed_error), {})
        before, self._num_kills = self._num_kills, memory.num_kernel_kills()
        text = str(training_failed_error)
        if failures and (self._num_kills > before or is_of_low_memory(training_failed_error)):
            memory.note_kill(self._run_dir)
        decision = super().make_decision(training_failed_error)
        log.warning(
            "worker_failed=%s failure=%d of %s decision=%s reason=%r",
            self._run_dir.name,
            self._worker_group_failures,
            self.failure_config.max_failures,
            decision.value,
            _first_lines(text),
        )
        return decision


def reason(error: BaseException | None) -> LorayError | None:
    """What a worker said it cannot go on for; None where it said nothing."""
    for found in (error, *_failures(error)):
        if isinstance(found, LorayError):
            return found
    return None


def is_of_low_memory(error: BaseException) -> bool:
    """Whether Ray killed a worker since its node was low on memory."""
    return _KILLED_BY_RAY in str(error)


def _is_of_starting(error: BaseException) -> bool:
    """Whether a worker died, or could not join the others, before it began to train."""
    if not isinstance(error, ControllerError):
        return False
    return isinstance(error.controller_failure, RayError | WorkerGroupStartupFailedError)


def _failures(error: BaseException | None) -> list[Exception]:
    return [*error.worker_failures.values()] if isinstance(error, WorkerGroupError) else []


def _first_lines(text: str) -> str:
    return " ".join(line.strip() for line in text.splitlines()[:4])[:400]
