"""Requests and answers: every field good and bad, the stock client's bodies, and arbitrary JSON."""

import json
from collections.abc import Callable, Iterator
from typing import Any

import httpx2
import jsonschema
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types import Completion, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.model_deleted import ModelDeleted as ClientModelDeleted
from pydantic import TypeAdapter, ValidationError

from serving import replies, schema
from serving.problems import ErrorObject, of_exception
from serving.replies import TokenLogprob
from serving.schema import ChatRequest, CompletionRequest, Sampling

Json = Any
USER = {"role": "user", "content": "What is 2 + 2?"}
CALL = {"id": "call_1", "type": "function", "function": {"name": "add", "arguments": "{}"}}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
CHOICE = {"type": "function", "function": {"name": "add"}}
NAMED = {"name": "answer", "schema": {"type": "object"}}


def chat(**fields: Json) -> ChatRequest:
    return ChatRequest.model_validate({"model": "base", "messages": [USER], **fields})


def completion(**fields: Json) -> CompletionRequest:
    return CompletionRequest.model_validate({"model": "base", "prompt": "Once", **fields})


def rejected(make: Callable[..., object], **fields: Json) -> ErrorObject:
    """The error object of a request that has to be refused."""
    with pytest.raises(ValidationError) as caught:
        make(**fields)
    status, body, _ = of_exception(caught.value)
    assert status == 400
    return body["error"]


def nested(depth: int) -> Json:
    value: Json = {}
    for _ in range(depth):
        value = {"items": value}
    return value


# Fields of both requests


@pytest.mark.parametrize("make", [chat, completion])
@pytest.mark.parametrize(
    ("field", "good"),
    [
        ("model", ["m", "ft:meta/llama:org:s:1", "é", "x" * 256]),
        ("frequency_penalty", [-2, 2, 0.5, None]),
        ("presence_penalty", [-2, 2, 0.5, None]),
        ("logit_bias", [{}, {"0": -100, "50256": 100, "999999999": 0.5}, None]),
        ("metadata", [{}, {"team": "x"}, {"k" * 64: "v" * 512}, None]),
        ("n", [1, 8, None]),
        ("seed", [0, -(2**63), 2**63 - 1, None]),
        ("stop", ["x", [], ["a", "b", "c", "d"], "x" * 256, None]),
        ("stream", [True, False, None]),
        ("stream_options", [None]),
        ("temperature", [0, 0.0, 2, 1e-9, None]),
        ("top_k", [-1, 0, 1, 1000, None]),
        ("top_p", [1, 1e-9, None]),
        ("user", ["", "u" * 512, None]),
    ],
)
def test_a_good_value_is_kept_in_both_requests(
    make: Callable[..., ChatRequest | CompletionRequest], field: str, good: list[Json]
) -> None:
    for value in good:
        assert getattr(make(**{field: value}), field) == value


@pytest.mark.parametrize("make", [chat, completion])
@pytest.mark.parametrize(
    ("field", "bad"),
    [
        ("model", ["", "x" * 257, None, 1, "\ud800"]),
        ("frequency_penalty", [-2.1, 2.1, "1", True, float("nan"), 10**400]),
        ("presence_penalty", [-2.1, 2.1, "1", True, float("inf")]),
        ("logit_bias", [{"0": 101}, {"0": "1"}, {"0": True}, [], {str(i): 1 for i in range(1025)}]),
        ("metadata", [{"k" * 65: ""}, {"k": "v" * 513}, {"k": 1}, "x"]),
        ("metadata", [{str(i): "" for i in range(17)}]),
        ("n", [0, 9, 10**30, 1.0, "1", True]),
        ("seed", [2**63, -(2**63) - 1, 1.5, "1", False]),
        ("stop", ["", [""], ["a"] * 5, "x" * 257, 1, [1], {"a": 1}]),
        ("stream", ["true", 1, 0]),
        ("temperature", [-0.1, 2.1, "0", float("nan")]),
        ("top_k", [-2, 1001, 1.0, True]),
        ("top_p", [0, -1, 1.1, "1"]),
        ("user", ["u" * 513, 1]),
    ],
)
def test_a_bad_value_is_refused_by_the_name_of_its_field(
    make: Callable[..., object], field: str, bad: list[Json]
) -> None:
    for value in bad:
        error = rejected(make, **{field: value})
        assert str(error["param"]).startswith(field)
        assert error["code"] == "invalid_value"


