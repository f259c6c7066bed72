"""OpenAI error objects on every path, and the id that every response carries.

Whatever goes wrong becomes `{"error": {"message", "type", "param", "code"}}`: errors of ours,
bodies that do not validate, routes that do not exist, and bugs, of which a client learns nothing
but that there was one. Where files lie on the server stands in its log, by the request's id.
"""

import asyncio
import json
import logging
import math
import re
import traceback
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from http import HTTPStatus
from typing import Any, Literal

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from typing_extensions import TypedDict  # pydantic takes typing's from Python 3.12 on only

from cluster.errors import DataError, LorayError, RegistryError, ResourceError

MAX_MESSAGE_CHARS = 2000
RECEIVED = "loray.received"
"""An extension of ASGI between this layer and `serving.front`, and the type of its messages: how
many bytes of a body have been taken. Serve's proxy would go on reading, whether they are or not."""
GONE = 499
"""Status of a request whose client went before its answer came (nginx's)."""
_MAX_SHOWN_CHARS = 80
_MAX_RETRY_AFTER_S = 3600
_PRIVATE = ("messages", "prompt", "suffix", "stop", "tools", "metadata", "user")
"""Fields whose texts are not repeated."""
_NAMES_OF_KINDS = ("role", "type")
"""Within them: what is wrong there is no text of anybody's."""
_SHORT_BYTES = 64 << 10
"""A body that is read to its end even where it is refused, so that the connection stays."""
_TELL_BYTES = 1 << 20
_LINGER_S = 1.0
_LINGER_BYTES = 16 << 20
_REGISTRY_RETRY_S = 2.0
_REQUEST_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
_PATH = re.compile(r"(?<![\w/:.-])~?/(?:[^\s/'\"]+/)*([^\s/'\"]+)")
_FIELD = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")
_UNREAD_BODY = "There was an error parsing the body"
"""What FastAPI 0.165 says of bodies that it cannot decode (fastapi/routing.py)."""
_FAILED = (
    "The server had an error while processing your request. Its log says more, by this answer's "
    "x-request-id."
)
_log = logging.getLogger(__name__)


class ErrorObject(TypedDict):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(TypedDict):
    """The body of every answer that is not a success."""

    error: ErrorObject


RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": "An OpenAI error object"}
    for status in ("4XX", "5XX")
}
"""For `FastAPI(responses=RESPONSES)`: documents errors as they are, and no 422."""


class ApiError(LorayError):
    """A request that is answered with an error object; `str` of it is the object's message."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 500,
        type: str | None = None,
        code: str | None = None,
        param: str | None = None,
        retry_after_s: float | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)  # The one argument; pickling carries the rest as attributes.
        # One class for all rows of the contract: these belong to the error, not to its class.
        self.status: int = status  # pyright: ignore[reportIncompatibleVariableOverride]
        self.code: str | None = code  # pyright: ignore[reportIncompatibleVariableOverride]
        self.type = type
        self.param = param
        self.retry_after_s = retry_after_s
        self.headers = headers or {}


def invalid(param: str, why: str) -> ApiError:
    """400: a value that cannot be used."""
    return ApiError(f"{param}: {why}", status=400, code="invalid_value", param=param)


def unsupported(param: str, why: str) -> ApiError:
    """400: something that OpenAI's API has and this server does not."""
    return ApiError(f"{param}: {why}", status=400, code="unsupported_value", param=param)


def context_length_exceeded(
    limit: int, prompt_tokens: int, max_tokens: int | None, param: Literal["messages", "prompt"]
) -> ApiError:
    """400: prompt and answer do not fit the model's context of `limit` tokens."""
    if max_tokens is None:
        asked = f"your {param} resulted in {prompt_tokens} tokens. Please shorten the {param}."
    else:
        asked = (
            f"you requested {prompt_tokens + max_tokens} tokens ({prompt_tokens} in the {param}, "
            f"{max_tokens} in the completion). Please shorten the {param} or the completion."
        )
    message = f"This model's maximum context length is {limit} tokens. However, {asked}"
    return ApiError(message, status=400, code="context_length_exceeded", param=param)


def invalid_api_key() -> ApiError:
    """401: no key, or none that is known. The key that was sent is not repeated."""
    message = "Missing or incorrect API key. Send the header `Authorization: Bearer <key>`."
    return ApiError(message, status=401, code="invalid_api_key")


def forbidden(why: str, *, param: str | None = None) -> ApiError:
    """403: a good key that may not do this."""
    return ApiError(why, status=403, param=param)


def model_not_found(name: str) -> ApiError:
    """404: no base model or adapter of this name."""
    shown = name if len(name) <= _MAX_SHOWN_CHARS else f"{name[:_MAX_SHOWN_CHARS]}..."
    message = f"The model `{shown}` does not exist or you do not have access to it."
    return ApiError(message, status=404, code="model_not_found", param="model")


