"""What of Ray Train is started for a run; fails where the private names of Ray 2.60 move."""

from ray.train import ScalingConfig
from ray.train.backend import Backend
from ray.train.torch import TorchConfig
from ray.train.v2._internal.callbacks import BackendSetupCallback, DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback

from training import trainer


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
