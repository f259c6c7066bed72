"""Error objects: one shape on every path, and nothing in them or in logs that should not be."""

import asyncio
import json
import logging
import math
import pickle
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Annotated

import httpx2
import pytest
from fastapi import FastAPI, HTTPException, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import StreamingResponse
from fastapi.testclient import TestClient
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster import errors
from serving import problems
from serving.problems import ApiError, RequestId, of_exception, problem

SECRET = "the patient's name is Ada"


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    texts: list[Annotated[str, Field(max_length=99)]] = Field(max_length=3)
    limit: int = Field(default=1, ge=0, le=9)
    weights: dict[str, int] = {}


class Loud:
    """A layer of somebody else's that answers by itself or breaks."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] == "/layer/full":
            raise problems.overloaded(2.2)
        if scope["type"] == "http" and scope["path"] == "/layer/broken":
            raise KeyError(SECRET)
        await self.app(scope, receive, send)


def make_app() -> FastAPI:
    app = FastAPI(responses=problems.RESPONSES)
    problems.install(app, max_body_bytes=1 << 20)
    app.add_middleware(Loud)

    @app.post("/echo")
    async def echo(body: Body) -> Body:
        return body

    @app.get("/items/{number}")
    async def item(number: int, limit: Annotated[int, Query(ge=1)] = 1) -> dict[str, int]:
        return {"number": number, "limit": limit}

    @app.get("/raise/{name}")
    async def fail(name: str) -> None:
        raise {
            "model": problems.model_not_found("llama"),
            "late": problems.rate_limited(7, "Too many requests."),
            "tree": errors.AdapterError("adapter a: rank 999 is above 256"),
            "conflict": errors.RunInUseError("run r is alive"),
            "disk": errors.StorageError("/srv/runs/r is full"),
            "adapter": errors.AdapterError("/srv/runs/r/adapter is empty"),
            "data": errors.DataError("/srv/of/a/prompt"),
            "bug": KeyError(SECRET),
            "http": HTTPException(418, "short and stout", {"x-pot": "tea"}),
            "http404": HTTPException(404, "gone for good"),
        }[name]

    @app.get("/model")
    async def own_model() -> None:
        Body.model_validate({"texts": SECRET})

    @app.get("/stream")
    async def stream(breaks: bool = False) -> StreamingResponse:
        async def pieces() -> AsyncIterator[bytes]:
            yield b"one"
            if breaks:
                raise KeyError(SECRET)
            yield b"two"

        return StreamingResponse(pieces())

    @app.get("/id")
    async def request_id(request: Request) -> str:
        return request.state.request_id

    return app


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    with TestClient(make_app()) as client:
        yield client


def validation(model: type[BaseModel], value: object) -> ValidationError:
    with pytest.raises(ValidationError) as caught:
        model.model_validate(value)
    return caught.value


# The object


def test_a_problem_always_has_four_keys() -> None:
    assert problem(404, "none") == {
        "error": {
            "message": "none",
            "type": "invalid_request_error",
            "param": None,
            "code": None,
        }
    }
    whole = problem(503, "full", type="t", code="c", param="p")["error"]
    assert whole == {"message": "full", "type": "t", "param": "p", "code": "c"}
    assert problem(500, "x")["error"]["type"] == "server_error"


@given(st.text(st.characters(categories=None), max_size=5000))
def test_a_message_is_short_valid_text_whatever_is_in_it(message: str) -> None:
    given = problem(400, message)["error"]["message"]
    assert len(given) <= problems.MAX_MESSAGE_CHARS
    given.encode()


def test_a_lone_surrogate_is_replaced_and_a_long_message_cut() -> None:
    assert problem(400, "a\ud800b")["error"]["message"] == "a?b"
    cut = problem(400, "x" * 2001)["error"]["message"]
    assert len(cut) == 2000
    assert cut.endswith("...")
    assert problem(400, "x" * 2000)["error"]["message"] == "x" * 2000


# Rows of the contract


@pytest.mark.parametrize(
    ("error", "status", "kind", "code", "param"),
    [
        (problems.invalid("a", "b"), 400, "invalid_request_error", "invalid_value", "a"),
        (problems.unsupported("a", "b"), 400, "invalid_request_error", "unsupported_value", "a"),
        (
            problems.context_length_exceeded(10, 8, 4, "messages"),
            400,
            "invalid_request_error",
            "context_length_exceeded",
            "messages",
        ),
        (problems.invalid_api_key(), 401, "invalid_request_error", "invalid_api_key", None),
        (problems.forbidden("not yours"), 403, "invalid_request_error", None, None),
        (problems.model_not_found("m"), 404, "invalid_request_error", "model_not_found", "model"),
        (problems.not_found("file", "f"), 404, "invalid_request_error", "not_found", "id"),
        (problems.too_large(9), 413, "invalid_request_error", None, None),
        (problems.rate_limited(1, "slow"), 429, "requests", "rate_limit_exceeded", None),
        (
            problems.overloaded(1),
            503,
            "service_unavailable_error",
            "server_is_overloaded",
            None,
        ),
    ],
)
def test_constructors_give_the_rows_of_the_contract(
    error: ApiError, status: int, kind: str, code: str | None, param: str | None
) -> None:
    given_status, body, _ = of_exception(error)
    assert given_status == status == error.status
    assert body["error"] == {"message": str(error), "type": kind, "param": param, "code": code}
    assert isinstance(error, errors.LorayError)


def test_context_length_is_told_in_numbers() -> None:
    both = str(problems.context_length_exceeded(4097, 4000, 1000, "messages"))
    assert both.startswith("This model's maximum context length is 4097 tokens. However, you")
    assert "5000 tokens (4000 in the messages, 1000 in the completion)" in both
    alone = str(problems.context_length_exceeded(4097, 5000, None, "prompt"))
    assert "your prompt resulted in 5000 tokens" in alone


def test_a_model_name_of_any_length_and_kind_is_repeated_shortly() -> None:
    message = of_exception(problems.model_not_found("\ud800" + "x" * 10_000))[1]["error"]["message"]
    assert len(message) < 200
    message.encode()


@pytest.mark.parametrize("error", [problems.overloaded(3.5), problems.unsupported("n", "no")])
def test_an_api_error_survives_pickling(error: ApiError) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is ApiError
    assert copy.args == error.args == (str(error),)
    assert vars(copy) == vars(error)
    assert of_exception(copy) == of_exception(error)


@pytest.mark.parametrize(
    ("wait_s", "header"),
    [(0, "1"), (0.2, "1"), (2.2, "3"), (-5, "1"), (math.inf, "3600"), (math.nan, "1")],
)
def test_retry_after_is_whole_seconds_within_reason(wait_s: float, header: str) -> None:
    assert of_exception(problems.overloaded(wait_s))[2] == {"Retry-After": header}


def test_only_what_may_go_well_the_second_time_is_repeated() -> None:
    forbids = {"x-should-retry": "false"}
    assert of_exception(KeyError("x"))[2] == forbids
    assert of_exception(errors.RunInUseError("x"))[2] == forbids
    assert of_exception(errors.ResourceError("x"))[2] == forbids
    assert of_exception(errors.ClusterError("x"))[2] == {}
    assert of_exception(errors.ConfigError("x"))[2] == {}


def test_a_401_says_how_to_authenticate() -> None:
    assert of_exception(problems.invalid_api_key())[2] == {"WWW-Authenticate": "Bearer"}


# Other exceptions


@pytest.mark.parametrize(
    ("error", "status", "kind", "code"),
    [
        (errors.AdapterError("why"), 400, "invalid_request_error", "invalid_adapter"),
        (errors.RunInUseError("why"), 409, "invalid_request_error", "run_in_use"),
        (errors.ResourceError("why"), 507, "server_error", "insufficient_resources"),
    ],
)
def test_errors_of_the_tree_keep_status_code_and_message(
    error: Exception, status: int, kind: str, code: str
) -> None:
    given_status, body, _ = of_exception(error)
    assert given_status == status
    assert body["error"] == {"message": "why", "type": kind, "param": None, "code": code}


@pytest.mark.parametrize(
    "kind", [errors.LorayError, errors.StorageError, errors.TrainingError, errors.ClusterError]
)
def test_what_is_wrong_with_the_server_is_told_plainly(kind: type[errors.LorayError]) -> None:
    status, body, _ = of_exception(kind("/srv/runs is full"))
    assert (status, body["error"]["code"]) == (kind.status, kind.code)
    assert body["error"]["type"] == "server_error"
    assert body["error"]["message"].startswith("The server had an error while processing")
    assert "runs" not in body["error"]["message"]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("/srv/runs/a/adapter: no config", "adapter: no config"),
        ("at '/srv/my runs/x' (~/y/z), /data/", "at 'my runs/x' (z), data/"),
        ("path=/a/b.jsonl:13", "path=b.jsonl:13"),
        ("ft:meta/llama:loray::x and/or 1 / 2", "ft:meta/llama:loray::x and/or 1 / 2"),
        ("see https://h/a/b or ./c/d", "see https://h/a/b or ./c/d"),
    ],
)
def test_a_client_sees_no_path_of_the_server(text: str, told: str) -> None:
    for error in (errors.AdapterError(text), errors.ResourceError(text)):
        assert of_exception(error)[1]["error"]["message"] == told
    assert of_exception(ApiError(text))[1]["error"]["message"] == text  # written for clients


@pytest.mark.parametrize("error", [KeyError(SECRET), ValueError(SECRET), RecursionError(SECRET)])
def test_a_bug_is_a_500_that_does_not_say_what_happened(error: Exception) -> None:
    status, body, _ = of_exception(error)
    assert status == 500
    assert body["error"]["type"] == "server_error"
    assert SECRET not in json.dumps(body)


def test_an_http_exception_keeps_its_own_words_whatever_caused_it() -> None:
    error = HTTPException(404, "gone for good")
    error.__cause__ = KeyError(SECRET)
    status, body, _ = of_exception(error)
    assert (status, body["error"]["message"]) == (404, "gone for good")


def test_the_original_of_an_error_that_ray_wrapped_is_what_counts() -> None:
    class Mixture(ApiError):  # Like RayTaskError(ApiError): the class, without its attributes.
        def __init__(self, cause: Exception) -> None:
            self.cause = cause

        def __str__(self) -> str:
            return "Traceback: /home/ray/engine.py"

    original = problems.overloaded(2)
    assert of_exception(Mixture(original)) == of_exception(original)
    assert of_exception(Mixture(Mixture(original))) == of_exception(original)


# Bodies that do not validate


@pytest.mark.parametrize(
    ("value", "param", "code", "message"),
    [
        ({}, "texts", None, "texts is missing; it is required."),
        ({"texts": [], "limit": -1}, "limit", "invalid_value", "greater than or equal to 0; got"),
        ({"texts": [], "limit": "7"}, "limit", "invalid_value", 'valid integer; got "7"'),
        ({"texts": ["a", 4]}, "texts[1]", "invalid_value", "texts[1]: Input should be a valid"),
        ({"texts": "a"}, "texts", "invalid_value", 'valid list; got "a"'),
        ({"texts": ["a"] * 4}, "texts", "invalid_value", "got a list of 4"),
        ({"texts": [{"b": 1}]}, "texts[0]", "invalid_value", "got an object of 1"),
        ({"texts": [None]}, "texts[0]", "invalid_value", "got null"),
        ({"texts": [], "limit": 10**60}, "limit", "invalid_value", "an integer of 200 bits"),
        ({"texts": [], "colour": SECRET}, None, None, "Extra inputs are not permitted"),
        ({"texts": [], "weights": {SECRET: "x"}}, "weights", "invalid_value", "valid integer"),
        ([], None, "invalid_value", "The request's body: Input should be a valid dictionary"),
    ],
)
def test_a_validation_error_names_field_rule_and_input(
    value: object, param: str | None, code: str | None, message: str
) -> None:
    error = validation(Body, value)
    status, body, headers = of_exception(error)
    assert (status, headers) == (400, {})
    assert (body["error"]["param"], body["error"]["code"]) == (param, code)
    assert message in body["error"]["message"]
    located = [{**one, "loc": ("body", *one["loc"])} for one in error.errors()]
    assert of_exception(RequestValidationError(located))[1] == body


def test_what_was_given_is_shortened_and_escaped() -> None:
    long = of_exception(validation(Body, {"texts": "é\n" * 5000}))[1]["error"]["message"]
    assert len(long) < 700
    assert long.isascii()
    assert "10000 chars" in long
    odd = of_exception(validation(Body, {"texts": "\ud800\x00"}))[1]["error"]["message"]
    assert '"\\ud800\\u0000"' in odd
    assert (
        "(Body)" in of_exception(validation(Body, {"texts": Body(texts=[])}))[1]["error"]["message"]
    )


def test_json_that_pydantic_parses_is_treated_alike() -> None:
    with pytest.raises(ValidationError) as caught:
        Body.model_validate_json(b'{"texts": [')
    status, body, _ = of_exception(caught.value)
    assert status == 400
    assert body["error"]["param"] is None
    assert body["error"]["message"].startswith("The request's body is not valid JSON: EOF")


# The app


def rejected(response: httpx2.Response, status: int) -> dict[str, str | None]:
    """The error object of a response, which has to be one."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"].startswith("req_")
    body = response.json()
    assert list(body) == ["error"]
    assert list(body["error"]) == ["message", "type", "param", "code"]
    return body["error"]


