"""`loray alias`: names that stand for versions of a model, each with its share of the users."""

from typing import Annotated, Any
from urllib.parse import quote

import typer
from rich.console import Console
from rich.table import Table

from cluster.errors import ConfigError
from serving.connection import ApiKey, Url, connect

alias = typer.Typer(no_args_is_help=True, help="Share users out over versions of a model.")

Name = Annotated[str, typer.Argument(help="What clients give as `model`.", show_default=False)]
_PATH = "/v1/aliases"


@alias.command("set")
def set_(
    name: Name,
    versions: Annotated[
        list[str], typer.Argument(help="MODEL=WEIGHT, such as v7=90 v8=10.", show_default=False)
    ],
    shadow: Annotated[
        str | None, typer.Option(help="A model that gets copies; its answers are dropped.")
    ] = None,
    guard_error_rate: Annotated[
        float | None,
        typer.Option(help="Go back where more than this share of a version's requests fails."),
    ] = None,
    guard_min_requests: Annotated[
        int, typer.Option(help="Fewer requests within a minute say nothing.")
    ] = 50,
    url: Url = None,
    key: ApiKey = None,
) -> None:
    """Have a name stand for versions from now on, each with its share of the users."""
    targets: list[dict[str, Any]] = [_target(text) for text in versions]
    if shadow is not None:
        targets.append({"model": shadow, "is_shadow": True})
    body: dict[str, Any] = {"name": name, "targets": targets}
    if guard_error_rate is not None:
        body["guard"] = {"error_rate": guard_error_rate, "min_requests": guard_min_requests}
    _print(connect(url, key).call("POST", _PATH, body))


@alias.command("list")
def list_(url: Url = None, key: ApiKey = None) -> None:
    """The aliases of the key's project."""
    table = Table("alias", "revision", "versions")
    for row in connect(url, key).call("GET", _PATH)["data"]:
        table.add_row(row["id"], str(row["revision"]), _versions(row["targets"]))
    Console().print(table)


@alias.command()
def show(name: Name, url: Url = None, key: ApiKey = None) -> None:
    """What an alias stands for, how its versions did in the last minute, and what was before."""
    row = connect(url, key).call("GET", _path(name))
    _print(row)
    table = Table("version", "weight", "requests", "errors", "mean seconds")
    for target in row["targets"]:
        mean = target["mean_seconds"]
        table.add_row(
            target["model"],
            "shadow" if target["is_shadow"] else f"{target['weight']:g}",
            str(target["requests"]),
            str(target["errors"]),
            "" if mean is None else f"{mean:.3f}",
        )
    Console().print(table)
    for change in row["changes"]:
        restored = f" (revision {change['restored']})" if change["restored"] else ""
        shown = _versions(change["targets"])
        print(f"{change['revision']}: {shown}{restored}, by {change['by']}: {change['reason']}")


@alias.command()
def rollback(
    name: Name,
    reason: Annotated[str, typer.Option(help="For the history.")] = "by command",
    url: Url = None,
    key: ApiKey = None,
) -> None:
    """Restore what an alias stood for before its last change; again: before that."""
    _print(connect(url, key).call("POST", f"{_path(name)}/rollback", {"reason": reason}))


@alias.command()
def remove(name: Name, url: Url = None, key: ApiKey = None) -> None:
    """Have a name stand for nothing; the models stay."""
    connect(url, key).call("DELETE", _path(name))
    print(f"{name} stands for nothing any more")


def _target(text: str) -> dict[str, Any]:
    model, separator, weight = text.rpartition("=")
    try:
        if not separator or not model:
            raise ValueError
        return {"model": model, "weight": float(weight)}
    except ValueError:
        raise ConfigError(
            f"version {text[:200]!r} is not MODEL=WEIGHT; write it such as v7=90"
        ) from None


def _path(name: str) -> str:
    return f"{_PATH}/{quote(name)}"


def _print(row: dict[str, Any]) -> None:
    guard = row["guard"]
    guarded = (
        f", guarded: {guard['error_rate']:.2%} of at least {guard['min_requests']} requests"
        if guard
        else ""
    )
    print(f"{row['id']} is {_versions(row['targets'])} (revision {row['revision']}){guarded}")


def _versions(targets: list[dict[str, Any]]) -> str:
    return " ".join(
        f"{target['model']}=shadow" if target["is_shadow"] else
        f"{target['model']}={target['weight']:g}"
        for target in targets
    ) or "nothing"  # fmt: skip
