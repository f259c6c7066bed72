"""The HTTP contract, with the stock client over a real socket."""

import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import peft
import pytest
import requests
import torch
from server import Running, serving, until
from test_training_adapter import load, make_adapter

CHAT: Any = [{"role": "user", "content": "Say red please"}]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Iterator[Running]:
    directory = tmp_path_factory.mktemp("serving")
    first = make_adapter(directory / "first", tiny_base, seed=1)
    make_adapter(directory / "second", tiny_base, seed=2, r=8)
    adapters = [{"name": "team/first:v1", "path": str(first)}]
    with serving(directory, tiny_base, adapters=adapters) as server:
        yield server


@pytest.fixture
def base(running: Running) -> str:
    return running.replica.service.base.name


def ask(running: Running, model: str, **settings: Any) -> Any:
    fields = {"messages": CHAT, "temperature": 0, "max_tokens": 12, **settings}
    return running.client.chat.completions.create(model=model, **fields)


def ids_of(running: Running, text: str) -> list[int]:
    return running.replica.service.base.tokenizer(text).input_ids


def test_a_chat_is_answered_whole_and_in_pieces_alike(running: Running, base: str) -> None:
    texts: dict[str, str] = {}
    for model in (base, "team/first:v1"):
        whole = ask(running, model)
        choice = whole.choices[0]
        assert whole.object == "chat.completion"
        assert whole.usage.completion_tokens <= 12
        assert choice.finish_reason in ("stop", "length")
        chunks = list(ask(running, model, stream=True, stream_options={"include_usage": True}))
        text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
        assert text == choice.message.content
        assert len({chunk.id for chunk in chunks}) == 1
        assert chunks[0].choices[0].delta.role == "assistant"
        assert chunks[-1].choices == []
        assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
        assert chunks[-1].usage.prompt_tokens == whole.usage.prompt_tokens
        assert chunks[-2].choices[0].finish_reason == choice.finish_reason
        texts[model] = text
    assert texts[base] != texts["team/first:v1"]


def test_several_choices_with_a_seed_are_the_same_every_time(running: Running, base: str) -> None:
    settings = {"n": 3, "temperature": 1.5, "seed": 11}
    first, second = (ask(running, base, **settings) for _ in range(2))
    texts = [[choice.message.content for choice in one.choices] for one in (first, second)]
    assert texts[0] == texts[1]
    assert len(set(texts[0])) > 1
    assert [choice.index for choice in first.choices] == [0, 1, 2]


def test_stop_texts_end_an_answer_right_before_them(running: Running, base: str) -> None:
    whole = ask(running, base, max_tokens=40).choices[0].message.content
    stop = whole[5:8]
    cut = ask(running, base, max_tokens=40, stop=[stop, "never said"])
    assert cut.choices[0].message.content == whole[: whole.index(stop)]
    assert cut.choices[0].finish_reason == "stop"
    chunks = list(ask(running, base, max_tokens=40, stop=stop, stream=True))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == cut.choices[0].message.content


def test_logprobs_come_with_every_token(running: Running, base: str) -> None:
    whole = ask(running, base, logprobs=True, top_logprobs=2, max_tokens=5)
    content = whole.choices[0].logprobs.content
    assert len(content) == 5
    assert all(len(token.top_logprobs) == 2 for token in content)
    assert all(token.logprob == token.top_logprobs[0].logprob for token in content)
    chunks = list(ask(running, base, logprobs=True, max_tokens=5, stream=True))
    parts = [c.choices[0].logprobs.content for c in chunks if c.choices[0].logprobs]
    streamed = [token for part in parts for token in part]
    assert [token.logprob for token in streamed] == [
        pytest.approx(token.logprob, abs=1e-4) for token in content
    ]