def test_a_good_request_is_answered(client: TestClient) -> None:
    response = client.post("/echo", json={"texts": ["a"]})
    assert response.status_code == 200
    assert response.json() == {"texts": ["a"], "limit": 1, "weights": {}}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"texts": [', "not valid JSON: Expecting value at character 11."),
        (b"", "The request's body is missing; it is required."),
        (b'{"texts": ["\xff\xfe"]}', "not valid UTF-8: byte 12 cannot be decoded"),
        (b"\xff\xfe\xff", "not valid UTF-8"),
        (b"[" * 100_000, "JSON that is nested too deeply"),
        (b'{"texts": [], "limit": ' + b"9" * 5000 + b"}", "cannot be read"),
        (b'{"texts": [], "limit": NaN}', "limit: Input should be a valid integer"),
        (b'{"texts": ["\\ud800"]}', 'unable to parse raw data as a unicode string; got "\\ud800"'),
        (b"null", "The request's body"),
        (b"[1, 2]", "got a list of 2"),
    ],
)
def test_a_bad_body_is_a_400(client: TestClient, body: bytes, message: str) -> None:
    response = client.post("/echo", content=body, headers={"content-type": "application/json"})
    assert message in str(rejected(response, 400)["message"])


def test_a_body_that_is_not_called_json_is_a_400(client: TestClient) -> None:
    response = client.post("/echo", content=b"{}", headers={"content-type": "text/plain"})
    assert rejected(response, 400)["code"] == "invalid_value"


