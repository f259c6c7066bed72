"""`python -m training RECIPE [section.field=value ...]`: the same job as `loray train`."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from cluster import command, config
from cluster.command import say
from training.config import TrainRecipe

Recipe = Annotated[Path, typer.Argument(help="A recipe, YAML or JSON.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="Settings that win over the recipe's.", metavar="[SECTION.FIELD=VALUE]..."),
]

AsJson = Annotated[
    bool, typer.Option("--json", help="Print the result as one JSON object, the last line.")
]
Address = Annotated[
    str | None,
    typer.Option(help="Ray cluster: host:port, or with --submit http://host:8265."),
]
Submit = Annotated[
    bool, typer.Option("--submit", help="Run on the cluster as a Ray job and follow its log.")
]


def train(
    recipe: Recipe,
    overrides: Overrides = None,
    as_json: AsJson = False,
    address: Address = None,
    submit: Submit = False,
) -> None:
    """Fine-tune an adapter. On a run that exists, go on from its newest valid checkpoint."""
    chosen = config.load(TrainRecipe, recipe, overrides or ())
    if submit:
        words = ["training", str(recipe), *(overrides or []), *(["--json"] if as_json else [])]
        raise typer.Exit(command.submit(words, address=address))
    from training import run, view  # torch and ray: seconds that bad usage must not cost

    try:
        with view.watching() as watch:
            result = run.train(chosen, say=say, watch=watch, address=address)
    except KeyboardInterrupt:
        say("stopped at once; the same command resumes from the last checkpoint")
        raise typer.Exit(130) from None
    if as_json:
        print(json.dumps(result), flush=True)
    else:
        where = result["adapter_url"]
        if where:
            say(f"published as {where}")
        say(
            f"adapter {result['adapter']} (step {result['steps']}, loss "
            f"{result['final_loss']:.4f}, {result['real_tokens_per_s']:.0f} real tokens/s)"
        )
    if result["was_stopped"]:
        say("stopped early; the same command resumes")
        raise typer.Exit(130)


def main(argv: list[str] | None = None) -> int:
    """The door; returns the exit status."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(train)
    return command.run(app, argv)


if __name__ == "__main__":
    sys.exit(main())
