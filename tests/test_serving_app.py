"""The doors to serving: `python -m serving` under Ray Serve, `loray adapters`, `loray keys`."""

import os
import shutil
import signal
import socket
import time
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml
from keys_file import add_key
from local_cluster import free_port
from openai import AuthenticationError, NotFoundError, OpenAI
from postgres import PostgresServer
from processes import call, finish, start
from test_training_adapter import make_adapter

from cluster.config import build
from cluster.errors import ConfigError
from cluster.registry import database
from serving import config
from serving.config import ServeRecipe

CHAT: Any = [{"role": "user", "content": "Say red please"}]
SECRET_URL = "postgresql://me:secret@127.0.0.1:1/x?sslpassword=secret"


def write(directory: Path, base: Path, **sections: Any) -> tuple[Path, str]:
    """A serving file, and where it answers."""
    port = free_port()
    tree = {
        "model": {"base": str(base), "quantization": "none"},
        "adapters_root": str(directory),
        "http": {"port": port},
        "limits": {"rows": 4, "context_tokens": 256, "kv_tokens": 1024, "prefix_tokens": 256},
        **sections,
    }
    path = directory / "serve.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path, f"http://127.0.0.1:{port}"


def made(directory: Path, path: Path, *words: str) -> str:
    """A key of a serving file."""
    status, out, err = call(["loray", "keys", "create", path.name, *words], directory)
    assert status == 0, err
    return out.strip()


def wait_for(url: str, process: Any) -> None:
    deadline = time.monotonic() + 120
    while True:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, "the server did not start"
        try:
            if requests.get(url, timeout=5).ok:
                return
        except requests.RequestException:
            time.sleep(0.1)


@pytest.mark.ray
def test_a_server_under_ray_serve_answers_changes_adapters_and_ends_cleanly(
    tmp_path: Path, tiny_base: Path
) -> None:
    make_adapter(tmp_path / "first", tiny_base, seed=1)
    make_adapter(tmp_path / "second", tiny_base, seed=2)
    secret = add_key(tmp_path / "keys.yaml", "boss", roles=["admin"])
    path, url = write(
        tmp_path,
        tiny_base,
        keys_file=str(tmp_path / "keys.yaml"),
        adapters=[{"name": "first", "path": str(tmp_path / "first")}],
    )
    guest = made(tmp_path, path, "guest", "--model", "first")
    process = start(["serving", path.name], tmp_path)
    try:
        wait_for(f"{url}/healthz", process)
        admin = OpenAI(base_url=f"{url}/v1", api_key=secret, max_retries=0)

        def ask(model: str, client: OpenAI = admin) -> str:
            answer = client.chat.completions.create(
                model=model, messages=CHAT, temperature=0, max_tokens=8
            )
            return answer.choices[0].message.content or ""

        texts = {model.id: ask(model.id) for model in admin.models.list()}
        assert len(texts) == len(set(texts.values())) == 2
        chunks = admin.chat.completions.create(
            model="first", messages=CHAT, temperature=0, max_tokens=8, stream=True
        )
        assert "".join(c.choices[0].delta.content or "" for c in chunks) == texts["first"]
        words = ["--url", url, "--key", secret]
        status, _, err = call(["loray", "adapters", "add", "second", "second", *words], tmp_path)
        assert status == 0, err
        live = ask("second")
        assert live not in texts.values()
        status, _, err = call(["loray", "adapters", "switch", "second", "merged", *words], tmp_path)
        assert status == 0, err
        assert ask("second") == live
        status, out, err = call(["loray", "adapters", "list", *words], tmp_path)
        assert status == 0, err
        assert "merged" in out
        status, _, err = call(["loray", "adapters", "add", "bad", "../etc", *words], tmp_path)
        assert status == 1
        assert "inside" in err
        status, _, err = call(["loray", "adapters", "remove", "second", *words], tmp_path)
        assert status == 0, err
        other = OpenAI(base_url=f"{url}/v1", api_key=guest, max_retries=0)
        assert ask("first", other) == texts["first"]
        assert [model.id for model in other.models.list()] == ["first"]
        with pytest.raises(NotFoundError):
            ask(tiny_base.name, other)
        nobody = OpenAI(base_url=f"{url}/v1", api_key="sk-loray-00000000-x", max_retries=0)
        with pytest.raises(AuthenticationError):
            ask("first", nobody)
        status, _, err = call(["loray", "keys", "revoke", path.name, guest.split("-")[2]], tmp_path)
        assert status == 0, err
        deadline = time.monotonic() + 10
        headers = {"Authorization": f"Bearer {guest}"}
        while requests.get(f"{url}/v1/models", headers=headers, timeout=5).status_code != 401:
            assert time.monotonic() < deadline
    finally:
        os.kill(process.pid, signal.SIGINT)
        status, out, err = finish(process)
    assert status == 0, err
    assert secret not in out + err
    assert "no key was ever made" not in err