@pytest.mark.parametrize("key", ["-1", "01", "1.0", "x", "", "9" * 10, "٣"])
def test_keys_of_logit_bias_are_token_ids_and_a_bad_one_is_not_repeated(key: str) -> None:
    assert rejected(chat, logit_bias={key: 1})["param"] == "logit_bias"


def test_stream_options_need_a_stream() -> None:
    asked = {"include_usage": True}
    assert chat(stream=True, stream_options=asked).has_usage_chunk
    assert not chat(stream=True, stream_options={"include_usage": False}).has_usage_chunk
    assert not chat(stream=True).has_usage_chunk
    assert rejected(chat, stream_options=asked)["param"] == "stream_options"
    assert rejected(chat, stream=False, stream_options=asked)["param"] == "stream_options"
    odd = {"include_obfuscation": True}
    assert rejected(chat, stream=True, stream_options=odd)["code"] == "unsupported_value"


@pytest.mark.parametrize(
    ("make", "field", "hint"),
    [
        (chat, "temprature", "Did you mean 'temperature'?"),
        (chat, "max_token", "Did you mean 'max_tokens'?"),
        (completion, "messages", "Valid: model, "),
        (completion, "max_completion_tokens", "Unknown field"),
        (chat, "x" * 10_000, "Unknown field"),
        (chat, "\ud800{}", "Unknown field"),
    ],
)
def test_an_unknown_field_is_refused_with_the_nearest_valid_one(
    make: Callable[..., object], field: str, hint: str
) -> None:
    error = rejected(make, **{field: 1})
    assert hint in str(error["message"])
    assert (error["param"], error["code"]) == (None, None)


def test_an_unknown_field_further_in_is_placed() -> None:
    error = rejected(chat, messages=[{**USER, "wieght": 1}])
    assert error["param"] == "messages[0]"


@pytest.mark.parametrize("make", [ChatRequest, CompletionRequest])
@pytest.mark.parametrize("body", [None, [], "x", 1, {}, {"model": "m"}, {"prompt": "x"}])
def test_a_body_without_what_is_required_is_refused(make: type[ChatRequest], body: Json) -> None:
    assert rejected(lambda: make.model_validate(body))["message"]


# What OpenAI has and this server has not


@pytest.mark.parametrize(
    ("field", "neutral", "refused"),
    [
        ("store", [None, False], [True, 0, "no"]),
        ("service_tier", [None, "auto", "default"], ["flex", "priority", 1]),
        ("modalities", [None, ["text"]], [["audio"], ["text", "audio"], []]),
        ("parallel_tool_calls", [None, True], [False, 1]),
        ("audio", [None], [{"voice": "alloy", "format": "wav"}]),
        ("prediction", [None], [{"type": "content", "content": "x"}]),
        ("reasoning_effort", [None], ["low"]),
        ("verbosity", [None], ["low"]),
        ("web_search_options", [None], [{}]),
        ("functions", [None], [[]]),
        ("function_call", [None], ["auto"]),
        ("moderation", [None], [{"model": "m"}]),
        ("prompt_cache_key", [None], ["k"]),
        ("prompt_cache_options", [None], [{}]),
        ("prompt_cache_retention", [None], ["24h"]),
        ("safety_identifier", [None], ["s"]),
    ],
)
def test_fields_without_support_are_refused_by_name_unless_they_ask_for_nothing(
    field: str, neutral: list[Json], refused: list[Json]
) -> None:
    for value in neutral:
        chat(**{field: value})
    for value in refused:
        error = rejected(chat, **{field: value})
        assert (error["param"], error["code"]) == (field, "unsupported_value")
        assert "does not support" in str(error["message"])


def test_the_stock_client_has_no_field_that_the_requests_do_not_know() -> None:
    from openai.types import completion_create_params as text
    from openai.types.chat import completion_create_params as talk

    for params, request in (
        (talk.CompletionCreateParamsStreaming, ChatRequest),
        (talk.CompletionCreateParamsNonStreaming, ChatRequest),
        (text.CompletionCreateParamsStreaming, CompletionRequest),
    ):
        assert set(params.__annotations__) | params.__optional_keys__ <= set(request.model_fields)


@pytest.mark.parametrize("suffix", ["", "end"])
def test_suffix_is_refused(suffix: str) -> None:
    completion(suffix=None)
    assert rejected(completion, suffix=suffix)["code"] == "unsupported_value"


