"""`loray node` and `loray doctor --cluster`: the nodes of a cluster, kept running and checked."""

import logging
import signal
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cluster import node as nodes
from cluster.command import say
from cluster.errors import ConfigError

if TYPE_CHECKING:
    from cluster.survey import Visit

node = typer.Typer(no_args_is_help=True, help="Run this machine as a node of a Ray cluster.")


@node.callback()
def _group() -> None:
    """Keeps `start` a command of its own: typer takes an app of one command for that command."""


@node.command()
def start(
    head: Annotated[bool, typer.Option("--head", help="Be the head of a new cluster.")] = False,
    address: Annotated[
        str | None, typer.Option(help="Join the cluster of this head, HOST:PORT (port 6379).")
    ] = None,
    host: Annotated[
        str | None, typer.Option(help="This machine's address, as the other nodes reach it.")
    ] = None,
    port: Annotated[int, typer.Option(min=1, max=65535, help="The head's port.")] = 6379,
    dashboard_host: Annotated[
        str, typer.Option(help="Where the head's dashboard and Jobs API listen.")
    ] = "127.0.0.1",
    dashboard_port: Annotated[int, typer.Option(min=1, max=65535)] = 8265,
    redis: Annotated[
        str | None, typer.Option(help="Redis that keeps the head's state, HOST:PORT.")
    ] = None,
    num_cpus: Annotated[int | None, typer.Option(min=0, help="Default: all.")] = None,
    num_gpus: Annotated[int | None, typer.Option(min=0, help="Default: all.")] = None,
    object_store_bytes: Annotated[
        int | None, typer.Option(min=78643200, help="Shared memory for objects.")
    ] = None,
    temp_dir: Annotated[Path | None, typer.Option(help="Ray's logs and sockets.")] = None,
    token_file: Annotated[
        Path | None, typer.Option(help="The cluster's token; default: ~/.ray/auth_token.")
    ] = None,
) -> None:
    """Start a node and keep it running until Ctrl-C or SIGTERM; what fails is started anew."""
    if head == (address is not None):
        raise ConfigError("give one of --head and --address HOST:PORT")
    settings = nodes.NodeSettings(
        address=address,
        host=host,
        port=port,
        dashboard_host=dashboard_host,
        dashboard_port=dashboard_port,
        redis=redis,
        num_cpus=num_cpus,
        num_gpus=num_gpus,
        object_store_bytes=object_store_bytes,
        temp_dir=temp_dir.absolute() if temp_dir else None,
        token_file=(token_file or nodes.default_token_file()).absolute(),
    )
    logging.getLogger("cluster").setLevel(logging.INFO)
    if nodes.require_token(settings):
        _tell("token_made", path=settings.token_file, next="copy it to the other nodes, mode 0600")
    supervisor = nodes.Supervisor(settings, _tell)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, supervisor.stop)
    supervisor.run()


def check_cluster(address: str | None, storage: Path | None) -> bool:
    """Visit all nodes and print what was found; whether nothing must be fixed."""
    from rich.console import Console
    from rich.table import Table

    from cluster import doctor, facts, session, survey

    with session.connect(address) as found:
        visits = survey.visit_all(storage)
    findings = doctor.judge(visits, facts.versions())
    table = Table(title=str(found), title_justify="left")
    for column in _COLUMNS:
        table.add_column(column, no_wrap=column == "node")
    for visit in visits:
        table.add_row(*_row(visit))
    console = Console()
    console.print(table)
    for finding in findings:
        console.print(str(finding), soft_wrap=True, markup=False, highlight=False)
    must_fix = any(finding.level == "fix" for finding in findings)
    if not findings:
        console.print("nothing to fix")
    return not must_fix


_COLUMNS = (
    "node", "python, ray, torch", "clock s", "ms", "Mbit/s to, from", "storage", "GPUs Ray, torch",
    "open files", "shared memory", "memory free", "disk free", "token", "open ports",
)  # fmt: skip


def _row(visit: "Visit") -> list[str]:
    name = visit.host + (" (head)" if visit.is_head else "") + (" *" if visit.is_driver else "")
    facts, network = visit.facts, visit.network
    if facts is None or network is None:
        return [name, "not visited"]
    rates = [f"{r:.0f}" for r in (network.to_mbit_s, network.from_mbit_s) if r is not None]
    storage = {None: "", (): "ok"}.get(facts.storage_problems, "broken")
    return [
        name,
        " ".join(str(facts.versions[name]) for name in ("python", "ray", "torch")),
        f"{network.clock_skew_s:+.3f}",
        f"{network.latency_ms:.1f}",
        " ".join(rates),
        storage,
        f"{visit.num_gpus} {'' if facts.num_gpus_of_torch is None else facts.num_gpus_of_torch}",
        str(facts.max_open_files),
        _gib(facts.shm_bytes),
        _gib(facts.free_memory_bytes),
        _gib(facts.free_disk_bytes),
        "yes" if facts.has_token else "no",
        str(len(facts.open_to_all)),
    ]


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.1f} GiB"


def _tell(event: str, **fields: object) -> None:
    """One line of `key=value`, values with spaces quoted."""
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    words = [f"{name}={_word(value)}" for name, value in {"event": event, **fields}.items()]
    say(f"time={now} {' '.join(words)}")


def _word(value: object) -> str:
    text = str(value)
    return text if text and not set(text) & set(" '\"\n") else repr(text)
