"""OpenAI's contract, row by row: the stock client over a socket, every answer to the letter."""

import json
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openai
import pytest
import requests
from exact import exact
from openai import OpenAI
from openai.types import (
    Completion,
    ErrorObject,
    FileDeleted,
    FileObject,
    Model,
    ModelDeleted,
)  # fmt: skip
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.fine_tuning import FineTuningJob, FineTuningJobEvent
from openai.types.fine_tuning.jobs import FineTuningJobCheckpoint
from process_runs import ProcessRuns, make_result
from server import Running, serving, until
from test_training_adapter import make_adapter

from cluster import errors
from cluster.registry import database, keys, rebuild, tables
from cluster.registry.keys import Rights
from serving import problems
from training import checkpoint

BASE = "llama"
SLASHED = "ft:meta/llama:org:s:1"
CHAT: Any = [{"role": "user", "content": "Say red"}]
ANSWER = {"role": "assistant", "content": "red"}
ROW: dict[str, Any] = {"messages": [*CHAT, ANSWER]}
LINES = b"".join(json.dumps(ROW).encode() + b"\n" for _ in range(12))
TAG = "[A-Za-z0-9]{8,}"


def body_of(response: Any) -> Any:
    """The JSON of an answer that was asked for by `with_raw_response`."""
    return json.loads(response.text)


# The server on which no job is started


FAILURES: dict[str, Callable[[], Exception]] = {
    "bug": lambda: KeyError("/srv/secret"),
    "disk": lambda: errors.StorageError("/srv/secret is full"),
    "registry": lambda: errors.RegistryError("database postgresql://secret"),
    "cluster": lambda: errors.ClusterError("http://secret:8265"),
    "full": lambda: problems.overloaded(1),
    "later": lambda: problems.rate_limited(1, "Wait."),
    "conflict": lambda: errors.RunInUseError("it runs"),
    "slow": lambda: problems.ApiError("Too slow.", status=408),
    "gone": lambda: problems.not_found("thing", "x"),
}


@dataclass
class Still:
    """It asks for keys."""

    server: Running
    boss: OpenAI
    """With every scope."""
    file: str
    """A training file."""
    tries: Counter[str] = field(default_factory=Counter)
    """How often each failure was asked for."""

    def client(self, **rights: Any) -> OpenAI:
        key = keys.create(self.server.database, Rights(name="x", **rights), now=time.time())
        return self.boss.with_options(api_key=key)


