"""Where events may be sent."""

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from cluster import config
from cluster.errors import ConfigError
from serving.config import ServeRecipe
from serving.webhook import Webhook, destinations


@pytest.mark.parametrize(
    "url",
    [
        "https://hooks.example/loray",
        "https://10.0.0.7:8443/x?team=a",  # a private address is the operator's choice
        "http://127.0.0.1:9000/x",
        "http://[::1]:9000/x",
        "http://localhost/x",
    ],
)
def test_https_and_this_machine_are_destinations(url: str) -> None:
    assert Webhook(url=url, secret_file="s").url == url


@pytest.mark.parametrize(
    "url",
    [
        "",
        "hooks.example/x",
        "http://hooks.example/x",
        "http://10.0.0.7/x",
        "http://127.0.0.1.example/x",
        "http://2130706433/x",
        "https://user:geheim@hooks.example/x",
        "https:///x",
        "https://hooks.example:99999/x",
        "https://hooks.example/x#part",
        "https://hooks.example/a b",
        "https://hooks.example/\n",
        "https://hoöks.example/",
        "ftp://hooks.example/x",
        "file:///etc/passwd",
        "https://hooks.example/" + "x" * 1024,
        "https://[::1",
    ],
)
def test_other_urls_are_refused_without_showing_what_may_be_secret(url: str) -> None:
    with pytest.raises(ConfigError, match="webhooks: url") as raised:
        Webhook(url=url, secret_file="s")
    assert "geheim" not in str(raised.value)


def test_a_secret_is_read_from_its_file_and_never_shown(tmp_path: Path) -> None:
    file = tmp_path / "secret"
    hook = Webhook(url="https://hooks.example/", secret_file=str(file))
    with pytest.raises(ConfigError, match="cannot be read"):
        hook.secret()
    for bad in ("", "whsec_", "whsec_c2hvcnQ=", "geheimgeheimgeheimgeheimgeheimgeheim", "whsec_ü"):
        file.write_text(bad)
        with pytest.raises(ConfigError, match="holds no secret") as raised:
            hook.secret()
        assert "geheim" not in str(raised.value)
    file.write_bytes(b"whsec_" + base64.b64encode(b"k" * 32) + b"\n")
    assert hook.secret() == b"k" * 32


def test_an_event_goes_where_its_project_and_kind_are_wanted() -> None:
    hooks = [
        Webhook(url="https://all.example/", secret_file="s"),
        Webhook(url="https://red.example/", secret_file="s", projects=("red",)),
        Webhook(url="https://failed.example/", secret_file="s", events=("fine_tuning.job.failed",)),
    ]

    def asked(project: str, kind: str) -> list[str]:
        urls = destinations(hooks, project=project, type=f"fine_tuning.job.{kind}")
        return [url.split("/")[2].split(".")[0] for url in urls]

    assert asked("red", "succeeded") == ["all", "red"]
    assert asked("blue", "failed") == ["all", "failed"]
    assert destinations((), project="red", type="fine_tuning.job.failed") == []


def test_a_serving_file_names_its_webhooks(tmp_path: Path) -> None:
    row: dict[str, Any] = {"url": "https://hooks.example/", "secret_file": "s", "projects": ["a"]}

    def build(*rows: dict[str, Any]) -> ServeRecipe:
        tree = {"model": {"base": "demo"}, "webhooks": list(rows)}
        return config.build(ServeRecipe, json.loads(json.dumps(tree)), where="serve")

    recipe = build(row)
    assert recipe.webhooks[0].projects == ("a",)
    assert config.build(ServeRecipe, config.plain(recipe), where="serve") == recipe
    with pytest.raises(ConfigError, match="stands twice"):
        build(row, row)
    with pytest.raises(ConfigError, match="events"):
        build({**row, "events": ["batch.completed"]})
