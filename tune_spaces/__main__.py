"""`python -m tune_spaces SEARCH.yaml [section.field=value ...]`: the same job as `loray search`."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from cluster import command
from cluster.command import say
from cluster.errors import ConfigError
from training.__main__ import Address, AsJson, Overrides, Submit

SearchFile = Annotated[
    Path,
    typer.Argument(
        help="A search file, YAML or JSON; with --resume also the search's directory.",
        show_default=False,
    ),
]


def search(
    file: SearchFile,
    overrides: Overrides = None,
    as_json: AsJson = False,
    address: Address = None,
    submit: Submit = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with a search that was stopped or killed.")
    ] = False,
) -> None:
    """Search rank, learning rate and more, with many trials on one frozen base or each alone."""
    from tune_spaces import config

    settings = list(overrides or ())
    if file.is_dir():
        if not resume:
            raise ConfigError(
                f"{file} is a directory; give a search file, or --resume to go on with the search "
                "in that directory"
            )
        settings.append(f"storage={file.resolve().parent}")
        file = file / "config.json"
    chosen = config.load(file, settings)
    if submit:
        flags = {"--json": as_json, "--resume": resume}
        words = ["tune_spaces", str(file), *settings, *(n for n in flags if flags[n])]
        raise typer.Exit(command.submit(words, address=address))
    from tune_spaces import search as room  # torch and ray: seconds that bad usage must not cost
    from tune_spaces import view

    try:
        with view.watching() as watch:
            result = room.search(chosen, say=say, watch=watch, address=address, resume=resume)
    except KeyboardInterrupt:
        say("stopped; everything up to the last reports is kept: --resume goes on")
        raise typer.Exit(130) from None
    if as_json:
        print(json.dumps(result), flush=True)


def main(argv: list[str] | None = None) -> int:
    """The door; returns the exit status."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(search)
    return command.run(app, argv)


if __name__ == "__main__":
    sys.exit(main())
