"""The shell under Ray Serve: one deployment, whose replicas each hold an engine."""

import os
import socket
import threading
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve import Application

from cluster import config
from serving.config import ServeRecipe, database_url, key_marks

_ONGOING_PER_ROW = 64
"""Requests that Serve lets into a replica at once, for each row: our own queue is the fair one."""
_HEALTH_PERIOD_S = 5.0
_DRAIN_S = 600.0
JOBS_API = "http://127.0.0.1:8265"
"""Of a cluster whose head is the machine of the dispatcher."""


@serve.deployment
@serve.ingress()
class Server:
    """A replica."""

    def __init__(self, tree: dict[str, Any], directory: str, root: str) -> None:
        """tree: a ServeRecipe as plain data. directory: of the registry. root: of adapters."""
        # torch and transformers: seconds that the driver, which knows this class, must not spend
        from cluster.registry import database
        from serving import tuning
        from serving.access import Access
        from serving.keys import Keys
        from serving.metrics import Metrics
        from serving.quotas import Quotas
        from serving.replica import open_replica

        recipe = config.build(ServeRecipe, tree, where="serve")
        self._metrics = Metrics(known=[recipe.model_name])
        self._replica = open_replica(recipe, Path(directory), on_step=self._metrics.step)
        opened = database.open_(database_url(recipe, Path(directory)))
        self._quotas = Quotas(opened)
        self._access = Access(
            opened,
            keys_file=Keys(Path(recipe.keys_file)) if recipe.keys_file else None,
            host=recipe.http.host,
            marks=key_marks(recipe, Path(directory)),
        )
        self._root = Path(root)
        self._tuning = tuning.open_tuning(recipe, opened, self._replica)
        self._aliases = tuning.open_aliases(opened, self._replica)

    def __serve_build_asgi_app__(self) -> FastAPI:
        """The application, once the base is loaded (Ray Serve 2.60 calls this)."""
        from serving import inference

        return inference.make_app(
            self._replica,
            root=self._root,
            access=self._access,
            quotas=self._quotas,
            metrics=self._metrics,
            tuning=self._tuning,
            aliases=self._aliases,
            lifespan=lambda _: inference.following(
                self._replica,
                self._access,
                self._quotas,
                self._tuning.models if self._tuning else None,
                self._aliases,
            ),
        )

    def check_health(self) -> None:
        """Have Serve replace a replica whose engine is dead."""
        if not self._replica.service.is_healthy():
            raise RuntimeError("the engine is dead")


@serve.deployment
class Tuner:
    """Takes fine-tuning jobs to their ends; Serve starts it again where it dies."""

    def __init__(self, tree: dict[str, Any], directory: str, jobs_api: str) -> None:
        """tree: a ServeRecipe as plain data. directory: of the registry."""
        from cluster.registry import database
        from serving import tuning
        from serving.ray_runs import RayRuns

        recipe = config.build(ServeRecipe, tree, where="serve")
        opened = database.open_(database_url(recipe, Path(directory)))
        self._stop = threading.Event()
        dispatcher = tuning.open_dispatcher(
            recipe, opened, RayRuns(jobs_api), holder=f"{socket.gethostname()}-{os.getpid()}"
        )
        self._thread = threading.Thread(
            target=dispatcher.run, args=(self._stop,), name="dispatcher", daemon=True
        )
        courier = tuning.open_courier(recipe, opened)
        self._delivering = threading.Thread(
            target=courier.run, args=(self._stop,), name="courier", daemon=True
        )
        self._thread.start()
        self._delivering.start()

    def check_health(self) -> None:
        """Have Serve replace one whose loops have ended."""
        if not (self._thread.is_alive() and self._delivering.is_alive()):
            raise RuntimeError("the dispatcher has ended")

    def __del__(self) -> None:
        """Serve's word that the replica is to end: let another take over at once."""
        if hasattr(self, "_thread"):
            self._stop.set()
            self._thread.join(5)


def build_tuner(recipe: ServeRecipe, directory: Path, jobs_api: str) -> Application:
    """The application that dispatches fine-tuning jobs. It answers no requests."""
    tuner: Any = Tuner
    return tuner.options(
        num_replicas=1,
        health_check_period_s=_HEALTH_PERIOD_S,
        ray_actor_options={"num_cpus": 0},
    ).bind(config.plain(recipe), str(directory), jobs_api)


def build(recipe: ServeRecipe, directory: Path, root: Path) -> Application:
    """The application of a serving file. directory: of the registry. root: of adapters."""
    device = {"num_gpus": 1} if _has_gpu() else {"num_cpus": recipe.num_cpus}
    if recipe.max_replicas is None:
        replicas: dict[str, Any] = {"num_replicas": recipe.replicas}
    else:
        replicas = {
            "autoscaling_config": {
                "min_replicas": recipe.replicas,
                "max_replicas": recipe.max_replicas,
                "target_ongoing_requests": recipe.limits.rows,
            }
        }
    server: Any = Server
    return server.options(
        **replicas,
        max_ongoing_requests=_ONGOING_PER_ROW * recipe.limits.rows,
        max_surge_percent=recipe.max_surge_percent,
        health_check_period_s=_HEALTH_PERIOD_S,
        graceful_shutdown_timeout_s=_DRAIN_S,
        ray_actor_options=device,
    ).bind(config.plain(recipe), str(directory), str(root))


def application(args: dict[str, Any]) -> Application:
    """The same for `serve deploy`; args: of the application in `deploy_config`."""
    recipe = config.build(ServeRecipe, args["recipe"], where="args.recipe")
    return build(recipe, Path(args["registry"]), Path(args["root"]))


def tuner_application(args: dict[str, Any]) -> Application:
    """The dispatcher for `serve deploy`; args: of the application in `deploy_config`."""
    recipe = config.build(ServeRecipe, args["recipe"], where="args.recipe")
    return build_tuner(recipe, Path(args["registry"]), args["jobs_api"])


def deploy_config(recipe: ServeRecipe, directory: Path, root: Path) -> dict[str, Any]:
    """A config file of Ray Serve, as a tree, that serves a serving file on a cluster."""
    plain = {"recipe": config.plain(recipe), "registry": str(directory)}
    applications: list[dict[str, Any]] = [
        {
            "name": "loray",
            "route_prefix": "/",
            "import_path": "serving.app:application",
            "args": {**plain, "root": str(root)},
        }
    ]
    if recipe.tuning is not None:
        applications.append(
            {
                "name": "loray-jobs",
                "route_prefix": None,
                "import_path": "serving.app:tuner_application",
                "args": {**plain, "jobs_api": recipe.tuning.jobs_api or JOBS_API},
            }
        )
    return {
        "proxy_location": "EveryNode",
        "http_options": {"host": recipe.http.host, "port": recipe.http.port},
        "applications": applications,
    }


def _has_gpu() -> bool:
    import ray

    return ray.cluster_resources().get("GPU", 0) > 0