def test_best_of_may_only_be_one_or_n() -> None:
    for good in ({"best_of": None}, {"best_of": 1}, {"best_of": 1, "n": 3}, {"best_of": 3, "n": 3}):
        completion(**good)
    for bad in ({"best_of": 2}, {"best_of": 3, "n": 2}):
        error = rejected(completion, **bad)
        assert (error["param"], error["code"]) == ("best_of", "unsupported_value")
    assert rejected(completion, best_of=0)["code"] == "invalid_value"


# Messages


@pytest.mark.parametrize(
    "message",
    [
        USER,
        {"role": "system", "content": "Be brief."},
        {"role": "developer", "content": "Be brief.", "name": "me"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": ""}]},
        {"role": "user", "content": ""},
        {"role": "assistant", "content": "4", "refusal": None, "tool_calls": None},
        {"role": "assistant", "tool_calls": [CALL]},
        {"role": "assistant", "content": None, "tool_calls": [CALL, CALL]},
        {"role": "assistant", "content": "x", "annotations": [], "audio": None},
        {"role": "tool", "content": "4", "tool_call_id": "call_1", "name": "add"},
        {"role": "tool", "content": [{"type": "text", "text": "4"}], "tool_call_id": "call_1"},
    ],
)
def test_a_good_message_is_taken(message: Json) -> None:
    taken = chat(messages=[message]).messages[0]
    assert taken.model_dump(exclude_unset=True) == message


def test_the_text_of_a_message_is_its_parts_joined() -> None:
    parts = [{"type": "text", "text": "What is "}, {"type": "text", "text": "2 + 2?"}]
    talk = chat(
        messages=[
            {"role": "user", "content": parts},
            {**USER},
            {"role": "assistant", "tool_calls": [CALL]},
        ]
    )
    assert [schema.text_of(one) for one in talk.messages] == [USER["content"], USER["content"], ""]


@pytest.mark.parametrize(
    ("message", "param", "code"),
    [
        ({"role": "user"}, ".content", None),
        ({"role": "user", "content": None}, ".content", "invalid_value"),
        ({"role": "user", "content": 4}, ".content", "invalid_value"),
        ({"role": "user", "content": []}, ".content", "invalid_value"),
        ({"role": "user", "content": ["a"]}, ".content[0]", "invalid_value"),
        ({"role": "user", "content": [{"type": "text"}]}, ".content[0].text", None),
        ({"role": "user", "content": "a\ud800"}, ".content", "invalid_value"),
        ({"role": "user", "content": "a", "name": ""}, ".name", "invalid_value"),
        ({"role": "user", "content": "a", "name": "n" * 65}, ".name", "invalid_value"),
        ({"role": "user", "content": "a", "tool_calls": [CALL]}, "", None),
        ({"role": "robot", "content": "a"}, "", "invalid_value"),
        ({"role": ["user"], "content": "a"}, "", "invalid_value"),
        ({"role": "function", "content": "a", "name": "f"}, "", "invalid_value"),
        ({"content": "a"}, "", "invalid_value"),
        ("hello", "", "invalid_value"),
        ({"role": "assistant"}, ".content", "invalid_value"),
        ({"role": "assistant", "content": None}, ".content", "invalid_value"),
        ({"role": "assistant", "tool_calls": []}, ".tool_calls", "invalid_value"),
        ({"role": "assistant", "content": "a", "refusal": "no"}, ".refusal", "unsupported_value"),
        (
            {"role": "assistant", "content": "a", "function_call": {"name": "f"}},
            ".function_call",
            "unsupported_value",
        ),
        (
            {"role": "assistant", "tool_calls": [{**CALL, "type": "custom", "custom": {}}]},
            ".tool_calls[0]",
            "unsupported_value",
        ),
        (
            {"role": "assistant", "tool_calls": [{**CALL, "function": {"name": "a b"}}]},
            ".tool_calls[0].function.name",
            "invalid_value",
        ),
        ({"role": "tool", "content": "4"}, ".tool_call_id", None),
        ({"role": "tool", "content": "4", "tool_call_id": ""}, ".tool_call_id", "invalid_value"),
    ],
)
def test_a_bad_message_is_refused_where_it_is_bad(
    message: Json, param: str, code: str | None
) -> None:
    error = rejected(chat, messages=[USER, message])
    assert (error["param"], error["code"]) == (f"messages[1]{param}", code)


@pytest.mark.parametrize("kind", ["image_url", "input_audio", "file", "refusal", "x" * 10_000])
def test_parts_that_are_no_text_are_refused_by_their_type(kind: str) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": kind, kind: {}}]
    error = rejected(chat, messages=[{"role": "user", "content": parts}])
    assert (error["param"], error["code"]) == ("messages[0].content[1]", "unsupported_value")
    assert kind[:64] in str(error["message"])


def test_messages_are_bounded_in_number_and_in_size_together() -> None:
    chat(messages=[USER] * schema.MAX_MESSAGES)
    assert rejected(chat, messages=[USER] * (schema.MAX_MESSAGES + 1))["param"] == "messages"
    assert rejected(chat, messages=[])["param"] == "messages"
    half = "x" * (schema.MAX_TEXT_CHARS // 2)
    said = {"role": "user", "content": half}
    chat(messages=[said, said])
    assert "together" in str(rejected(chat, messages=[said, said, USER])["message"])
    parts = {"role": "user", "content": [{"type": "text", "text": half}] * 3}
    assert "together" in str(rejected(chat, messages=[parts])["message"])
    call = {**CALL, "function": {"name": "add", "arguments": half}}
    called = {"role": "assistant", "tool_calls": [call] * 3}
    assert "together" in str(rejected(chat, messages=[called])["message"])
    huge = {"role": "user", "content": half * 3}
    assert rejected(chat, messages=[huge])["param"] == "messages[0].content"


# Fields of chat


def test_both_names_of_the_token_limit_are_one_field() -> None:
    assert chat(max_tokens=5).sampling().max_tokens == 5
    assert chat(max_completion_tokens=5).sampling().max_tokens == 5
    assert chat(max_completion_tokens=5, max_tokens=5).sampling().max_tokens == 5
    assert chat(max_completion_tokens=None, max_tokens=5).sampling().max_tokens == 5
    error = rejected(chat, max_tokens=4, max_completion_tokens=5)
    assert error["param"] == "max_completion_tokens"
    for bad in (0, -1, 2**31, 1.5, "5"):
        assert rejected(chat, max_tokens=bad)["param"] == "max_tokens"


def test_top_logprobs_need_logprobs() -> None:
    assert chat(logprobs=True).sampling().num_logprobs == 0
    assert chat(logprobs=True, top_logprobs=20).sampling().num_logprobs == 20
    assert chat(logprobs=False).sampling().num_logprobs is None
    assert chat(top_logprobs=0).sampling().num_logprobs is None
    assert rejected(chat, top_logprobs=1)["param"] == "top_logprobs"
    assert rejected(chat, logprobs=False, top_logprobs=1)["param"] == "top_logprobs"
    assert rejected(chat, logprobs=True, top_logprobs=21)["param"] == "top_logprobs"
    assert rejected(chat, logprobs=1)["param"] == "logprobs"


@pytest.mark.parametrize(
    "given",
    [
        {"type": "text"},
        {"type": "json_object"},
        {"type": "json_schema", "json_schema": NAMED},
        {"type": "json_schema", "json_schema": {**NAMED, "strict": True, "description": "d"}},
        None,
    ],
)
def test_a_good_response_format_is_taken(given: Json) -> None:
    taken = chat(response_format=given).response_format
    dumped = taken and taken.model_dump(exclude_unset=True, by_alias=True)
    assert dumped == given


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ("json", ""),
        ({}, ""),
        ({"type": "grammar"}, ""),
        ({"type": "json_schema"}, ".json_schema"),
        ({"type": "json_schema", "json_schema": {"name": "n"}}, ".json_schema.schema"),
        ({"type": "json_schema", "json_schema": {**NAMED, "name": "a b"}}, ".json_schema.name"),
        ({"type": "json_schema", "json_schema": {**NAMED, "strict": 1}}, ".json_schema.strict"),
        ({"type": "json_schema", "json_schema": {**NAMED, "schema": []}}, ".json_schema.schema"),
        ({"type": "text", "json_schema": NAMED}, ""),
    ],
)
def test_a_bad_response_format_is_refused(given: Json, param: str) -> None:
    assert rejected(chat, response_format=given)["param"] == f"response_format{param}"