@pytest.fixture(scope="module")
def still(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Iterator[Still]:
    directory = tmp_path_factory.mktemp("still")
    adapter = make_adapter(directory / "first", tiny_base, seed=1)
    adapters = [{"name": SLASHED, "path": str(adapter)}]
    tuning = {"storage": str(directory / "runs"), "unfinished_per_key": 1000}
    with serving(directory, tiny_base, adapters=adapters, tuning=tuning) as server:
        rights = Rights(name="boss", scopes=("infer", "tune", "admin"))
        key = keys.create(server.database, rights, now=time.time())
        boss = server.client.with_options(api_key=key)
        until(lambda: requests.get(f"{server.url}/v1/models", timeout=9).status_code == 401)
        file = boss.files.create(file=("a.jsonl", LINES), purpose="fine-tune").id
        found = Still(server, boss, file)

        @server.app.post("/v1/fail/{name}")
        def fail(name: str) -> None:
            found.tries[name] += 1
            raise FAILURES[name]()

        yield found


def fail(client: OpenAI, name: str) -> Any:
    return client.post(f"/fail/{name}", cast_to=object)


# Errors: status, exception, object, headers


Call = Callable[[Still], Any]
INVALID = "invalid_request_error"
KEY_OF_NONE = "sk-loray-00000000-x"


def chat(client: OpenAI, **fields: Any) -> Any:
    whole = {"model": BASE, "messages": CHAT, "max_tokens": 1, **fields}
    return client.chat.completions.create(**whole)


def complete(client: OpenAI, **fields: Any) -> Any:
    return client.completions.create(**{"model": BASE, "prompt": "ab", "max_tokens": 1, **fields})


def job(still: Still, client: OpenAI | None = None, **fields: Any) -> Any:
    jobs = (client or still.boss).fine_tuning.jobs
    return jobs.create(**{"model": BASE, "training_file": still.file, **fields})


def spent(still: Still, **quota: int) -> Any:
    client = still.client(**quota)
    for _ in range(3):
        complete(client)


def twice(still: Still) -> Any:
    for suffix in ("first", "second"):
        job(still, suffix=suffix, extra_headers={"Idempotency-Key": "the same"})


ERRORS: list[tuple[Call, type[openai.APIStatusError], int, str, str | None, str | None, str]] = [
    (lambda s: s.boss.post("/chat/completions", body={"model": BASE}, cast_to=object),
     openai.BadRequestError, 400, INVALID, None, "messages", "messages is missing"),
    (lambda s: chat(s.boss, extra_body={"colour": 1}),
     openai.BadRequestError, 400, INVALID, None, None, "Unknown field 'colour'"),
    (lambda s: s.boss.post("/chat/completions", body=[], cast_to=object),
     openai.BadRequestError, 400, INVALID, "invalid_value", None, "The request's body"),
    (lambda s: chat(s.boss, temperature=3),
     openai.BadRequestError, 400, INVALID, "invalid_value", "temperature", "less than or equal"),
    (lambda s: chat(s.boss, messages=[{"role": "robot", "content": "x"}]),
     openai.BadRequestError, 400, INVALID, "invalid_value", "messages[0]", "role should be"),
    (lambda s: chat(s.boss, store=True),
     openai.BadRequestError, 400, INVALID, "unsupported_value", "store", "does not support"),
    (lambda s: chat(s.boss, max_tokens=600),
     openai.BadRequestError, 400, INVALID, "context_length_exceeded", "messages",
     r"This model's maximum context length is 512 tokens\. However, you requested"),
    (lambda s: complete(s.boss, prompt="x" * 600),
     openai.BadRequestError, 400, INVALID, "context_length_exceeded", "prompt",
     r"This model's maximum context length is 512 tokens\. However, "),
    (lambda s: complete(s.boss.with_options(api_key=KEY_OF_NONE)),
     openai.AuthenticationError, 401, INVALID, "invalid_api_key", None, "API key"),
    (lambda s: s.boss.with_options(api_key=KEY_OF_NONE).get("/nothing", cast_to=object),
     openai.AuthenticationError, 401, INVALID, "invalid_api_key", None, "API key"),
    (lambda s: s.client(scopes=("infer",)).files.list(),
     openai.PermissionDeniedError, 403, INVALID, None, None, "scope tune"),
    (lambda s: job(s, s.client(scopes=("infer",))),
     openai.PermissionDeniedError, 403, INVALID, None, None, "scope tune"),
    (lambda s: complete(s.client(scopes=("tune",))),
     openai.PermissionDeniedError, 403, INVALID, None, None, "scope infer"),
    (lambda s: s.client(scopes=("tune",)).models.delete(SLASHED),
     openai.PermissionDeniedError, 403, INVALID, None, None, "scope admin"),
    (lambda s: s.boss.models.delete(BASE),
     openai.PermissionDeniedError, 403, INVALID, None, "model", "cannot be deleted"),
    (lambda s: s.boss.models.retrieve("a/b:c"),
     openai.NotFoundError, 404, INVALID, "model_not_found", "model",
     r"^The model `a/b:c` does not exist or you do not have access to it\.$"),
    (lambda s: chat(s.boss, model="nobody"),
     openai.NotFoundError, 404, INVALID, "model_not_found", "model", "The model `nobody` does not"),
    (lambda s: complete(s.client(models=("other",))),
     openai.NotFoundError, 404, INVALID, "model_not_found", "model", "The model `llama` does not"),
    (lambda s: job(s, model="gpt-9"),
     openai.NotFoundError, 404, INVALID, "model_not_found", "model", "The model `gpt-9` does not"),
    (lambda s: s.boss.files.retrieve("file-none"),
     openai.NotFoundError, 404, INVALID, "not_found", "id", "No such file"),
    (lambda s: s.boss.files.content("file-" + "0" * 24),
     openai.NotFoundError, 404, INVALID, "not_found", "id", "No such file"),
    (lambda s: s.boss.fine_tuning.jobs.retrieve("ftjob-" + "0" * 24),
     openai.NotFoundError, 404, INVALID, "not_found", "id", "No such fine-tuning job"),
    (lambda s: s.boss.fine_tuning.jobs.list_events("ftjob-none"),
     openai.NotFoundError, 404, INVALID, "not_found", "id", "No such fine-tuning job"),
    (lambda s: s.boss.fine_tuning.jobs.cancel("%00"),
     openai.NotFoundError, 404, INVALID, "not_found", "id", "No such fine-tuning job"),
    (lambda s: s.boss.uploads.create(bytes=1, filename="a", mime_type="b", purpose="batch"),
     openai.NotFoundError, 404, INVALID, "unknown_url", None, "Unknown request URL"),
    (lambda s: s.boss.fine_tuning.alpha.graders.validate(grader={"type": "x"}),  # pyright: ignore
     openai.NotFoundError, 404, INVALID, "unknown_url", None, "Unknown request URL"),
    (lambda s: s.boss.fine_tuning.checkpoints.permissions.create("x", project_ids=["y"]),
     openai.NotFoundError, 404, INVALID, "unknown_url", None, "Unknown request URL"),
    (twice,
     openai.ConflictError, 409, INVALID, "idempotency_key_reused", None, "another request"),
    (lambda s: spent(s, requests_per_minute=1),
     openai.RateLimitError, 429, "requests", "rate_limit_exceeded", None, "Rate limit reached"),
    (lambda s: spent(s, tokens_per_day=1),
     openai.RateLimitError, 429, "tokens", "rate_limit_exceeded", None, "Rate limit reached"),
    (lambda s: fail(s.boss, "bug"),
     openai.InternalServerError, 500, "server_error", None, None, "The server had an error"),
    (lambda s: fail(s.boss, "disk"),
     openai.InternalServerError, 500, "server_error", "storage_error", None, "The server had an"),
    (lambda s: fail(s.boss, "registry"),
     openai.InternalServerError, 503, "server_error", "registry_unavailable", None, "try again"),
    (lambda s: fail(s.boss, "full"),
     openai.InternalServerError, 503, "service_unavailable_error", "server_is_overloaded", None,
     "try again"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("call", "kind", "status", "type", "code", "param", "words"),
    ERRORS,
    ids=[f"{row[2]}-{row[4]}-{number}" for number, row in enumerate(ERRORS)],
)
def test_an_error_is_the_rows(
    still: Still,
    call: Call,
    kind: type[openai.APIStatusError],
    status: int,
    type: str,
    code: str | None,
    param: str | None,
    words: str,
) -> None:
    with pytest.raises(kind) as caught:
        call(still)
    error = caught.value
    null = " ".join(n for n, v in (("code", code), ("param", param)) if v is None)
    exact(ErrorObject, error.body, null=null, absent="misalignment")
    assert (error.status_code, error.type, error.code, error.param) == (status, type, code, param)
    assert re.search(words, json.loads(error.response.text)["error"]["message"]), error.message
    assert list(json.loads(error.response.text)) == ["error"]
    assert error.response.headers["content-type"] == "application/json"
    assert error.request_id == error.response.headers["x-request-id"]
    assert "secret" not in error.response.text
    if status == 429:
        assert 1 <= int(error.response.headers["retry-after"]) <= 3600
        for what in ("limit", "remaining", "reset"):
            assert error.response.headers[f"x-ratelimit-{what}-{type}"]


@pytest.mark.parametrize(
    ("name", "tries"),
    [
        ("bug", 1), ("disk", 1), ("conflict", 1), ("slow", 1), ("gone", 1),
        ("full", 2), ("later", 2), ("cluster", 2),
    ],
)  # fmt: skip
def test_the_client_repeats_only_what_may_go_well(still: Still, name: str, tries: int) -> None:
    before = still.tries[name]
    with pytest.raises(openai.APIStatusError) as caught:
        fail(still.boss.with_options(max_retries=1), name)
    assert still.tries[name] - before == tries
    headers = caught.value.response.headers
    assert (headers.get("x-should-retry") == "false") == (tries == 1 and name != "gone")
    assert ("retry-after" in headers) == (name in ("full", "later"))


def test_every_answer_has_an_id_and_takes_the_clients_headers(still: Still) -> None:
    client = OpenAI(
        base_url=f"{still.server.url}/v1", api_key=still.boss.api_key,
        organization="org-a", project="proj_b",
    )  # fmt: skip
    raw = client.models.with_raw_response.list(extra_headers={"x-request-id": "mine-1"})
    assert raw.http_request.headers["openai-organization"] == "org-a"
    assert raw.headers["x-request-id"] == "mine-1"
    first, second = (chat(client)._request_id for _ in range(2))
    assert first.startswith("req_")
    assert first != second


# Models


def test_models_are_one_page_of_whole_objects(still: Still) -> None:
    raw = body_of(still.boss.models.with_raw_response.list())
    assert list(raw) == ["object", "data"]
    assert raw["object"] == "list"
    models = [exact(Model, one, absent="shutdown_date") for one in raw["data"]]
    assert [model.id for model in models] == [BASE, SLASHED]
    assert [model.id for model in still.boss.models.list()] == [BASE, SLASHED]
    assert abs(models[0].created - time.time()) < 600


def test_a_name_with_slashes_and_colons_is_a_name_like_any_other(still: Still) -> None:
    raw = body_of(still.boss.models.with_raw_response.retrieve(SLASHED))
    model = exact(Model, raw, absent="shutdown_date")
    assert model.id == SLASHED
    assert (model.model_extra["parent"], model.model_extra["root"]) == (BASE, BASE)
    assert set(model.model_extra["adapter"]) == {"rank"}
    assert chat(still.boss, model=SLASHED).model == SLASHED
    assert complete(still.boss, model=SLASHED).model == SLASHED


# Chat and completions


NO_USAGE = (
    "usage.completion_tokens_details usage.prompt_tokens_details.audio_tokens "
    "usage.prompt_tokens_details.image_tokens usage.prompt_tokens_details.text_tokens "
    "usage.prompt_tokens_details.cache_write_tokens "
)
"""Of the client's fields, what this server has nothing to say of; here and below."""
NO_CHUNK = "moderation obfuscation service_tier "


def test_a_chat_takes_every_field_and_answers_with_every_field(still: Still) -> None:
    raw = body_of(
        still.boss.chat.completions.with_raw_response.create(
            model=BASE,
            messages=[
                {"role": "system", "content": "Be brief."},
                {"role": "developer", "content": "Be kind."},
                {"role": "user", "content": [{"type": "text", "text": "Say A"}], "name": "ada"},
                {"role": "assistant", "content": "A"},
                {"role": "user", "content": "Again"},
            ],
            frequency_penalty=0.5, logit_bias={"32": 100}, logprobs=True, top_logprobs=2,
            max_completion_tokens=3, metadata={"a": "b"}, n=2, parallel_tool_calls=True,
            presence_penalty=-0.5, response_format={"type": "text"}, seed=1,
            stop=["never", "ever", "said", "!!!"], store=False, stream=False, temperature=0.5,
            tool_choice="none", tools=[], top_p=0.9, user="ada", service_tier="auto",
            modalities=["text"],
        )
    )  # fmt: skip
    answer = exact(
        ChatCompletion, raw,
        null="choices.message.refusal choices.logprobs.refusal",
        absent=NO_USAGE + "metadata moderation service_tier choices.message.annotations "
        "choices.message.audio choices.message.function_call choices.message.tool_calls",
    )  # fmt: skip
    assert answer.id.startswith("chatcmpl-")
    assert [choice.index for choice in answer.choices] == [0, 1]
    for choice in answer.choices:
        assert (choice.finish_reason, choice.message.role) == ("length", "assistant")
        assert len(choice.logprobs.content) == 3
        for token in choice.logprobs.content:
            assert len(token.top_logprobs) == 2
            assert bytes(token.bytes).decode() == token.token
    usage = answer.usage
    assert usage.completion_tokens == 6
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


@pytest.mark.parametrize(
    ("param", "value"),
    [
        ("audio", {"voice": "x", "format": "wav"}), ("store", True), ("functions", [{"name": "f"}]),
        ("function_call", "auto"), ("parallel_tool_calls", False), ("modalities", ["audio"]),
        ("prediction", {"type": "content", "content": "x"}), ("reasoning_effort", "low"),
        ("service_tier", "flex"), ("web_search_options", {}),
    ],
)  # fmt: skip
def test_what_a_chat_does_not_support_is_refused_by_name(
    still: Still, param: str, value: Any
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        chat(still.boss, **{param: value})
    assert (caught.value.param, caught.value.code) == (param, "unsupported_value")


@pytest.mark.parametrize(
    ("param", "value"),
    [
        ("frequency_penalty", 2.1), ("presence_penalty", -2.1), ("temperature", -0.1),
        ("top_p", 1.1), ("n", 0), ("max_completion_tokens", 0), ("top_logprobs", 21),
        ("stop", ["a"] * 5), ("response_format", {"type": "xml"}), ("tool_choice", "perhaps"),
        ("logit_bias", {"1": 101}), ("metadata", {str(n): "" for n in range(17)}),
        ("messages", []), ("model", ""),
    ],
)  # fmt: skip
def test_what_is_beyond_a_chats_bounds_is_refused_by_name(
    still: Still, param: str, value: Any
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        chat(still.boss, logprobs=True, **{param: value})
    assert caught.value.code == "invalid_value"
    assert str(caught.value.param).split("[")[0].split(".")[0] == param


def events_of(still: Still, path: str, **fields: Any) -> list[Any]:
    """The chunks of a stream, whose bytes are what the client splits at."""
    answer = requests.post(
        f"{still.server.url}/v1/{path}",
        json={"model": BASE, "max_tokens": 3, "stream": True, "logit_bias": {"32": 100}, **fields},
        headers={"authorization": f"Bearer {still.boss.api_key}"},
        timeout=60,
    )
    assert answer.headers["content-type"].startswith("text/event-stream")
    *lines, last = answer.content.decode().removesuffix("\n\n").split("\n\n")
    assert last == "data: [DONE]"
    assert all(line.startswith("data: {") and "\n" not in line for line in lines)
    return [json.loads(line.removeprefix("data: ")) for line in lines]


@pytest.mark.parametrize("has_usage", [False, True])
def test_chunks_of_a_chat(still: Still, has_usage: bool) -> None:
    options = {"stream_options": {"include_usage": True}} if has_usage else {}
    chunks = events_of(still, "chat/completions", messages=CHAT, **options)
    if has_usage:
        total = exact(ChatCompletionChunk, chunks.pop(), absent=NO_CHUNK + NO_USAGE)
        assert (total.choices, total.usage.completion_tokens) == ([], 3)
    assert {chunk["id"] for chunk in chunks} == {chunks[0]["id"]}
    assert chunks[0]["id"].startswith("chatcmpl-")
    no_usage = "" if has_usage else "usage "
    for place, chunk in enumerate(chunks):
        is_first, is_last = place == 0, place == len(chunks) - 1
        role = "" if is_first else "choices.delta.role "
        found = exact(
            ChatCompletionChunk, chunk,
            null="choices.logprobs " + ("usage " if has_usage else "")
            + ("" if is_last else "choices.finish_reason"),
            absent=NO_CHUNK + no_usage + role + "choices.delta.audio choices.delta.function_call "
            "choices.delta.refusal choices.delta.tool_calls"
            + ("" if "content" in chunk["choices"][0]["delta"] else " choices.delta.content"),
        )  # fmt: skip
        assert found.choices[0].delta.role == ("assistant" if is_first else None)
        assert found.choices[0].finish_reason == ("length" if is_last else None)
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks) == "AAA"


@pytest.mark.parametrize(
    ("prompt", "num"),
    [("ab", 1), (["ab", "cd"], 2), ([65, 66], 1), ([[65, 66], [67]], 2)],
)
def test_a_completion_takes_every_form_of_prompt(still: Still, prompt: Any, num: int) -> None:
    raw = body_of(
        still.boss.completions.with_raw_response.create(
            model=BASE, prompt=prompt, max_tokens=2, n=2, best_of=2, logit_bias={"32": 100},
        )
    )  # fmt: skip
    answer = exact(
        Completion, raw, null="choices.logprobs", absent=NO_USAGE
    )  # fmt: skip
    assert answer.id.startswith("cmpl-")
    assert [choice.index for choice in answer.choices] == list(range(2 * num))
    assert {(choice.text, choice.finish_reason) for choice in answer.choices} == {("AA", "length")}


def test_a_completion_scores_a_prompt_of_ids_as_lm_eval_asks(still: Still) -> None:
    raw = body_of(
        still.boss.completions.with_raw_response.create(
            model=BASE, prompt=[[65, 66, 67]], echo=True, logprobs=1, max_tokens=1, temperature=0
        )
    )
    columns = raw["choices"][0]["logprobs"]
    assert (columns["token_logprobs"][0], columns["top_logprobs"][0]) == (None, None)
    columns["token_logprobs"][0], columns["top_logprobs"][0] = 0.0, {}  # OpenAI's type has no null
    answer = Completion.model_validate_json(json.dumps(raw), strict=True)
    found = answer.choices[0].logprobs
    assert found is not None
    assert found.tokens is not None
    assert [len(column) for column in columns.values()] == [4, 4, 4, 4]
    assert "".join(found.tokens) == answer.choices[0].text
    assert found.text_offset == [0, 1, 2, 3]


def test_chunks_of_a_completion(still: Still) -> None:
    chunks = events_of(still, "completions", prompt="ab", stream_options={"include_usage": True})
    assert "".join(c["choices"][0]["text"] for c in chunks[:-1]) == "AAA"
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == 3
    assert {(chunk["id"], chunk["object"]) for chunk in chunks} == {
        (chunks[0]["id"], "text_completion")
    }


# Files


@pytest.mark.parametrize(
    "purpose", ["assistants", "batch", "vision", "user_data", "evals", "fine-tune"]
)
def test_a_file_has_every_field(still: Still, purpose: Any) -> None:
    files = still.boss.files
    raw = body_of(
        files.with_raw_response.create(
            file=("ä b.jsonl", LINES),
            purpose=purpose,
            expires_after={"anchor": "created_at", "seconds": 3600},
        )
    )
    assert raw["purpose"] == purpose
    known = {**raw, "purpose": "batch"}  # the client sends evals, and does not list it
    file = exact(FileObject, known, null="status_details")
    assert re.fullmatch(f"file-{TAG}", file.id)
    assert (file.bytes, file.filename) == (len(LINES), "ä b.jsonl")
    assert file.expires_at == pytest.approx(file.created_at + 3600, abs=1)
    assert file.status == ("uploaded" if purpose == "fine-tune" else "processed")
    done = files.wait_for_processing(file.id, poll_interval=0.05, max_wait_seconds=60)
    assert done.status == "processed"
    assert files.content(file.id).read() == LINES
    plain = files.create(file=LINES, purpose="batch")
    exact(FileObject, plain.to_dict(), null="status_details expires_at")
    for id in (file.id, plain.id):
        gone = body_of(files.with_raw_response.delete(id))
        assert exact(FileDeleted, gone) == FileDeleted(id=id, object="file", deleted=True)
        with pytest.raises(openai.NotFoundError):
            files.content(id)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"purpose": "fine-tune-results"}, "purpose"),
        ({"purpose": "x"}, "purpose"),
        ({"purpose": "fine-tune", "file": ("a.txt", LINES)}, "file"),
        ({"file": ("a.jsonl", b"")}, "file"),
        ({"expires_after": {"anchor": "created_at", "seconds": 3599}}, "expires_after[seconds]"),
        ({"expires_after": {"anchor": "created_at", "seconds": 2592001}}, "expires_after[seconds]"),
        ({"expires_after": {"anchor": "now", "seconds": 3600}}, "expires_after[anchor]"),
    ],
)
def test_a_file_that_cannot_be_is_refused(still: Still, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        still.boss.files.create(**{"file": ("a.jsonl", LINES), "purpose": "batch", **fields})
    assert caught.value.param == param


@pytest.mark.parametrize(
    "query",
    [
        "/files?limit=0", "/files?limit=10001", "/files?order=up", "/files?purpose=x",
        "/files?after=file-none", "/fine_tuning/jobs?limit=0", "/fine_tuning/jobs?limit=x",
        "/fine_tuning/jobs?after=ftjob-none",
    ],
)  # fmt: skip
def test_a_list_that_cannot_be_is_a_400_that_names_the_parameter(still: Still, query: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        still.boss.get(query, cast_to=object)
    assert caught.value.param == query.partition("?")[2].split("=")[0]


def of_turns(*messages: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"messages": list(messages), **more}


USER = CHAT[0]
BAD_LINES: list[tuple[Any, str]] = [
    ([1], "expected an object with named fields"),
    ({"text": "x"}, "no 'messages'"),
    ({"messages": []}, "messages is empty"),
    (of_turns({"content": "x"}, ANSWER), "messages[0] has no 'role'"),
    (of_turns(USER, {"role": "assistant"}), "no 'content'"),
    (of_turns(USER, {**ANSWER, "mood": "x"}), "unknown key 'mood'"),
    (of_turns({"role": "robot", "content": "x"}, ANSWER), "unknown role 'robot'"),
    (of_turns(USER, {**ANSWER, "content": None}), "content is empty"),
    (of_turns(USER), "no assistant turn"),
    (of_turns(USER, {**ANSWER, "weight": 2}), "weight is 2"),
]
"""Each of the cookbook's checks, and what is said of such a line."""
CALL = {"id": "1", "type": "function", "function": {"name": "add", "arguments": "{}"}}
PAIR = {"role": "assistant", "content": "blue"}
GOOD_FILES: dict[str, Any] = {
    "chat": ROW,
    "system and weights": of_turns(
        {"role": "system", "content": "Be brief."}, USER, {**ANSWER, "weight": 0}, USER, ANSWER
    ),
    "tools": of_turns(
        USER, {"role": "assistant", "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "1", "content": "4"}, ANSWER,
        tools=[{"type": "function", "function": {"name": "add", "parameters": {}}}],
        parallel_tool_calls=False,
    ),
    "functions": of_turns(USER, ANSWER, functions=[{"name": "add", "parameters": {}}]),
    "prompt and completion": {"prompt": "a", "completion": "b"},
    "preferred_completion": {
        "input": {"messages": CHAT, "tools": [], "parallel_tool_calls": True},
        "preferred_completion": [ANSWER], "non_preferred_completion": [PAIR],
    },
    "preferred_output": {
        "input": {"messages": CHAT}, "preferred_output": [ANSWER], "non_preferred_output": [PAIR],
    },
}  # fmt: skip


def processed(client: OpenAI, *rows: Any) -> FileObject:
    data = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
    file = client.files.create(file=("a.jsonl", data), purpose="fine-tune")
    return client.files.wait_for_processing(file.id, poll_interval=0.05, max_wait_seconds=60)


def test_every_check_of_a_line_is_told_with_its_number(still: Still) -> None:
    done = processed(still.boss, *(row for row, _ in BAD_LINES), ROW)
    assert done.status == "error"
    told = str(done.status_details).split("; Line ")
    for number, (line, (_, words)) in enumerate(zip(told, BAD_LINES, strict=True), start=1):
        assert line.removeprefix("Line ").startswith(f"{number}: ")
        assert words in line


def test_every_format_of_the_spec_is_taken(still: Still) -> None:
    files = {
        name: still.boss.files.create(
            file=("a.jsonl", json.dumps(row).encode() + b"\n"), purpose="fine-tune"
        ).id
        for name, row in GOOD_FILES.items()
    }
    for name, id in files.items():
        done = still.boss.files.wait_for_processing(id, poll_interval=0.05, max_wait_seconds=60)
        assert (done.status, done.status_details) == ("processed", None), name


# Creating jobs


EDGES: list[dict[str, Any]] = [
    {"suffix": "a"}, {"suffix": "x" * 64}, {"seed": 0}, {"seed": 2**31 - 1},
    {"metadata": {f"{n:064}": "v" * 512 for n in range(16)}},
    {"integrations": []}, {"validation_file": None},
    *(
        {"hyperparameters": {name: value}}
        for name, values in {
            "n_epochs": (1, 50, "auto"), "batch_size": (1, 256, "auto"),
            "learning_rate_multiplier": (0.001, 3, "auto"),
        }.items()
        for value in values
    ),
    {"method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2}}}},
    {"method": {"type": "dpo", "dpo": {"hyperparameters": {"beta": 2}}}},
    {"method": {"type": "dpo", "dpo": {"hyperparameters": {"beta": "auto", "n_epochs": 3}}}},
    {"extra_body": {"lora": {"rank": 8, "alpha": 4, "target_modules": ["q_proj"]}}},
]  # fmt: skip


@pytest.mark.parametrize("fields", EDGES, ids=lambda fields: next(iter(fields)))
def test_what_is_within_a_jobs_bounds_is_taken_and_echoed(
    still: Still, fields: dict[str, Any]
) -> None:
    made = job(still, **fields)
    assert made.status in ("validating_files", "queued")
    method = fields.get("method", {"type": "supervised"})
    given = method.get(method["type"], {}).get("hyperparameters", fields.get("hyperparameters", {}))
    names = ["n_epochs", "batch_size", "learning_rate_multiplier"]
    names += ["beta"] if method["type"] == "dpo" else []
    echoed = {**dict.fromkeys(names, "auto"), **given}
    assert made.to_dict()["hyperparameters"] == echoed
    assert made.method.to_dict() == {"type": method["type"], method["type"]: {
        "hyperparameters": echoed}}  # fmt: skip
    assert made.metadata == fields.get("metadata")
    assert made.model_extra["user_provided_suffix"] == fields.get("suffix")
    assert made.seed == fields.get("seed", made.seed)
    assert 0 <= made.seed < 2**31
    if "extra_body" in fields:
        assert fields["extra_body"]["lora"].items() <= made.model_extra["lora"].items()


REFUSED: list[tuple[dict[str, Any], str, str | None]] = [
    ({"training_file": "file-none"}, "training_file", "invalid_value"),
    ({"validation_file": "file-none"}, "validation_file", "invalid_value"),
    ({"suffix": ""}, "suffix", "invalid_value"),
    ({"suffix": "a/b"}, "suffix", "invalid_value"),
    ({"suffix": "x" * 65}, "suffix", "invalid_value"),
    ({"seed": -1}, "seed", "invalid_value"),
    ({"seed": 2**31}, "seed", "invalid_value"),
    *(
        (fields, f"{place}.{name}", "invalid_value")
        for name, values in {
            "n_epochs": (0, 51, 1.5), "batch_size": (0, 257), "learning_rate_multiplier": (0, -1),
        }.items()
        for value in values
        for place, fields in (
            ("hyperparameters", {"hyperparameters": {name: value}}),
            ("method.supervised.hyperparameters", {"method": {
                "type": "supervised", "supervised": {"hyperparameters": {name: value}}}}),
        )
    ),
    *(
        ({"method": {"type": "dpo", "dpo": {"hyperparameters": {"beta": beta}}}},
         "method.dpo.hyperparameters.beta", "invalid_value")
        for beta in (0, 2.1)
    ),
    ({"hyperparameters": {"epochs": 1}}, "hyperparameters", None),
    ({"hyperparameters": {"n_epochs": "all"}}, "hyperparameters.n_epochs", "invalid_value"),
    ({"method": {"type": "reinforcement", "reinforcement": {}}}, "method", "unsupported_value"),
    ({"method": {"type": "dpo", "supervised": {}}}, "method", "invalid_value"),
    ({"method": {"type": "supervised"}, "hyperparameters": {}}, "hyperparameters", "invalid_value"),
    ({"metadata": {str(n): "" for n in range(17)}}, "metadata", "invalid_value"),
    ({"metadata": {"k" * 65: "v"}}, "metadata", "invalid_value"),
    ({"metadata": {"k": "v" * 513}}, "metadata.k", "invalid_value"),
    ({"integrations": [{"type": "wandb", "wandb": {"project": "x"}}]}, "integrations",
     "unsupported_value"),
    ({"extra_body": {"lora": {"rank": 0}}}, "lora.rank", "invalid_value"),
    ({"extra_body": {"lora": {"variant": "dora"}}}, "lora.variant", "invalid_value"),
    ({"extra_body": {"search": {"trials": 0}}}, "search.trials", "invalid_value"),
    ({"extra_body": {"colour": "red"}}, None, None),
]  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "param", "code"), REFUSED, ids=[f"{n}-{row[1]}" for n, row in enumerate(REFUSED)]
)
def test_what_is_beyond_a_jobs_bounds_is_refused_with_the_place(
    still: Still, fields: dict[str, Any], param: str | None, code: str | None
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        job(still, **fields)
    assert (caught.value.param, caught.value.code) == (param, code), caught.value.message


def test_the_same_request_twice_is_one_job(still: Still) -> None:
    def create(suffix: str, key: str | None = None) -> str:
        headers = {"Idempotency-Key": key} if key else {}
        return job(still, suffix=suffix, extra_headers=headers).id

    first = create("same-a")
    assert create("same-a") == first
    assert create("same-b") != first
    kept = create("same-c", "key")
    assert create("same-c", "key") == kept
    with pytest.raises(openai.ConflictError, match="another request") as caught:
        create("same-d", "key")
    assert caught.value.response.headers["x-should-retry"] == "false"
    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(lambda _: create("together"), range(8)))) == 1
    assert job(still, still.client(scopes=("tune",)), suffix="same-a").id != first


def test_jobs_are_chosen_by_their_metadata(still: Still) -> None:
    jobs = still.boss.fine_tuning.jobs
    made = [job(still, metadata={"team": "x[]=&", "n": str(n)}).id for n in range(3)]
    plain = job(still, suffix="plain").id
    for limit in (1, 2, 3, 100):
        assert [one.id for one in jobs.list(limit=limit, metadata={"team": "x[]=&"})] == made[::-1]
    assert [one.id for one in jobs.list(metadata={"team": "x[]=&", "n": "1"})] == [made[1]]
    assert [one.id for one in jobs.list(metadata={"team": "y"})] == []
    without = [one.id for one in jobs.list(extra_query={"metadata": "null"})]
    assert plain in without
    assert not set(made) & set(without)


# Jobs from their beginning to their end


@dataclass
class Story:
    """What came of some jobs, and what was seen on the way."""

    server: Running
    runs: ProcessRuns
    storage: Path
    files: tuple[str, str] = ("", "")
    """The training and the validation file."""
    seen: dict[str, Any] = field(default_factory=dict)
    """Jobs as JSON, by what they were then."""

    @property
    def client(self) -> OpenAI:
        return self.server.client

    def create(self, **fields: Any) -> Any:
        whole = {"model": BASE, "training_file": self.files[0], **fields}
        return body_of(self.client.fine_tuning.jobs.with_raw_response.create(**whole))

    def now(self, id: str) -> Any:
        return body_of(self.client.fine_tuning.jobs.with_raw_response.retrieve(id))

    def wait(self, id: str, status: str) -> Any:
        ends = {"succeeded", "failed", "cancelled", status}
        until(lambda: self.now(id)["status"] in ends)
        found = self.now(id)
        assert found["status"] == status, found
        return found

    def speed(self, step_s: float) -> None:
        """Of runs that start from now on."""
        self.runs._words[1] = str(step_s)


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Iterator[Story]:
    directory = tmp_path_factory.mktemp("story")
    runs = ProcessRuns(directory / "processes", make_result(directory / "result", tiny_base))
    tuning = {"storage": str(directory / "runs")}
    with serving(directory, tiny_base, tuning=tuning, runner=runs) as server:
        story = Story(server, runs, directory / "runs")
        play(story)
        yield story


def play(story: Story) -> None:
    """One job after another: through all states, and to every kind of end."""
    client, seen = story.client, story.seen
    jobs = client.fine_tuning.jobs.with_raw_response
    story.files = (processed(client, *[ROW] * 12).id, processed(client, ROW).id)
    story.speed(1)
    slow = story.create()["id"]
    until(lambda: story.now(slow)["estimated_finish"] is not None)
    seen["running"] = story.now(slow)
    seen["created"] = story.create(
        validation_file=story.files[1], suffix="tickets", seed=7, metadata={"team": "x"},
        hyperparameters={"n_epochs": 2, "batch_size": "auto"}, extra_body={"lora": {"rank": 8}},
    )  # fmt: skip
    seen["queued"] = story.wait(seen["created"]["id"], "queued")
    story.speed(0.01)
    seen["paused"] = body_of(jobs.pause(slow))
    seen["succeeded"] = story.wait(seen["created"]["id"], "succeeded")
    seen["resumed"] = body_of(jobs.resume(slow))
    story.wait(slow, "succeeded")
    cancelled = story.create(suffix="cancelled")["id"]
    seen["cancelled"] = body_of(jobs.cancel(cancelled))
    dpo = processed(client, *[GOOD_FILES["preferred_completion"]] * 10).id
    method = {"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.5, "n_epochs": "auto"}}}
    seen["dpo"] = story.wait(story.create(training_file=dpo, method=method)["id"], "succeeded")
    good, story.runs._words[0] = story.runs._words[0], str(story.storage / "nowhere")
    seen["failed"] = story.wait(story.create(suffix="fails")["id"], "failed")
    story.runs._words[0] = good


NOTHING_GIVEN = "validation_file metadata "
NO_RESULT = "fine_tuned_model trained_tokens "
NOT_OVER = "error finished_at "
NULL: dict[str, str] = {
    "created": NO_RESULT + NOT_OVER + "estimated_finish",
    "queued": NO_RESULT + NOT_OVER + "estimated_finish",
    "running": NOTHING_GIVEN + NO_RESULT + NOT_OVER,
    "paused": NOTHING_GIVEN + NO_RESULT + NOT_OVER + "estimated_finish",
    "resumed": NOTHING_GIVEN + NO_RESULT + NOT_OVER + "estimated_finish",
    "succeeded": "error estimated_finish",
    "dpo": NOTHING_GIVEN + "error estimated_finish",
    "cancelled": NOTHING_GIVEN + NO_RESULT + "error estimated_finish",
    "failed": NOTHING_GIVEN + NO_RESULT + "error.param estimated_finish",
}
"""What may be null of a job, by what it is."""
STATUS = {"created": "validating_files", "resumed": "queued", "dpo": "succeeded"}
"""Of those that are not called by it."""


@pytest.mark.parametrize("name", list(NULL))
def test_a_job_has_every_field_in_every_state(story: Story, name: str) -> None:
    raw = story.seen[name]
    status = STATUS.get(name, name)
    assert raw["status"] == status or (name, raw["status"]) == ("created", "queued")
    other = "supervised" if name == "dpo" else "dpo"
    known = {**raw, "status": "queued"} if status == "paused" else raw  # not in the client's list
    found = exact(
        FineTuningJob, known, null=NULL[name], absent=f"method.{other} method.reinforcement"
    )
    assert re.fullmatch(f"ftjob-{TAG}", found.id)
    assert (found.model, found.organization_id, found.integrations) == (BASE, "org-loray", [])
    assert abs(found.created_at - time.time()) < 600
    assert (found.finished_at or found.created_at) >= found.created_at
    assert bool(found.result_files) == (status == "succeeded")
    if name in ("created", "queued", "succeeded"):
        assert (found.seed, found.metadata) == (7, {"team": "x"})
        assert (found.training_file, found.validation_file) == story.files
        assert found.model_extra["user_provided_suffix"] == "tickets"
        assert found.model_extra["lora"]["rank"] == 8


def test_auto_gives_way_to_what_it_comes_to(story: Story) -> None:
    asked = {"n_epochs": 2, "batch_size": "auto", "learning_rate_multiplier": "auto"}
    taken = {"n_epochs": 2, "batch_size": 1, "learning_rate_multiplier": 1.0}
    for name, expected in (("created", asked), ("queued", taken), ("succeeded", taken)):
        raw = story.seen[name]
        assert raw["hyperparameters"] == expected
        assert raw["method"] == {"type": "supervised", "supervised": {"hyperparameters": expected}}
    assert story.seen["running"]["hyperparameters"]["n_epochs"] == 9  # 12 examples, 100 in all
    assert story.seen["dpo"]["method"]["dpo"]["hyperparameters"] == {
        "n_epochs": 10, "batch_size": 1, "learning_rate_multiplier": 0.1, "beta": 0.5,
    }  # fmt: skip


def test_a_jobs_events_are_those_that_clients_look_for(story: Story) -> None:
    done = story.seen["succeeded"]
    raw = body_of(
        story.client.fine_tuning.jobs.with_raw_response.list_events(done["id"], limit=100)
    )
    assert (list(raw), raw["object"]) == (["object", "data", "has_more"], "list")
    events = [
        exact(FineTuningJobEvent, one, null="data" if one["type"] == "message" else "")
        for one in reversed(raw["data"])
    ]
    training, validation = story.files
    steps: list[str] = []
    for step in range(1, 7):
        steps.append(f"Step {step}/6: training loss={2 / step:.2f}")
        if step % 2 == 0:
            steps.append(f"Step {step}: validation loss={2 / step + 0.1:.2f}")
            steps.append(f"Checkpoint created at step {step}")
    assert [event.message for event in events] == [
        f"Created fine-tuning job: {done['id']}",
        f"Validating training file: {training} and validation file: {validation}",
        "Files validated, moving job to queued state",
        "Fine-tuning job started",
        "training_file.jsonl:3 is cut",
        *steps,
        f"New fine-tuned model created: {done['fine_tuned_model']}",
        "The job has successfully completed",
    ]
    assert [event.message for event in events if event.level != "info"] == [events[4].message]
    assert events[4].level == "warn"
    assert all(re.fullmatch(f"ftevent-{TAG}", event.id) for event in events)
    assert [event.created_at for event in events] == sorted(event.created_at for event in events)
    metrics = [event.data for event in events if event.type == "metrics"]
    assert metrics[1] == {
        "step": 2, "total_steps": 6, "train_loss": 1.0, "train_mean_token_accuracy": 0.5,
        "learning_rate": 0.001,
    }  # fmt: skip
    assert metrics[2] == {"step": 2, "valid_loss": 1.1, "valid_mean_token_accuracy": 0.25}


@pytest.mark.parametrize(
    ("name", "level", "last"),
    [
        ("cancelled", "info", "The job was cancelled"),
        ("failed", "error", "The job failed: nowhere: no such directory"),
    ],
)
def test_how_a_job_ended_is_its_last_event(story: Story, name: str, level: str, last: str) -> None:
    (event,) = story.client.fine_tuning.jobs.list_events(story.seen[name]["id"], limit=1).data
    assert (event.level, event.message) == (level, last)
    if name == "failed":
        told = {"code": "storage_error", "message": "nowhere: no such directory", "param": None}
        assert story.seen["failed"]["error"] == told  # where the server keeps it is not told


@pytest.mark.parametrize(
    ("data", "fields", "code", "words"),
    [
        (json.dumps(ROW).encode() + b"\n", {}, "invalid_n_examples",
         r"^Training file has 1 example\(s\), but must have at least 10 examples$"),
        (LINES + b"{}\n", {}, "invalid_training_file", "Line 13"),
        (b"PK\x03\x04" + b"0" * 100, {}, "invalid_training_file", "zip"),
        (b"[" * 10000, {}, "invalid_training_file", "nested"),
        (LINES, {"method": {"type": "dpo", "dpo": {}}}, "invalid_training_file", "method"),
        (b"{}\n", {"is_validation": True}, "invalid_validation_file", "Line 1"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_used_fails_the_job_and_not_the_request(
    story: Story, data: bytes, fields: dict[str, Any], code: str, words: str
) -> None:
    file = story.client.files.create(file=("a.jsonl", data), purpose="fine-tune").id
    is_validation = fields.get("is_validation", False)
    param = "validation_file" if is_validation else "training_file"
    given = {} if is_validation else fields
    made = story.create(**{param: file}, **given)
    assert made["status"] == "validating_files"
    done = exact(
        FineTuningJob, story.wait(made["id"], "failed"),
        null=NO_RESULT + "estimated_finish metadata"
        + ("" if is_validation else " validation_file"),
        absent=f"method.{'supervised' if given else 'dpo'} method.reinforcement",
    )  # fmt: skip
    assert (done.error.code, done.error.param) == (code, param)
    assert re.search(words, done.error.message)


@pytest.mark.parametrize(
    ("name", "verb", "words"),
    [
        ("succeeded", "cancel", "succeeded and cannot be cancelled"),
        ("succeeded", "pause", "succeeded and cannot be paused"),
        ("cancelled", "resume", "cancelled and cannot be resumed"),
        ("failed", "resume", "failed and cannot be resumed"),
    ],
)
def test_what_cannot_be_done_to_a_job_is_a_400(
    story: Story, name: str, verb: str, words: str
) -> None:
    act = getattr(story.client.fine_tuning.jobs, verb)
    with pytest.raises(openai.BadRequestError, match=words):
        act(story.seen[name]["id"])


def test_checkpoints_are_models_with_their_metrics(story: Story) -> None:
    done = story.seen["succeeded"]
    checkpoints = story.client.fine_tuning.jobs.checkpoints
    raw = body_of(checkpoints.with_raw_response.list(done["id"]))
    assert (raw["object"], raw["has_more"]) == ("list", False)
    assert (raw["first_id"], raw["last_id"]) == (raw["data"][0]["id"], raw["data"][-1]["id"])
    found = [exact(FineTuningJobCheckpoint, one) for one in raw["data"]]
    assert [one.step_number for one in found] == [6, 4, 2]
    for one in found:
        assert re.fullmatch(f"ftckpt_{TAG}", one.id)
        assert one.fine_tuning_job_id == done["id"]
        name = f"{done['fine_tuned_model']}:ckpt-step-{one.step_number}"
        assert one.fine_tuned_model_checkpoint == name
        assert complete(story.client, model=name).model == name
        loss = pytest.approx(2 / one.step_number)
        assert one.metrics.to_dict() == {
            "step": one.step_number, "train_loss": loss, "train_mean_token_accuracy": 0.5,
            "valid_loss": pytest.approx(2 / one.step_number + 0.1),
            "valid_mean_token_accuracy": 0.25,
            "full_valid_loss": pytest.approx(2 / one.step_number + 0.1),
            "full_valid_mean_token_accuracy": 0.25,
        }  # fmt: skip


def test_the_results_are_a_csv_file_of_the_files_api(story: Story) -> None:
    (id,) = story.seen["succeeded"]["result_files"]
    raw = body_of(story.client.files.with_raw_response.retrieve(id))
    file = exact(FileObject, raw, null="expires_at status_details")
    assert (file.purpose, file.status) == ("fine-tune-results", "processed")
    assert [one.id for one in story.client.files.list(purpose="fine-tune-results")].count(id) == 1
    assert story.client.files.content(id).text == (
        "step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy\n"
        "1,2,0.5,,\n2,1,0.5,1.1,0.25\n3,0.666667,0.5,,\n4,0.5,0.5,0.6,0.25\n5,0.4,0.5,,\n"
        "6,0.333333,0.5,0.433333,0.25\n"
    )


def test_the_result_is_a_model_until_it_is_deleted_for_good(story: Story, tmp_path: Path) -> None:
    client, job = story.client, story.seen["succeeded"]
    name = job["fine_tuned_model"]
    assert name == f"ft:{BASE}:loray:tickets:{job['id'][-8:]}"
    plain = story.seen["dpo"]["fine_tuned_model"]
    assert re.fullmatch(rf"ft:{BASE}:loray::[A-Za-z0-9]{{8}}", plain)
    model = exact(
        Model, body_of(client.models.with_raw_response.retrieve(name)), absent="shutdown_date"
    )
    assert (model.id, model.model_extra["parent"]) == (name, BASE)
    assert chat(client, model=name).model == name
    gone = body_of(client.models.with_raw_response.delete(name))
    assert exact(ModelDeleted, gone) == ModelDeleted(id=name, object="model", deleted=True)
    assert name not in [one.id for one in client.models.list()]
    for ask in (client.models.retrieve, client.models.delete):
        with pytest.raises(openai.APIStatusError):
            ask(name)
    new = database.open_(database.sqlite_url(tmp_path / "new.db"))  # the registry is lost
    found = rebuild.rebuild(new, story.storage, adapter_of=checkpoint.adapter_directory)
    new.close()
    assert plain in found.added
    assert name not in found.added
    assert (found.num_deleted, found.broken) == (1, ())


def test_a_base_with_a_slash_is_looked_up_and_not_split(story: Story) -> None:
    name = "ft:meta/llama:3:org:a:b:12345678"
    path = story.storage / story.seen["dpo"]["id"] / "adapter"
    with story.server.database.write() as session:
        session.add(
            tables.Model(
                name=name, project="default", job_id=None, base="meta/llama:3", step=None,
                path=str(path), created_at=time.time(), deleted_at=None,
            )
        )  # fmt: skip
    model = exact(
        Model, body_of(story.client.models.with_raw_response.retrieve(name)),
        absent="shutdown_date",
    )  # fmt: skip
    assert (model.id, model.model_extra["parent"]) == (name, "meta/llama:3")
    assert chat(story.client, model=name).model == name
    assert story.client.models.delete(name).deleted


# Lists


LISTS: dict[str, Callable[[Story], Any]] = {
    "files": lambda s: s.client.files,
    "jobs": lambda s: s.client.fine_tuning.jobs,
    "events": lambda s: s.client.fine_tuning.jobs,
    "checkpoints": lambda s: s.client.fine_tuning.jobs.checkpoints,
}


@pytest.mark.parametrize("kind", list(LISTS))
def test_a_list_is_read_page_by_page_exactly(story: Story, kind: str) -> None:
    resource, args = LISTS[kind](story), ()
    if kind in ("events", "checkpoints"):
        args = (story.seen["succeeded"]["id"],)
    verb = "list_events" if kind == "events" else "list"
    ask, ask_raw = getattr(resource, verb), getattr(resource.with_raw_response, verb)
    ids = [one.id for one in ask(*args, limit=100)]
    assert len(ids) == len(set(ids)) >= 3
    for limit in (1, 2, len(ids) - 1, len(ids), len(ids) + 1):
        assert [one.id for one in ask(*args, limit=limit)] == ids
        pages: list[Any] = []
        after: dict[str, str] = {}
        while not pages or pages[-1]["has_more"]:
            pages.append(body_of(ask_raw(*args, limit=limit, **after)))
            after = {"after": pages[-1]["data"][-1]["id"]}
        parts = [[one["id"] for one in page["data"]] for page in pages]
        assert parts == [ids[n : n + limit] for n in range(0, len(ids), limit)]
        for page, part in zip(pages, parts, strict=True):
            assert page["object"] == "list"
            if kind in ("files", "checkpoints"):
                assert (page["first_id"], page["last_id"]) == (part[0], part[-1])
    last = body_of(ask_raw(*args, after=ids[-1]))
    assert (last["data"], last["has_more"]) == ([], False)
    times = [one["created_at"] for one in body_of(ask_raw(*args, limit=100))["data"]]
    assert times == sorted(times, reverse=True)
    if kind == "files":
        assert [one.id for one in ask(limit=2, order="asc")] == ids[::-1]


def test_pages_are_as_long_as_openais_where_nothing_is_said(story: Story) -> None:
    client, job = story.client, story.seen["succeeded"]["id"]
    with story.server.database.write() as session:
        rows = session.query(tables.JobEvent).filter_by(job_id=job).count()
        for number in range(30):
            session.add(
                tables.JobEvent(
                    id=f"ftevent-{number:024}", job_id=job, place=rows + number + 1,
                    created_at=time.time(), level="info", message="x", type="message",
                )
            )  # fmt: skip
            session.add(
                tables.JobCheckpoint(
                    id=f"ftckpt_{number:024}", job_id=job, step=100 + number,
                    created_at=time.time(), model="x", metrics={},
                )
            )  # fmt: skip
    assert len(client.fine_tuning.jobs.list_events(job).data) == 20
    assert len(client.fine_tuning.jobs.checkpoints.list(job).data) == 10
