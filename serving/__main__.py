"""`python -m serving SERVE.yaml [section.field=value ...]`: the same as `loray serve`."""

import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
import yaml

from cluster import command, storage
from cluster.command import say
from cluster.errors import ConfigError
from training.__main__ import Address, Overrides

if TYPE_CHECKING:
    from serving.config import ServeRecipe

ServeFile = Annotated[
    Path, typer.Argument(help="A serving file, YAML or JSON.", show_default=False)
]


PRIVATE_RAY = {
    # Ray (2.60) runs workers at niceness 15, so that clients on this machine would slow the engine.
    "RAY_worker_niceness": "0",
    # Serve's own words for less work by request; our application never blocks the loop.
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    "RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE": "1000",
    "RAY_SERVE_LOG_TO_STDERR": "0",
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "serving.front:middlewares",
}
"""Settings of a Ray that is started here; a cluster has its own."""


def serve(
    file: ServeFile,
    overrides: Overrides = None,
    address: Address = None,
    print_config: Annotated[
        bool, typer.Option("--config", help="Print a config for `serve deploy`; start nothing.")
    ] = False,
) -> None:
    """Serve a base model with adapters over HTTP, in the OpenAI API."""
    from serving import config

    recipe = config.load(file, overrides or ())
    directory, root = config.registry_of(recipe, file), Path(recipe.adapters_root)
    for hook in recipe.webhooks:
        hook.secret()
    has_keys = _has_keys(recipe, directory)  # refuses before Ray is started
    if print_config:
        from serving import app

        print(yaml.safe_dump(app.deploy_config(recipe, directory, root), sort_keys=False))
        return
    _require_free(recipe.http.host, recipe.http.port)
    started = time.perf_counter()

    from cluster import session  # seconds that bad usage must not cost

    stop = threading.Event()

    def ask_to_stop(*_: object) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    _on_signals(ask_to_stop)
    with (
        session.environment(PRIVATE_RAY),
        session.connect(address, has_jobs_api=recipe.tuning is not None) as ray_session,
    ):
        from ray import serve as ray_serve

        from serving import app

        _on_signals(
            ask_to_stop
        )  # Ray (2.60) has put a handler of its own, which aborts, on SIGTERM
        say(f"{ray_session}; loading {recipe.model.base}")
        ray_serve.start(
            proxy_location="EveryNode",
            http_options={"host": recipe.http.host, "port": recipe.http.port},
        )
        try:
            ray_serve.run(app.build(recipe, directory, root), name="loray", route_prefix="/")
            if recipe.tuning is not None:
                jobs_api = recipe.tuning.jobs_api or ray_session.jobs_api or app.JOBS_API
                tuner = app.build_tuner(recipe, directory, jobs_api)
                ray_serve.run(tuner, name="loray-jobs", route_prefix=None)
            took_s = time.perf_counter() - started
            _announce(file, recipe, took_s, num_nodes=ray_session.num_nodes, has_keys=has_keys)
            stop.wait()
            say("stopping: answers that run may end; Ctrl-C again stops at once")
            if recipe.tuning is not None:
                ray_serve.delete("loray-jobs")
            ray_serve.delete("loray")  # `shutdown` alone ends the proxy under them
        finally:
            ray_serve.shutdown()


def _announce(
    file: Path, recipe: "ServeRecipe", took_s: float, *, num_nodes: int, has_keys: bool
) -> None:
    """Say what is served where, and who may ask."""
    url = f"http://{recipe.http.host}:{recipe.http.port}/v1"
    say(f"serving {recipe.model_name} at {url} after {took_s:.0f} s")
    if num_nodes > 1:
        say(
            "of the cluster's nodes those that have a replica, and the head, listen: now "
            f"{', '.join(_listeners())}"
        )
    if not has_keys:
        say(
            "no key was ever made: whoever is on this machine may do everything, until the "
            f"first `loray keys create {file} NAME`"
        )


def _listeners() -> list[str]:
    """Addresses of the nodes where Serve listens now."""
    import ray
    from ray import serve as ray_serve

    ids = ray_serve.status().proxies
    return sorted(str(node["NodeManagerAddress"]) for node in ray.nodes() if node["NodeID"] in ids)


def _on_signals(act: Callable[..., None]) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, act)


def _has_keys(recipe: "ServeRecipe", directory: Path) -> bool:
    """Whether a key is asked. directory: of the registry.

    Raises ConfigError for a keys_file or a database that cannot be used, and where a key is needed
    and there is none, or none any more; RegistryError.
    """
    from cluster.registry import database, keys
    from serving.config import database_url, key_marks
    from serving.keys import Keys
    from serving.loopback import require_never_keys, require_safe_bind

    if recipe.keys_file is not None:
        Keys(Path(recipe.keys_file))
    storage.make_directory(directory)
    with closing(database.open_(database_url(recipe, directory))) as opened:
        has_keys = recipe.keys_file is not None or keys.known(opened, now=time.time()).was_any
    require_safe_bind(recipe.http.host, has_keys=has_keys)
    if not has_keys:
        require_never_keys(key_marks(recipe, directory))
    return has_keys


def _require_free(host: str, port: int) -> None:
    """Raises ConfigError where another program has the port, or the host is none of ours."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host.strip("[]"), port))
        except OSError as error:
            raise ConfigError(
                f"http.host {host}, http.port {port}: cannot listen there ({error.strerror}); stop "
                "what listens, or set http.port=PORT"
            ) from None


def main(argv: list[str] | None = None) -> int:
    """The door; returns the exit status."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(serve)
    return command.run(app, argv)


if __name__ == "__main__":
    sys.exit(main())
