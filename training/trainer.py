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
import signal
import threading
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import asdict, replace
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

from cluster import config, remote
from cluster.errors import ResourceError
from cluster.remote import is_url
from cluster.scratch import Scratch
from cluster.session import Session
from training import notice, strategy, worker
from training.config import ScaleConfig, TrainRecipe
from training.dataset import Seen
from training.failures import FailurePolicy

_RESIZE_EVERY_S = 30.0
"""Between two looks for room for more workers: each resize costs a start and what was not saved."""
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
    seen: Seen,
    ray_session: Session,
    *,
    is_held: bool = False,
) -> Outcome:
    """Start the workers of a recipe whose paths are absolute; they write into `run_dir`.

    The caller holds the run's lock. seen: see worker.run. is_held: see loop.Job. Raises
    ResourceError where the cluster has fewer CPUs or GPUs than the recipe asks for.
    """
    scale = _share_out(recipe.scale, ray_session)
    cpus, gpus = scale.cpus_per_worker, scale.gpus_per_worker
    assert cpus != "auto"
    assert gpus != "auto"
    # Read where the controller starts workers: in this process, or in an actor that is given it.
    os.environ.setdefault("RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S", _HUNG_AFTER_S)
    if ray_session.is_private:
        end_workers([recipe.name])  # of a driver that was killed: nobody else has the lock
    spec = {
        "recipe": config.plain(recipe),
        "run_dir": str(run_dir),
        "seen": asdict(seen),
        "threads": cpus,
        "is_held": is_held,
    }
    # Ray's state of the run is not used: our checkpoints are the truth, so it gets a throw-away
    # place (a truncated checkpoint_manager_snapshot.json makes a run of Ray 2.60 unresumable).
    scratch = Scratch()
    talks = scale.workers != 1 or scale.strategy in strategy.ZERO
    group = TorchConfig if talks else _NoGroup
    train = worker.ray_worker
    if is_url(recipe.storage) and not ray_session.is_private:
        train = _with_settings(remote.settings())
    trainer = _LeanTrainer(
        train,
        train_loop_config=spec,
        torch_config=group(timeout_s=_GROUP_TIMEOUT_S),
        scaling_config=ScalingConfig(
            num_workers=(scale.least_workers, scale.most_workers)
            if scale.is_elastic
            else scale.most_workers,
            elastic_resize_monitor_interval_s=_RESIZE_EVERY_S,
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


def _with_settings(settings: dict[str, str]) -> Callable[[dict[str, Any]], None]:
    """The train function where the driver's access to its store is not in a node's environment.

    In a closure, since Ray shows train_loop_config and the runtime environment on its dashboard.
    """

    def train(spec: dict[str, Any]) -> None:
        remote.use_settings(settings)
        worker.ray_worker(spec)

    return train


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

    def shutdown(self) -> None:
        """Ends a stopped worker by hand, since Ray would first ask it to go, for half a minute."""
        for rank in self._world_rank_to_ongoing_poll:
            with suppress(ProcessLookupError):
                os.kill(self.get_workers()[rank].metadata.pid, signal.SIGKILL)
        super().shutdown()

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


def _share_out(scale: ScaleConfig, ray_session: Session) -> ScaleConfig:
    """What `auto`, and on a private Ray a range of workers, comes to on this cluster.

    Raises ResourceError where the cluster has no room for the least number of workers.
    """
    fixed = scale.least_workers
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus = scale.gpus_per_worker
    if gpus == "auto":
        gpus = 1 if ray_session.num_gpus >= fixed else 0
    cpus = scale.cpus_per_worker
    if cpus == "auto" and scale.is_elastic:  # as many as a node has for each of its workers
        each = [int(n.get("CPU", 0) / max(1, n.get("GPU", 0) if gpus else 1)) for n in nodes]
        cpus = max(1, min((number for number in each if number), default=1))
    elif cpus == "auto":
        cpus = max(1, int(ray_session.num_cpus) // fixed)
    for name, wanted, there in (
        ("CPUs", cpus * fixed, ray_session.num_cpus),
        ("GPUs", gpus * fixed, ray_session.num_gpus),
    ):
        if wanted > there:
            raise ResourceError(
                f"scale asks for {wanted} {name} ({fixed} workers), the cluster has {there:g}; "
                f"lower scale.workers or scale.{name[:-1].lower()}s_per_worker, or add nodes"
            )
    workers = scale.workers
    if scale.is_elastic and ray_session.is_private:  # no node comes or goes
        room = ray_session.num_gpus // gpus if gpus else ray_session.num_cpus // cpus
        workers = min(scale.most_workers, max(fixed, room))
    return replace(scale, workers=workers, cpus_per_worker=cpus, gpus_per_worker=gpus)
