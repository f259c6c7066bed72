"""A served tiny model over a real socket, without Ray."""

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests
import uvicorn
from fastapi import FastAPI
from local_cluster import free_port
from openai import OpenAI

from cluster import config
from cluster.registry import database
from serving import inference, tuning
from serving.access import Access
from serving.aliases import Aliases
from serving.config import ServeRecipe, database_url, key_marks
from serving.keys import Keys
from serving.metrics import Metrics
from serving.quotas import Quotas
from serving.replica import Replica, open_replica
from serving.runner import Runner

_START_S = 60.0


@dataclass
class Running:
    """A server that answers."""

    url: str
    client: OpenAI
    replica: Replica
    metrics: Metrics
    database: database.Database
    """Of its registry."""
    app: FastAPI
    aliases: Aliases

    def post(self, path: str, body: Any, **options: Any) -> requests.Response:
        return requests.post(f"{self.url}{path}", json=body, timeout=60, **options)


@contextmanager
def serving(
    directory: Path,
    base: Path,
    *,
    keys: Path | None = None,
    runner: Runner | None = None,
    **sections: Any,
) -> Iterator[Running]:
    """Serve a base directory; `sections` of the serving file win over the defaults.

    runner: runs the fine-tuning jobs, where there is a section `tuning`; None: nothing does.
    """
    if "database" in sections:  # its URL may hold a password
        sections = {**sections, "database": secret_url(directory / "database-url", sections)}
    tree = {
        "model": {"base": str(base), "quantization": "none"},
        "limits": {
            "rows": 4, "context_tokens": 512, "kv_tokens": 4096, "prefill_tokens": 64,
            "prefix_page": 4, "prefix_tokens": 1024, "waiting": 64,
        },
        **sections,
    }  # fmt: skip
    recipe = config.build(ServeRecipe, tree, where="serve")
    metrics = Metrics(known=[recipe.model_name])
    replica = open_replica(recipe, directory / "registry", on_step=metrics.step)
    opened = database.open_(database_url(recipe, directory / "registry"))
    access = Access(
        opened,
        keys_file=Keys(keys) if keys else None,
        host=recipe.http.host,
        marks=key_marks(recipe, directory / "registry"),
    )
    quotas = Quotas(opened)
    tuned = tuning.open_tuning(recipe, opened, replica)
    aliases = tuning.open_aliases(opened, replica)
    app = inference.make_app(
        replica,
        root=directory,
        access=access,
        quotas=quotas,
        metrics=metrics,
        tuning=tuned,
        aliases=aliases,
        lifespan=lambda _: inference.following(
            replica, access, quotas, tuned.models if tuned else None, aliases
        ),
    )
    port = free_port()
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="error", lifespan="on"))
    thread = threading.Thread(target=server.run)
    thread.start()
    stop = threading.Event()
    dispatching = threading.Thread(target=lambda: None)
    if runner is not None:
        dispatcher = tuning.open_dispatcher(recipe, opened, runner, holder="test")
        dispatching = threading.Thread(target=dispatcher.run, args=(stop,))
    dispatching.start()
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + _START_S
        while not server.started:
            assert thread.is_alive(), "the server ended"
            assert time.monotonic() < deadline, "the server did not start"
            time.sleep(0.02)
        client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60)
        yield Running(url, client, replica, metrics, opened, app, aliases)
    finally:
        stop.set()
        dispatching.join(30)
        server.should_exit = True
        thread.join(30)
        replica.close()
        opened.close()
        assert not thread.is_alive(), "the server does not end"


def secret_url(path: Path, sections: Mapping[str, Any]) -> str:
    """The word `database` of a serving file whose URL is to be in a file."""
    path.touch(0o600)
    path.write_text(sections["database"])
    return f"file:{path}"


def until(condition: Callable[[], bool]) -> None:
    """Wait for what must come soon."""
    deadline = time.monotonic() + _START_S
    while not condition():
        assert time.monotonic() < deadline, "nothing happened in time"
        time.sleep(0.005)
