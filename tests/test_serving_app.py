"""The doors to serving: `python -m serving` under Ray Serve, `loray adapters`, `loray keys`."""

import os
import signal
import socket
import time
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml
from local_cluster import free_port
from openai import AuthenticationError, NotFoundError, OpenAI
from processes import call, finish, start
from test_training_adapter import make_adapter

from serving.keys import create

CHAT: Any = [{"role": "user", "content": "Say red please"}]


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
    secret = create(tmp_path / "keys.yaml", "boss", roles=("admin",), models=None)
    guest = create(tmp_path / "keys.yaml", "guest", models=("first",))
    path, url = write(
        tmp_path,
        tiny_base,
        keys_file=str(tmp_path / "keys.yaml"),
        adapters=[{"name": "first", "path": str(tmp_path / "first")}],
    )
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
    finally:
        os.kill(process.pid, signal.SIGINT)
        status, out, err = finish(process)
    assert status == 0, err
    assert secret not in out + err


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
    assert usage
    assert usage.completion_tokens == 2000


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"http": {"host": "0.0.0.0", "port": 8000}}, "keys_file"),
        ({"adapters": [{"name": "a", "path": "x"}, {"name": "a", "path": "y"}]}, "stands twice"),
        ({"adapters": [{"name": "../a", "path": "x"}]}, "allowed"),
        ({"adapters": [{"name": "x" * 10000, "path": "x"}]}, "allowed"),
        ({"limits": {"rows": 0}}, "limits.rows"),
        ({"limitz": {}}, "limits"),
        ({"keys_file": "nowhere.yaml"}, "loray keys add"),
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
    assert time.monotonic() - started < 30


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