def not_found(kind: str, name: str) -> ApiError:
    """404: nothing of this kind and name."""
    return ApiError(f"No such {kind}: {_shown(name)}", status=404, code="not_found", param="id")


def too_large(limit_bytes: int) -> ApiError:
    """413: a body beyond the server's limit."""
    message = f"The request's body is larger than {limit_bytes} bytes, this server's limit."
    return ApiError(message, status=413)


def rate_limited(
    retry_after_s: float,
    why: str,
    *,
    kind: Literal["requests", "tokens"] = "requests",
    headers: Mapping[str, str] | None = None,
) -> ApiError:
    """429: this client has used up its share. headers: its x-ratelimit-*."""
    return ApiError(
        why,
        status=429,
        type=kind,
        code="rate_limit_exceeded",
        retry_after_s=retry_after_s,
        headers=headers,
    )


def overloaded(retry_after_s: float) -> ApiError:
    """503: the server has no room for anyone at the moment."""
    return ApiError(
        "The server is overloaded or not ready yet. Please try again later.",
        status=503,
        type="service_unavailable_error",
        code="server_is_overloaded",
        retry_after_s=retry_after_s,
    )


def without_paths(text: str) -> str:
    """A text in which absolute paths are shown by their last parts."""
    return _PATH.sub(r"\1", text)


def problem(
    status: int,
    message: str,
    *,
    type: str | None = None,
    code: str | None = None,
    param: str | None = None,
) -> ErrorBody:
    """The error object; in the message at most MAX_MESSAGE_CHARS, all of them valid text."""
    if len(message) > MAX_MESSAGE_CHARS:
        message = f"{message[: MAX_MESSAGE_CHARS - 3]}..."
    return {
        "error": {
            "message": message.encode(errors="replace").decode(),  # "?" for a lone surrogate
            "type": type or ("invalid_request_error" if status < 500 else "server_error"),
            "param": param,
            "code": code,
        }
    }


def of_exception(error: Exception) -> tuple[int, ErrorBody, dict[str, str]]:
    """Status, body and headers for whatever was raised.

    The client repeats 408, 409, 429 and >= 500 by itself. `x-should-retry: false` forbids that
    where the second time would end like the first: on all of them but 429, 503 and where
    Retry-After says when. A bug (500) is not repeated: it would cost the same tokens again.
    """
    known = _as_api_error(_origin(error))
    headers = dict(known.headers)
    if known.retry_after_s is not None:
        seconds = min(max(1.0, known.retry_after_s), _MAX_RETRY_AFTER_S)
        headers["Retry-After"] = str(math.ceil(seconds))
    elif known.status in (408, 409) or (known.status >= 500 and known.status != 503):
        headers["x-should-retry"] = "false"
    if known.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    body = problem(known.status, str(known), type=known.type, code=known.code, param=known.param)
    return known.status, body, headers


def install(
    app: FastAPI,
    *,
    max_body_bytes: int,
    longer: Mapping[tuple[str, str], int] | None = None,
    gate: Callable[[ASGIApp], ASGIApp] = lambda inner: inner,
) -> None:
    """Make every error of this app an error object and give every response `x-request-id`.

    Bodies beyond `max_body_bytes` are answered with 413, unread where their length is declared.
    longer: limits of the routes, by method and path, that take longer ones.
    gate: a layer before all routes, and before the paths that have none.
    """
    for kind in (HTTPException, RequestValidationError, ValidationError, LorayError, Exception):
        app.add_exception_handler(kind, _respond)

    def build_middleware_stack() -> ASGIApp:
        inner = FastAPI.build_middleware_stack(app)
        return RequestId(_BodyLimit(gate(_Shield(inner)), max_body_bytes, longer or {}))

    # `add_middleware` would put these inside the layer that answers bugs.
    app.build_middleware_stack = build_middleware_stack


