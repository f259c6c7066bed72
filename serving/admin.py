"""`loray adapters` and `loray keys`: what a running server serves, and who may ask."""

from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import quote

import requests
import typer
from rich.console import Console
from rich.table import Table

from cluster.errors import ClusterError, ConfigError

_TIMEOUT_S = 600.0
"""A merge takes its time."""

adapters = typer.Typer(no_args_is_help=True, help="Add, remove and list adapters of a server.")
keys = typer.Typer(no_args_is_help=True, help="Make and remove API keys.")

Url = Annotated[str, typer.Option(help="Where the server answers.")]
ApiKey = Annotated[
    str | None, typer.Option(envvar="LORAY_API_KEY", help="A key with the role admin.")
]
Name = Annotated[str, typer.Argument(help="What clients give as `model`.", show_default=False)]
KeysFile = Annotated[Path, typer.Argument(help="The server's keys_file.", show_default=False)]
_URL = "http://127.0.0.1:8000"


@adapters.command()
def add(
    name: Name,
    path: Annotated[str, typer.Argument(help="Directory, relative to adapters_root.")],
    mode: Annotated[Literal["live", "merged"], typer.Option()] = "live",
    url: Url = _URL,
    key: ApiKey = None,
) -> None:
    """Serve an adapter, or a new version of one, while requests flow."""
    _call("POST", url, "/v1/adapters", key, {"name": name, "path": path, "mode": mode})
    print(f"{name} answers at {url}/v1")


@adapters.command()
def remove(name: Name, url: Url = _URL, key: ApiKey = None) -> None:
    """Serve an adapter no more; its files stay."""
    _call("DELETE", url, f"/v1/models/{quote(name)}", key)
    print(f"{name} is not served any more")


@adapters.command()
def switch(
    name: Name,
    mode: Annotated[Literal["live", "merged"], typer.Argument()],
    url: Url = _URL,
    key: ApiKey = None,
) -> None:
    """Serve an adapter live or merged from now on."""
    _call("POST", url, f"/v1/adapters/{quote(name)}/mode", key, {"mode": mode})
    print(f"{name} is served {mode}")


@adapters.command("list")
def list_(url: Url = _URL, key: ApiKey = None) -> None:
    """What is served."""
    table = Table("name", "mode", "in memory", "path", "refused because")
    for row in _call("GET", url, "/v1/adapters", key)["data"]:
        loaded = "yes" if row["is_loaded"] else "no"
        table.add_row(row["name"], row["mode"], loaded, row["path"], row["error"] or "")
    Console().print(table)


@keys.command("add")
def add_key(
    file: KeysFile,
    name: Annotated[str, typer.Argument(help="Whose key it is.", show_default=False)],
    admin: Annotated[bool, typer.Option("--admin", help="May add and remove adapters.")] = False,
    model: Annotated[list[str] | None, typer.Option(help="May use only these models.")] = None,
) -> None:
    """Make a key and print it, this once."""
    from serving.keys import create

    roles = ("inference", "admin") if admin else ("inference",)
    print(create(file, name, roles=roles, models=tuple(model) if model else None))


@keys.command("remove")
def remove_key(
    file: KeysFile, id: Annotated[str, typer.Argument(help="The part after sk-loray-.")]
) -> None:
    """Let a key open nothing any more."""
    from serving.keys import remove as room

    room(file, id)
    print(f"{id} is removed")


@keys.command("list")
def list_keys(file: KeysFile) -> None:
    """Whose keys there are, and what they open."""
    from serving.keys import list_ as room

    table = Table("id", "name", "roles", "models")
    for key in room(file):
        models = "all" if key.models is None else ", ".join(key.models)
        table.add_row(key.id, key.name, ", ".join(key.roles), models)
    Console().print(table)


def _call(
    method: str, url: str, path: str, key: str | None, body: dict[str, str] | None = None
) -> Any:
    """What the server answers. Raises ConfigError for what it refuses, ClusterError without it."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        answer = requests.request(
            method, f"{url.rstrip('/')}{path}", json=body, headers=headers, timeout=_TIMEOUT_S
        )
    except requests.RequestException as error:
        raise ClusterError(
            f"no server answers at {url} ({type(error).__name__}); start one with `loray serve`, "
            "or give its --url"
        ) from None
    if answer.ok:
        return answer.json()
    try:
        message = answer.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = f"status {answer.status_code}"
    raise ConfigError(f"{url}: {message}")
