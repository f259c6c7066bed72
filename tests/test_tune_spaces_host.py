"""All trials in one process: calls in order, trials that are gone, Tune's own code."""

import ast
import inspect
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import ray
from ray.air.execution._internal import actor_manager
from ray.tune.execution import class_cache

from cluster.errors import ClusterError
from tune_spaces import host
from tune_spaces.host import TrialHost


class Told:
    """A trial that keeps what it was asked."""

    def __init__(self, name: str = "", fault: str = "") -> None:
        if fault:
            raise ValueError(fault)
        self.name = name
        self.heard: list[str] = []
        self.go_on = threading.Event()

    def say(self, word: str, *, loud: bool = False) -> str:
        self.heard.append(word)
        return word.upper() if loud else word

    def wait(self) -> str:
        assert self.go_on.wait(10)
        return self.say("waited")

    def fail(self) -> None:
        raise ValueError("wrong")

    def stop(self) -> list[str]:
        return self.heard


def test_calls_of_a_trial_come_in_order_whoever_arrives_first() -> None:
    trials = TrialHost()
    with ThreadPoolExecutor(8) as pool:
        late = [
            pool.submit(trials.ask, "a", number, "say", [str(number)], {"loud": True})
            for number in (3, 2, 1)
        ]
        time.sleep(0.1)
        assert not any(future.done() for future in late)  # its start has not come yet
        trials.start("a", Told, {"name": "first"})
        assert [future.result(10) for future in late] == ["3", "2", "1"]
    assert trials.ask("a", 4, "stop", [], {}) == ["1", "2", "3"]


def test_trials_do_not_wait_for_each_other() -> None:
    trials = TrialHost()
    for key in "ab":
        trials.start(key, Told, {})
    slow = trials._trials["a"]
    with ThreadPoolExecutor(2) as pool:
        waiting = pool.submit(trials.ask, "a", 1, "wait", [], {})
        assert trials.ask("b", 1, "say", ["now"], {}) == "now"
        assert not waiting.done()
        slow.go_on.set()
        assert waiting.result(10) == "waited"


def test_a_call_that_raises_does_not_stop_the_next() -> None:
    trials = TrialHost()
    trials.start("a", Told, {})
    with pytest.raises(ValueError, match="wrong"):
        trials.ask("a", 1, "fail", [], {})
    assert trials.ask("a", 2, "say", ["on"], {}) == "on"


def _stopped(trials: TrialHost) -> None:
    trials.start("a", Told, {})
    trials.ask("a", 1, "stop", [], {})


def _killed(trials: TrialHost) -> None:
    trials.start("a", Told, {})
    trials.forget("a")


def _not_made(trials: TrialHost) -> None:
    with pytest.raises(ValueError, match="no seat"):
        trials.start("a", Told, {"fault": "no seat"})


@pytest.mark.parametrize("end", [_stopped, _killed, _not_made, lambda _: None])
def test_who_is_gone_says_so(
    end: Callable[[TrialHost], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "_START_S", 0.1)
    trials = TrialHost()
    end(trials)
    with pytest.raises(ClusterError, match=r"trial of call 2 \(say\) is gone"):
        trials.ask("a", 2, "say", ["?"], {})
    assert not trials._trials
    assert not trials._turns


def test_who_waits_for_a_turn_hears_that_the_trial_was_killed() -> None:
    trials = TrialHost()
    trials.start("a", Told, {})
    slow = trials._trials["a"]
    with ThreadPoolExecutor(2) as pool:
        running = pool.submit(trials.ask, "a", 1, "wait", [], {})
        queued = pool.submit(trials.ask, "a", 2, "say", ["?"], {})
        time.sleep(0.1)
        trials.forget("a")
        with pytest.raises(ClusterError, match="is gone"):
            queued.result(10)
        slow.go_on.set()
        assert running.result(10) == "waited"
    assert not trials._turns


def test_tune_makes_and_ends_actors_as_this_file_expects() -> None:
    """Ray 2.60. Whoever fails here: read both modules again before the names are changed."""
    known = {
        actor_manager: {"remote", "kill", "wait", "actor", "ObjectRef"},
        class_cache: {"remote", "air", "train"},
    }
    for module, names in known.items():
        tree = ast.parse(inspect.getsource(module))
        used = {
            node.attr
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.value.id == "ray"
        }
        assert used <= names, module.__name__
    source = inspect.getsource(actor_manager.RayActorManager)
    handled = {"__ray_ready__", "__ray_terminate__"}
    assert {word for word in handled if f".{word}.remote()" in source} == handled
    assert "if not isinstance(actor_cls, ray.actor.ActorClass):" in source


def test_tune_is_left_as_it_was() -> None:
    class Stop(Exception):
        pass

    def search() -> None:
        with host.one_process(2):
            modules: Any = [actor_manager, class_cache]
            assert all(module.ray is not ray for module in modules)
            assert actor_manager.ray.wait is ray.wait
            raise Stop

    with pytest.raises(Stop):
        search()
    assert actor_manager.ray is ray
    assert class_cache.ray is ray