class RequestId:
    """ASGI layer: the client's `x-request-id` where it is sane, else a new one, on every response.

    Handlers find it as `request.state.request_id`.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else f"req_{uuid.uuid4().hex}"
        scope.setdefault("state", {})["request_id"] = request_id

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message.setdefault("headers", [])
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        await self._app(scope, receive, send_with_id)


class _BodyLimit:
    """ASGI layer that reads no more of a body than is allowed.

    Where an error is answered before a long body is at its end, the connection is closed: a client
    that goes on sending would be listened to until it ends. What it sends for a moment longer is
    read and dropped, or the system would reset the connection under the answer.
    """

    def __init__(self, app: ASGIApp, max_bytes: int, longer: Mapping[tuple[str, str], int]) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._longer = longer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        max_bytes = self._longer.get((scope["method"], scope["path"]), self._max_bytes)
        is_counted = RECEIVED in (scope.get("extensions") or {})
        body = _Body(Headers(scope=scope), receive, send if is_counted else None)
        sending = _Closing(body, send)
        if body.declared_bytes > max_bytes:
            status, answer, headers = of_exception(too_large(max_bytes))
            await JSONResponse(answer, status, headers)(scope, receive, sending)
            return

        async def counted() -> Message:
            message = await body.receive()
            if body.num_bytes > max_bytes:
                raise too_large(max_bytes)
            return message

        await self._app(scope, counted, sending)


class _Body:
    """How much of a request's body has come, and whether more is to come."""

    def __init__(self, headers: Headers, receive: Receive, tell: Send | None) -> None:
        """tell: is sent RECEIVED now and then."""
        declared = headers.get("content-length", "")
        self.declared_bytes = int(declared) if declared.isdigit() else 0
        is_chunked = "transfer-encoding" in headers
        self._receive = receive
        self._tell = tell
        self._told_bytes = 0
        self.num_bytes = 0
        self.is_long = is_chunked or self.declared_bytes > _SHORT_BYTES
        self.is_whole = not is_chunked and self.declared_bytes == 0

    async def receive(self) -> Message:
        message = await self._receive()
        self.num_bytes += len(message.get("body", b""))
        if message["type"] == "http.disconnect" or not message.get("more_body", False):
            self.is_whole = True
        elif self._tell is not None and self.num_bytes - self._told_bytes >= _TELL_BYTES:
            self._told_bytes = self.num_bytes
            await self._tell({"type": RECEIVED, "num_bytes": self.num_bytes})
        return message

    async def drop(self) -> None:
        """Read on for a moment."""
        most = self.num_bytes + _LINGER_BYTES
        with suppress(TimeoutError):
            async with asyncio.timeout(_LINGER_S):
                while not self.is_whole and self.num_bytes < most:
                    await self.receive()


class _Closing:
    """A `send` that closes the connection after an error while a long body still comes."""

    def __init__(self, body: _Body, send: Send) -> None:
        self._body = body
        self._send = send
        self._closes = False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            is_coming = self._body.is_long and not self._body.is_whole
            self._closes = message["status"] >= 400 and is_coming
            if self._closes:
                message.setdefault("headers", [])
                MutableHeaders(scope=message)["connection"] = "close"
        elif self._closes and not message.get("more_body", False):
            await self._send({**message, "more_body": True})
            await self._body.drop()
            message = {"type": "http.response.body", "body": b"", "more_body": False}
        await self._send(message)