def test_a_field_of_the_body_is_named_without_the_word_body(client: TestClient) -> None:
    error = rejected(client.post("/echo", json={"texts": [1]}), 400)
    assert (error["param"], error["code"]) == ("texts[0]", "invalid_value")


def test_parameters_of_path_and_query_are_checked_alike(client: TestClient) -> None:
    assert rejected(client.get("/items/x"), 400)["param"] == "number"
    assert rejected(client.get("/items/1?limit=0"), 400)["param"] == "limit"


def test_a_model_of_our_own_that_refuses_is_a_400(client: TestClient) -> None:
    assert rejected(client.get("/model"), 400)["param"] == "texts"


def test_an_unknown_route_is_a_404(client: TestClient) -> None:
    error = rejected(client.get("/v1/n%C3%B6thing"), 404)
    assert error["code"] == "unknown_url"
    assert error["message"] == (
        'Unknown request URL: GET "/v1/n\\u00f6thing". Please check the URL for typos.'
    )
    assert len(str(rejected(client.get("/" + "x" * 5000), 404)["message"])) < 300


def test_a_wrong_method_is_a_405_that_says_which_are_right(client: TestClient) -> None:
    response = client.get("/echo")
    assert rejected(response, 405)["message"] == 'Not allowed: GET "/echo". Use POST.'
    assert response.headers["allow"] == "POST"


