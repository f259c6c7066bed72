"""The shell under Ray Serve: one deployment, whose replicas each hold an engine."""

from pathlib import Path
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve import Application

from cluster import config
from serving.config import ServeRecipe

_ONGOING_PER_ROW = 64
"""Requests that Serve lets into a replica at once, for each row: our own queue is the fair one."""
_HEALTH_PERIOD_S = 5.0
_DRAIN_S = 600.0


@serve.deployment
@serve.ingress()
class Server:
    """A replica."""

    def __init__(self, tree: dict[str, Any], directory: str, root: str) -> None:
        """tree: a ServeRecipe as plain data. directory: of the registry. root: of adapters."""
        # torch and transformers: seconds that the driver, which knows this class, must not spend
        from serving.keys import Keys
        from serving.metrics import Metrics
        from serving.replica import open_replica

        recipe = config.build(ServeRecipe, tree, where="serve")
        self._metrics = Metrics(known=[recipe.model_name])
        self._replica = open_replica(recipe, Path(directory), on_step=self._metrics.step)
        self._keys = Keys.load(Path(recipe.keys_file)) if recipe.keys_file else None
        self._root = Path(root)

    def __serve_build_asgi_app__(self) -> FastAPI:
        """The application, once the base is loaded (Ray Serve 2.60 calls this)."""
        from serving import inference

        return inference.make_app(
            self._replica,
            root=self._root,
            keys=self._keys,
            metrics=self._metrics,
            lifespan=lambda _: inference.following(self._replica),
        )

    def check_health(self) -> None:
        """Have Serve replace a replica whose engine is dead."""
        if not self._replica.service.is_healthy():
            raise RuntimeError("the engine is dead")


def build(recipe: ServeRecipe, directory: Path, root: Path) -> Application:
    """The application of a serving file."""
    device = {"num_gpus": 1} if _has_gpu() else {"num_cpus": recipe.num_cpus}
    server: Any = Server
    return server.options(
        num_replicas=recipe.replicas,
        max_ongoing_requests=_ONGOING_PER_ROW * recipe.limits.rows,
        health_check_period_s=_HEALTH_PERIOD_S,
        graceful_shutdown_timeout_s=_DRAIN_S,
        ray_actor_options=device,
    ).bind(config.plain(recipe), str(directory), str(root))


def _has_gpu() -> bool:
    import ray

    return ray.cluster_resources().get("GPU", 0) > 0
