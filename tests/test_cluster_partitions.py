"""Nodes that are lost and come back, in network namespaces; needs root and Linux.

LORAY_LONG_CHAOS=1 adds the variants that take minutes: a cut of 30 and of 120 s, a slow and lossy
link under a run, two workers of which one is cut off, the loss of the head during a run.
`-s` shows what was measured.
"""

import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from netns import PORT, Host, network, start_node, wait_for
from runs import adapter_bytes, events_of, make_recipe, run_dir_of, train

from cluster import config, storage
from training.config import TrainRecipe

pytestmark = [pytest.mark.ray, pytest.mark.chaos]
long = pytest.mark.skipif(
    os.environ.get("LORAY_LONG_CHAOS") != "1", reason="takes minutes; LORAY_LONG_CHAOS=1 runs it"
)

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

    def start(self, extra: dict[str, str] | None = None, **of_head: str) -> None:
        """All nodes, and someone who watches the head's table."""
        start_node(self.head, num_cpus=0, extra=extra, **of_head)
        wait_for(lambda: self.num_starts(self.head) == 1, 60, "the head is up")
        self.head.start(["watch_members", self.address], log="members")
        for node in self.nodes:
            start_node(node, head=self.head, extra=extra)
        wait_for(lambda: all(self.num_alive(node) == 1 for node in self.nodes), 60, "nodes up")

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

    def until_over(self, node: Host, *, starts: int) -> float:
        """Seconds until it is clear whether a node was lost, and if so until it is back."""
        return self.until_back(node, starts=starts if self.num_alive(node) == 0 else 1)

    def train(self, recipe: TrainRecipe, *, on: Host, log: str) -> "subprocess.Popen[str]":
        """`python -m training` of a recipe on this cluster, its driver on a node."""
        path = Path(recipe.storage).parent / f"{recipe.name}.yaml"
        path.write_text(yaml.safe_dump(config.plain(recipe)))
        return on.start(["training", str(path), "--address", self.address, "--json"], log=log)

    def node_of(self, pid: int) -> Host:
        """The node that a process is on."""
        return next(node for node in self.nodes if pid in node.pids())


@contextmanager
def cluster(*, slow: tuple[str, ...] = (), **of_head: str) -> Iterator[Cluster]:
    with network("a", "b", "c", slow=slow) as hosts:
        found = Cluster(hosts)
        try:
            found.start(**of_head)
            yield found
        except BaseException:
            for host in hosts.values():
                print(f"--- {host.name}\n{host.said()}")
            raise


def measured(**figures: float) -> None:
    """For people, with `-s`, and for RELIABILITY.md."""
    print("measured", " ".join(f"{name}={value:.1f}s" for name, value in figures.items()))


def long_recipe(directory: Path, base: Path, *, workers: int, steps: int) -> TrainRecipe:
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


def test_a_killed_raylet_and_a_short_cut_are_over_within_a_minute() -> None:
    with cluster() as here:
        b, c = here.nodes
        b.processes("raylet")[0].kill()
        dead_s = here.until_dead(b)
        back_s = here.until_back(b, starts=2)
        measured(raylet_killed_dead=dead_s, raylet_killed_back=dead_s + back_s)
        c.cut()
        time.sleep(5)
        c.heal()
        measured(cut_5_back=here.until_back(c, starts=1))
        sent, received = c.num_bytes()
        assert min(sent, received) > 1000


def test_a_worker_that_is_cut_off_trains_on_and_commits_nothing_once_it_is_replaced(
    tmp_path: Path, tiny_base: Path
) -> None:
    recipe = long_recipe(tmp_path / "cut", tiny_base, workers=1, steps=2600)
    with cluster() as here:
        driver = here.train(recipe, on=here.head, log="run")
        until_trained(recipe, checkpoints=2)
        pid = int(started(recipe)[0].number("pid"))
        lost = here.node_of(pid)
        lost.cut()
        cut = time.monotonic()
        dead_s = here.until_dead(lost)
        wait_for(lambda: len(started(recipe)) == 2, 90, "the run goes on elsewhere")
        resumed_s = time.monotonic() - cut
        at_step = int(started(recipe)[1].number("from_step"))
        assert at_step > 40  # the cut-off worker went on and committed while nobody else did
        wait_for(lambda: pid not in lost.pids(), 60, "the cut-off worker ends")
        lost.heal()
        back_s = here.until_back(lost, starts=2)
        result = finish(driver, here.head, "run")
        measured(cut_dead=dead_s, cut_resumed=resumed_s, cut_back=back_s)
    assert result["steps"] == 2600
    assert [int(event.number("attempt")) for event in started(recipe)] == [1, 2]
    assert events_of(recipe, "failed") == []
    info = storage.read_manifest(run_dir_of(recipe) / "adapter").info
    assert info["step"] == 2600
    whole = long_recipe(tmp_path / "whole", tiny_base, workers=1, steps=2600)
    train(whole)
    assert adapter_bytes(recipe) == adapter_bytes(whole)


@long
@pytest.mark.parametrize("cut_s", [30, 120])
def test_a_node_is_back_within_a_minute_of_its_links_healing(cut_s: int) -> None:
    with cluster() as here:
        b = here.nodes[0]
        b.cut()
        dead_s = here.until_dead(b)
        time.sleep(cut_s - dead_s)
        b.heal()
        measured(**{f"cut_{cut_s}_dead": dead_s, f"cut_{cut_s}_back": here.until_back(b, starts=2)})


@long
def test_two_workers_of_which_one_is_cut_off_wait_for_its_node_and_end_with_the_same_adapter(
    tmp_path: Path, tiny_base: Path
) -> None:
    recipe = long_recipe(tmp_path / "cut", tiny_base, workers=2, steps=400)
    whole = long_recipe(tmp_path / "whole", tiny_base, workers=2, steps=400)
    with cluster() as here:
        finish(here.train(whole, on=here.head, log="whole"), here.head, "whole")
        driver = here.train(recipe, on=here.head, log="run")
        until_trained(recipe, checkpoints=2)
        lost = here.node_of(int(started(recipe)[0].number("pid")))
        lost.cut()
        dead_s = here.until_dead(lost)
        time.sleep(30 - dead_s)
        assert len(started(recipe)) == 1  # one CPU is left for two workers
        lost.heal()
        healed = time.monotonic()
        back_s = here.until_back(lost, starts=2)
        wait_for(lambda: len(started(recipe)) == 2, 90, "the run goes on")
        measured(cut_dead=dead_s, back=back_s, resumed_after_heal=time.monotonic() - healed)
        finish(driver, here.head, "run")
    assert adapter_bytes(recipe) == adapter_bytes(whole)
    assert events_of(recipe, "failed") == []


@long
def test_a_slow_and_lossy_link_loses_no_node_and_no_run(tmp_path: Path, tiny_base: Path) -> None:
    recipe = long_recipe(tmp_path, tiny_base, workers=2, steps=40)
    with cluster(slow=("b",)) as here:
        b = here.nodes[0]
        assert b.relay is not None
        b.relay.delay_s, b.relay.loss = 0.2, 0.05  # each way
        driver = here.train(recipe, on=here.head, log="run")
        begun = time.monotonic()
        finish(driver, here.head, "run")
        measured(run_over_slow_link=time.monotonic() - begun)
        tables = map(json.loads, here.head.said("members").splitlines())
        alive = [(table["alive"] or {}).get(b.ip, 0) for table in tables]
        assert alive[alive.index(1) :] == [1] * len(alive[alive.index(1) :])
        assert here.num_starts(b) == 1
    assert len(started(recipe)) == 1
