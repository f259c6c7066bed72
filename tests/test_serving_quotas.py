"""Quotas: what a key may have, over all replicas, and what it is told."""

import asyncio
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
from server import Running, serving, until
from sqlalchemy import select, text

from cluster.registry import database, keys
from cluster.registry.database import Database
from cluster.registry.keys import Rights
from cluster.registry.tables import Usage
from serving.access import Caller
from serving.problems import ApiError
from serving.quotas import Quotas, duration

NOON = 1_800_014_400.0


class Clock:
    def __init__(self, now: float = NOON) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def caller(key_id: str = "0a0a0a0a", **limits: int) -> Caller:
    return Caller(key_id=key_id, **limits)  # pyright: ignore[reportArgumentType]


def refusal(quotas: Quotas, who: Caller) -> ApiError:
    with pytest.raises(ApiError) as raised:
        quotas.take(who)
    assert (raised.value.status, raised.value.code) == (429, "rate_limit_exceeded")
    return raised.value


def sync(*replicas: Quotas) -> None:
    async def all_() -> None:
        for quotas in replicas:
            await quotas.sync()

    asyncio.run(all_())


def used(registry: Database) -> dict[tuple[str, str, int], int]:
    with registry.read() as session:
        rows = session.scalars(select(Usage))
        return {(row.key_id, row.kind, row.window): row.used for row in rows}


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0, "1s"), (0.2, "1s"), (1, "1s"), (59.01, "1m0s"), (60, "1m0s"), (360, "6m0s"),
        (3599, "59m59s"), (3600, "1h0m0s"), (86399, "23h59m59s"),
    ],
)  # fmt: skip
def test_durations_are_written_as_openai_does(seconds: float, shown: str) -> None:
    assert duration(seconds) == shown


def test_requests_of_a_minute_are_counted_and_come_back_with_the_next(registry: Database) -> None:
    clock = Clock(NOON + 20)
    quotas = Quotas(registry, clock=clock)
    who = caller(requests_per_minute=3)
    for left in (2, 1, 0):
        quotas.take(who)
        assert quotas.headers(who) == {
            "x-ratelimit-limit-requests": "3",
            "x-ratelimit-remaining-requests": str(left),
            "x-ratelimit-reset-requests": "40s",
        }
    error = refusal(quotas, who)
    assert (error.type, error.retry_after_s) == ("requests", 40)
    assert error.headers["x-ratelimit-remaining-requests"] == "0"
    quotas.take(caller("0b0b0b0b", requests_per_minute=1))
    clock.now = NOON + 60
    quotas.take(who)


def test_tokens_of_a_day_are_counted_when_they_are_spent(registry: Database) -> None:
    clock = Clock()
    quotas = Quotas(registry, clock=clock)
    who = caller(tokens_per_day=100)
    for tokens in (60, 50):
        quotas.take(who)
        quotas.spend(who.key_id, tokens)
    assert quotas.headers(who)["x-ratelimit-remaining-tokens"] == "0"
    error = refusal(quotas, who)
    assert (error.type, error.retry_after_s) == ("tokens", 43200)
    assert error.headers["x-ratelimit-reset-tokens"] == "12h0m0s"
    clock.now += 86400
    quotas.take(who)


def test_a_request_that_is_refused_is_not_counted(registry: Database) -> None:
    quotas = Quotas(registry, clock=Clock())
    who = caller(requests_per_minute=5, tokens_per_day=10)
    quotas.take(who)
    quotas.spend(who.key_id, 10)
    refusal(quotas, who)
    assert quotas.headers(who)["x-ratelimit-remaining-requests"] == "4"


def test_a_key_without_quotas_is_not_counted(registry: Database) -> None:
    quotas = Quotas(registry, clock=Clock())
    for _ in range(100):
        quotas.take(caller())
        quotas.spend("0a0a0a0a", 1000)
    assert quotas.headers(caller()) == {}
    sync(quotas)
    assert used(registry) == {}


def test_replicas_count_together(registry: Database, registry_url: str) -> None:
    clock = Clock()
    other = database.open_(registry_url)
    replicas = [Quotas(one, clock=clock) for one in (registry, other)]
    who = caller(requests_per_minute=10, tokens_per_day=1000)
    for quotas in replicas:
        for _ in range(4):
            quotas.take(who)
            quotas.spend(who.key_id, 30)
    sync(*replicas, *replicas)  # the second time nothing is new
    assert set(used(registry).values()) == {8, 240}
    for quotas in replicas:
        quotas.take(who)  # the ninth of both, but each knows of eight
    sync(replicas[0])
    assert replicas[0].headers(who)["x-ratelimit-remaining-requests"] == "1"
    sync(replicas[1])
    refusal(replicas[1], who)
    sync(replicas[0])
    quotas = Quotas(registry, clock=clock)
    quotas.headers(who)
    sync(quotas)  # a replica that has just come
    refusal(quotas, who)
    other.close()


def test_what_goes_beyond_is_what_the_others_let_through_before_they_read(
    registry: Database, registry_url: str
) -> None:
    clock = Clock()
    opened = [database.open_(registry_url) for _ in range(3)]
    replicas = [Quotas(one, clock=clock) for one in opened]
    who, granted = caller(requests_per_minute=100), 0
    for number in range(3000):
        quotas = replicas[number % 3]
        try:
            quotas.take(who)
            granted += 1
        except ApiError:
            pass
        if number % 30 == 29:  # "a second"
            sync(*replicas)
    assert 100 <= granted <= 130
    for one in opened:
        one.close()