@pytest.mark.parametrize(
    "bad",
    [
        {"enum": ["x" * schema.MAX_SCHEMA_BYTES]},
        {"const": float("nan")},
        {"const": "\ud800"},
        {"\udfff": 1},
        nested(5000),
    ],
)
def test_a_schema_is_small_plain_json(bad: Json) -> None:
    given = {"type": "json_schema", "json_schema": {"name": "n", "schema": bad}}
    assert rejected(chat, response_format=given)["param"] == "response_format.json_schema.schema"
    tool = {"type": "function", "function": {"name": "f", "parameters": bad}}
    assert rejected(chat, tools=[tool])["param"] == "tools[0].function.parameters"


@pytest.mark.parametrize(
    ("tools", "param", "code"),
    [
        ([{"type": "custom", "custom": {"name": "c"}}], "tools[0]", "unsupported_value"),
        ([{"type": "function"}], "tools[0].function", None),
        ([{"type": "function", "function": {"name": "a.b"}}], "tools[0].function.name", None),
        ([{"type": "function", "function": {"name": "x" * 65}}], "tools[0].function.name", None),
        ([TOOL, TOOL], "tools", "invalid_value"),
        ([TOOL] * 65, "tools", "invalid_value"),
        ("add", "tools", "invalid_value"),
    ],
)
def test_bad_tools_are_refused(tools: Json, param: str, code: str | None) -> None:
    error = rejected(chat, tools=tools)
    assert error["param"] == param
    assert code is None or error["code"] == code


