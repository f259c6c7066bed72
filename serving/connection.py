"""How commands talk to a running server: where it answers, with which key, and what it said."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import requests
import typer

from cluster import storage
from cluster.errors import ClusterError, ConfigError, StorageError

DEFAULT_URL = "http://127.0.0.1:8000"
_TIMEOUT_S = 600.0
"""A merge takes its time."""

Url = Annotated[
    str | None,
    typer.Option(
        envvar="LORAY_URL", help=f"Where the server answers; default: `loray login`, {DEFAULT_URL}."
    ),
]
ApiKey = Annotated[
    str | None, typer.Option(envvar="LORAY_API_KEY", help="An API key; default: `loray login`.")
]


@dataclass(frozen=True, kw_only=True, slots=True, repr=False)
class Connection:
    """A server, and who asks it. Its key is not shown."""

    url: str
    key: str | None = None

    def call(self, method: str, path: str, body: Any = None, **params: Any) -> Any:
        """What the server answers. Raises ConfigError for what it refuses, ClusterError without."""
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        try:
            answer = requests.request(
                method, f"{self.url}{path}", json=body, params=params, headers=headers,
                timeout=_TIMEOUT_S,
            )  # fmt: skip
        except requests.RequestException as error:
            raise ClusterError(
                f"no server answers at {self.url} ({type(error).__name__}); start one with "
                "`loray serve`, or give its --url"
            ) from None
        if answer.ok:
            return answer.json()
        try:
            message = answer.json()["error"]["message"]
        except (ValueError, KeyError, TypeError):
            message = f"status {answer.status_code}"
        raise ConfigError(f"{self.url}: {message}")


def connect(url: str | None, key: str | None) -> Connection:
    """The server of a command: what was given, else what `loray login` has stored.

    A stored key goes to the server that it was stored for, and to no other.
    """
    stored = _stored()
    chosen = (url or (stored.url if stored else DEFAULT_URL)).rstrip("/").removesuffix("/v1")
    if key is None and stored is not None and stored.url == chosen:
        key = stored.key
    return Connection(url=chosen, key=key)


def login(
    url: Annotated[str, typer.Argument(help="Where the server answers.", show_default=False)],
    key: Annotated[
        str | None, typer.Option(envvar="LORAY_API_KEY", help="An API key; asked where left out.")
    ] = None,
) -> None:
    """Check a key, and have the commands that ask a server use both from now on."""
    given = key or typer.prompt("API key", hide_input=True, err=True)
    found = Connection(url=url.rstrip("/").removesuffix("/v1"), key=given.strip())
    if not found.url.startswith(("http://", "https://")):
        raise ConfigError(f"{url[:200]!r} is no server's URL; give one such as {DEFAULT_URL}")
    models = [model["id"] for model in found.call("GET", "/v1/models")["data"]]
    path = _path()
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    umask = os.umask(0o077)
    try:
        content = json.dumps({"url": found.url, "key": found.key})
        storage.write_file(path, content.encode())
    finally:
        os.umask(umask)
    path.chmod(0o600)
    print(f"{found.url} answers, with {len(models)} models; stored in {path}")


def _path() -> Path:
    root = os.environ.get("XDG_CONFIG_HOME") or "~/.config"
    return Path(root).expanduser() / "loray" / "credentials.json"


def _stored() -> Connection | None:
    path = _path()
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        return Connection(url=str(tree["url"]), key=str(tree["key"]))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StorageError(f"{path} cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError):
        raise ConfigError(f"{path} is damaged; run `loray login` again") from None