def test_while_the_registry_is_away_each_replica_counts_by_itself(registry: Database) -> None:
    quotas = Quotas(registry, clock=Clock())
    who = caller(requests_per_minute=4)
    quotas.take(who)
    sync(quotas)
    with registry.write() as session:
        session.execute(text("ALTER TABLE usage RENAME TO away"))
    for _ in range(3):
        quotas.take(who)
        sync(quotas)
    refusal(quotas, who)
    with registry.write() as session:
        session.execute(text("ALTER TABLE away RENAME TO usage"))
    sync(quotas)
    assert list(used(registry).values()) == [4]
    refusal(quotas, who)


def test_counts_of_past_windows_are_dropped(registry: Database) -> None:
    clock = Clock()
    quotas = Quotas(registry, clock=clock)
    for number in range(50):
        quotas.take(caller(f"{number:08x}", requests_per_minute=1, tokens_per_day=1))
    sync(quotas)
    clock.now += 4 * 86400
    quotas.take(caller(requests_per_minute=1))
    sync(quotas)
    assert len(quotas._counts) == 1
    assert len(used(registry)) == 1


def test_a_new_count_is_shared_at_once_and_all_of_them_at_the_end(registry: Database) -> None:
    quotas = Quotas(registry, clock=Clock())

    async def run() -> None:
        task = asyncio.create_task(quotas.follow())
        quotas.take(caller(requests_per_minute=9))
        deadline = time.monotonic() + 5
        while not used(registry):
            assert time.monotonic() < deadline
            await asyncio.sleep(0.01)
        quotas.take(caller(requests_per_minute=9))
        quotas.end()
        await task

    asyncio.run(run())
    assert list(used(registry).values()) == [2]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Iterator[Running]:
    with serving(tmp_path_factory.mktemp("quotas"), tiny_base) as server:
        yield server


def posts(running: Running, **quotas: int) -> Iterator[requests.Response]:
    """Requests of each kind with a new key, over and over; each is answered with 4 tokens."""
    key = keys.create(running.database, Rights(name="ada", **quotas), now=time.time())
    served = running.replica.service.base
    letter = str(served.tokenizer("A").input_ids[0])
    fields = {"model": served.name, "max_tokens": 4, "logit_bias": {letter: 100}}
    chat = {"messages": [{"role": "user", "content": "Say red"}]}
    while True:
        for path, asked in (("chat/completions", chat), ("completions", {"prompt": "Say red"})):
            for stream in (False, True):
                body = {**fields, **asked, "stream": stream}
                yield running.post(f"/v1/{path}", body, headers={"Authorization": f"Bearer {key}"})


def test_every_answer_says_what_is_left(running: Running) -> None:
    answers = posts(running, requests_per_minute=1000, tokens_per_day=10**6)
    tokens = [10**6]
    for number, answer in zip(range(1, 5), answers, strict=False):
        assert answer.status_code == 200, answer.text
        left = {
            kind: answer.headers[f"x-ratelimit-remaining-{kind}"] for kind in ("requests", "tokens")
        }
        assert 1000 - number <= int(left["requests"]) < 1000
        tokens.append(int(left["tokens"]))
        for kind, limit in (("requests", "1000"), ("tokens", "1000000")):
            assert answer.headers[f"x-ratelimit-limit-{kind}"] == limit
            reset = answer.headers[f"x-ratelimit-reset-{kind}"]
            assert re.fullmatch(r"((\d+h)?\d+m)?\d+s", reset)
    assert tokens == sorted(tokens, reverse=True)
    assert tokens[-1] < tokens[1] < 10**6


@pytest.mark.parametrize("kind", ["requests", "tokens"])
def test_what_is_too_much_is_told_when_to_come_again(running: Running, kind: str) -> None:
    quotas = {"requests": {"requests_per_minute": 2}, "tokens": {"tokens_per_day": 20}}[kind]
    refused = 0
    deadline = time.monotonic() + 60
    for answer in posts(running, **quotas):
        assert time.monotonic() < deadline
        if answer.status_code == 200:  # a minute may end at any time
            continue
        assert answer.status_code == 429
        error = answer.json()["error"]
        assert (error["type"], error["code"]) == (kind, "rate_limit_exceeded")
        assert answer.headers[f"x-ratelimit-remaining-{kind}"] == "0"
        assert re.fullmatch(r"((\d+h)?\d+m)?\d+s", answer.headers[f"x-ratelimit-reset-{kind}"])
        assert 1 <= int(answer.headers["retry-after"]) <= 3600
        refused += 1
        if refused == 4:
            break


def test_tokens_of_clients_that_go_away_are_counted(running: Running) -> None:
    key = keys.create(running.database, Rights(name="ada", tokens_per_day=10**6), now=time.time())
    letter = str(running.replica.service.base.tokenizer("A").input_ids[0])
    engine = running.replica.service.base.engine
    body = {
        "model": running.replica.service.base.name, "prompt": "abc", "max_tokens": 450,
        "logit_bias": {letter: 100}, "stream": True,
    }  # fmt: skip
    headers = {"Authorization": f"Bearer {key}"}
    url = f"{running.url}/v1/completions"
    with requests.post(url, json=body, headers=headers, stream=True, timeout=30) as answer:
        next(answer.iter_lines())
    until(lambda: engine.num_running == 0)
    found: list[int] = []

    def is_counted() -> bool:
        found[:] = [n for (id_, kind, _), n in used(running.database).items() if id_ in key]
        return bool(found) and found[0] > 3

    until(is_counted)
    assert found[0] < 454
