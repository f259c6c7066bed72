"""Aliases of a served tiny model, over a real socket, with the stock client."""

import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import requests
from openai import OpenAI
from server import Running, serving, until
from test_training_adapter import make_adapter

import loray
from cluster import command
from cluster.registry import keys
from cluster.registry.keys import Rights
from cluster.registry.tables import Model

CHAT: Any = [{"role": "user", "content": "Say red please"}]
VERSIONS = ("v7", "v8", "v9")


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Iterator[Running]:
    directory = tmp_path_factory.mktemp("aliases")
    adapters = [
        {"name": name, "path": str(make_adapter(directory / name, tiny_base, seed=seed))}
        for seed, name in enumerate(VERSIONS, start=1)
    ]
    make_adapter(directory / "spare", tiny_base, seed=9)
    tuning = {"storage": str(directory / "runs")}
    with serving(directory, tiny_base, adapters=adapters, tuning=tuning) as server:
        with server.database.write() as session:  # a version that cannot be loaded
            session.add(
                Model(
                    name="ft:broken", project="default", job_id=None, base="llama", step=None,
                    path=str(directory / "nowhere"), created_at=1.0, deleted_at=None,
                )
            )  # fmt: skip
        yield server


@pytest.fixture
def server(running: Running) -> Iterator[Running]:
    """With no alias before and after."""
    yield running
    for row in running.aliases.book.list_("default"):
        running.client.delete(f"/aliases/{row.name}", cast_to=openai.BaseModel)


def put(
    server: Running, name: str = "bot", *, status: int = 200, guard: Any = None, **weights: float
) -> Any:
    targets = [{"model": model, "weight": weight} for model, weight in weights.items()]
    return put_these(server, targets, name, status=status, guard=guard)


def put_these(
    server: Running, targets: list[Any], name: str = "bot", *, status: int = 200, guard: Any = None
) -> Any:
    body = {"name": name, "targets": targets, "guard": guard}
    answer = server.post("/v1/aliases", body)
    assert answer.status_code == status, answer.text
    return answer.json()


def ask(server: Running, model: str = "bot", **fields: Any) -> Any:
    asked = {"messages": CHAT, "temperature": 0, "max_tokens": 8, **fields}
    return server.client.chat.completions.create(model=model, **asked)


def answered_by(server: Running, **fields: Any) -> str:
    raw = server.client.chat.completions.with_raw_response.create(
        model="bot", messages=CHAT, max_tokens=1, **fields
    )
    assert raw.parse().model == raw.headers["x-loray-model"]
    return raw.headers["x-loray-model"]


def look(server: Running, name: str = "bot") -> Any:
    return server.client.get(f"/aliases/{name}", cast_to=openai.BaseModel).model_dump()


def counts(server: Running) -> dict[str, tuple[int, int]]:
    return {row["model"]: (row["requests"], row["errors"]) for row in look(server)["targets"]}


def test_each_user_keeps_a_version_and_the_answer_says_which(server: Running) -> None:
    put(server, v7=50, v8=50)
    alias = server.aliases.find("default", "bot")
    assert alias is not None
    users = [f"user-{number}" for number in range(12)]
    found = [alias.choose(user) for user in users]
    for _ in range(2):
        assert [answered_by(server, user=user) for user in users] == found
    assert set(found) == {"v7", "v8"}
    header = {"x-loray-user": users[3]}
    assert answered_by(server, extra_headers=header) == found[3]
    assert answered_by(server, extra_headers=header, user=users[4]) == found[4]
    assert len({answered_by(server) for _ in range(3)}) == 1


def test_an_alias_answers_as_its_version_does(server: Running) -> None:
    put(server, v8=1)
    whole, direct = ask(server), ask(server, "v8")
    assert whole.choices[0].message.content == direct.choices[0].message.content
    assert whole.model == "v8"
    chunks = list(ask(server, stream=True))
    assert {chunk.model for chunk in chunks} == {"v8"}
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == direct.choices[0].message.content
    completed = server.client.completions.create(model="bot", prompt="red", max_tokens=2)
    assert completed.model == "v8"
    stream = server.client.completions.with_raw_response.create(
        model="bot", prompt="red", max_tokens=2, stream=True
    )
    assert stream.headers["x-loray-model"] == "v8"
    until(lambda: counts(server)["v8"][0] >= 3)


def test_names_clash_nowhere(server: Running, tiny_base: Path) -> None:
    base = server.replica.service.base.name
    put(server, v7=1)
    assert put(server, "v7", v8=1, status=409)["error"]["code"] == "name_taken"
    assert put(server, base, v8=1, status=409)["error"]["code"] == "name_taken"
    put(server, "ft:mine", v8=1, status=409)
    body = put(server, "other", bot=1, status=400)
    assert "is an alias" in body["error"]["message"]
    body = put(server, "other", v99=1, status=404)
    assert "`v99`" in body["error"]["message"]
    taken = server.post("/v1/adapters", {"name": "bot", "path": "spare"})
    assert (taken.status_code, taken.json()["error"]["code"]) == (409, "name_taken")
    with pytest.raises(openai.ConflictError):
        server.client.models.delete("v7")
    put(server, v8=1)
    assert "v7" in [model.id for model in server.client.models.list()]


