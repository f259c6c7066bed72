"""A layer in Ray Serve's HTTP proxy: one more try where a replica dies, and errors in one shape.

Serve (2.60) answers for a replica that died, or that is not there yet, in plain text, and lets a
stream that breaks off look like one that ended. Here a request of which nothing was answered goes
to another replica once; what fails all the same becomes an OpenAI error object, and a broken stream
ends with an error event. `RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=serving.front:middlewares` in
the environment of a cluster puts it there; on a private Ray it is set.
"""

import json
from collections import deque

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving import problems

_REPEATABLE = ("GET", "POST")
_MAX_BODY_BYTES = 64 << 20
"""Of a request that can be sent again; the most that http.max_body_bytes allows."""
_RETRY_AFTER_S = 5.0


def middlewares() -> list[Middleware]:
    """What Serve's proxy is to put around itself."""
    return [Middleware(front)]


def front(app: ASGIApp) -> ASGIApp:
    """The layer around an application."""
    return problems.RequestId(_Front(app))


class _Front:
    """The ASGI layer."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        MutableHeaders(scope=scope)["x-request-id"] = scope["state"]["request_id"]
        body = _Recorded(receive)
        attempt = _Attempt(send)
        await self._app(dict(scope), body.receive, attempt.send)
        if attempt.is_lost and body.can_repeat and scope["method"] in _REPEATABLE:
            body.rewind()
            attempt = _Attempt(send)
            await self._app(dict(scope), body.receive, attempt.send)
        if body.is_gone:
            return
        if attempt.is_lost:
            await _answer(send)
        elif not attempt.is_whole:
            await attempt.break_off()


class _Recorded:
    """A request's body, which can be read again."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._heard: list[Message] = []
        self._again: deque[Message] = deque()
        self._num_bytes = 0
        self.is_gone = False
        """Whether the client has left."""

    @property
    def can_repeat(self) -> bool:
        return not self.is_gone and self._num_bytes <= _MAX_BODY_BYTES

    async def receive(self) -> Message:
        if self._again:
            return self._again.popleft()
        message = await self._receive()
        if message["type"] == "http.disconnect":
            self.is_gone = True
        elif self._num_bytes <= _MAX_BODY_BYTES:
            self._num_bytes += len(message.get("body", b""))
            self._heard.append(message)
        return message

    def rewind(self) -> None:
        self._again = deque(self._heard)


class _Attempt:
    """What one replica answers, passed on unless it is Serve's own error."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._is_stream = False
        self.is_lost = True
        """Nothing was answered, or Serve has answered in the replica's place."""
        self.is_whole = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            kind = Headers(raw=message.get("headers", [])).get("content-type", "")
            self._is_stream = kind.startswith("text/event-stream")
            self.is_lost = message["status"] >= 400 and kind.startswith("text/plain")
        if not self.is_lost:
            await self._send(message)
            is_body = message["type"] == "http.response.body"
            self.is_whole = is_body and not message.get("more_body", False)

    async def break_off(self) -> None:
        """End what cannot go on: a stream with an error event, else by cutting the connection."""
        if not self._is_stream:
            raise RuntimeError("the replica has died in the middle of its answer")
        error = problems.ApiError("The replica that answered has died. Please try again.")
        event = f"data: {json.dumps(problems.of_exception(error)[1])}\n\n".encode()
        await self._send({"type": "http.response.body", "body": event, "more_body": False})


async def _answer(send: Send) -> None:
    status, body, headers = problems.of_exception(problems.overloaded(_RETRY_AFTER_S))
    raw = [(b"content-type", b"application/json")]
    raw += [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": status, "headers": raw})
    await send({"type": "http.response.body", "body": json.dumps(body).encode()})
