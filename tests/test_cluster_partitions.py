"""Nodes that are lost and come back, in network namespaces; needs root and Linux.

LORAY_CHAOS=full adds the variants that take minutes: a cut of 30 and of 120 s, a slow and lossy
link under a run, two workers of which one is cut off. `-s` shows what was measured.
"""

import json
import time
from pathlib import Path

import chaos
import pytest
from machines import DEAD_S, cluster, finish, long_recipe, measured, started, until_trained
from netns import wait_for
from runs import adapter_bytes, events_of

pytestmark = [pytest.mark.ray, pytest.mark.chaos]


def test_a_killed_raylet_is_back_within_a_minute_and_a_cut_of_5_s_loses_nothing() -> None:
    with cluster() as here:
        b, c = here.nodes
        b.processes("raylet")[0].kill()
        c.cut()
        cut = time.monotonic()
        dead_s = here.until_dead(b)
        time.sleep(max(0.0, cut + 5 - time.monotonic()))
        c.heal()
        back_s = here.until_back(b, starts=2)
        measured(raylet_killed_dead=dead_s, raylet_killed_back=back_s + max(5.0, dead_s))
        time.sleep(max(0.0, cut + DEAD_S - time.monotonic()))
        assert (here.num_alive(c), here.num_starts(c)) == (1, 1)
        assert min(c.num_bytes()) > 1000


def test_a_worker_that_is_cut_off_trains_on_and_commits_nothing_once_it_is_replaced(
    tmp_path: Path, tiny_base: Path
) -> None:
    steps = 2400
    recipe = long_recipe(tmp_path, tiny_base, workers=1, steps=steps)
    with cluster() as here:
        driver = here.train(recipe, on=here.head, log="run")
        until_trained(recipe, checkpoints=2)
        lost = here.node_of(int(started(recipe)[0].number("pid")))
        lost.cut()
        cut = time.monotonic()
        dead_s = here.until_dead(lost)
        wait_for(lambda: len(started(recipe)) == 2, 90, "the run goes on elsewhere")
        resumed_s = time.monotonic() - cut
        result = finish(driver, here.head, "run")
        lost.heal()
        back_s = here.until_back(lost, starts=2)
        measured(cut_dead=dead_s, cut_resumed=resumed_s, back_after_heal=back_s)
    assert result["steps"] == steps
    assert [int(event.number("attempt")) for event in started(recipe)] == [1, 2]
    assert events_of(recipe, "failed") == []
    # Cut off, it went on and committed while it was the only one, and no longer.
    from_step = int(started(recipe)[1].number("from_step"))
    assert from_step > 60
    committed = [int(event.number("step")) for event in events_of(recipe, "checkpoint")]
    assert committed == list(range(20, steps + 1, 20))
    # What both attempts did is the same to the bit.
    losses: dict[int, set[float]] = {}
    for event in events_of(recipe, "step"):
        losses.setdefault(int(event.number("step")), set()).add(event.number("loss"))
    assert list(losses) != []
    assert all(len(found) == 1 for found in losses.values())
    assert len(events_of(recipe, "step")) > steps


@chaos.full
@pytest.mark.parametrize("cut_s", [30, 120])
def test_a_node_is_back_within_a_minute_of_its_links_healing(cut_s: int) -> None:
    with cluster() as here:
        b = here.nodes[0]
        b.cut()
        dead_s = here.until_dead(b)
        time.sleep(cut_s - dead_s)
        b.heal()
        measured(**{f"cut_{cut_s}_dead": dead_s, f"cut_{cut_s}_back": here.until_back(b, starts=2)})


@chaos.full
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


@chaos.full
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