@pytest.mark.parametrize("choice", ["none", "auto", "required", CHOICE, None])
def test_a_good_tool_choice_is_taken(choice: Json) -> None:
    assert chat(tools=[TOOL], tool_choice=choice).tool_choice is not None or choice is None


@pytest.mark.parametrize(
    ("choice", "param", "code"),
    [
        ("any", "tool_choice", "invalid_value"),
        (1, "tool_choice", "invalid_value"),
        ({"type": "function"}, "tool_choice.function", None),
        ({"type": "function", "function": {}}, "tool_choice.function.name", None),
        (
            {"type": "function", "function": {"name": "subtract"}},
            "tool_choice",
            "invalid_value",
        ),
        ({"type": "allowed_tools", "allowed_tools": {}}, "tool_choice", "unsupported_value"),
    ],
)
def test_a_bad_tool_choice_is_refused(choice: Json, param: str, code: str | None) -> None:
    error = rejected(chat, tools=[TOOL], tool_choice=choice)
    assert (error["param"], error["code"]) == (param, code)


def test_a_tool_can_only_be_asked_for_where_there_are_tools() -> None:
    chat(tool_choice="none")
    chat(tool_choice="auto", tools=[])
    assert "together with tools" in str(rejected(chat, tool_choice="required")["message"])
    assert "together with tools" in str(rejected(chat, tool_choice=CHOICE, tools=[])["message"])


# Fields of completions


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("a", ["a"]),
        ("", [""]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([0], [[0]]),
        ([[1, 2], [3]], [[1, 2], [3]]),
    ],
)
def test_every_form_of_prompt_becomes_a_list(prompt: Json, prompts: Json) -> None:
    assert completion(prompt=prompt).prompts == prompts


@pytest.mark.parametrize(
    ("prompt", "param"),
    [
        (None, "prompt"),
        (1, "prompt"),
        ({}, "prompt"),
        ([], "prompt"),
        ([[]], "prompt[0]"),
        (["a", 1], "prompt[1]"),
        ([1, "a"], "prompt[1]"),
        ([1, True], "prompt[1]"),
        ([True], "prompt[0]"),
        ([1, [2]], "prompt[1]"),
        ([[1], 2], "prompt[1]"),
        ([[1], ["a"]], "prompt[1][0]"),
        ([-1], "prompt[0]"),
        ([2**31], "prompt[0]"),
        ([1.0], "prompt[0]"),
        (["a"] * 65, "prompt"),
        ([[1]] * 65, "prompt"),
        (["\ud800"], "prompt[0]"),
    ],
)
def test_a_bad_prompt_is_refused_where_it_is_bad(prompt: Json, param: str) -> None:
    assert rejected(completion, prompt=prompt)["param"] == param


