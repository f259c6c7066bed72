"""What of Ray Train is started for a run; fails where the private names of Ray 2.60 move."""

from typing import Any

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


def test_a_private_ray_is_not_asked_to_scale() -> None:
    asked: dict[str, object] = {}

    class Noting(trainer.TorchTrainer):
        def _initialize_and_run_controller(self, **options: object) -> None:
            asked.update(options)

    class Lean(trainer._LeanTrainer, Noting):
        pass

    lean = Lean(lambda: None, scaling_config=ScalingConfig(num_workers=1))
    for is_private in (False, True):
        lean.is_private = is_private
        lean._initialize_and_run_controller(scaling_policy="Ray's own")
        assert (asked["scaling_policy"] == "Ray's own") is not is_private
    policy = asked["scaling_policy"]
    assert isinstance(policy, trainer._StillPolicy)
    policy.after_controller_start(None)
    assert policy._coordinator_client is None
    decision: Any = policy.make_decision_for_non_running_worker_group()
    assert decision.num_workers == 1
