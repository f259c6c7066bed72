"""`python -m tune_spaces SEARCH.yaml [section.field=value ...]`: the same job as `loray search`."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from cluster import command
from training.__main__ import Overrides, say
from training.events import Event

SearchFile = Annotated[
    Path, typer.Argument(help="A search file, YAML or JSON.", show_default=False)
]


def search(
    file: SearchFile,
    overrides: Overrides = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the result as one JSON object, the last line.")
    ] = False,
    address: Annotated[str | None, typer.Option(help="Ray cluster: host:port.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with a search that was stopped or killed.")
    ] = False,
) -> None:
    """Search rank, learning rate and more: many trials share one frozen base."""
    from tune_spaces import config

    chosen = config.load(file, overrides or ())
    from tune_spaces import search as room  # torch and ray: seconds that bad usage must not cost

    try:
        result = room.search(chosen, say=say, watch=_show, address=address, resume=resume)
    except KeyboardInterrupt:
        say("stopped; everything up to the last reports is kept: --resume goes on")
        raise typer.Exit(130) from None
    if as_json:
        print(json.dumps(result), flush=True)


def _show(event: Event) -> None:
    fields = event.fields
    if event.kind == "failed":
        say(f"trial {event.text('trial')} failed: {event.text('message')}")
        return
    end = "finished" if fields["is_finished"] else event.text("reason")
    say(
        f"trial {event.text('trial')}  rank {fields['rank']}  "
        f"lr {event.number('learning_rate'):.2e}  "
        f"{fields['supervised_tokens']} tokens  loss {event.number('train_loss'):.4f}"
        f"  metric {event.number('value'):.4f}  {end}".rstrip()
    )


def main(argv: list[str] | None = None) -> int:
    """The door; returns the exit status."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(search)
    return command.run(app, argv)


if __name__ == "__main__":
    sys.exit(main())