def test_prompts_are_bounded_together() -> None:
    ids = [7] * (schema.MAX_PROMPT_TOKENS // 2)
    assert completion(prompt=[ids, ids]).prompts == [ids, ids]
    assert "tokens in all" in str(rejected(completion, prompt=[ids, ids, [7]])["message"])
    text = "x" * (schema.MAX_TEXT_CHARS // 2)
    completion(prompt=[text, text])
    assert "characters in all" in str(rejected(completion, prompt=[text, text, "x"])["message"])
    assert rejected(completion, prompt=ids * 3)["param"] == "prompt"


def test_max_tokens_of_completions_is_16_and_may_be_0_with_echo() -> None:
    assert completion().sampling().max_tokens == 16
    assert completion(max_tokens=None).sampling().max_tokens == 16
    assert completion(max_tokens=3).sampling().max_tokens == 3
    assert completion(max_tokens=0, echo=True).sampling().max_tokens == 0
    for bad in ({"max_tokens": 0}, {"max_tokens": 0, "echo": False}, {"max_tokens": -1}):
        assert rejected(completion, **bad)["param"] == "max_tokens"


def test_logprobs_of_completions_are_a_number() -> None:
    assert completion().sampling().num_logprobs is None
    assert completion(logprobs=0).sampling().num_logprobs == 0
    assert completion(logprobs=5).sampling().num_logprobs == 5
    for bad in (-1, 6, True, 1.0):
        assert rejected(completion, logprobs=bad)["param"] == "logprobs"


def test_what_lm_eval_sends_is_taken() -> None:
    # lm_eval 0.4.9, models/openai_completions.py: LocalCompletionsAPI._create_payload
    taken = completion(
        prompt=[[1, 2, 3]], temperature=0, max_tokens=1, logprobs=1, seed=1234, echo=True
    )
    assert taken.prompts == [[1, 2, 3]]
    generates = completion(prompt=["Q:"], max_tokens=256, temperature=0, stop=["\n"], seed=1234)
    assert generates.sampling().stop == ("\n",)


# Sampling


@pytest.mark.parametrize("make", [chat, completion])
def test_sampling_defaults_are_openais(
    make: Callable[..., ChatRequest | CompletionRequest],
) -> None:
    limit = 16 if make is completion else None
    assert make().sampling() == Sampling(max_tokens=limit)
    fields = ("temperature", "top_p", "top_k", "seed", "stop", "logit_bias", "n", "max_tokens")
    nothing = make(**dict.fromkeys(fields))
    assert nothing.sampling() == Sampling(max_tokens=limit)
    assert nothing.num_choices == 1


def test_sampling_takes_every_field() -> None:
    asked = chat(
        temperature=0,
        top_p=0.5,
        top_k=40,
        seed=-3,
        presence_penalty=1,
        frequency_penalty=-1,
        logit_bias={"5": -100, "0": 1.5},
        logprobs=True,
        top_logprobs=2,
        stop="END",
        max_tokens=9,
        n=3,
    )
    assert asked.num_choices == 3
    assert asked.sampling() == Sampling(
        temperature=0.0,
        top_p=0.5,
        top_k=40,
        seed=-3,
        presence_penalty=1.0,
        frequency_penalty=-1.0,
        logit_bias={5: -100.0, 0: 1.5},
        num_logprobs=2,
        stop=("END",),
        max_tokens=9,
    )
    assert chat(top_k=-1).sampling().top_k == 0


def test_requests_cannot_be_changed_and_do_not_quote_their_input() -> None:
    with pytest.raises(ValidationError):
        chat().model = "other"
    with pytest.raises(ValidationError) as caught:
        chat(messages=[{"role": "user", "content": ["the patient's name is Ada"]}])
    assert "Ada" not in str(caught.value)


# The stock client


@pytest.fixture
def sent() -> Iterator[tuple[openai.OpenAI, list[bytes]]]:
    """A client of OpenAI's, and the bodies that it sends."""
    bodies: list[bytes] = []

    def answer(request: httpx2.Request) -> httpx2.Response:
        bodies.append(request.content)
        return httpx2.Response(400, json={"error": {"message": "enough"}})

    transport = httpx2.MockTransport(answer)
    with (
        httpx2.Client(transport=transport) as http,
        openai.OpenAI(api_key="none", base_url="http://localhost/v1", http_client=http) as client,
    ):
        yield client, bodies


def test_bodies_of_the_stock_client_are_taken(sent: tuple[openai.OpenAI, list[bytes]]) -> None:
    client, bodies = sent
    say: Json = client.chat.completions.create
    write: Json = client.completions.create
    calls: list[Callable[[], object]] = [
        lambda: say(model="m", messages=[USER]),
        lambda: say(model="m", messages=[USER], stream=True),
        lambda: say(
            model="m",
            messages=[USER],
            stream=True,
            stream_options={"include_usage": True},
            temperature=0,
            extra_body={"top_k": 5},
        ),
        lambda: say(model="m", messages=[USER], tools=[TOOL], tool_choice="auto", metadata=None),
        lambda: write(model="m", prompt="Once"),
        lambda: write(model="m", prompt=[1, 2], echo=True, logprobs=1, max_tokens=1),
    ]
    for call in calls:
        with pytest.raises(openai.BadRequestError):
            call()
    taken = [
        (CompletionRequest if b'"prompt"' in body else ChatRequest).model_validate_json(body)
        for body in bodies
    ]
    assert len(taken) == len(calls)
    assert taken[2].sampling().top_k == 5


def test_an_answer_can_be_said_again_as_a_message() -> None:
    whole = ChatCompletion.model_validate(whole_answer())
    message = whole.choices[0].message.model_dump(exclude_unset=True)
    chat(messages=[USER, message, {"role": "tool", "tool_call_id": "call_1", "content": "4"}])
    everything = whole.choices[0].message.model_dump()
    chat(messages=[USER, everything])


# The documented schema


def nodes(node: Json) -> Iterator[dict[str, Json]]:
    if isinstance(node, dict):
        yield node
    for child in (
        node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    ):
        yield from nodes(child)


@pytest.mark.parametrize("request_type", [ChatRequest, CompletionRequest])
def test_every_number_and_length_is_bounded_in_the_documented_schema(
    request_type: type[ChatRequest],
) -> None:
    document = request_type.model_json_schema()
    jsonschema.Draft202012Validator.check_schema(document)
    for node in nodes(document):
        kind = node.get("type")
        if "const" in node or "enum" in node:
            continue
        if kind == "string":
            assert "maxLength" in node or "pattern" in node, node
        if kind in ("integer", "number"):
            assert {"minimum", "exclusiveMinimum"} & set(node), node
            assert "maximum" in node, node
        if kind == "array":
            assert "maxItems" in node, node
        if kind == "object" and "properties" in node:
            assert node["additionalProperties"] is False, node


ODD_TEXT = st.text(st.characters(categories=None), max_size=8)
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    ODD_TEXT,
    st.sampled_from(["user", "text", "function", "auto", "json_schema", "custom", "assistant"]),
)
KEYS = st.one_of(
    ODD_TEXT,
    st.sampled_from(
        ["role", "content", "type", "text", "function", "name", "arguments", "tool_calls", "id"]
    ),
    st.sampled_from(["json_schema", "schema", "parameters", "include_usage", "tool_call_id"]),
)
ANY_JSON = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=12,
)


