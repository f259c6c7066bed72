"""The layer in Serve's proxy: one more try, errors in one shape."""

import asyncio
import json
from collections.abc import Sequence
from typing import Any

import pytest
from starlette.types import Message, Receive, Scope, Send

from serving.front import front

JSON = {
    "type": "http.response.start",
    "status": 200,
    "headers": [(b"content-type", b"application/json")],
}
STREAM = {**JSON, "headers": [(b"content-type", b"text/event-stream; charset=utf-8")]}
TEXT = {**JSON, "status": 503, "headers": [(b"content-type", b"text/plain")]}


def body(data: bytes, *, more: bool = False) -> dict[str, Any]:
    return {"type": "http.response.body", "body": data, "more_body": more}


def ask(
    attempts: Sequence[Sequence[Any]], *, method: str = "POST", is_gone: bool = False
) -> tuple[list[Message], list[tuple[bytes, dict[bytes, bytes]]]]:
    """Messages that a client gets, and the body and headers that each attempt saw."""
    sent: list[Message] = []
    seen: list[tuple[bytes, dict[bytes, bytes]]] = []
    waiting = [
        {"type": "http.request", "body": b"one ", "more_body": True},
        {"type": "http.request", "body": b"two", "more_body": False},
        *([{"type": "http.disconnect"}] if is_gone else []),
    ]

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        heard = b""
        for message in [await receive() for _ in range(2 + is_gone)]:
            heard += message.get("body", b"")
        seen.append((heard, dict(scope["headers"])))
        for message in attempts[len(seen) - 1]:
            await send(message)

    async def receive() -> Message:
        return waiting.pop(0)

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {"type": "http", "method": method, "path": "/", "headers": []}
    asyncio.run(front(app)(scope, receive, send))
    return sent, seen


def test_what_is_answered_passes_as_it_is_with_one_id() -> None:
    sent, seen = ask([[JSON, body(b"{}")]])
    assert [message["type"] for message in sent] == ["http.response.start", "http.response.body"]
    assert sent[1]["body"] == b"{}"
    (heard, headers) = seen[0]
    assert heard == b"one two"
    assert dict(sent[0]["headers"])[b"x-request-id"] == headers[b"x-request-id"]


@pytest.mark.parametrize("lost", [[], [TEXT, body(b"no replica")]])
def test_a_request_of_which_nothing_was_answered_is_sent_once_more(lost: list[Any]) -> None:
    sent, seen = ask([lost, [JSON, body(b"{}")]])
    assert [heard for heard, _ in seen] == [b"one two"] * 2
    assert seen[0][1] == seen[1][1]
    assert sent[1]["body"] == b"{}"


@pytest.mark.parametrize("lost", [[], [TEXT, body(b"no replica")]])
def test_what_fails_twice_is_an_error_object_that_says_when_to_come_again(lost: list[Any]) -> None:
    sent, seen = ask([lost, lost])
    assert len(seen) == 2
    assert sent[0]["status"] == 503
    headers = dict(sent[0]["headers"])
    assert int(headers[b"retry-after"]) >= 1
    assert headers[b"x-request-id"]
    assert json.loads(sent[1]["body"])["error"]["code"] == "server_is_overloaded"


def test_what_may_not_be_done_twice_is_not() -> None:
    sent, seen = ask([[], [JSON, body(b"{}")]], method="DELETE")
    assert (len(seen), sent[0]["status"]) == (1, 503)


def test_a_client_that_has_gone_gets_no_second_try() -> None:
    sent, seen = ask([[], [JSON, body(b"{}")]], is_gone=True)
    assert (len(seen), sent) == (1, [])


def test_a_stream_that_breaks_off_ends_with_an_error_event() -> None:
    sent, seen = ask([[STREAM, body(b"data: 1\n\n", more=True)]])
    assert len(seen) == 1
    event = sent[-1]["body"].decode()
    assert event.startswith("data: ")
    assert json.loads(event[6:])["error"]["type"] == "server_error"
    assert not sent[-1]["more_body"]


def test_a_whole_answer_that_breaks_off_is_cut() -> None:
    with pytest.raises(RuntimeError, match="died"):
        ask([[JSON, body(b'{"a":', more=True)]])
