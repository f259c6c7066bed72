"""Fine-tuning jobs as Ray jobs."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from cluster import jobs
from cluster.errors import ClusterError
from serving.runner import Room, RunState


class RayRuns:
    """The runs of a cluster, by its Jobs API; in a process that is connected to Ray."""

    def __init__(self, address: str) -> None:
        """address: of the Jobs API, such as http://127.0.0.1:8265."""
        self._address = address

    def start(self, run_job: str, words: Sequence[str]) -> None:
        """Submit `python -m`; Ray refuses an id that it knows, which is no error here."""
        # This interpreter is the cluster's: another `python` may come first in a shell's path.
        command = [sys.executable, "-m", *words]
        try:
            jobs.submit(command, address=self._address, working_dir=None, job_id=run_job)
        except ClusterError:
            if jobs.find(run_job, address=self._address) is None:
                raise

    def state(self, run_job: str) -> RunState:
        """As the Jobs API says, and ended where its driver's node is lost."""
        found = jobs.find(run_job, address=self._address)
        if found is None:
            return "unknown"
        if found.is_over or (found.node is not None and found.node not in _living_nodes()):
            return "ended"
        return "alive"

    def stop(self, run_job: str) -> None:
        """SIGTERM, and SIGKILL a little later."""
        jobs.ask_to_stop(run_job, address=self._address)

    def room(self) -> Room:
        """What no replica, worker or placement group holds."""
        import ray

        with _explained():
            return Room(free=ray.available_resources(), total=ray.cluster_resources())


def _living_nodes() -> set[str]:
    import ray

    with _explained():
        return {node["NodeID"] for node in ray.nodes() if node["Alive"]}


@contextmanager
def _explained() -> Iterator[None]:
    from ray.exceptions import RayError

    try:
        yield
    except RayError as error:
        raise ClusterError(f"the cluster does not answer ({type(error).__name__})") from error
