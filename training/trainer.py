"""The Ray Train workers of a run: how many resources each gets, starting them, waiting for them.

Ray Train 2.60 starts six helper actors beside the workers, each of which wakes 100 times a second.
On two cores helpers and servers took 9 % of the training speed: the loop's two threads wait for
each other, so that a pause of one is a pause of both. On a private Ray the controller therefore
runs in the driver, and helpers that have nothing to do are not started or end at once; the servers
likewise in `cluster.session`. `scripts/bench ray` measures what is left. The private names of Ray
Train that this takes are all in this file, `failures.py` and `notice.py`.
"""

import asyncio
import logging
import os
import threading
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.backend import Backend
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy
from ray.train.v2._internal.execution.worker_group import WorkerGroup
from ray.train.v2._internal.execution.worker_group.placement_group_handle import (
    DefaultPlacementGroupHandle,
)
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)

from cluster import config
from cluster.errors import ResourceError
from cluster.scratch import Scratch
from cluster.session import Session
from training import notice, worker
from training.config import TrainRecipe
from training.failures import FailurePolicy

_GROUP_TIMEOUT_S = 1800
"""Longest wait of a worker for the others, which may be evaluating by generation."""
_HUNG_AFTER_S = "60"
"""Without an answer of a worker's actor, which has a thread for it beside that of the training: a
worker that evaluates or writes for longer answers, a stopped process does not. Ray Train's own
setting (600 s) wins where it is in the environment."""


class Outcome:
    """A call in a thread: Ctrl-C must reach the main thread, not Ray's own handler."""

    def __init__(self, call: Callable[[], object], scratch: Scratch):
        self.error: BaseException | None = None
        self._call = call
        self._scratch = scratch
        self._ended = threading.Event()
        threading.Thread(target=self._run, name="ray-train-fit", daemon=True).start()

    def _run(self) -> None:
        try:
            self._call()
        except BaseException as error:  # handed over to the main thread
            self.error = error
        finally:
            self._scratch.remove()
            self._ended.set()

    def is_over(self, timeout_s: float) -> bool:
        """Wait up to `timeout_s`; whether the call has ended."""
        # Not Thread.join: interrupted, it takes the thread for stopped (bpo-45274, Python 3.11).
        return self._ended.wait(timeout_s)


def start(
    recipe: TrainRecipe,
    run_dir: Path,
    data_fingerprint: str,
    ray_session: Session,
    *,
    is_held: bool = False,
) -> Outcome:
    """Start the workers of a recipe whose paths are absolute; they write into `run_dir`.

    The caller holds the run's lock. is_held: see loop.Job. Raises ResourceError where the cluster
    has fewer CPUs or GPUs than the recipe asks for.
    """
    cpus, gpus = _share_out(recipe, ray_session)
    # Read where the controller starts workers: in this process, or in an actor that is given it.
    os.environ.setdefault("RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S", _HUNG_AFTER_S)
    if ray_session.is_private:
        end_workers([recipe.name])  # of a driver that was killed: nobody else has the lock
    spec = {
        "recipe": config.plain(recipe),
        "run_dir": str(run_dir),
        "data_fingerprint": data_fingerprint,
        "threads": cpus,
        "is_held": is_held,
    }
    # Ray's state of the run is not used: our checkpoints are the truth, so it gets a throw-away
    # place (a truncated checkpoint_manager_snapshot.json makes a run of Ray 2.60 unresumable).
    scratch = Scratch()
    group = TorchConfig if recipe.scale.workers > 1 else _NoGroup
    trainer = _LeanTrainer(
        worker.ray_worker,
        train_loop_config=spec,
        torch_config=group(timeout_s=_GROUP_TIMEOUT_S),
        scaling_config=ScalingConfig(
            num_workers=recipe.scale.workers,
            use_gpu=gpus > 0,
            resources_per_worker={"CPU": cpus, **({"GPU": gpus} if gpus else {})},
        ),
        run_config=RunConfig(
            name=recipe.name,
            storage_path=str(scratch.path),
            failure_config=FailureConfig(max_failures=recipe.scale.max_failures),
        ),
    )
    trainer.is_private = ray_session.is_private
    trainer.run_dir = run_dir
    return Outcome(trainer.fit, scratch)


def end_workers(runs: Collection[str]) -> None:
    """Kill what a private Ray still has of the runs of these names, and free its CPUs and GPUs.

    Ray keeps the placement group of a driver that is an actor until the whole job ends (ray
    #54305); a shared cluster has Ray's own cleaner for that.
    """
    for key, row in placement_group_table().items():
        if row["name"] in runs and row["state"] != "REMOVED":
            remove_placement_group(PlacementGroup(ray.PlacementGroupID(bytes.fromhex(key))))


