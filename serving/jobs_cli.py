"""`loray jobs`: the fine-tuning jobs of a server, through the API that clients use."""

import time
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from serving.connection import ApiKey, Connection, Url, connect

jobs = typer.Typer(no_args_is_help=True, help="Look at and steer the fine-tuning jobs of a server.")

JobId = Annotated[str, typer.Argument(help="Such as ftjob-...", show_default=False)]
_PATH = "/v1/fine_tuning/jobs"
_OVER = ("succeeded", "failed", "cancelled")
_POLL_S = 1.0
_PAGE = 100


@jobs.command("list")
def list_(
    limit: Annotated[int, typer.Option(min=1, max=10000, help="Jobs to show.")] = 20,
    url: Url = None,
    key: ApiKey = None,
) -> None:
    """The newest jobs of the key's project."""
    table = Table("id", "status", "model", "created", "result")
    rows = _pages(connect(url, key), _PATH, limit)
    for job in rows:
        result = job["fine_tuned_model"] or (job["error"] or {}).get("code") or ""
        table.add_row(job["id"], job["status"], job["model"], _time(job["created_at"]), result)
    Console().print(table)


@jobs.command()
def show(id: JobId, url: Url = None, key: ApiKey = None) -> None:
    """All that is known of a job, and its checkpoints."""
    server = connect(url, key)
    job = server.call("GET", f"{_PATH}/{id}")
    table = Table(show_header=False, box=None)
    for name, value in job.items():
        if value not in (None, [], {}):
            shown = _time(value) if name.endswith(("_at", "_finish")) else str(value)
            table.add_row(name, shown)
    Console().print(table)
    for one in server.call("GET", f"{_PATH}/{id}/checkpoints", limit=_PAGE)["data"][::-1]:
        loss = one["metrics"]["train_loss"]
        shown = "" if loss is None else f"  training loss {loss:.4f}"
        print(f"step {one['step_number']}: {one['fine_tuned_model_checkpoint']}{shown}")


@jobs.command()
def logs(
    id: JobId,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Until the job's end.")] = False,
    url: Url = None,
    key: ApiKey = None,
) -> None:
    """A job's story, the oldest line first."""
    server = connect(url, key)
    seen: set[str] = set()
    while True:
        is_over = server.call("GET", f"{_PATH}/{id}")["status"] in _OVER
        new: list[dict[str, Any]] = []
        for event in _pages(server, f"{_PATH}/{id}/events", 1 << 30):
            if event["id"] in seen:
                break
            new.append(event)
        for event in reversed(new):
            seen.add(event["id"])
            level = "" if event["level"] == "info" else f"{event['level']}: "
            print(f"{_time(event['created_at'])} {level}{event['message']}", flush=True)
        if is_over or not follow:
            return
        time.sleep(_POLL_S)


@jobs.command()
def cancel(id: JobId, url: Url = None, key: ApiKey = None) -> None:
    """End a job for good."""
    _steer(id, "cancel", connect(url, key))


@jobs.command()
def pause(id: JobId, url: Url = None, key: ApiKey = None) -> None:
    """Have a job save a checkpoint and free its device."""
    _steer(id, "pause", connect(url, key))


@jobs.command()
def resume(id: JobId, url: Url = None, key: ApiKey = None) -> None:
    """Have a paused job go on where it was."""
    _steer(id, "resume", connect(url, key))


def _steer(id: str, verb: str, server: Connection) -> None:
    print(f"{id} is {server.call('POST', f'{_PATH}/{id}/{verb}')['status']}")


def _pages(server: Connection, path: str, limit: int) -> Iterator[dict[str, Any]]:
    """Rows of a list, page by page."""
    after: dict[str, str] = {}
    while limit > 0:
        page = server.call("GET", path, limit=min(limit, _PAGE), **after)
        yield from page["data"]
        limit -= len(page["data"])
        if not page["has_more"]:
            return
        after = {"after": page["data"][-1]["id"]}


def _time(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S")