@pytest.mark.parametrize(
    ("path", "status", "code"),
    [
        ("/raise/model", 404, "model_not_found"),
        ("/raise/late", 429, "rate_limit_exceeded"),
        ("/raise/tree", 400, "invalid_adapter"),
        ("/raise/conflict", 409, "run_in_use"),
        ("/raise/disk", 500, "storage_error"),
        ("/raise/bug", 500, None),
        ("/raise/http", 418, None),
        ("/raise/http404", 404, None),
        ("/layer/full", 503, "server_is_overloaded"),
        ("/layer/broken", 500, None),
    ],
)
def test_whatever_is_raised_wherever_becomes_an_error_object(
    client: TestClient, path: str, status: int, code: str | None
) -> None:
    assert rejected(client.get(path), status)["code"] == code


def test_headers_of_errors_arrive(client: TestClient) -> None:
    assert client.get("/raise/late").headers["retry-after"] == "7"
    assert client.get("/layer/full").headers["retry-after"] == "3"
    assert client.get("/raise/bug").headers["x-should-retry"] == "false"
    assert client.get("/raise/http").headers["x-pot"] == "tea"
    assert client.get("/raise/http404").json()["error"]["message"] == "gone for good"


def test_a_bug_is_logged_by_kind_and_place_and_never_by_its_text(
    client: TestClient, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG):
        response = client.get("/raise/bug")
    assert SECRET not in response.text
    assert SECRET not in caplog.text
    (record,) = [one for one in caplog.records if one.name == "serving.problems"]
    line = record.getMessage()
    assert f"request_id={response.headers['x-request-id']} error=KeyError at=" in line
    assert f"at={__file__}:" in line