@pytest.mark.ray
def test_a_server_that_is_told_to_stop_ends_its_answers_first(
    tmp_path: Path, tiny_base: Path
) -> None:
    limits = {"rows": 4, "context_tokens": 2048, "kv_tokens": 4096}
    path, url = write(tmp_path, tiny_base, limits=limits)
    process = start(["serving", path.name], tmp_path)
    try:
        wait_for(f"{url}/healthz", process)
        client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        chunks = client.completions.create(
            model=tiny_base.name, prompt="a", temperature=0, max_tokens=2000, stream=True,
            logit_bias={"72": 100}, stream_options={"include_usage": True},
        )  # fmt: skip
        next(chunks)
    finally:
        os.kill(process.pid, signal.SIGINT)
    usage = [chunk.usage for chunk in chunks][-1]
    status, _, err = finish(process)
    assert status == 0, err
    assert "no key was ever made" in err
    assert usage
    assert usage.completion_tokens == 2000


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"http": {"host": "0.0.0.0", "port": 8000}}, "loray keys create"),
        ({"adapters": [{"name": "a", "path": "x"}, {"name": "a", "path": "y"}]}, "stands twice"),
        ({"adapters": [{"name": "../a", "path": "x"}]}, "allowed"),
        ({"adapters": [{"name": "x" * 10000, "path": "x"}]}, "allowed"),
        ({"limits": {"rows": 0}}, "limits.rows"),
        ({"limitz": {}}, "limits"),
        ({"keys_file": "nowhere.yaml"}, "loray keys create"),
        ({"database": "mysql://host/x"}, "postgresql://"),
        ({"database": "postgresql://me:secret@127.0.0.1:1/x"}, "database: file:PATH"),
        ({"database": "postgresql://me:secret/s@h/x"}, "env:NAME"),
        ({"database": "postgresql://h/x?user=me&password=secret"}, "env:NAME"),
        ({"database": ["postgresql://me:secret@h/x"]}, "postgresql://me***h/x"),
        ({"databse": "postgresql://me:secret@h/x"}, "Did you mean 'database'"),
        ({"database": "file:nowhere"}, "nowhere cannot be read"),
        ({"database": "file:serve.yaml"}, "is open to others; run: chmod 600"),
        ({"database": "env:LORAY_NOWHERE"}, "no variable 'LORAY_NOWHERE'"),
        ({"model": {"base": "demo", "quantization": "int9"}}, "int8"),
    ],
)
def test_a_bad_serving_file_is_refused_before_anything_starts(
    tmp_path: Path, tiny_base: Path, sections: dict[str, Any], words: str
) -> None:
    path, _ = write(tmp_path, tiny_base, **sections)
    started = time.monotonic()
    status, _, err = call(["serving", path.name], tmp_path)
    assert status == 1
    assert words in err
    assert "secret" not in err
    assert time.monotonic() - started < 30


