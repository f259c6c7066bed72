"""A layer in Ray Serve's HTTP proxy: one more try where a replica dies, and errors in one shape.

Serve (2.60) answers for a replica that died, or that is not there yet, in plain text, and lets a
stream that breaks off look like one that ended. Here a request of which nothing was answered goes
to another replica once; what fails all the same becomes an OpenAI error object, and a broken stream
ends with an error event.

Serve also reads a body as fast as its client sends it, and holds what the replica has not taken: of
an upload no more is read here than the replica keeps up with.

`RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=serving.front:middlewares` in the environment of a
cluster puts this layer there; on a private Ray it is set.
"""

import asyncio
import json
from collections import deque

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving import problems

_REPEATABLE = ("GET", "POST")
_MAX_BODY_BYTES = 64 << 20
"""Of a request that can be sent again; the most that http.max_body_bytes allows."""
_UPLOAD = ("POST", "/v1/files")
_MAX_UPLOAD_BYTES = 1 << 20
"""Of an upload that can be sent again."""
_AHEAD_BYTES = 8 << 20
"""Of an upload that the replica has not taken yet."""
_PACE_S = 30.0
"""How long an upload waits for a replica that says nothing, before it goes on all the same."""
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
        is_upload = (scope["method"], scope["path"]) == _UPLOAD
        if is_upload:
            extensions = scope.get("extensions") or {}
            scope = {**scope, "extensions": {**extensions, problems.RECEIVED: {}}}
        body = _Recorded(receive, _MAX_UPLOAD_BYTES if is_upload else _MAX_BODY_BYTES)
        pace = _Pace(body.receive) if is_upload else None
        attempt = _Attempt(send, pace)
        await self._app(dict(scope), pace.receive if pace else body.receive, attempt.send)
        if attempt.is_lost and body.can_repeat and scope["method"] in _REPEATABLE:
            body.rewind()
            attempt = _Attempt(send, pace)
            await self._app(dict(scope), body.receive, attempt.send)
        if body.is_gone:
            return
        if attempt.is_lost:
            await _answer(send)
        elif not attempt.is_whole:
            await attempt.break_off()


class _Recorded:
    """A request's body, which can be read again where it is not too long."""

    def __init__(self, receive: Receive, max_bytes: int) -> None:
        self._receive = receive
        self._max_bytes = max_bytes
        self._heard: list[Message] = []
        self._again: deque[Message] = deque()
        self._num_bytes = 0
        self.is_gone = False
        """Whether the client has left."""

    @property
    def can_repeat(self) -> bool:
        return not self.is_gone and self._num_bytes <= self._max_bytes

    async def receive(self) -> Message:
        if self._again:
            return self._again.popleft()
        message = await self._receive()
        if message["type"] == "http.disconnect":
            self.is_gone = True
        elif self._num_bytes <= self._max_bytes:
            self._num_bytes += len(message.get("body", b""))
            self._heard.append(message)
            if self._num_bytes > self._max_bytes:
                self._heard.clear()
        return message

    def rewind(self) -> None:
        self._again = deque(self._heard)


class _Pace:
    """A `receive` that does not run ahead of the replica by more than a bound."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._given_bytes = 0
        self._taken_bytes = 0
        self._is_taken = asyncio.Event()
        self._is_off = False

    async def receive(self) -> Message:
        while not self._is_off and self._given_bytes - self._taken_bytes > _AHEAD_BYTES:
            self._is_taken.clear()
            try:
                await asyncio.wait_for(self._is_taken.wait(), _PACE_S)
            except TimeoutError:  # an application that is not ours, or one that hangs
                self._is_off = True
        message = await self._receive()
        self._given_bytes += len(message.get("body", b""))
        return message

    def take(self, num_bytes: int) -> None:
        """The replica has taken so many bytes in all."""
        self._taken_bytes = num_bytes
        self._is_taken.set()


class _Attempt:
    """What one replica answers, passed on unless it is Serve's own error."""

    def __init__(self, send: Send, pace: _Pace | None) -> None:
        self._send = send
        self._pace = pace
        self._is_stream = False
        self.is_lost = True
        """Nothing was answered, or Serve has answered in the replica's place."""
        self.is_whole = False

    async def send(self, message: Message) -> None:
        if message["type"] == problems.RECEIVED:
            if self._pace is not None:
                self._pace.take(message["num_bytes"])
            return
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