def bodies(request_type: type[ChatRequest] | type[CompletionRequest]) -> st.SearchStrategy[Json]:
    start: Json = {"model": "m", "messages": [USER], "prompt": "Once"}
    start = {key: value for key, value in start.items() if key in request_type.model_fields}
    fields = st.dictionaries(st.sampled_from(list(request_type.model_fields)), ANY_JSON, max_size=4)
    return ANY_JSON | fields.map(lambda more: {**start, **more})


@pytest.mark.parametrize("request_type", [ChatRequest, CompletionRequest])
def test_arbitrary_json_is_taken_or_refused_cleanly(
    request_type: type[ChatRequest] | type[CompletionRequest],
) -> None:
    document = jsonschema.Draft202012Validator(request_type.model_json_schema())

    @settings(max_examples=300, deadline=None)
    @given(bodies(request_type))
    def check(body: Json) -> None:
        try:
            taken = request_type.model_validate(body)
        except ValidationError as error:
            status, refusal, _ = of_exception(error)
            assert status == 400
            json.dumps(refusal, ensure_ascii=False).encode()
        else:
            assert isinstance(taken.sampling(), Sampling)
            assert document.is_valid(body)

    check()


# Answers

HEAD: replies.Head = {"id": "x-1", "created": 5, "model": "m", "system_fingerprint": "fp"}
TOKENS = [
    TokenLogprob(token="The", bytes=None, logprob=None),
    TokenLogprob(
        token=" cat",
        bytes=[32, 99, 97, 116],
        logprob=-0.5,
        top=[
            TokenLogprob(token=" cat", bytes=[32, 99, 97, 116], logprob=-0.5),
            TokenLogprob(token="\ufffd", bytes=[195], logprob=-3.0),
            TokenLogprob(token="\ufffd", bytes=[196], logprob=float("-inf")),
        ],
    ),
    TokenLogprob(token=" sat", bytes=[32, 115, 97, 116], logprob=-7.0),
]


def whole_answer() -> replies.ChatCompletion:
    call = replies.ToolCall(
        id="call_1",
        type="function",
        function=replies.FunctionCall(name="add", arguments="{}"),
    )
    choice = replies.ChatChoice(
        index=0,
        message={"role": "assistant", "content": None, "refusal": None, "tool_calls": [call]},
        logprobs=replies.chat_logprobs(TOKENS[1:]),
        finish_reason="tool_calls",
    )
    usage = replies.usage_of(7, 3, cached_tokens=4)
    return replies.chat_completion(HEAD, [choice], usage)


