"""The head is killed under a run and under a server, with a Redis that keeps its state or without.

Needs root and Linux, for network namespaces; takes minutes, so LORAY_CHAOS=full runs it. `-s`
shows what was measured.
"""

import json
import signal
import subprocess
import time
from pathlib import Path

import chaos
import pytest
import yaml
from machines import (
    Cluster,
    cluster,
    finish,
    long_recipe,
    measured,
    started,
    until_trained,
)
from netns import Host, wait_for
from runs import events_of

pytestmark = [pytest.mark.ray, pytest.mark.chaos]


def until_head_is_back(here: Cluster, *, starts: int = 2) -> float:
    return wait_for(lambda: here.num_starts(here.head) >= starts, 60, "the head is back")


@chaos.full
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


@chaos.full
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


@chaos.full
def test_what_the_old_head_had_queued_holds_no_cpu_for_ever(tmp_path: Path) -> None:
    with cluster(has_redis=True) as here:
        b = here.nodes[0]
        b.start(["queue_an_actor", here.address, b.ip], log="actors")
        wait_for(lambda: "waits" in b.said("actors"), 60, "an actor waits")
        here.kill_head()
        until_head_is_back(here)
        (b.directory / "go").touch()
        wait_for(lambda: "answered" in b.said("actors"), 200, "the actor that waited answers")
        print(b.said("actors").splitlines()[-1])
        assert b.said().count("event=idle_workers_ended") == 1
        assert [here.num_starts(node) for node in here.nodes] == [1, 1]


SERVING = "ray::ServeReplica:loray"


def serve_on(here: Cluster, directory: Path, base: Path, *, log: str) -> "subprocess.Popen[str]":
    """`python -m serving` with two replicas, one on each node, its driver on b."""
    tree = {
        "model": {"base": str(base), "quantization": "none"},
        "http": {"port": 8000},
        "limits": {"rows": 4, "context_tokens": 256, "kv_tokens": 1024, "prefix_tokens": 256},
        "replicas": 2,
        "cpus_per_replica": 1,
    }
    path = directory / "serve.yaml"
    path.write_text(yaml.safe_dump(tree))
    b = here.nodes[0]
    driver = b.start(["serving", str(path), "--address", here.address], log=log)
    told = f"and the head, listen: now {here.head.ip}"
    wait_for(lambda: told in b.said(log), 120, "it serves")
    return driver


def statuses(node: Host, since: float = 0.0) -> list[object]:
    """What was answered to the questions asked since then (seconds since 1970)."""
    lines = node.said("asked").splitlines()
    return [status for asked, status in map(json.loads, lines) if asked >= since]


def count(when: str, node: Host, answers: list[object]) -> None:
    print(f"{node.name} {when}: {answers.count(200)} of {len(answers)} answered")


@chaos.full
@pytest.mark.parametrize("has_redis", [True, False], ids=["redis", "no redis"])
def test_replicas_answer_while_the_head_is_away(
    tmp_path: Path, tiny_base: Path, has_redis: bool
) -> None:
    with cluster(has_redis=has_redis) as here:
        driver = serve_on(here, tmp_path, tiny_base, log="serve")
        for node in here.nodes:
            words = ["ask_over_and_over", "http://127.0.0.1:8000", tiny_base.name]
            node.start(words, log="asked")
        for node in here.nodes:
            wait_for(lambda node=node: statuses(node)[-5:] == [200] * 5, 60, "answers")
        here.kill_head()
        killed = time.time()
        head_s = until_head_is_back(here)
        for node in here.nodes:
            meanwhile = statuses(node, killed)
            count("while the head is away", node, meanwhile)
            assert meanwhile[:20] == [200] * 20
        if has_redis:
            back = time.time()
            victim = here.nodes[1].processes(SERVING)[0]
            time.sleep(20)
            for node in here.nodes:
                after = statuses(node, back)
                count("when it is back", node, after)
                assert after.count(200) > 0.9 * len(after)
            assert [here.num_starts(node) for node in here.nodes] == [1, 1]
            victim.kill()  # whoever replaces it is the controller, which was on the head

            def is_replaced() -> bool:
                now = here.nodes[1].processes(SERVING)
                return bool(now) and now[0].pid != victim.pid

            replaced_s = wait_for(is_replaced, 90, "the replica is replaced")
            measured(head_back=head_s, replica_replaced=replaced_s)
        else:
            driver.send_signal(signal.SIGKILL)  # it serves nothing any more, and does not notice
            driver.wait(60)
            for node in here.nodes:
                here.until_back(node, starts=2)
            down_s = time.time() - killed
            serve_on(here, tmp_path, tiny_base, log="again")
            for node in here.nodes:
                wait_for(lambda node=node: statuses(node)[-5:] == [200] * 5, 60, "answers again")
            again_s = time.time() - killed
            measured(head_back=head_s, cluster_back=down_s, served_again=again_s)