@pytest.mark.parametrize(
    "targets",
    [
        [],
        [{"model": "v7", "weight": 0}],
        [{"model": "v7", "weight": -1}, {"model": "v8", "weight": 2}],
        [{"model": "v7", "weight": float("nan")}],
        [{"model": "v7", "weight": float("inf")}],
        [{"model": "v7", "weight": "1"}],
        [{"model": "v7", "weight": 1}, {"model": "v7", "weight": 1}],
        [{"model": "v7", "weight": 1, "is_shadow": True}],
        [{"model": "v7", "weight": 1, "role": "x"}],
        [{"model": f"v{number}", "weight": 1} for number in range(101)],
    ],
)
def test_targets_that_cannot_be_are_refused(server: Running, targets: list[Any]) -> None:
    body = json.dumps({"name": "bot", "targets": targets})  # json: NaN stays NaN
    answer = requests.post(f"{server.url}/v1/aliases", data=body, timeout=60)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["message"]


def test_going_back_under_traffic_fails_no_request(server: Running) -> None:
    put(server, v7=1)
    put(server, v7=20, v8=80)
    stop, failed, seen = threading.Event(), list[Exception](), Counter[str]()

    def traffic(worker: int) -> None:
        number = 0
        while not stop.is_set():
            number += 1
            try:
                answer = ask(server, user=f"{worker}-{number}", stream=number % 2 == 0)
                seen[answer.model if number % 2 else next(iter([*answer])).model] += 1
            except Exception as error:
                failed.append(error)

    threads = [threading.Thread(target=traffic, args=(worker,)) for worker in range(3)]
    for thread in threads:
        thread.start()
    until(lambda: seen["v8"] > 10)
    for _ in range(5):
        assert roll_back(server) == {"v7": 1}
        before = seen["v7"]
        until(lambda before=before: seen["v7"] > before + 5)
        put(server, v7=20, v8=80)
        before = seen["v8"]
        until(lambda before=before: seen["v8"] > before + 5)
    stop.set()
    for thread in threads:
        thread.join()
    assert failed == []


def roll_back(server: Running) -> dict[str, float]:
    answer = server.post("/v1/aliases/bot/rollback", {})
    assert answer.status_code == 200, answer.text
    return {row["model"]: row["weight"] for row in answer.json()["targets"]}


def test_a_version_that_fails_too_often_is_left_by_itself(server: Running) -> None:
    put(server, v7=1)
    guard = {"error_rate": 0.2, "min_requests": 10}
    set_ = put_these(
        server,
        [{"model": "v7", "weight": 50}, {"model": "ft:broken", "weight": 50}],
        guard=guard,
    )["revision"]
    deadline, number, failures = time.monotonic() + 60, 0, 0
    while look(server)["revision"] == set_:
        assert time.monotonic() < deadline
        number += 1
        try:
            ask(server, user=f"user-{number}", max_tokens=1)
        except openai.APIStatusError:
            failures += 1
    assert failures >= 10
    [newest, *_] = look(server)["changes"]
    assert (newest["by"], newest["restored"]) == ("loray", set_ - 1)
    assert "requests to ft:broken failed" in newest["reason"]
    for again in range(number):  # nobody fails any more
        assert answered_by(server, user=f"user-{again}") == "v7"
    assert look(server)["revision"] == set_ + 1


def test_what_clients_do_wrong_does_not_count(server: Running) -> None:
    put(server, guard={"error_rate": 0.0, "min_requests": 1}, v7=1)
    bad: list[dict[str, Any]] = [{"max_tokens": 10_000}, {"logit_bias": {"1": 1000}}]
    for fields in bad:
        with pytest.raises(openai.BadRequestError):
            ask(server, **fields)
    with pytest.raises(openai.APITimeoutError):  # gone in the middle
        ask(server, max_tokens=400, timeout=0.05)
    ask(server)
    until(lambda: counts(server)["v7"] == (1, 0))


def test_a_shadow_sees_requests_and_changes_no_answer(server: Running) -> None:
    put(server, v7=1)
    plain = ask(server, n=2, seed=3, temperature=1.0)
    put_these(server, [{"model": "v7", "weight": 1}, {"model": "v9", "is_shadow": True}])

    def is_counted() -> bool:
        whole = ask(server, n=2, seed=3, temperature=1.0)
        assert whole.model == "v7"
        texts = [choice.message.content for choice in whole.choices]
        assert texts == [choice.message.content for choice in plain.choices]
        return counts(server)["v9"][0] >= 2

    until(is_counted)
    [real, shadow] = look(server)["targets"]
    assert real["requests"] > 0
    assert (shadow["is_shadow"], shadow["errors"]) == (True, 0)
    assert shadow["mean_seconds"] > 0


