"""Adapters that come, change, are switched and evicted under requests: nobody's answer changes."""

import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from server import Running, serving, until
from test_training_adapter import make_adapter

from cluster import storage

CHAT: Any = [{"role": "user", "content": "Say red please"}]
LONG = 300


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Path:
    """Adapters a, b, c, of ranks 4, 8 and 2."""
    directory = tmp_path_factory.mktemp("adapters")
    for seed, (name, rank) in enumerate({"a": 4, "b": 8, "c": 2}.items()):
        make_adapter(directory / name, tiny_base, seed=seed, r=rank)
    return directory


@pytest.fixture
def running(tmp_path: Path, tiny_base: Path, sources: Path) -> Iterator[Running]:
    """A server that serves a, b and c and has room for two of them."""
    shutil.copytree(sources, tmp_path, dirs_exist_ok=True)
    limits = {"rows": 4, "context_tokens": 512, "kv_tokens": 4096, "adapters": 2}
    adapters = [{"name": name, "path": str(tmp_path / name)} for name in "abc"]
    with serving(tmp_path, tiny_base, limits=limits, adapters=adapters) as server:
        yield server


def settings(running: Running, model: str, max_tokens: int) -> dict[str, Any]:
    """Of a greedy answer that does not end by itself."""
    end = str(running.replica.service.base.tokenizer.eos_token_id)
    return {
        "model": model, "messages": CHAT, "temperature": 0, "max_tokens": max_tokens,
        "logit_bias": {end: -100},
    }  # fmt: skip


def ask(running: Running, model: str, max_tokens: int = LONG) -> str:
    answer = running.client.chat.completions.create(**settings(running, model, max_tokens))
    return answer.choices[0].message.content or ""


class Stream:
    """An answer that has begun."""

    def __init__(self, running: Running, model: str) -> None:
        self._chunks: Iterator[Any] = iter(
            running.client.chat.completions.create(**settings(running, model, LONG), stream=True)
        )
        next(self._chunks)

    def rest(self) -> str:
        """All that it says."""
        deltas = [chunk.choices[0].delta.content or "" for chunk in self._chunks]
        return "".join(deltas)


def in_model(running: Running) -> set[str]:
    """The adapters that the model's layers hold."""
    model: Any = running.replica.service.adapters._model
    return set(model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj").lora_A)


def test_a_new_version_takes_over_and_the_old_one_ends_its_answers(running: Running) -> None:
    old, new = ask(running, "a"), ask(running, "b")
    assert running.client.models.delete("b").deleted
    stream = Stream(running, "a")
    added = running.post("/v1/adapters", {"name": "a", "path": "b"})
    assert added.ok, added.text
    assert ask(running, "a") == new
    assert stream.rest() == old
    until(lambda: len(in_model(running) - {"base"}) == 1)  # the old one is taken down
    assert ask(running, "a") == new


def test_more_adapters_than_slots_take_turns(running: Running) -> None:
    adapters = running.replica.service.adapters
    texts = {name: ask(running, name, 20) for name in "abc"}
    assert len(set(texts.values())) == 3
    before = adapters.events.evictions
    for name in "abcabc":
        assert ask(running, name, 20) == texts[name]
        assert len(adapters.loaded) <= 2
    assert adapters.events.evictions - before >= 4


def test_an_adapter_in_use_is_not_evicted_and_who_needs_its_slot_waits(running: Running) -> None:
    texts = {name: ask(running, name) for name in "abc"}
    evictions = running.replica.service.adapters.events.evictions
    streams = {name: Stream(running, name) for name in "ab"}
    versions = {name: running.replica.service.adapters.loaded[name] for name in "ab"}
    late: list[str] = []
    waits = threading.Thread(target=lambda: late.append(ask(running, "c")))
    waits.start()
    for name, stream in streams.items():
        if not late:
            assert running.replica.service.adapters.loaded.get(name) in (versions[name], None)
        assert stream.rest() == texts[name]
    waits.join(60)
    assert late == [texts["c"]]
    assert running.replica.service.adapters.events.evictions > evictions


def test_an_adapter_is_switched_under_its_own_requests_and_none_is_dropped(
    running: Running,
) -> None:
    stop, texts, problems = threading.Event(), set[str](), list[BaseException]()

    def traffic() -> None:
        while not stop.is_set():
            try:
                texts.add(ask(running, "a", 20))
            except BaseException as error:
                problems.append(error)

    threads = [threading.Thread(target=traffic) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for mode in ("merged", "live") * 3:
            switched = running.post("/v1/adapters/a/mode", {"mode": mode})
            assert switched.ok, switched.text
            rows = requests.get(f"{running.url}/v1/adapters", timeout=30).json()["data"]
            assert {row["name"]: row["mode"] for row in rows}["a"] == mode
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not problems
    assert len(texts) == 1


def test_proving_leaves_the_model_alone_that_the_engine_changes(
    running: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapters: Any = running.replica.service.adapters
    with monkeypatch.context() as patch:  # walked meanwhile, its modules change under the walker
        patch.setattr(adapters, "_model", None)
        config, factors, _ = adapters._prove(tmp_path / "b")
    assert set(factors) == set(config.layers)


def test_adapters_that_are_added_at_once_are_all_there(running: Running) -> None:
    problems: list[str] = []

    def add(name: str, path: str) -> None:
        for _ in range(8):
            answer = running.post("/v1/adapters", {"name": name, "path": path})
            if not answer.ok:
                problems.append(answer.text)

    texts = {name: ask(running, name, 20) for name in "abc"}
    threads = [threading.Thread(target=add, args=(f"new-{name}", name)) for name in "abc"]
    for thread in threads:
        thread.start()
    for _ in range(5):
        assert {name: ask(running, name, 20) for name in "abc"} == texts
    for thread in threads:
        thread.join()
    assert not problems
    assert {name: ask(running, f"new-{name}", 20) for name in "abc"} == texts


def test_an_adapter_of_another_base_is_refused_by_its_manifest(
    running: Running, tmp_path: Path
) -> None:
    info = {"base_model": "other", "base_fingerprint": "0" * 64}
    storage.commit(
        tmp_path / "foreign",
        lambda to: shutil.copytree(tmp_path / "a", to, dirs_exist_ok=True) and None,
        attempt="1",
        info=info,
    )
    refused = running.post("/v1/adapters", {"name": "foreign", "path": "foreign"})
    assert refused.status_code == 400
    assert "other" in refused.json()["error"]["message"]
    assert "foreign" not in [model.id for model in running.client.models.list()]
