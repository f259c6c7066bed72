"""A notice that a worker is to be taken away: SIGTERM to its process, or Ray drains its node.

Clouds, SLURM and Kubernetes send one seconds to minutes ahead. The loop asks once a step; where one
worker has been told, all take a checkpoint and raise ToldToEnd, which starts them again, from that
checkpoint, on what is left. It is no failure and uses up no retry.

What is not covered: a notice that ends sooner than a step and a checkpoint take.
"""

import signal
import threading
from types import FrameType

from ray.train.v2._internal.execution.callback import WorkerCallback
from ray.train.v2._internal.execution.context import get_train_context

_has_come = threading.Event()


class Listener(WorkerCallback):
    """Has SIGTERM noted in a Ray Train worker, which else dies of it (Ray 2.60)."""

    def after_init_train_context(self) -> None:
        """Runs in the actor's main thread, which alone may set a handler."""
        signal.signal(signal.SIGTERM, _note)


def has_come() -> bool:
    """Whether this worker has been told to end, by a signal or by Ray Train's watcher of nodes."""
    return _has_come.is_set() or get_train_context().preemption_context.preemption_info is not None


def _note(number: int, frame: FrameType | None) -> None:
    _has_come.set()