@pytest.mark.parametrize("name", ["disk", "adapter"])
def test_what_a_client_is_not_told_is_logged_with_the_requests_id(
    client: TestClient, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    response = client.get(f"/raise/{name}")
    assert "/srv" not in response.text
    (record,) = [one for one in caplog.records if one.name == "serving.problems"]
    assert f"request_id={response.headers['x-request-id']} " in record.getMessage()
    assert "/srv/runs/r" in record.getMessage()


def test_what_a_client_does_wrong_is_not_logged(
    client: TestClient, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG, logger="serving"):
        client.get("/raise/model")
        client.get("/raise/data")
        client.post("/echo", json={"texts": SECRET})
    assert not caplog.records


def test_errors_are_documented_as_they_are(client: TestClient) -> None:
    document = client.get("/openapi.json").json()
    responses = document["paths"]["/echo"]["post"]["responses"]
    assert set(responses) == {"200", "4XX", "5XX"}
    schema = document["components"]["schemas"]["ErrorObject"]
    assert schema["required"] == ["message", "type", "param", "code"]


# Request ids


@pytest.mark.parametrize("path", ["/id", "/raise/bug", "/layer/full", "/layer/broken", "/nothing"])
def test_a_sane_request_id_of_the_client_is_kept_on_every_path(
    client: TestClient, path: str
) -> None:
    response = client.get(path, headers={"x-request-id": "trace-1_A"})
    assert response.headers.get_list("x-request-id") == ["trace-1_A"]


@pytest.mark.parametrize("given", ["", "x" * 65, "a b", "a\tb", "<script>", "a:b"])
def test_any_other_request_id_is_replaced(client: TestClient, given: str) -> None:
    made = client.get("/id", headers={"x-request-id": given}).headers["x-request-id"]
    assert made.startswith("req_")
    assert len(made) == 36


def test_handlers_know_the_request_id_and_it_is_new_each_time(client: TestClient) -> None:
    first, second = client.get("/id"), client.get("/id")
    assert first.json() == first.headers["x-request-id"]
    assert first.json() != second.json()


def run(
    app: ASGIApp, path: str = "/", query: bytes = b""
) -> tuple[list[Message], Exception | None]:
    """What an ASGI app sends for a GET, and what it raises."""
    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "method": "GET",
        "path": path,
        "query_string": query,
        "headers": [],
    }

    async def main() -> None:
        await app(scope, receive, send)

    try:
        asyncio.run(main())
    except Exception as error:
        return sent, error
    return sent, None


def test_streams_pass_piece_by_piece() -> None:
    sent, error = run(make_app(), "/stream")
    assert error is None
    assert [one.get("body") for one in sent] == [None, b"one", b"two", b""]
    assert [name for name, _ in sent[0]["headers"]].count(b"x-request-id") == 1


def test_a_stream_that_breaks_off_is_cut_and_its_error_keeps_the_text_to_itself() -> None:
    sent, error = run(make_app(), "/stream", b"breaks=true")
    assert [one.get("body") for one in sent] == [None, b"one"]
    assert str(error) == "KeyError: the response broke off"
    assert error is not None
    assert error.__suppress_context__


def test_a_start_that_fails_says_why() -> None:
    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        raise errors.ModelError("no such base model")
        yield

    app = FastAPI(lifespan=lifespan)
    problems.install(app, max_body_bytes=1 << 20)
    with pytest.raises(errors.ModelError, match="no such base model"), TestClient(app):
        pass


def test_a_response_without_headers_gets_the_id_and_other_protocols_pass() -> None:
    kinds: list[str] = []

    async def bare(scope: Scope, receive: Receive, send: Send) -> None:
        kinds.append(scope["type"])
        if scope["type"] == "http":
            await send({"type": "http.response.start", "status": 204})
            await send({"type": "http.response.body"})

    sent, _ = run(RequestId(bare))
    assert [name for name, _ in sent[0]["headers"]] == [b"x-request-id"]

    async def unused() -> Message:
        raise AssertionError

    async def unsent(message: Message) -> None:
        raise AssertionError(message)

    asyncio.run(RequestId(bare)({"type": "lifespan"}, unused, unsent))
    assert kinds == ["http", "lifespan"]
