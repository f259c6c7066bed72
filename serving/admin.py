"""`loray adapters` and `loray keys`: what a running server serves, and who may ask."""

import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, cast
from urllib.parse import quote

import typer
from rich.console import Console
from rich.table import Table

from cluster.errors import ConfigError
from serving.connection import ApiKey, Url, connect

if TYPE_CHECKING:
    from cluster.registry.database import Database

adapters = typer.Typer(no_args_is_help=True, help="Add, remove and list adapters of a server.")
registry = typer.Typer(no_args_is_help=True, help="The registry of a server.")
keys = typer.Typer(no_args_is_help=True, help="Make and revoke API keys of a server.")

Name = Annotated[str, typer.Argument(help="What clients give as `model`.", show_default=False)]
ServeFile = Annotated[Path, typer.Argument(help="The server's file.", show_default=False)]
KeyId = Annotated[str, typer.Argument(help="The part after sk-loray-.", show_default=False)]


@adapters.command()
def add(
    name: Name,
    path: Annotated[str, typer.Argument(help="Directory, relative to adapters_root.")],
    mode: Annotated[Literal["live", "merged"], typer.Option()] = "live",
    url: Url = None,
    key: ApiKey = None,
) -> None:
    """Serve an adapter, or a new version of one, while requests flow."""
    server = connect(url, key)
    server.call("POST", "/v1/adapters", {"name": name, "path": path, "mode": mode})
    print(f"{name} answers at {server.url}/v1")


@adapters.command()
def remove(name: Name, url: Url = None, key: ApiKey = None) -> None:
    """Serve an adapter no more; its files stay."""
    connect(url, key).call("DELETE", f"/v1/models/{quote(name)}")
    print(f"{name} is not served any more")


@adapters.command()
def switch(
    name: Name,
    mode: Annotated[Literal["live", "merged"], typer.Argument()],
    url: Url = None,
    key: ApiKey = None,
) -> None:
    """Serve an adapter live or merged from now on."""
    connect(url, key).call("POST", f"/v1/adapters/{quote(name)}/mode", {"mode": mode})
    print(f"{name} is served {mode}")


@adapters.command("list")
def list_(url: Url = None, key: ApiKey = None) -> None:
    """What is served."""
    table = Table("name", "mode", "in memory", "path", "refused because")
    for row in connect(url, key).call("GET", "/v1/adapters")["data"]:
        loaded = "yes" if row["is_loaded"] else "no"
        table.add_row(row["name"], row["mode"], loaded, row["path"], row["error"] or "")
    Console().print(table)


@keys.command()
def create(
    file: ServeFile,
    name: Annotated[str, typer.Argument(help="Whose key it is.", show_default=False)],
    project: Annotated[str, typer.Option(help="Whose files, jobs and models it sees.")] = "default",
    scope: Annotated[
        list[str] | None, typer.Option(help="infer (the default), tune or admin; may be repeated.")
    ] = None,
    model: Annotated[list[str] | None, typer.Option(help="May use only these models.")] = None,
    requests_per_minute: Annotated[int | None, typer.Option()] = None,
    tokens_per_day: Annotated[int | None, typer.Option(help="Prompts and answers.")] = None,
    concurrent_jobs: Annotated[int | None, typer.Option()] = None,
) -> None:
    """Make a key and print it, this once."""
    from cluster.registry import keys as room

    rights = room.Rights(
        name=name,
        project=project,
        scopes=tuple(cast("list[room.Scope]", scope or ["infer"])),
        models=tuple(model) if model else None,
        requests_per_minute=requests_per_minute,
        tokens_per_day=tokens_per_day,
        concurrent_jobs=concurrent_jobs,
    )
    with _database(file) as database:
        room.mark(_key_marks(file))
        print(room.create(database, rights, now=time.time()))


@keys.command()
def revoke(file: ServeFile, id: KeyId) -> None:
    """Let a key open nothing any more, within a second."""
    from cluster.registry import keys as room

    with _database(file) as database:
        row = room.revoke(database, id, now=time.time())
    print(f"{row.id} ({row.name}) is revoked")


@keys.command()
def rotate(
    file: ServeFile,
    id: KeyId,
    grace: Annotated[float, typer.Option(help="Seconds for which the old key goes on.")] = 0.0,
) -> None:
    """Make a key with the rights of another, which ends, and print it, this once."""
    from cluster.registry import keys as room

    with _database(file) as database:
        print(room.rotate(database, id, now=time.time(), grace_s=grace))


@keys.command("list")
def list_keys(file: ServeFile) -> None:
    """Whose keys there are, and what they open."""
    from cluster.registry import keys as room

    now = time.time()
    table = Table("id", "name", "project", "scopes", "models", "limits", "made", "ends")
    with _database(file) as database:
        for key in room.list_(database):
            limits = {
                "requests/min": key.requests_per_minute,
                "tokens/day": key.tokens_per_day,
                "jobs": key.concurrent_jobs,
            }
            table.add_row(
                key.id,
                key.name,
                key.project,
                ", ".join(key.scopes),
                "all" if key.models is None else ", ".join(key.models),
                ", ".join(f"{most} {what}" for what, most in limits.items() if most) or "none",
                _day(key.created_at),
                _end(key.revoked_at, now),
            )
    Console().print(table)


@registry.command()
def rebuild(file: ServeFile) -> None:
    """Bring the models that jobs have left in storage back into a registry that was lost."""
    from cluster.registry import rebuild as room
    from serving import config
    from training import checkpoint

    tuning = config.load(file).tuning
    if tuning is None:
        raise ConfigError(f"{file} has no section tuning; add it, with its storage")
    with _database(file) as database:
        report = room.rebuild(
            database, Path(tuning.storage), adapter_of=checkpoint.adapter_directory
        )
    for line in report.broken:
        print(f"left out: {line}")
    added, broken = len(report.added), len(report.broken)
    print(
        f"{added} models added, {report.num_known} known, {report.num_deleted} deleted, "
        f"{broken} left out"
    )


@contextmanager
def _database(file: Path) -> Iterator["Database"]:
    """The registry's database of a serving file."""
    from cluster import storage
    from cluster.registry import database
    from serving import config

    recipe = config.load(file)
    directory = config.registry_of(recipe, file)
    storage.make_directory(directory)
    with closing(database.open_(config.database_url(recipe, directory))) as opened:
        yield opened


def _key_marks(file: Path) -> tuple[Path, ...]:
    from serving import config

    recipe = config.load(file)
    return config.key_marks(recipe, config.registry_of(recipe, file))


def _day(at: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(at))


def _end(revoked_at: float | None, now: float) -> str:
    if revoked_at is None:
        return ""
    return "revoked" if revoked_at <= now else _day(revoked_at)
