"""What Prometheus is told: true, readable, and bounded whatever clients send."""

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from prometheus_client.parser import text_string_to_metric_families
from server import Running, serving
from test_training_adapter import make_adapter

from cluster.errors import ClusterError
from serving import problems
from serving.metrics import Metrics


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Iterator[Running]:
    directory = tmp_path_factory.mktemp("metrics")
    adapter = make_adapter(directory / "first", tiny_base)
    with serving(
        directory, tiny_base, adapters=[{"name": "team/first:v1", "path": str(adapter)}]
    ) as server:
        yield server


def parsed(metrics: Metrics) -> dict[str, float]:
    """Every sample of the rendered text as `snapshot` names it, but for the order of labels."""
    text = metrics.render()[0].decode()
    return {
        " ".join([sample.name, *sorted(sample.labels.values())]): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def labels(metrics: Metrics) -> set[str]:
    """All values of the label `model`."""
    families = text_string_to_metric_families(metrics.render()[0].decode())
    return {s.labels["model"] for family in families for s in family.samples if "model" in s.labels}


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (None, "200"),
        (problems.model_not_found("x"), "404"),
        (problems.overloaded(1), "503"),
        (ClusterError("gone"), "503"),
        (ZeroDivisionError(), "500"),
        (asyncio.CancelledError(), "499"),
        (GeneratorExit(), "499"),
    ],
)
def test_a_request_is_counted_with_how_it_ended(error: BaseException | None, status: str) -> None:
    now = [10.0]
    metrics = Metrics(known=["a"], clock=lambda: now[0])

    def ask() -> None:
        with metrics.request("chat", "a"):
            now[0] += 3.0
            if error is not None:
                raise error

    if error is None:
        ask()
    else:
        with pytest.raises(type(error)):
            ask()
    found = metrics.snapshot()
    assert found[f"loray_requests_total a chat {status}"] == 1
    assert found["loray_request_seconds_sum a"] == 3.0
    assert found["loray_request_seconds_bucket a 2.5"] == 0
    assert found["loray_request_seconds_bucket a 5.0"] == 1


def test_tokens_and_their_times_are_counted_by_model() -> None:
    metrics = Metrics(known=["a", "b"])
    metrics.tokens("a", 5, 7)
    metrics.tokens("a", 1, 0)
    metrics.tokens("b", 2, 3)
    metrics.first_token("a", 0.2)
    found = metrics.snapshot()
    assert found["loray_tokens_total a prompt"] == 6
    assert found["loray_tokens_total a completion"] == 7
    assert found["loray_tokens_total b completion"] == 3
    assert found["loray_time_to_first_token_seconds_count a"] == 1
    assert found["loray_time_to_first_token_seconds_bucket a 0.1"] == 0
    assert found["loray_time_to_first_token_seconds_bucket a 0.25"] == 1


def test_whatever_clients_ask_for_has_one_label() -> None:
    metrics = Metrics(known=["a"])
    sent = ['"', "\n", "\\", "é", "a ", "A", "", "x" * 10_000, "\x00", '"} 1\nfake 1', "other"]
    sizes: set[int] = set()
    for name in [*sent, *map(str, range(1000))]:
        with pytest.raises(problems.ApiError), metrics.request("chat", name):
            raise problems.model_not_found(name)
        sizes.add(len(metrics.snapshot()))
    assert len(sizes) == 1
    assert labels(metrics) == {"other"}
    assert metrics.snapshot()["loray_requests_total other chat 404"] == len(sent) + 1000


def test_a_model_that_came_later_is_known_once_it_answers() -> None:
    metrics = Metrics(known=["a"])
    with metrics.request("chat", "late"):
        metrics.first_token("late", 0.1)
    assert metrics.snapshot()["loray_requests_total late chat 200"] == 1


def test_more_models_than_labels_share_one() -> None:
    names = [f"model-{number}" for number in range(1000)]
    metrics = Metrics(known=names)
    for name in names:
        metrics.tokens(name, 1, 1)
    assert len(labels(metrics)) == 129
    assert metrics.snapshot()["loray_tokens_total other prompt"] == 872


