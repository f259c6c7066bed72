"""What people say to a server, what it answers, and the secrets of keys stand nowhere but there."""

import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from keys_file import add_key
from server import Running, serving
from test_training_adapter import make_adapter

from cluster.registry import keys
from cluster.registry.keys import Rights
from cluster.registry.tables import Table

ASKED = "CANARYASKED"
ANSWERED = "K"
"""A letter that every answer is made of, over and over."""
ANSWER = ANSWERED * 40


@pytest.fixture
def all_logs(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Every log line of every library, however small."""
    with caplog.at_level(logging.DEBUG):
        for name in ("urllib3", "asyncio"):  # of this test's own client
            logging.getLogger(name).setLevel(logging.INFO)
        yield


def secret_of(key: str) -> str:
    return key.split("-", 3)[3]


def talk(running: Running, key: str) -> list[requests.Response]:
    """Good requests of each kind, and requests that go wrong in many ways."""
    base = running.replica.service.base
    letter = str(base.tokenizer(ANSWERED).input_ids[0])
    fields: dict[str, Any] = {"model": base.name, "max_tokens": 40, "logit_bias": {letter: 100}}
    chat = [{"role": "user", "content": ASKED}]
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": ASKED}}}
    headers = {"Authorization": f"Bearer {key}"}
    good = [
        ("chat/completions", {**fields, "messages": chat, "user": ASKED, "metadata": {"a": ASKED}}),
        ("chat/completions", {**fields, "messages": chat, "stream": True}),
        ("completions", {**fields, "prompt": ASKED}),
        ("completions", {**fields, "prompt": [ASKED, ASKED], "stream": True, "echo": True}),
    ]
    for path, body in good:
        answer = running.post(f"/v1/{path}", body, headers=headers)
        assert answer.status_code == 200, answer.text
        assert answer.text.count(ANSWERED) >= 40
    bad: list[tuple[str, Any]] = [
        ("chat/completions", {**fields, "messages": [{"role": "user", "content": ASKED * 500}]}),
        ("chat/completions", {**fields, "messages": [{"role": "user", "content": [ASKED]}]}),
        ("chat/completions", {**fields, "messages": [{"role": "user", "content": {"a": ASKED}}]}),
        ("chat/completions", {**fields, "messages": [{"role": "tool", "content": ASKED}]}),
        ("chat/completions", {**fields, "messages": chat, "tools": [tool]}),
        ("completions", {**fields, "prompt": ASKED * 500}),
        ("completions", {**fields, "prompt": ASKED, "max_tokens": 10**6}),
        ("completions", {**fields, "prompt": ASKED, "model": "nobody"}),
        ("adapters", {"name": "new", "path": "nowhere"}),
    ]
    answers = [running.post(f"/v1/{path}", body, headers=headers) for path, body in bad]
    raw = f'{{"model": "{base.name}", "messages": [{{"content": "{ASKED}"'
    url = f"{running.url}/v1/chat/completions"
    json_ = {**headers, "Content-Type": "application/json"}
    answers.append(requests.post(url, data=raw, headers=json_, timeout=30))
    answers.append(requests.post(url, data=ASKED.encode() + b"\xff", headers=json_, timeout=30))
    for given in (f"{key}x", f"{key[:-1]}", f"sk-loray-00000000-{secret_of(key)}"):
        wrong = {"Authorization": f"Bearer {given}"}
        answers.append(running.post("/v1/completions", {"prompt": ASKED}, headers=wrong))
    answers.append(running.post("/v1/completions", {"prompt": ASKED}))
    assert all(answer.status_code >= 400 for answer in answers), answers
    return answers


def written(directory: Path) -> dict[Path, bytes]:
    """Every file of a server, but the weights and the tokenizer that it was given."""
    return {
        path: path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file() and path.suffix != ".safetensors"
    }


def test_what_was_said_and_the_secrets_of_keys_are_written_nowhere(
    tmp_path: Path,
    tiny_base: Path,
    registry_url: str,
    all_logs: None,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    make_adapter(tmp_path / "first", tiny_base, seed=1)
    static = add_key(tmp_path / "keys.yaml", "static", roles=["admin"])
    with serving(
        tmp_path, tiny_base, keys=tmp_path / "keys.yaml", database=registry_url
    ) as running:
        rights = Rights(
            name="ada", scopes=("admin",), requests_per_minute=1000, tokens_per_day=10**6
        )
        made = keys.create(running.database, rights, now=time.time())
        errors = [*talk(running, made), *talk(running, static)]
        headers = {"Authorization": f"Bearer {made}"}
        assert running.post("/v1/adapters", {"name": "first", "path": "first"}, headers=headers).ok
        rotated = keys.rotate(running.database, made.split("-")[2], now=time.time(), grace_s=60)
        errors += talk(running, rotated)
        running.replica.service.base.engine._bare.forward = None  # pyright: ignore
        broken = {"model": running.replica.service.base.name, "prompt": ASKED}
        errors.append(running.post("/v1/completions", broken, headers=headers))
        assert errors[-1].status_code >= 500
        metrics = requests.get(f"{running.url}/metrics", headers=headers, timeout=30).text
        assert "loray_tokens_total" in metrics
        rows = dumped(running)
    assert any("served.json" in path.name for path in written(tmp_path))
    assert len(rows) > 3
    places = {
        "logs": caplog.text,
        "output": "".join(capfd.readouterr()),
        "metrics": metrics,
        "rows": "\n".join(rows),
        **{f"error {n}": f"{e.headers} {e.text}" for n, e in enumerate(errors)},
        **{str(path): text.decode(errors="replace") for path, text in written(tmp_path).items()},
    }
    for where, text in places.items():
        assert ANSWER not in text, where
        for key in (static, made, rotated):
            assert secret_of(key)[:16] not in text, where
            assert secret_of(key)[-16:] not in text, where
        assert ASKED not in text, where


def dumped(running: Running) -> list[str]:
    """Every row of every table."""
    with running.database.engine.connect() as connection:
        return [
            f"{table.name} {tuple(row)}"
            for table in Table.metadata.sorted_tables
            for row in connection.execute(table.select())
        ]