def test_penalties_and_biases_change_what_is_said(running: Running, base: str) -> None:
    plain = ask(running, base, max_tokens=8).choices[0].message.content
    a, b = map(str, ids_of(running, "AB"))
    biased = ask(running, base, max_tokens=8, logit_bias={a: 100}).choices[0].message.content
    assert biased == "A" * 8 != plain
    penalised = ask(running, base, max_tokens=3, logit_bias={a: 60, b: 59}, frequency_penalty=2)
    assert penalised.choices[0].message.content == "ABA"


def test_completions_score_prompts_of_token_ids(running: Running, base: str) -> None:
    """What lm-eval's local-completions asks for."""
    text = "The quick brown fox"
    ids = ids_of(running, text)
    answer = running.client.completions.create(
        model=base, prompt=[ids, ids[:7]], echo=True, logprobs=1, max_tokens=1, temperature=0
    )
    for choice, expected in zip(answer.choices, (ids, ids[:7]), strict=True):
        found = choice.logprobs
        assert found is not None
        assert found.tokens is not None
        assert "".join(found.tokens[:-1]) == text[: len(expected)]
        assert len(found.token_logprobs or ()) == len(expected) + 1
        assert (found.token_logprobs or [0])[0] is None
        assert found.text_offset == list(range(len(expected) + 1))
        assert choice.text.startswith(text[: len(expected)])
    silent = running.client.completions.create(
        model=base, prompt=ids, echo=True, logprobs=1, max_tokens=0
    )
    assert silent.choices[0].text == text
    assert silent.usage is not None
    assert silent.usage.completion_tokens == 0


def test_completions_of_several_prompts_stream(running: Running, base: str) -> None:
    settings: dict[str, Any] = {
        "model": base, "prompt": ["one two", "three"], "n": 2, "max_tokens": 6, "temperature": 0,
    }  # fmt: skip
    whole = running.client.completions.create(**settings)
    assert [choice.index for choice in whole.choices] == [0, 1, 2, 3]
    texts = dict.fromkeys(range(4), "")
    for chunk in running.client.completions.create(**settings, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == {choice.index: choice.text for choice in whole.choices}


def test_adapters_come_and_go_while_others_answer(running: Running, base: str) -> None:
    stop = threading.Event()
    problems: list[BaseException] = []

    def traffic() -> None:
        while not stop.is_set():
            try:
                ask(running, "team/first:v1", max_tokens=20)
            except BaseException as error:
                problems.append(error)

    threads = [threading.Thread(target=traffic) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(3):
            added = running.post("/v1/adapters", {"name": "second", "path": "second"})
            assert added.ok, added.text
            text = ask(running, "second").choices[0].message.content
            assert text != ask(running, base).choices[0].message.content
            merged = running.post("/v1/adapters/second/mode", {"mode": "merged"})
            assert merged.ok, merged.text
            assert ask(running, "second").choices[0].message.content == text
            assert running.client.models.delete("second").deleted
            with pytest.raises(openai.NotFoundError):
                ask(running, "second")
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not problems


def test_a_dora_adapter_is_refused_live_and_served_merged(
    running: Running, tiny_base: Path, tmp_path: Path
) -> None:
    root = Path(running.replica.registry.entries()["team/first:v1"].path).parent
    directory = make_adapter(root / "dora", tiny_base, seed=3, use_dora=True)
    refused = running.post("/v1/adapters", {"name": "dora", "path": "dora", "mode": "live"})
    assert refused.status_code == 400
    assert "serve it merged" in refused.json()["error"]["message"]
    model = peft.PeftModel.from_pretrained(load(tiny_base), str(directory)).eval()
    tokenizer = running.replica.service.base.tokenizer
    prompt = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=True)
    ids = torch.tensor([prompt["input_ids"]])
    told = model.generate(input_ids=ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    adapters = [{"name": "dora", "path": str(directory), "mode": "auto"}]
    with serving(tmp_path, tiny_base, adapters=adapters) as server:
        text = ask(server, "dora").choices[0].message.content
        assert text == tokenizer.decode(told, skip_special_tokens=True)
        assert text != ask(server, tiny_base.name).choices[0].message.content


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        ({"messages": []}, "messages", "invalid_value"),
        ({"temperature": 3}, "temperature", "invalid_value"),
        ({"n": 1000}, "n", "invalid_value"),
        ({"max_tokens": -1}, "max_tokens", "invalid_value"),
        ({"max_tokens": 100000}, "messages", "context_length_exceeded"),
        ({"messages": [{"role": "user", "content": "x" * 2000}]}, "messages",
         "context_length_exceeded"),
        ({"stop": ["x" * 1_000_000]}, "stop[0]", "invalid_value"),
        ({"nonsense": 1}, None, None),
        ({"response_format": {"type": "json_schema", "json_schema": {
            "name": "x", "schema": {"type": "no such type"}}}}, "response_format", "invalid_value"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools",
         "unsupported_value"),
        ({"model": "nobody"}, "model", "model_not_found"),
        ({"model": "x" * 10000}, "model", "invalid_value"),
    ],
)  # fmt: skip
def test_bad_requests_are_answered_with_what_is_wrong(
    running: Running, base: str, body: dict[str, Any], param: str | None, code: str | None
) -> None:
    answer = running.post("/v1/chat/completions", {"model": base, "messages": CHAT, **body})
    assert 400 <= answer.status_code < 500
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param or (param and error["param"].startswith(param))
    assert error["code"] == code
    assert answer.headers["x-request-id"]