@pytest.mark.parametrize("name", ['quo"ted', "back\\slash", "two\nlines", "é", "a{b}=c,d", " "])
def test_a_known_name_comes_out_as_it_is(name: str) -> None:
    metrics = Metrics(known=[name])
    metrics.tokens(name, 3, 4)
    assert labels(metrics) == {name}


def test_what_is_rendered_is_what_was_counted() -> None:
    metrics = Metrics(known=["a"])
    with metrics.request("chat", "a"):
        metrics.tokens("a", 5, 7)
    text, content_type = metrics.render()
    assert content_type.startswith("text/plain; version=")
    names = {family.name for family in text_string_to_metric_families(text.decode())}
    assert all(name.startswith("loray_") for name in names)
    ours = {
        " ".join([name.split(" ")[0], *sorted(name.split(" ")[1:])]): value
        for name, value in metrics.snapshot().items()
    }
    assert parsed(metrics) == ours


def test_replicas_in_one_process_count_for_themselves() -> None:
    first, second = Metrics(known=["a"]), Metrics(known=["a"])
    first.tokens("a", 1, 1)
    assert "loray_tokens_total a prompt" not in second.snapshot()


def test_a_served_model_is_seen_in_all_that_is_counted(running: Running) -> None:
    service, metrics = running.replica.service, running.metrics
    chat: Any = [{"role": "user", "content": "Say red please"}]
    for model in (service.base.name, "team/first:v1", "team/first:v1"):
        running.client.chat.completions.create(
            model=model, messages=chat, temperature=0, max_tokens=4
        )
    refused = running.post("/v1/chat/completions", {"model": "nobody", "messages": chat})
    assert refused.status_code == 404
    engine, adapters = service.base.engine, service.adapters
    deadline = time.monotonic() + 30
    while engine.num_running:  # the last answer is told of before its row is empty
        assert time.monotonic() < deadline, "the engine does not come to rest"
        time.sleep(0.005)
    metrics.observe(service)
    found = metrics.snapshot()
    assert found["loray_requests_total team/first:v1 chat 200"] == 2
    assert found["loray_requests_total other chat 404"] == 1
    assert found["loray_tokens_total team/first:v1 prompt"] > 0
    assert found["loray_time_to_first_token_seconds_count team/first:v1"] == 2
    assert found["loray_batch_size_count"] > 0
    assert found["loray_inter_token_seconds_count"] > 0
    assert found["loray_running"] == found["loray_waiting"] == found["loray_kv_used_tokens"] == 0
    assert found["loray_kv_capacity_tokens"] == engine.limits.kv_tokens
    assert adapters is not None
    assert adapters.events.hits == 2
    cache = {name: value for name, value in found.items() if "loray_adapter_" in name}
    assert cache["loray_adapter_cache_total hits"] == 2
    assert cache["loray_adapter_cache_total misses"] == adapters.events.misses
    assert cache["loray_adapter_cache_total evictions"] == 0
    assert cache["loray_adapter_load_seconds_count"] == 1
    metrics.observe(service)
    assert cache.items() <= metrics.snapshot().items()  # what was read twice counts once


def test_the_text_comes_over_http_as_prometheus_reads_it(running: Running) -> None:
    answer = requests.get(f"{running.url}/metrics", timeout=30)
    assert answer.headers["content-type"].startswith("text/plain; version=")
    assert answer.headers["content-type"].count("charset") == 1
    families = {family.name: family for family in text_string_to_metric_families(answer.text)}
    kinds = {
        "loray_requests": "counter", "loray_tokens": "counter", "loray_adapter_cache": "counter",
        "loray_request_seconds": "histogram", "loray_inter_token_seconds": "histogram",
        "loray_time_to_first_token_seconds": "histogram", "loray_batch_size": "histogram",
        "loray_adapter_load_seconds": "histogram", "loray_running": "gauge",
        "loray_waiting": "gauge", "loray_kv_used_tokens": "gauge",
        "loray_kv_capacity_tokens": "gauge",
    }  # fmt: skip
    assert {name: families[name].type for name in kinds} == kinds