def test_a_databases_password_stays_in_its_file_or_variable(
    tmp_path: Path, tiny_base: Path, postgres: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = postgres.make_database()
    password = url.split("@")[0].rsplit(":", 1)[1]
    (tmp_path / "url").touch(0o600)
    (tmp_path / "url").write_text(f"{url}\n")
    monkeypatch.setenv("REGISTRY_URL", url)
    monkeypatch.chdir(tmp_path)
    for given in ("file:url", "env:REGISTRY_URL"):
        path, _ = write(tmp_path, tiny_base, database=given, tuning={"storage": "runs"})
        recipe = config.load(path)
        assert config.database_url(recipe, tmp_path) == url
        assert password not in repr(recipe)
        status, out, err = call(["serving", path.name, "--config"], tmp_path)
        assert status == 0, err
        assert password not in out + err
        for one in yaml.safe_load(out)["applications"]:  # what a replica is started with
            again = build(ServeRecipe, one["args"]["recipe"], where="args")
            assert config.database_url(again, tmp_path) == url
        wrong = url.replace(password, "secret") + "?sslpassword=secret"
        (tmp_path / "url").write_text(wrong)
        monkeypatch.setenv("REGISTRY_URL", wrong)
        status, out, err = call(["serving", path.name, "--config"], tmp_path)
        assert status == 1
        assert "password authentication failed" in err
        assert "secret" not in out + err
        (tmp_path / "url").write_text(url)
        monkeypatch.setenv("REGISTRY_URL", url)


@pytest.mark.parametrize("word", ["database=URL", "databse=URL", "database: URL", "database=[URL]"])
def test_an_override_that_cannot_be_does_not_show_its_password(
    tmp_path: Path, tiny_base: Path, word: str
) -> None:
    path, _ = write(tmp_path, tiny_base)
    with pytest.raises(ConfigError, match="database") as caught:
        config.load(path, [word.replace("URL", SECRET_URL)])
    assert "secret" not in str(caught.value)


def test_a_port_that_is_taken_is_named(tmp_path: Path, tiny_base: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        path, _ = write(tmp_path, tiny_base, http={"port": port})
        status, _, err = call(["serving", path.name], tmp_path)
    assert status == 1
    assert f"http.port {port}" in err
    assert "http.port=PORT" in err


@pytest.mark.ray
def test_a_base_that_is_missing_ends_the_server_with_what_to_do(tmp_path: Path) -> None:
    path, _ = write(tmp_path, tmp_path / "nowhere")
    status, _, err = call(["serving", path.name], tmp_path)
    assert status == 1
    assert "no such directory" in err


def test_adapters_of_no_server_and_of_a_bad_key(tmp_path: Path) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    status, _, err = call(["loray", "adapters", "list", "--url", url], tmp_path)
    assert status == 1
    assert "loray serve" in err


def test_keys_are_made_listed_rotated_and_revoked_by_command(
    tmp_path: Path, tiny_base: Path
) -> None:
    path, _ = write(tmp_path, tiny_base)
    words = ["--scope", "infer", "--scope", "tune", "--requests-per-minute", "60"]
    first = made(tmp_path, path, "ada", "--project", "team-a", "--model", "m", *words)
    id_ = first.split("-")[2]
    status, second, err = call(
        ["loray", "keys", "rotate", path.name, id_, "--grace", "3600"], tmp_path
    )
    assert status == 0, err
    status, out, err = call(["loray", "keys", "list", path.name], tmp_path, {"COLUMNS": "200"})
    assert status == 0, err
    for word in (id_, second.split("-")[2], "ada", "team-a", "infer, tune", "60 requests/min"):
        assert word in out
    status, out, err = call(["loray", "keys", "revoke", path.name, id_], tmp_path)
    assert (status, out) == (0, f"{id_} (ada) is revoked\n"), err
    for key in (first.strip(), second.strip()):
        status, out, err = call(["loray", "keys", "revoke", path.name, key], tmp_path)
        assert status == 1
        assert key.split("-", 3)[3] not in out + err
    status, _, err = call(
        ["loray", "keys", "create", path.name, "bob", "--scope", "root"], tmp_path
    )
    assert status == 1
    assert "infer, tune, admin" in err


def test_a_host_that_others_reach_needs_a_key_of_the_registry(
    tmp_path: Path, tiny_base: Path
) -> None:
    http = {"host": "0.0.0.0", "port": free_port()}
    path, _ = write(tmp_path, tiny_base, http=http)
    status, _, err = call(["serving", path.name, "--config"], tmp_path)
    assert status == 1
    assert "loray keys create" in err
    made(tmp_path, path, "ada")
    status, out, err = call(["serving", path.name, "--config"], tmp_path)
    assert status == 0, err
    assert "0.0.0.0" in out


def test_a_server_whose_registry_was_lost_does_not_begin_without_keys(
    tmp_path: Path, tiny_base: Path
) -> None:
    path, _ = write(tmp_path, tiny_base, tuning={"storage": "runs"})
    assert call(["serving", path.name, "--config"], tmp_path)[0] == 0
    made(tmp_path, path, "ada")
    shutil.rmtree(tmp_path / ".loray")
    status, _, err = call(["serving", path.name, "--config"], tmp_path)
    assert status == 1
    mark = tmp_path / "runs" / "keys-were-made"
    for words in (str(mark), "loray keys create FILE NAME", "remove what is named here"):
        assert words in err
    mark.unlink()
    assert call(["serving", path.name, "--config"], tmp_path)[0] == 0
    made(tmp_path, path, "bob")
    (tmp_path / ".loray" / "serve" / "serve" / "registry.db").unlink()
    assert call(["serving", path.name, "--config"], tmp_path)[0] == 1
    made(tmp_path, path, "cleo")
    assert call(["serving", path.name, "--config"], tmp_path)[0] == 0


def test_the_registry_is_where_the_serving_file_says(tmp_path: Path, tiny_base: Path) -> None:
    url = database.sqlite_url(tmp_path / "elsewhere" / "own.db")
    path, _ = write(tmp_path, tiny_base, database=url)
    made(tmp_path, path, "ada")
    assert (tmp_path / "elsewhere" / "own.db").stat().st_size > 0
    recipe = config.load(path)
    assert config.database_url(recipe, tmp_path / "x") == url
    path, _ = write(tmp_path, tiny_base)
    recipe = config.load(path)
    assert config.database_url(recipe, tmp_path / "x") == f"sqlite:///{tmp_path}/x/registry.db"