def test_what_is_no_request_at_all_is_refused(running: Running) -> None:
    url = f"{running.url}/v1/chat/completions"
    for body in (b"{", b"\xff\xfe", b"[]", b"null", b"NaN"):
        answer = requests.post(
            url, data=body, headers={"Content-Type": "application/json"}, timeout=30
        )
        assert answer.status_code == 400, body
        assert answer.json()["error"]["type"] == "invalid_request_error"
    parts = (b" " * 65536 for _ in range(80))  # sent without its length
    for body in (b" " * (5 << 20), parts):
        large = requests.post(
            url, data=body, headers={"Content-Type": "application/json"}, timeout=30
        )
        assert large.status_code == 413
        assert "4194304 bytes" in large.json()["error"]["message"]
    unknown = requests.get(f"{running.url}/v1/nothing", timeout=30)
    assert unknown.status_code == 404
    assert unknown.json()["error"]["message"]


@pytest.mark.parametrize("path", ["../first", "/etc", "first/../..", "", "nowhere", "registry"])
def test_paths_that_lead_elsewhere_or_to_nothing_are_refused(running: Running, path: str) -> None:
    answer = running.post("/v1/adapters", {"name": "new", "path": path})
    assert answer.status_code == 400
    assert answer.json()["error"]["message"]
    assert "new" not in [model.id for model in running.client.models.list()]