class _Shield:
    """ASGI layer that keeps an exception's text, which may quote a prompt, out of server logs.

    Starlette answers a bug and then raises it once more, for the server to log.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        is_complete = False

        async def watched(message: Message) -> None:
            nonlocal is_complete
            await send(message)
            if message["type"] == "http.response.body":
                is_complete = not message.get("more_body", False)

        try:
            await self._app(scope, receive, watched)
        except Exception as error:
            if not is_complete:  # The server must cut the connection, or half looks like whole.
                kind = type(error).__name__
                raise RuntimeError(f"{kind}: the response broke off") from None


async def _respond(request: Request, error: Exception) -> JSONResponse:
    where = f"{request.method} {_shown(request.scope['path'])}"
    headers: Mapping[str, str] = {}
    if isinstance(error, HTTPException):
        headers = error.headers or {}  # `Allow` of a 405
        if error.status_code == 404 and error.detail == HTTPStatus.NOT_FOUND.phrase:
            message = f"Unknown request URL: {where}. Please check the URL for typos."
            error = ApiError(message, status=404, code="unknown_url")
        elif error.status_code == 405:
            allowed = headers.get("Allow", "another method")
            error = ApiError(f"Not allowed: {where}. Use {allowed}.", status=405)
    status, body, more = of_exception(error)
    log_what_is_not_told(request, error)
    return JSONResponse(body, status, {**headers, **more})


def log_what_is_not_told(request: Request, error: Exception) -> None:
    """For the operator: the text of an error of ours, and of a bug only where it was raised."""
    request_id = getattr(request.state, "request_id", None)
    cause = _origin(error)
    told = of_exception(cause)[1]["error"]["message"]
    if isinstance(cause, LorayError):
        if str(cause) != told and not isinstance(cause, ApiError | DataError):  # of their requests
            line = "event=request_failed request_id=%s error=%s reason=%r"
            _log.warning(line, request_id, type(cause).__name__, str(cause)[:MAX_MESSAGE_CHARS])
    elif told == _FAILED:
        frames = reversed(traceback.extract_tb(error.__traceback__, limit=-4))
        _log.error(
            "event=request_failed request_id=%s error=%s at=%s",
            request_id,
            type(error).__name__,
            "<".join(f"{frame.filename}:{frame.lineno}" for frame in frames),  # innermost first
        )


def _origin(error: Exception) -> Exception:
    """The exception itself where Ray wrapped it.

    Ray 2.60 raises a mixture of RayTaskError and the original's class, which has the original in
    `cause`, its traceback as text, and only the class's status.
    """
    while isinstance(cause := getattr(error, "cause", None), Exception):
        error = cause
    return error


def _as_api_error(error: Exception) -> ApiError:
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RegistryError):  # its text says where the database is
        message = "The server's database cannot be reached at the moment. Please try again later."
        wait_s = _REGISTRY_RETRY_S
        return ApiError(message, status=error.status, code=error.code, retry_after_s=wait_s)
    if isinstance(error, LorayError):
        is_ours = error.status >= 500 and not isinstance(error, ResourceError)
        message = _FAILED if is_ours else without_paths(str(error))
        return ApiError(message, status=error.status, code=error.code)
    if isinstance(error, RequestValidationError):
        return _of_validation(error.errors(), has_place=True)
    if isinstance(error, ValidationError):
        return _of_validation(error.errors(include_url=False), has_place=False)
    if isinstance(error, HTTPException):
        if isinstance(error.__cause__, ApiError):  # FastAPI wraps what reading a body raised
            return error.__cause__
        is_unread = error.detail == _UNREAD_BODY
        message = _of_unreadable(error.__cause__) if is_unread else str(error.detail)
        return ApiError(message, status=error.status_code)
    return ApiError(_FAILED, status=500)


def _of_unreadable(cause: BaseException | None) -> str:
    """Why FastAPI could not read a body; it says only that it could not."""
    if isinstance(cause, UnicodeDecodeError):
        return f"The request's body is not valid UTF-8: byte {cause.start} cannot be decoded."
    if isinstance(cause, RecursionError):
        return "The request's body is JSON that is nested too deeply."
    return "The request's body cannot be read."


def _of_validation(errors: Sequence[Mapping[str, Any]], *, has_place: bool) -> ApiError:
    """The first of pydantic's errors. `has_place`: `loc` begins with body, query, path..."""
    error = errors[0]
    kind: str = error["type"]
    if kind == "json_invalid":
        why = str(error.get("ctx", {}).get("error", "it cannot be parsed"))
        where = f" at character {error['loc'][-1]}" if has_place else ""
        return ApiError(f"The request's body is not valid JSON: {why}{where}.", status=400)
    place: tuple[str | int, ...] = error["loc"][1:] if has_place else error["loc"]
    param = _path(place[:-1] if kind == "extra_forbidden" else place)
    named = param or "The request's body"
    if kind == "missing":
        return ApiError(f"{named} is missing; it is required.", status=400, param=param)
    if kind in ("unknown_field", "extra_forbidden"):
        return ApiError(f"{named}: {error['msg']}", status=400, param=param)
    code = "unsupported_value" if kind == "unsupported_value" else "invalid_value"
    is_private = place[:1] and place[0] in _PRIVATE and place[-1] not in _NAMES_OF_KINDS
    given = error["input"]
    shown = f"a text of {len(given)}" if is_private and isinstance(given, str) else _shown(given)
    message = f"{named}: {error['msg']}; got {shown}"
    return ApiError(message, status=400, code=code, param=param)


def _path(place: Sequence[str | int]) -> str | None:
    """`messages[0].content`; it ends where a name follows that cannot be a field's."""
    path = ""
    for step in place[:-2] if place[-1:] == ("[key]",) else place:  # A bad key of a mapping.
        if isinstance(step, int):
            path += f"[{step}]"
        elif _FIELD.fullmatch(step):
            path += f".{step}" if path else step
        elif not step.startswith("~"):  # "~text" is a branch of a union in serving/schema.py.
            break
    return path or None


def _shown(value: object) -> str:
    """What was given, in ASCII and short: texts and numbers as JSON, the rest by its size."""
    if isinstance(value, str):
        text = json.dumps(value[:_MAX_SHOWN_CHARS])
        return text if len(value) <= _MAX_SHOWN_CHARS else f"{text} and so on, {len(value)} chars"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if isinstance(value, dict):
        return f"an object of {len(value)}"
    if isinstance(value, int) and value.bit_length() > 128:
        return f"an integer of {value.bit_length()} bits"
    if value is None or isinstance(value, bool | int | float):
        return json.dumps(value)
    return f"something that is not JSON ({type(value).__name__})"
