"""`python -m training RECIPE [section.field=value ...]`: the same job as `loray train`."""

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from cluster import command, config, jobs
from training.config import TrainRecipe

Recipe = Annotated[Path, typer.Argument(help="A recipe, YAML or JSON.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="Settings that win over the recipe's.", metavar="[SECTION.FIELD=VALUE]..."),
]


def train(
    recipe: Recipe,
    overrides: Overrides = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the result as one JSON object, the last line.")
    ] = False,
    address: Annotated[
        str | None,
        typer.Option(help="Ray cluster: host:port, or with --submit http://host:8265."),
    ] = None,
    submit: Annotated[
        bool, typer.Option("--submit", help="Run on the cluster as a Ray job and follow its log.")
    ] = False,
) -> None:
    """Fine-tune an adapter. On a run that exists, go on from its newest valid checkpoint."""
    chosen = config.load(TrainRecipe, recipe, overrides or ())
    if submit:
        raise typer.Exit(_submit(recipe, overrides or [], as_json=as_json, address=address))
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
        say(
            f"adapter {result['adapter']} (step {result['steps']}, loss "
            f"{result['final_loss']:.4f}, {result['real_tokens_per_s']:.0f} real tokens/s)"
        )
    if result["was_stopped"]:
        say("stopped early; the same command resumes")
        raise typer.Exit(130)


def _submit(recipe: Path, overrides: list[str], *, as_json: bool, address: str | None) -> int:
    words = ["python", "-m", "training", str(recipe), *overrides, *(["--json"] if as_json else [])]
    where = address or "http://127.0.0.1:8265"
    job_id = jobs.submit(words, address=where, working_dir=Path.cwd())
    say(f"job {job_id} on {where}: {shlex.join(words)}")
    try:
        return jobs.follow(job_id, address=where)
    except KeyboardInterrupt:
        if typer.confirm(f"stop job {job_id}? (no leaves it running)", default=True, err=True):
            jobs.stop(job_id, address=where)
        return 130


def say(line: str) -> None:
    """One line for people, on stderr."""
    print(line, file=sys.stderr, flush=True)


def main(argv: list[str] | None = None) -> int:
    """The door; returns the exit status."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(train)
    return command.run(app, argv)


if __name__ == "__main__":
    sys.exit(main())