def test_a_client_that_goes_away_frees_its_place_at_once(running: Running, base: str) -> None:
    engine = running.replica.service.base.engine
    took: list[float] = []
    host, port = running.url.removeprefix("http://").split(":")
    letter = str(ids_of(running, "A")[0])  # an answer that does not end by itself
    for is_stream in (True, False):
        body = json.dumps(
            {"model": base, "messages": CHAT, "max_tokens": 450, "stream": is_stream,
             "logit_bias": {letter: 100}}
        ).encode()  # fmt: skip
        for _ in range(10):
            with socket.create_connection((host, int(port)), timeout=30) as client:
                client.sendall(
                    b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n"
                    b"Content-Type: application/json\r\n"
                    b"Content-Length: " + str(len(body)).encode() + b"\r\n\r\n" + body
                )
                until(lambda: engine.num_running > 0)
            gone = time.monotonic()
            until(lambda: engine.num_running == 0)
            took.append(time.monotonic() - gone)
    assert max(took) < 1.0
    assert sorted(took)[len(took) // 2] < 0.1, took
    assert engine.kv_tokens == 0
    assert len(engine.waiting) == 0


def test_a_full_queue_is_answered_with_when_to_come_again(tmp_path: Path, tiny_base: Path) -> None:
    limits = {
        "rows": 1, "context_tokens": 512, "kv_tokens": 512, "prefix_tokens": 0, "waiting": 2,
    }  # fmt: skip
    with serving(tmp_path, tiny_base, limits=limits) as running:
        base = running.replica.service.base
        letter = str(ids_of(running, "A")[0])
        body = {
            "model": base.name,
            "messages": CHAT,
            "max_tokens": 400,
            "logit_bias": {letter: 100},
        }
        threads = [
            threading.Thread(target=running.post, args=("/v1/chat/completions", body))
            for _ in range(3)
        ]
        for number, thread in enumerate(threads):
            thread.start()
            until(lambda n=number: base.engine.num_running + len(base.engine.waiting) > n)
        refused = running.post("/v1/chat/completions", {**body, "max_tokens": 1})
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "server_is_overloaded"
        assert int(refused.headers["retry-after"]) >= 1
        for thread in threads:
            thread.join()


def test_health_and_metrics_speak_of_the_engine(running: Running, base: str) -> None:
    ask(running, base)
    assert requests.get(f"{running.url}/healthz", timeout=30).ok
    text = requests.get(f"{running.url}/metrics", timeout=30).text
    assert "loray_requests_total" in text
    assert f'model="{base}"' in text


def test_auto_measures_both_ways_and_serves_one(tmp_path: Path, tiny_base: Path) -> None:
    path = make_adapter(tmp_path / "either", tiny_base)
    adapters = [{"name": "either", "path": str(path)}]
    with serving(tmp_path, tiny_base, adapters=adapters, mode="auto") as running:
        (row,) = requests.get(f"{running.url}/v1/adapters", timeout=30).json()["data"]
        assert row["mode"] in ("live", "merged")
        assert (row["is_loaded"], row["error"]) == (True, None)
        own, base = (ask(running, name) for name in ("either", running.replica.service.base.name))
        assert own.choices[0].message.content != base.choices[0].message.content


def test_an_error_in_the_middle_of_a_stream_is_its_last_event_and_is_logged(
    tmp_path: Path, tiny_base: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with serving(tmp_path, tiny_base) as running:
        engine = running.replica.service.base.engine
        stream = ask(running, running.replica.service.base.name, stream=True, max_tokens=400)
        next(stream)
        engine._bare.forward = None  # pyright: ignore
        with pytest.raises(openai.APIError, match="The server had an error") as raised:
            list(stream)
        assert raised.value.type == "server_error"
        lines = [one.getMessage() for one in caplog.records if one.name == "serving.problems"]
        assert [stream.response.headers["x-request-id"] in line for line in lines] == [True]


def test_a_dead_engine_is_told_and_shown(tmp_path: Path, tiny_base: Path) -> None:
    with serving(tmp_path, tiny_base) as running:
        base = running.replica.service.base
        base.engine._bare.forward = None  # pyright: ignore
        with pytest.raises(openai.APIStatusError) as raised:
            ask(running, base.name)
        assert raised.value.status_code >= 500
        assert requests.get(f"{running.url}/healthz", timeout=30).status_code == 503
        with pytest.raises(openai.APIStatusError):
            ask(running, base.name)


def test_an_adapter_that_was_served_is_served_after_a_restart(
    tmp_path: Path, tiny_base: Path
) -> None:
    make_adapter(tmp_path / "kept", tiny_base)
    with serving(tmp_path, tiny_base) as running:
        assert running.post("/v1/adapters", {"name": "kept", "path": "kept"}).ok
        text = ask(running, "kept").choices[0].message.content
    with serving(tmp_path, tiny_base) as running:
        assert ask(running, "kept").choices[0].message.content == text
