"""The head is killed under a run and under a server, with a Redis that keeps its state or without.

Needs root and Linux, for network namespaces; takes minutes, so LORAY_LONG_CHAOS=1 runs it. `-s`
shows what was measured.
"""

import time
from pathlib import Path

import pytest
from machines import (
    Cluster,
    cluster,
    finish,
    long,
    long_recipe,
    measured,
    started,
    until_trained,
)
from netns import wait_for
from runs import events_of

pytestmark = [pytest.mark.ray, pytest.mark.chaos]


def until_head_is_back(here: Cluster, *, starts: int = 2) -> float:
    return wait_for(lambda: here.num_starts(here.head) >= starts, 60, "the head is back")


@long
def test_without_redis_the_same_command_resumes_on_the_new_head(
    tmp_path: Path, tiny_base: Path
) -> None:
    recipe = long_recipe(tmp_path, tiny_base, workers=2, steps=300)
    with cluster() as here:
        driver = here.train(recipe, on=here.head, log="run")
        until_trained(recipe, checkpoints=2)
        here.kill_head()
        killed = time.monotonic()
        assert driver.wait(60) != 0
        head_s = until_head_is_back(here)
        for node in here.nodes:
            here.until_back(node, starts=2)
        nodes_s = time.monotonic() - killed
        result = finish(here.train(recipe, on=here.head, log="again"), here.head, "again")
        measured(head_back=head_s, nodes_back=nodes_s)
    assert result["resumed_from"] >= 40
    assert result["steps"] == 300
    assert len(started(recipe)) == 2


@long
def test_with_redis_a_run_goes_on_while_the_head_is_away(tmp_path: Path, tiny_base: Path) -> None:
    recipe = long_recipe(tmp_path, tiny_base, workers=2, steps=2500)
    with cluster(has_redis=True) as here:
        b = here.nodes[0]
        driver = here.train(recipe, on=b, log="run")
        until_trained(recipe, checkpoints=2)
        here.kill_head()
        head_s = until_head_is_back(here)
        result = finish(driver, b, "run")
        measured(head_back=head_s)
        assert [here.num_starts(node) for node in here.nodes] == [1, 1]
    assert result["steps"] == 2500
    assert len(started(recipe)) == 1
    assert events_of(recipe, "failed") == []
