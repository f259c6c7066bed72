"""A real cluster of three machines in network namespaces, whose losses are watched and timed.

`-s` shows what was measured.
"""

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from netns import PORT, Host, network, start_node, wait_for
from runs import events_of, make_recipe, run_dir_of

from cluster import config, offspring
from training.config import TrainRecipe

DEAD_S = 15.0
"""The head declares a node dead within this."""
BACK_S = 60.0
"""A node is back within this of the link's healing, or of its raylet's death."""
REDIS_PORT = 6380


class Cluster:
    """A head without CPUs, and nodes of one CPU each; b's link may be slow."""

    def __init__(self, hosts: dict[str, Host]) -> None:
        self.head, self.nodes = hosts["a"], [hosts["b"], hosts["c"]]
        self._since = 0.0

    @property
    def address(self) -> str:
        return f"{self.head.ip}:{PORT}"

    def start(self, *, has_redis: bool, has_jobs_api: bool = False) -> None:
        """All nodes, and someone who watches the head's table."""
        extra = {"RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "serving.front:middlewares"}
        of_head = {"redis": self._start_redis()} if has_redis else {}
        if has_jobs_api:
            of_head["dashboard_host"] = self.head.ip
        start_node(self.head, num_cpus=0, extra=extra, **of_head)
        wait_for(lambda: self.num_starts(self.head) == 1, 60, "the head is up")
        self.head.start(["watch_members", self.address], log="members")
        for node in self.nodes:
            start_node(node, head=self.head, extra=extra)
        for node in self.nodes:
            self.until_back(node, starts=1)

    def _start_redis(self) -> str:
        """On the head's machine, where it survives the head; its address."""
        words = ["redis-server", "--port", str(REDIS_PORT), "--bind", self.head.ip, "--save", ""]
        ip = shutil.which("ip") or "ip"
        words = [ip, "netns", "exec", self.head.space, *words, "--protected-mode", "no"]
        words = offspring.ended_with_parent(words)
        with (self.head.directory / "redis").open("w") as log:
            server = subprocess.Popen(words, cwd=self.head.directory, stdout=log, text=True)
        self.head.running.append(server)
        return f"{self.head.ip}:{REDIS_PORT}"

    def kill_head(self) -> None:
        """Kill the control service; what else the head runs ends with it."""
        for process in self.head.processes("gcs_server"):
            process.kill()

    def num_starts(self, node: Host) -> int:
        """How often the supervisor of a node has brought it up."""
        return node.said().count("event=node_up")

    def num_alive(self, node: Host) -> int:
        """How often the head's table has the node as alive: 0 or 1."""
        lines = self.head.said("members").splitlines()
        table = json.loads(lines[-1])["alive"] if lines else None
        return table.get(node.ip, 0) if table else 0

    def until_dead(self, node: Host) -> float:
        """Seconds from now until the head takes the node for dead."""
        return wait_for(lambda: self.num_alive(node) == 0, DEAD_S, f"{node.name} is dead")

    def until_back(self, node: Host, *, starts: int) -> float:
        """Seconds from now until the node has been started so often, and is alive."""
        is_back: Callable[[], bool] = lambda: (  # noqa: E731
            self.num_starts(node) >= starts and self.num_alive(node) == 1
        )
        return wait_for(is_back, BACK_S, f"{node.name} is back")

    def train(self, recipe: TrainRecipe, *, on: Host, log: str) -> "subprocess.Popen[str]":
        """`python -m training` of a recipe on this cluster, its driver on a node."""
        path = Path(recipe.storage).parent / f"{recipe.name}.yaml"
        path.write_text(yaml.safe_dump(config.plain(recipe)))
        return on.start(["training", str(path), "--address", self.address, "--json"], log=log)

    def node_of(self, pid: int) -> Host:
        """The node that a process is on."""
        return next(node for node in self.nodes if pid in node.pids())


@contextmanager
def cluster(
    *, slow: tuple[str, ...] = (), has_redis: bool = False, has_jobs_api: bool = False
) -> Iterator[Cluster]:
    """has_jobs_api: the other machines reach it, too."""
    if has_redis and shutil.which("redis-server") is None:
        pytest.skip("needs the command redis-server (Debian's package of this name)")
    with network("a", "b", "c", slow=slow) as hosts:
        found = Cluster(hosts)
        try:
            found.start(has_redis=has_redis, has_jobs_api=has_jobs_api)
            yield found
        except BaseException:
            for host in hosts.values():
                print(f"--- {host.name}\n{host.said()}")
            raise


def measured(**figures: float) -> None:
    """For people, with `-s`, and for RELIABILITY.md."""
    print("measured", " ".join(f"{name}={value:.1f}s" for name, value in figures.items()))


def long_recipe(directory: Path, base: Path, *, workers: int, steps: int) -> TrainRecipe:
    directory.mkdir(exist_ok=True)
    optim = {"learning_rate": 1e-3, "max_steps": steps, "global_batch_size": 4}
    return make_recipe(
        directory,
        base,
        optim=optim,
        checkpoint={"every_steps": 20},
        scale={"workers": workers, "cpus_per_worker": 1},
    )


def until_trained(recipe: TrainRecipe, *, checkpoints: int) -> None:
    def are_there() -> bool:
        return run_dir_of(recipe).exists() and len(events_of(recipe, "checkpoint")) >= checkpoints

    wait_for(are_there, 90, "checkpoints")


def started(recipe: TrainRecipe) -> list[Any]:
    return events_of(recipe, "started")


def finish(process: "subprocess.Popen[str]", host: Host, log: str) -> dict[str, Any]:
    """The result of a run that ends well."""
    status = process.wait(240)
    assert status == 0, host.said(log)
    return json.loads(host.said(log).splitlines()[-1])