def test_a_shadow_that_fails_fails_nobody(server: Running) -> None:
    put(server, guard={"error_rate": 0.0, "min_requests": 1}, v7=1)
    set_ = put_these(
        server,
        [{"model": "v7", "weight": 1}, {"model": "ft:broken", "is_shadow": True}],
        guard={"error_rate": 0.0, "min_requests": 1},
    )["revision"]

    def is_counted() -> bool:
        assert ask(server).model == "v7"
        return counts(server)["ft:broken"][1] >= 2

    until(is_counted)
    assert look(server)["revision"] == set_


def test_nothing_is_copied_while_the_engine_is_busy(server: Running) -> None:
    put_these(server, [{"model": "v7", "weight": 1}, {"model": "v9", "is_shadow": True}])
    stop = threading.Event()

    def occupy() -> None:
        while not stop.is_set():
            ask(server, "v8", n=4, max_tokens=200, logit_bias={"65": 100})

    thread = threading.Thread(target=occupy)
    thread.start()
    engine = server.replica.service.base.engine
    until(lambda: engine.num_running >= 3)
    for number in range(5):
        ask(server, max_tokens=2, user=str(number))
    stop.set()
    thread.join()
    until(lambda: counts(server)["v7"][0] == 5)
    assert counts(server)["v9"] == (0, 0)


def test_a_key_opens_an_alias_by_its_name_or_by_all_of_its_versions(
    tmp_path: Path, tiny_base: Path
) -> None:
    adapters = [
        {"name": name, "path": str(make_adapter(tmp_path / name, tiny_base, seed=seed))}
        for seed, name in enumerate(VERSIONS, start=1)
    ]
    with serving(tmp_path, tiny_base, adapters=adapters) as server:

        def key(name: str, *models: str, **rights: Any) -> OpenAI:
            whole = Rights(name=name, models=models or None, **rights)
            made = keys.create(server.database, whole, now=time.time())
            return server.client.with_options(api_key=made)

        def may(client: OpenAI) -> bool:
            try:
                client.chat.completions.create(model="bot", messages=CHAT, max_tokens=1)
            except openai.NotFoundError as error:
                return error.code != "model_not_found"
            return True

        boss = key("boss", scopes=("admin",))
        body = {
            "name": "bot",
            "targets": [
                {"model": "v7", "weight": 1},
                {"model": "v8", "weight": 1},
                {"model": "v9", "is_shadow": True},
            ],
        }
        boss.post("/aliases", body=body, cast_to=openai.BaseModel)
        assert may(key("all"))
        assert may(key("alias", "bot"))
        assert may(key("versions", "v7", "v8"))
        assert not may(key("one", "v7"))
        assert not may(key("foreign", project="blue"))
        with pytest.raises(openai.PermissionDeniedError):
            key("plain").post("/aliases", body=body, cast_to=openai.BaseModel)
        other = key("other", project="blue", scopes=("admin",))
        for act in (other.get, other.delete):
            with pytest.raises(openai.NotFoundError):
                act("/aliases/bot", cast_to=openai.BaseModel)
        with pytest.raises(openai.NotFoundError):
            other.post("/aliases/bot/rollback", body={}, cast_to=openai.BaseModel)


def test_the_command_sets_shows_and_rolls_back(
    server: Running, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")

    def call(*words: str) -> tuple[int, str]:
        status = command.run(loray.app, ("alias", *words, "--url", server.url))
        said = capsys.readouterr()
        return status, said.out + said.err

    assert call("set", "support-bot", "v7=1")[0] == 0
    guard = ("--guard-error-rate", "0.05", "--guard-min-requests", "50")
    status, said = call("set", "support-bot", "v7=90", "v8=10", "--shadow", "v9", *guard)
    assert status == 0
    wanted = (
        "support-bot is v7=90 v8=10 v9=shadow (revision 2), guarded: 5.00% of at least 50 requests"
    )
    assert said.strip() == wanted
    assert "v7=90 v8=10 v9=shadow" in call("list")[1]
    assert "1: v7=1, by nobody: set" in call("show", "support-bot")[1]
    assert (
        call("rollback", "support-bot", "--reason", "bad tone")[1].strip()
        == "support-bot is v7=1 (revision 3)"
    )
    assert "by nobody: bad tone" in call("show", "support-bot")[1]
    assert call("remove", "support-bot")[0] == 0
    for words in (
        ("show", "support-bot"),
        ("set", "support-bot", "v7"),
        ("set", "support-bot", "v7=x"),
        ("set", "v7", "v8=1"),
    ):
        status, said = call(*words)
        assert status != 0
        assert "Traceback" not in said
