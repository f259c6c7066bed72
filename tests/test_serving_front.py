"""The layer in Serve's proxy: one more try, errors in one shape."""

import asyncio
import json
from collections.abc import Sequence
from typing import Any

import pytest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving import problems
from serving.front import _UPLOAD, front

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


# Uploads


class Client:
    """Sends a body in pieces as fast as it is read."""

    def __init__(self, num_pieces: int) -> None:
        self.left = num_pieces
        self.sent = 0

    async def receive(self) -> Message:
        self.left -= 1
        self.sent += 1
        return {"type": "http.request", "body": bytes(1 << 20), "more_body": self.left > 0}


def upload(app: ASGIApp, client: Client) -> list[Message]:
    answered: list[Message] = []

    async def send(message: Message) -> None:
        answered.append(message)

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/files",
        "headers": [],
        "query_string": b"",
    }
    asyncio.run(front(app)(scope, client.receive, send))
    return answered


def test_an_upload_is_read_no_further_than_the_replica_keeps_up_with() -> None:
    client = Client(64)
    ahead: list[int] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        """As Serve's proxy: reads on whatever the replica has taken."""
        assert problems.RECEIVED in scope["extensions"]
        queue: asyncio.Queue[Message] = asyncio.Queue()

        async def read_on() -> None:
            while True:
                await queue.put(await receive())

        reading = asyncio.create_task(read_on())
        for taken in range(1, 65):
            await asyncio.sleep(0)
            message = await queue.get()
            ahead.append(client.sent - taken)
            await send({"type": problems.RECEIVED, "num_bytes": taken << 20})
        assert not message["more_body"]
        reading.cancel()
        await send(JSON)
        await send(body(b"{}"))

    answered = upload(app, client)
    assert [message["type"] for message in answered] == [
        "http.response.start", "http.response.body",
    ]  # fmt: skip
    assert 4 < max(ahead) <= 9


def test_an_application_that_does_not_tell_what_it_takes_is_not_waited_for_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("serving.front._PACE_S", 0.01)
    client = Client(32)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        while (await receive())["more_body"]:
            pass
        await send(JSON)
        await send(body(b"{}"))

    assert upload(app, client)[-1]["body"] == b"{}"
    assert client.sent == 32


def test_an_upload_that_was_lost_half_way_is_not_sent_again() -> None:
    attempts: list[int] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        attempts.append(len((await receive())["body"]) + len((await receive())["body"]))

    answered = upload(app, Client(4))
    assert attempts == [2 << 20]
    assert answered[0]["status"] == 503


def test_the_front_and_the_routes_mean_the_same_upload() -> None:
    from serving import files
    from serving.shelf import FileLimits

    assert list(files.body_limits(FileLimits())) == [_UPLOAD]


def test_the_layer_inside_tells_what_it_has_taken_where_it_is_asked() -> None:
    from fastapi import FastAPI, Request

    app = FastAPI()
    problems.install(app, max_body_bytes=1 << 10, longer={("POST", "/v1/files"): 8 << 20})

    @app.post("/v1/files")
    async def read(request: Request) -> int:
        return sum([len(piece) async for piece in request.stream()])

    told: list[int] = []

    async def watched(scope: Scope, receive: Receive, send: Send) -> None:
        async def send_on(message: Message) -> None:
            if message["type"] == problems.RECEIVED:
                told.append(message["num_bytes"])
            await send(message)

        await app(scope, receive, send_on)

    answered = upload(watched, Client(5))
    assert answered[-1]["body"] == str(5 << 20).encode()
    assert told == [number << 20 for number in range(1, 5)]