def round_trip(kind: type[Json], value: Json) -> None:
    """Valid as documented, and strict JSON."""
    TypeAdapter(kind).validate_python(value, strict=True)
    assert json.loads(json.dumps(value, allow_nan=False)) == value


def test_a_whole_answer_is_read_by_the_stock_client() -> None:
    answer = whole_answer()
    round_trip(replies.ChatCompletion, answer)
    read = ChatCompletion.model_validate(answer, strict=True)
    assert read.usage is not None
    assert read.usage.total_tokens == 10
    assert read.usage.prompt_tokens_details is not None
    assert read.usage.prompt_tokens_details.cached_tokens == 4
    assert read.choices[0].finish_reason == "tool_calls"
    logprobs = read.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert [one.logprob for one in logprobs.content] == [-0.5, -7.0]
    assert [one.logprob for one in logprobs.content[0].top_logprobs] == [-0.5, -3.0, -9999.0]
    assert logprobs.content[0].bytes == [32, 99, 97, 116]


def test_chunks_speak_of_usage_only_where_it_was_asked_for() -> None:
    choice = replies.ChatChunkChoice(
        index=0,
        delta={"role": "assistant", "content": ""},
        logprobs=None,
        finish_reason=None,
    )
    plain = replies.chat_chunk(HEAD, [choice], has_usage=False)
    assert "usage" not in plain
    asked = replies.chat_chunk(HEAD, [choice], has_usage=True)
    assert asked["usage"] is None  # pyright: ignore[reportTypedDictNotRequiredAccess]
    last = replies.chat_chunk(HEAD, [], has_usage=True, usage=replies.usage_of(1, 2))
    for chunk in (plain, asked, last):
        round_trip(replies.ChatCompletionChunk, chunk)
        ChatCompletionChunk.model_validate(chunk, strict=True)
        assert {**chunk, **HEAD} == chunk


def test_a_completion_is_read_by_the_stock_client_whole_and_in_pieces() -> None:
    choice = replies.TextChoice(
        index=0,
        text="The cat sat",
        logprobs=replies.text_logprobs(TOKENS, offsets=[0, 3, 7]),
        finish_reason="stop",
    )
    whole = replies.text_completion(HEAD, [choice], usage=replies.usage_of(1, 2))
    round_trip(replies.TextCompletion, whole)
    read = Completion.construct(**whole)  # As it does: OpenAI too has null for the first token.
    assert read.choices[0].text == "The cat sat"
    assert read.choices[0].logprobs is not None
    assert read.choices[0].logprobs.text_offset == [0, 3, 7]
    piece = replies.text_completion(HEAD, [choice], has_usage=False)
    assert "usage" not in piece
    assert Completion.construct(**piece).choices[0].finish_reason == "stop"


def test_logprobs_of_completions_stand_in_columns() -> None:
    assert replies.text_logprobs(TOKENS, offsets=[0, 3, 7]) == {
        "tokens": ["The", " cat", " sat"],
        "token_logprobs": [None, -0.5, -7.0],
        "top_logprobs": [None, {"\ufffd": -3.0, " cat": -0.5}, {" sat": -7.0}],
        "text_offset": [0, 3, 7],
    }


def test_lm_eval_finds_the_greedy_token_among_the_top() -> None:
    columns = replies.text_logprobs(TOKENS, offsets=[0, 3, 7])
    top = columns["top_logprobs"][1]
    assert top is not None
    assert max(top, key=top.__getitem__) == " cat"


def test_models_are_read_by_the_stock_client() -> None:
    base = replies.base_object("meta/llama", created=5, owned_by="loray")
    adapter = replies.adapter_object("ft:a", base="meta/llama", rank=8, created=6, owned_by="loray")
    listing: replies.ModelList = {"object": "list", "data": [base, adapter]}
    round_trip(replies.ModelList, listing)
    assert [Model.model_validate(one).id for one in listing["data"]] == ["meta/llama", "ft:a"]
    assert (base["root"], base["parent"]) == ("meta/llama", None)
    assert (adapter["root"], adapter["parent"]) == ("meta/llama", "meta/llama")
    gone: replies.ModelDeleted = {"id": "ft:a", "object": "model", "deleted": True}
    round_trip(replies.ModelDeleted, gone)
    assert ClientModelDeleted.model_validate(gone).deleted
