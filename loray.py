"""The `loray` command: one function per verb, nothing else."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from cluster import __version__, command, config
from cluster import admin as cluster_admin
from cluster.remote import is_url
from serving import admin, connection
from serving.__main__ import serve
from serving.alias_cli import alias
from serving.jobs_cli import jobs
from training.__main__ import Overrides, train
from training.config import TrainRecipe
from tune_spaces.__main__ import search

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Fine-tune, search and serve LoRA adapters on your own machines.",
)
app.command()(train)
app.command()(search)
app.command()(serve)
app.add_typer(cluster_admin.node, name="node")
app.add_typer(admin.adapters, name="adapters")
app.add_typer(admin.keys, name="keys")
app.add_typer(jobs, name="jobs")
app.add_typer(alias, name="alias")
app.command()(connection.login)
app.add_typer(admin.registry, name="registry")

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object, the last line.")]
Adapter = Annotated[str, typer.Argument(help="An adapter directory.", show_default=False)]
Base = Annotated[str | None, typer.Option(help="Base model; default: the one it was trained on.")]


@app.command()
def doctor(
    recipe: Annotated[
        Path | None, typer.Argument(help="A recipe, YAML or JSON.", show_default=False)
    ] = None,
    overrides: Overrides = None,
    whole_cluster: Annotated[
        bool, typer.Option("--cluster", help="Check every node of a cluster, too.")
    ] = False,
    address: Annotated[str | None, typer.Option(help="Ray cluster: host:port or auto.")] = None,
    storage: Annotated[
        Path | None, typer.Option(help="Directory that all nodes share; default: the recipe's.")
    ] = None,
) -> None:
    """Check a recipe and its data without training, or the nodes of a cluster; or both."""
    if recipe is None and not whole_cluster:
        raise typer.BadParameter("name a recipe, or give --cluster")
    if not whole_cluster and (address is not None or storage is not None):
        raise typer.BadParameter("--address and --storage go with --cluster")
    if recipe is not None:
        chosen = config.load(TrainRecipe, recipe, overrides or ())
        _inspect(chosen)
        if storage is None and not is_url(chosen.storage):
            storage = Path(chosen.storage)
    if whole_cluster and not cluster_admin.check_cluster(address, storage):
        raise typer.Exit(1)


def _inspect(chosen: TrainRecipe) -> None:
    from training import mirror, run, strategy, view

    store = mirror.Mirror.of(chosen)
    if store is not None:
        store.check()
        print(f"storage {store.url} can be written and leased")
    print(f"strategy {strategy.check(chosen)}")
    Console().print(view.support())
    for refusal in strategy.SUPPORT:
        print(f"refused: {refusal}")
    run.inspect(chosen, print)
    print("ready to train")


@app.command()
def schema(
    kind: Annotated[Literal["train", "search", "serve"], typer.Argument()] = "train",
) -> None:
    """Print the JSON Schema of a recipe, a search file or a serving file, for editors."""
    from serving.config import ServeRecipe
    from tune_spaces import config as search_config

    if kind == "search":
        tree = search_config.schema()
    else:
        tree = config.schema(TrainRecipe if kind == "train" else ServeRecipe)
    print(json.dumps(tree, indent=2))


@app.command()
def merge(
    adapter: Adapter,
    out: Annotated[Path, typer.Option(help="Directory to create.", show_default=False)],
    base: Base = None,
    precision: Annotated[Literal["fp16", "bf16", "fp32"], typer.Option()] = "fp16",
    as_json: AsJson = False,
) -> None:
    """Fold an adapter into its base and prove that the result answers the same."""
    from training import merge as room

    report = room.merge(Path(adapter), out, base=base, precision=precision)
    print(json.dumps(asdict(report), default=str) if as_json else "\n".join(report.lines()))


@app.command()
def evaluate(
    adapter: Adapter,
    data: Annotated[str, typer.Argument(help="Examples: file, glob, directory or hub id.")],
    metrics: Annotated[
        list[str] | None, typer.Option("--metric", help="loss, exact_match, json_valid, rouge_l.")
    ] = None,
    base: Base = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, max=8192)] = 256,
    as_json: AsJson = False,
) -> None:
    """Measure an adapter on held-out examples, with 95 % intervals. `base` measures the base."""
    from training import evaluate as room

    report = room.evaluate_adapter(
        adapter, data, metrics=tuple(metrics or ()), base=base, max_new_tokens=max_new_tokens
    )
    print(json.dumps(report.as_json()) if as_json else "\n".join(report.lines()))


@app.command()
def generate(
    adapter: Adapter,
    prompt: Annotated[str, typer.Argument(help="What the user says.")],
    system: Annotated[str | None, typer.Option(help="A system message.")] = None,
    base: Base = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, max=8192)] = 256,
) -> None:
    """Answer one prompt with an adapter."""
    from training import generation

    print(
        generation.answer(adapter, prompt, system=system, base=base, max_new_tokens=max_new_tokens)
    )


@app.command()
def version() -> None:
    """Print the version."""
    print(__version__)


def main() -> int:
    """The door; returns the exit status."""
    return command.run(app)


if __name__ == "__main__":
    sys.exit(main())
