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


def post_any(server: Running, path: str, body: Any) -> requests.Response:
    """With what JSON does not have: NaN stays NaN."""
    headers = {"Content-Type": "application/json"}
    url = f"{server.url}{path}"
    return requests.post(url, data=json.dumps(body), headers=headers, timeout=60)


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
    answer = post_any(server, "/v1/aliases", {"name": "bot", "targets": targets})
    assert answer.status_code == 400, answer.text
    assert "targets" in answer.json()["error"]["message"]


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


def quality(max_fall: float = 0.02, **more: Any) -> Any:
    return {"evaluation": {"metric": "quality", "better": "higher", "max_fall": max_fall}, **more}


def test_a_version_whose_score_falls_answers_no_more(server: Running) -> None:
    put(server, guard=quality(), v7=1)
    put(server, guard=quality(error_rate=0.5), v8=1)
    assert answered_by(server) == "v8"

    def tell(model: str, value: float) -> Any:
        body = {"model": model, "metric": "quality", "value": value}
        answer = server.post("/v1/aliases/bot/scores", body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    said = tell("v7", 0.9)
    assert (said["targets"][0]["model"], said["targets"][0]["score"]) == ("v8", None)
    assert said["guard"]["evaluation"] == quality()["evaluation"]
    assert tell("v8", 0.89)["targets"][0]["score"] == 0.89
    revision = said["revision"]
    for _ in range(2):  # told twice, it goes back once
        assert tell("v8", 0.5)["revision"] == revision + 1
        assert answered_by(server) == "v7"
    [newest, *_] = look(server)["changes"]
    assert (newest["by"], newest["restored"]) == ("loray", revision - 1)
    assert newest["reason"].startswith("quality of v8 is 0.5, 0.4 worse than the 0.9 of v7")
    body = put(server, guard=quality(), v7=90, v8=10, status=409)["error"]
    assert body["code"] == "evaluation_failed"
    assert "loray alias evaluate" in body["message"]
    assert answered_by(server) == "v7"


@pytest.mark.parametrize(
    ("fields", "status", "words"),
    [
        ({"value": float("nan")}, 400, "value"),
        ({"value": float("inf")}, 400, "value"),
        ({"value": "0.5"}, 400, "value"),
        ({"value": None}, 400, "value"),
        ({"value": True}, 400, "value"),
        ({"metric": "loss"}, 400, "its guards name quality"),
        ({"metric": ""}, 400, "metric"),
        ({"metric": "a\0"}, 400, "metric"),
        ({"metric": "x" * 65}, 400, "metric"),
        ({"model": "v99"}, 404, "`v99`"),
        ({"model": "a\0"}, 404, "model"),
        ({"model": "bot"}, 400, "is an alias"),
        ({"revision": 1}, 400, "Extra inputs"),
    ],
)
def test_scores_that_cannot_be_are_refused(
    server: Running, fields: dict[str, Any], status: int, words: str
) -> None:
    put(server, guard=quality(), v7=1)
    put(server, guard=quality(), v8=1)
    body = {"model": "v8", "metric": "quality", "value": 0.5, **fields}
    answer = post_any(server, "/v1/aliases/bot/scores", body)
    assert answer.status_code == status, answer.text
    assert words in answer.json()["error"]["message"]
    assert [row["score"] for row in look(server)["targets"]] == [None]


@pytest.mark.parametrize(
    "guard",
    [
        {},
        {"min_requests": 5},
        {"evaluation": None},
        {"evaluation": {"metric": "loss", "max_fall": 0.1}},
        {"evaluation": {"metric": "loss", "better": "more", "max_fall": 0.1}},
        {"evaluation": {"metric": "loss", "better": "lower", "max_fall": -0.1}},
        {"evaluation": {"metric": "loss", "better": "lower", "max_fall": float("nan")}},
        {"evaluation": {"metric": "a b", "better": "lower", "max_fall": 0.1}},
        {"evaluation": {"metric": "loss", "better": "lower", "max_fall": 0.1, "n": 1}},
    ],
)
def test_guards_that_cannot_be_are_refused(server: Running, guard: dict[str, Any]) -> None:
    body = {"name": "bot", "targets": [{"model": "v7", "weight": 1}], "guard": guard}
    answer = post_any(server, "/v1/aliases", body)
    assert answer.status_code == 400, answer.text
    assert "guard" in answer.json()["error"]["message"]


@pytest.mark.parametrize("reason", ["a\0", "\ud800", "", "x" * 513])
def test_reasons_that_no_registry_keeps_are_refused(server: Running, reason: str) -> None:
    put(server, v7=1)
    put(server, v8=1)
    answer = post_any(server, "/v1/aliases/bot/rollback", {"reason": reason})
    assert answer.status_code == 400, answer.text
    assert "reason" in answer.json()["error"]["message"]
    assert answered_by(server) == "v8"


def test_who_lists_models_finds_aliases(server: Running) -> None:
    put(server, v7=50, v8=50, v9=0)
    listed = {model.id: model for model in server.client.models.list()}
    assert {"bot", *VERSIONS} <= set(listed)
    found = listed["bot"]
    assert (found.object, found.owned_by) == ("model", "default")
    assert abs(found.created - time.time()) < 60
    assert found.model_extra == {"root": "bot", "parent": None, "alias": {"versions": ["v7", "v8"]}}
    assert server.client.models.retrieve("bot") == found
    assert "alias" not in (listed["v7"].model_extra or {})
    with pytest.raises(openai.BadRequestError, match="loray alias remove"):
        server.client.models.delete("bot")
    assert answered_by(server) in ("v7", "v8")
    server.client.delete("/aliases/bot", cast_to=openai.BaseModel)
    assert "bot" not in [model.id for model in server.client.models.list()]
    for act in (server.client.models.retrieve, server.client.models.delete):
        with pytest.raises(openai.NotFoundError):
            act("bot")


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
            return "bot" in [model.id for model in client.models.list()]

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
        strangers = [key("one", "v7"), key("foreign", project="blue")]
        for client in strangers:
            assert not may(client)
            assert "bot" not in [model.id for model in client.models.list()]
            with pytest.raises(openai.NotFoundError):
                client.models.retrieve("bot")
        with pytest.raises(openai.PermissionDeniedError):
            key("plain").post("/aliases", body=body, cast_to=openai.BaseModel)
        score = {"model": "v8", "metric": "quality", "value": 0.1}
        for name, rights in (("tuner", {"scopes": ("infer", "tune")}), ("user", {})):
            with pytest.raises(openai.PermissionDeniedError):
                key(name, **rights).post(
                    "/aliases/bot/scores", body=score, cast_to=openai.BaseModel
                )
        other = key("other", project="blue", scopes=("admin",))
        for act in (other.get, other.delete):
            with pytest.raises(openai.NotFoundError):
                act("/aliases/bot", cast_to=openai.BaseModel)
        for path, sent in (("rollback", {}), ("scores", score)):
            with pytest.raises(openai.NotFoundError):
                other.post(f"/aliases/bot/{path}", body=sent, cast_to=openai.BaseModel)
        for client in (other, *strangers):  # nor is it said that there is one
            with pytest.raises(openai.APIStatusError) as raised:
                client.models.delete("bot")
            assert raised.value.status_code in (403, 404)


def test_the_command_sets_shows_and_rolls_back(
    server: Running,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
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
    guard = (
        "--guard-metric",
        "exact_match",
        "--guard-better",
        "higher",
        "--guard-max-fall",
        "0.02",
    )
    guarded = ", guarded: exact_match at most 0.02 worse than before"
    said = call("set", "support-bot", "v7=1", *guard)[1]
    assert said.strip() == f"support-bot is v7=1 (revision 4){guarded}"
    assert call("evaluate", "support-bot", "v7", "exact_match=0.9")[0] == 0
    call("set", "support-bot", "v7=90", "v8=10", *guard)
    report = tmp_path / "report.json"
    estimate = {"value": 0.5, "low": 0.4, "high": 0.6, "n": 40}
    metrics = {"loss": {**estimate, "value": 1.5}, "exact_match": estimate}
    report.write_text(f"{json.dumps({'metrics': metrics})}\n")
    status, said = call("evaluate", "support-bot", "v8", "--report", str(report))
    assert status == 0
    reason = "exact_match of v8 is 0.5, 0.4 worse than the 0.9 of v7; the guard allows 0.02"
    assert said.splitlines() == [
        f"support-bot is v7=1 (revision 6){guarded}", f"went back: {reason}",
    ]  # fmt: skip
    shown = call("show", "support-bot")[1]
    assert f"6: v7=1 (revision 4), by loray: {reason}" in shown
    assert "0.9" in shown
    report.write_text('{"metrics": {"loss": {"value": 1}}}')
    for words, expected in (
        (("--report", str(report)), "no finite value of 'exact_match'"),
        (("--report", str(tmp_path / "nowhere")), "cannot be read"),
        (("--report", str(report), "exact_match=1"), "not both"),
        ((), "not both"),
        (("exact_match",), "is not METRIC=VALUE"),
        (("exact_match=nan",), "is not METRIC=VALUE"),
        (("=1",), "is not METRIC=VALUE"),
        (("loss=1",), "its guards name exact_match"),
    ):
        status, said = call("evaluate", "support-bot", "v8", *words)
        assert status != 0
        assert expected in " ".join(said.split())
        assert "Traceback" not in said
    for content in (
        "",
        "null",
        "[1]",
        "{",
        '{"metrics": {"exact_match": {"value": 1%s}}}' % ("0" * 400),
    ):
        report.write_text(content)
        status, said = call("evaluate", "support-bot", "v8", "--report", str(report))
        assert status != 0
        assert "no finite value" in " ".join(said.split())
    status, said = call("set", "support-bot", "v7=1", "--guard-metric", "loss")
    assert status != 0
    assert "--guard-better and --guard-max-fall" in " ".join(said.split())
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
