"""`loray alias`: names that stand for versions of a model, each with its share of the users."""

import json
import math
from pathlib import Path
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
    guard_metric: Annotated[
        str | None, typer.Option(help="Go back by this evaluation; see `loray alias evaluate`.")
    ] = None,
    guard_better: Annotated[
        str | None, typer.Option(help="Whether a higher or a lower score is better.")
    ] = None,
    guard_max_fall: Annotated[
        float | None, typer.Option(help="How much worse than the version before it may be.")
    ] = None,
    url: Url = None,
    key: ApiKey = None,
) -> None:
    """Have a name stand for versions from now on, each with its share of the users."""
    targets: list[dict[str, Any]] = [_target(text) for text in versions]
    if shadow is not None:
        targets.append({"model": shadow, "is_shadow": True})
    body: dict[str, Any] = {"name": name, "targets": targets}
    evaluation = _evaluation(guard_metric, guard_better, guard_max_fall)
    if guard_error_rate is not None or evaluation is not None:
        body["guard"] = {
            "error_rate": guard_error_rate,
            "min_requests": guard_min_requests,
            "evaluation": evaluation,
        }
    row = connect(url, key).call("POST", _PATH, body)
    _print(row)
    if row["guard"] and row["revision"] == 1 and len(versions) > 1:
        typer.echo("there is nothing before this that it could go back to", err=True)


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
    table = Table("version", "weight", "requests", "errors", "mean seconds", "score")
    for target in row["targets"]:
        mean = target["mean_seconds"]
        table.add_row(
            target["model"],
            "shadow" if target["is_shadow"] else f"{target['weight']:g}",
            str(target["requests"]),
            str(target["errors"]),
            "" if mean is None else f"{mean:.3f}",
            "" if target["score"] is None else f"{target['score']:g}",
        )
    Console().print(table)
    for change in row["changes"]:
        restored = f" (revision {change['restored']})" if change["restored"] else ""
        shown = _versions(change["targets"])
        print(f"{change['revision']}: {shown}{restored}, by {change['by']}: {change['reason']}")


@alias.command()
def evaluate(
    name: Name,
    version: Annotated[str, typer.Argument(help="The model.", show_default=False)],
    score: Annotated[
        str | None, typer.Argument(help="METRIC=VALUE, such as exact_match=0.91.")
    ] = None,
    report: Annotated[
        Path | None, typer.Option(help="What `loray evaluate --json` wrote, in place of a score.")
    ] = None,
    url: Url = None,
    key: ApiKey = None,
) -> None:
    """Tell what a version is worth; the alias goes back where that has fallen too far."""
    if (score is None) == (report is None):
        raise ConfigError("give METRIC=VALUE, or --report FILE, and not both")
    connection = connect(url, key)
    before = connection.call("GET", _path(name))
    metric, value = _score(score) if score is not None else _reported(report, before)
    body = {"model": version, "metric": metric, "value": value}
    row = connection.call("POST", f"{_path(name)}/scores", body)
    _print(row)
    if row["revision"] != before["revision"]:
        print(f"went back: {connection.call('GET', _path(name))['changes'][0]['reason']}")


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


def _evaluation(
    metric: str | None, better: str | None, max_fall: float | None
) -> dict[str, Any] | None:
    given = {"metric": metric, "better": better, "max_fall": max_fall}
    missing = [word for word, value in given.items() if value is None]
    if len(missing) == len(given):
        return None
    if missing:
        options = " and ".join(f"--guard-{word.replace('_', '-')}" for word in missing)
        raise ConfigError(f"an evaluation is guarded by three options; give {options}, too")
    return given


def _score(text: str) -> tuple[str, float]:
    metric, _, value = text.rpartition("=")
    try:
        if not metric:
            raise ValueError
        return metric, _finite(float(value))
    except ValueError:
        raise ConfigError(
            f"score {text[:200]!r} is not METRIC=VALUE; write it such as exact_match=0.91"
        ) from None


def _reported(path: Path | None, alias: dict[str, Any]) -> tuple[str, float]:
    """The newest of the alias's evaluations, out of a report."""
    assert path is not None
    guards = [change["guard"] for change in (alias, *alias["changes"])]
    metrics = [guard["evaluation"]["metric"] for guard in guards if guard and guard["evaluation"]]
    if not metrics:
        raise ConfigError(f"{alias['id']} goes by no evaluation; set it with --guard-metric")
    try:
        lines = path.read_text(encoding="utf-8").strip().splitlines()
        value = json.loads(lines[-1])["metrics"][metrics[0]]["value"]
        return metrics[0], _finite(float(value))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, LookupError, TypeError, OverflowError):
        raise ConfigError(
            f"{path}: says no finite value of {metrics[0]!r}; write it with "
            f"`loray evaluate --json --metric {metrics[0]}`"
        ) from None


def _finite(value: float) -> float:
    """JSON has no other numbers. Raises ValueError."""
    if not math.isfinite(value):
        raise ValueError
    return value


def _path(name: str) -> str:
    return f"{_PATH}/{quote(name)}"


def _print(row: dict[str, Any]) -> None:
    versions = f"{row['id']} is {_versions(row['targets'])} (revision {row['revision']})"
    print(", ".join([versions, *_guards(row["guard"])]))


def _guards(guard: dict[str, Any] | None) -> list[str]:
    said: list[str] = []
    if guard and guard["error_rate"] is not None:
        said.append(f"{guard['error_rate']:.2%} of at least {guard['min_requests']} requests")
    if guard and guard["evaluation"]:
        evaluation = guard["evaluation"]
        said.append(f"{evaluation['metric']} at most {evaluation['max_fall']:g} worse than before")
    return [f"guarded: {' and '.join(said)}"] if said else []


def _versions(targets: list[dict[str, Any]]) -> str:
    return " ".join(
        f"{target['model']}=shadow" if target["is_shadow"] else
        f"{target['model']}={target['weight']:g}"
        for target in targets
    ) or "nothing"  # fmt: skip
