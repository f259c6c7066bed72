"""What of Ray Train is started for a run; fails where the private names of Ray 2.60 move."""

import ast
import inspect
import textwrap
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from ray.train import ScalingConfig
from ray.train.backend import Backend
from ray.train.torch import TorchConfig
from ray.train.v2._internal.callbacks import BackendSetupCallback, DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback

from training import trainer

# Ray 2.60 warns itself when it copies its own data context.
pytestmark = pytest.mark.filterwarnings("ignore:`use_.*` is deprecated:DeprecationWarning")


def kinds_of_callbacks(*, is_private: bool) -> set[type]:
    lean = trainer._LeanTrainer(lambda: None, scaling_config=ScalingConfig(num_workers=1))
    lean.is_private = is_private
    return {type(callback) for callback in lean._create_default_callbacks()}


def test_a_private_ray_starts_no_helper_that_has_nothing_to_do() -> None:
    kinds = kinds_of_callbacks(is_private=True)
    assert BackendSetupCallback in kinds
    assert not kinds & {DatasetsCallback, PlacementGroupCleanerCallback}


def test_a_shared_cluster_keeps_the_cleaner_of_placement_groups() -> None:
    kinds = kinds_of_callbacks(is_private=False)
    assert PlacementGroupCleanerCallback in kinds
    assert DatasetsCallback not in kinds


def test_one_worker_has_no_process_group_and_several_have() -> None:
    assert trainer._NoGroup().backend_cls is Backend
    assert TorchConfig().backend_cls is not Backend


class Controller:
    """Stands in for the controller: what it was made with, and that it ran."""

    made: ClassVar[list["Controller"]] = []

    def __init__(self, **options: Any) -> None:
        self.options = options
        self.has_run = False
        self.made.append(self)

    async def run(self) -> None:
        self.has_run = True

    def get_result(self) -> bool:
        return self.has_run


def test_a_private_ray_runs_the_controller_here_and_is_not_asked_to_scale(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(trainer, "_DriverController", Controller)
    lean = trainer._LeanTrainer(lambda: None, scaling_config=ScalingConfig(num_workers=1))
    lean.is_private = True
    assert lean._initialize_and_run_controller(scaling_policy="Ray's own") is True
    policy: Any = Controller.made[-1].options["scaling_policy"]
    assert isinstance(policy, trainer._StillPolicy)
    policy.after_controller_start(None)
    assert policy._coordinator_client is None
    assert policy.make_decision_for_non_running_worker_group().num_workers == 1


def test_a_shared_cluster_has_rays_own_controller(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def note(_: Any, **options: Any) -> None:
        asked.update(options)

    monkeypatch.setattr(trainer.TorchTrainer, "_initialize_and_run_controller", note)
    lean = trainer._LeanTrainer(lambda: None, scaling_config=ScalingConfig(num_workers=1))
    lean._initialize_and_run_controller(scaling_policy="Ray's own")
    assert asked["scaling_policy"] == "Ray's own"


@pytest.mark.parametrize("num_workers", [1, 2])
def test_the_barrier_of_one_worker_is_ended(
    num_workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[str] = []
    monkeypatch.setattr(trainer.WorkerGroup, "_start", lambda _: None)
    monkeypatch.setattr(trainer.WorkerGroup, "get_workers", lambda _: [None] * num_workers)
    monkeypatch.setattr(trainer.ray, "kill", ended.append)
    group: Any = object.__new__(trainer._LeanGroup)
    group._worker_group_state = SimpleNamespace(sync_actor="barrier")
    group._start()
    assert ended == (["barrier"] if num_workers == 1 else [])


def arguments(method: Any, function: str = "") -> set[str]:
    """Names of the keyword arguments in calls of `function`, or in all calls."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(method)))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    wanted = [c for c in calls if function in ("", getattr(c.func, "id", None))]
    return {key.arg for call in wanted for key in call.keywords if key.arg}


def test_workers_are_told_what_ray_tells_them() -> None:
    """_LeanGroup repeats two calls of Ray's; their arguments must stay those of Ray's own."""
    ours = arguments(trainer._LeanGroup._init_train_context_on_workers)
    assert ours == arguments(trainer.WorkerGroup._init_train_context_on_workers)
    assert "controller_actor" in ours
    ours = arguments(trainer._LeanGroup._create_placement_group, "placement_group")
    theirs = arguments(trainer.WorkerGroup._create_placement_group, "placement_group")
    assert ours == theirs | {"name"}
    assert "bundles" in theirs
