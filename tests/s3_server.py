"""A real S3 server (moto's) in a thread, on a random port, that can be told to misbehave.

What it cannot show: how the stores of Amazon and others behave under load. moto checks
If-None-Match and writes without a lock in between, so conditional writes take turns here.
"""

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import requests
from moto.moto_server.werkzeug_app import (
    DomainDispatcherApplication,
    MotoRequestHandler,
    create_backend_app,
)
from s3fs import S3FileSystem
from werkzeug.serving import make_server

BUCKET = "bucket"
ACCESS = {
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One request of a client: its method, its object, and whether the server has answered it."""

    method: str
    key: str
    is_done: bool


Fault = Callable[[Request], int | None]
"""Told of each request twice; the status to answer with instead, such as 503."""


@dataclass
class S3Server:
    """Where the server is, what was asked of it, and what goes wrong."""

    endpoint: str = ""
    requests: list[Request] = field(default_factory=list)
    fault: Fault | None = None
    honours_conditions: bool = True
    """If-None-Match is heeded."""

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs to use it."""
        return {**ACCESS, "FSSPEC_S3_ENDPOINT_URL": self.endpoint}

    def puts(self) -> list[str]:
        """Keys in the order in which they were written."""
        return [one.key for one in self.requests if one.method == "PUT" and one.is_done]

    def objects(self, prefix: str = "") -> list[str]:
        """All objects of the bucket below a prefix."""
        found = self._client().find(f"{BUCKET}/{prefix}".rstrip("/"))
        return [key.removeprefix(f"{BUCKET}/") for key in found]

    def get(self, key: str) -> bytes:
        """The bytes of an object."""
        return self._client().cat_file(f"{BUCKET}/{key}")

    def put(self, key: str, data: bytes) -> None:
        """Write an object behind everybody's back."""
        self._client().pipe_file(f"{BUCKET}/{key}", data)

    def delete(self, key: str) -> None:
        """Remove an object behind everybody's back."""
        self._client().rm_file(f"{BUCKET}/{key}")

    def _client(self) -> S3FileSystem:
        return S3FileSystem(
            endpoint_url=self.endpoint,
            key=ACCESS["AWS_ACCESS_KEY_ID"],
            secret=ACCESS["AWS_SECRET_ACCESS_KEY"],
            use_listings_cache=False,
        )


class _Quiet(MotoRequestHandler):
    def log_request(self, *_: Any) -> None:
        """Say nothing."""


@contextmanager
def s3_server() -> Iterator[S3Server]:
    """A server with an empty bucket, for the time of the block."""
    app = DomainDispatcherApplication(create_backend_app)
    server = S3Server()
    one_writer = threading.Lock()

    def answer(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        method = environ["REQUEST_METHOD"]
        key = environ["PATH_INFO"].removeprefix(f"/{BUCKET}").lstrip("/")
        if not server.honours_conditions:
            environ.pop("HTTP_IF_NONE_MATCH", None)
        status = _ask(server, method, key, is_done=False)
        if status is None:
            if method == "PUT":
                with one_writer:
                    body = list(app(environ, start_response))
            else:
                body = app(environ, start_response)
            status = _ask(server, method, key, is_done=True)
            if status is None:
                return body
        start_response(f"{status} Injected", [("Content-Type", "text/plain")])
        return [b""]

    http = make_server("127.0.0.1", 0, answer, threaded=True, request_handler=_Quiet)
    http.daemon_threads = True
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    server.endpoint = f"http://127.0.0.1:{http.server_port}"
    try:
        requests.post(f"{server.endpoint}/moto-api/reset", timeout=10).raise_for_status()
        requests.put(f"{server.endpoint}/{BUCKET}", timeout=10).raise_for_status()
        server.requests.clear()
        yield server
    finally:
        http.shutdown()
        thread.join()
        http.server_close()


def _ask(server: S3Server, method: str, key: str, *, is_done: bool) -> int | None:
    request = Request(method=method, key=key, is_done=is_done)
    server.requests.append(request)
    return None if server.fault is None else server.fault(request)