class _NoGroup(TorchConfig):
    """No process group: one worker has nobody to talk to."""

    @property
    def backend_cls(self) -> Any:  # Ray types it as its own process group backend
        """Sets up nothing."""
        return Backend


class _LeanTrainer(TorchTrainer):
    """TorchTrainer (Ray 2.60) without the helpers that have nothing to do here."""

    is_private = False
    """A private Ray ends with its driver, and leaves no placement group to clean up."""
    run_dir = Path()
    """Where the workers write."""

    def _create_default_callbacks(self) -> list[Any]:
        idle: tuple[type, ...] = (DatasetsCallback,)  # it serves Ray Data sets; we use none
        if self.is_private:
            idle = (*idle, PlacementGroupCleanerCallback)
        calls = [call for call in super()._create_default_callbacks() if not isinstance(call, idle)]
        return [*calls, notice.Listener()]

    def _initialize_and_run_controller(self, **options: Any) -> Any:
        config: Any = self.run_config.failure_config
        options["failure_policy"] = FailurePolicy(config, self.run_dir)
        if not self.is_private:
            return super()._initialize_and_run_controller(**options)
        options["scaling_policy"] = _StillPolicy(self.scaling_config)
        # It is told to the controller's own log elsewhere; a person reads our events and errors.
        logging.getLogger("ray.train").setLevel(logging.CRITICAL)
        controller = _DriverController(**options)
        asyncio.run(controller.run())
        return controller.get_result()


class _LeanGroup(WorkerGroup):
    """Workers without a controller actor, and where there is one, without a barrier actor."""

    def _start(self) -> None:
        super()._start()
        if len(self.get_workers()) == 1:  # it would wait for itself in a process of its own
            state: Any = self._worker_group_state
            ray.kill(state.sync_actor)

    def _create_placement_group(self, scaling_config: Any, worker_group_context: Any) -> Any:
        """As Ray's without TPUs, and with the run's name, by which `end_workers` finds it."""
        return DefaultPlacementGroupHandle(
            placement_group(
                bundles=[worker_group_context.resources_per_worker]
                * worker_group_context.num_workers,
                strategy=worker_group_context.placement_strategy,
                name=self._train_run_context.run_config.name or "",
                bundle_label_selector=worker_group_context.label_selector,
            )
        )

    def _init_train_context_on_workers(
        self, workers: Any, sync_actor: Any, train_context_args: Any
    ) -> None:
        """As Ray's, but for the controller's handle, which only ray.train.report would use."""
        ray.get(
            [
                worker.actor.init_train_context.remote(
                    train_run_context=self._train_run_context,
                    distributed_context=worker.distributed_context,
                    synchronization_actor=sync_actor,
                    storage_context=self._storage_context,
                    worker_callbacks=self._worker_callbacks_to_propagate,
                    controller_actor=None,
                    **{name: values[i] for name, values in train_context_args.items()},
                )
                for i, worker in enumerate(workers)
            ]
        )
        self._decorate_worker_log_file_paths(workers)


class _DriverController(TrainController):
    """The controller, in the driver's process: a private Ray ends with its driver anyway."""

    worker_group_cls = _LeanGroup


class _StillPolicy(FixedScalingPolicy):
    """A fixed number of workers on a machine that nobody scales, so nobody is asked for more."""

    def after_controller_start(self, train_run_context: Any) -> None:
        """Starts no AutoscalingCoordinator."""

    def _maybe_send_resource_request(self) -> None:
        """There is nobody to send it to."""


def _share_out(recipe: TrainRecipe, ray_session: Session) -> tuple[int, int]:
    """CPUs and GPUs of each worker."""
    workers = recipe.scale.workers
    gpus = recipe.scale.gpus_per_worker
    if gpus == "auto":
        gpus = 1 if ray_session.num_gpus >= workers else 0
    cpus = recipe.scale.cpus_per_worker
    if cpus == "auto":
        cpus = max(1, int(ray_session.num_cpus) // workers)
    for name, wanted, there in (
        ("CPUs", cpus * workers, ray_session.num_cpus),
        ("GPUs", gpus * workers, ray_session.num_gpus),
    ):
        if wanted > there:
            raise ResourceError(
                f"scale asks for {wanted} {name} ({workers} workers), the cluster has {there:g}; "
                f"lower scale.workers or scale.{name[:-1].lower()}s_per_worker, or add nodes"
            )
    return cpus, gpus
