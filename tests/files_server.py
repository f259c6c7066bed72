"""The files API alone under Ray Serve: `python -m files_server DIRECTORY PORT`, until Ctrl-C."""

import sys
import threading
import time
from pathlib import Path

from fastapi import FastAPI
from ray import serve

from cluster import session
from serving import files, problems
from serving.__main__ import PRIVATE_RAY
from serving.shelf import FileLimits, Shelf

LIMITS = FileLimits(max_file_bytes=256 << 20, max_line_bytes=8 << 20)


@serve.deployment(max_ongoing_requests=64, ray_actor_options={"num_cpus": 0.1})
@serve.ingress()
class Files:
    """A replica."""

    def __init__(self, directory: str) -> None:
        from cluster.registry import database

        opened = database.open_(database.sqlite_url(Path(directory) / "registry.db"))
        self._shelf = Shelf(opened, Path(directory) / "runs", LIMITS, time.time)

    def __serve_build_asgi_app__(self) -> FastAPI:
        app = FastAPI()
        problems.install(app, max_body_bytes=4 << 20, longer=files.body_limits(LIMITS))
        app.state.access = None
        app.include_router(files.router(self._shelf))
        return app


def main(directory: str, port: int) -> None:
    with session.environment(PRIVATE_RAY), session.connect(None):
        serve.start(proxy_location="EveryNode", http_options={"host": "127.0.0.1", "port": port})
        try:
            deployment = Files  # pyright: ignore[reportAttributeAccessIssue]
            serve.run(deployment.bind(directory), name="loray", route_prefix="/")
            print("ready", flush=True)
            threading.Event().wait()
        except KeyboardInterrupt:
            pass
        finally:
            serve.shutdown()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
