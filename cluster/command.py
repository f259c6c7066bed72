"""What every door shares: run a typer app, turn errors into one message and an exit status."""

import logging
import sys
import warnings
from collections.abc import Sequence

import typer

from cluster.errors import LorayError


def run(app: typer.Typer, argv: Sequence[str] | None = None) -> int:
    """Run a command line; 0 on success, 1 on a LorayError, 2 on bad usage."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s %(message)s")
    # Noise of libraries: bitsandbytes 0.50.2 warns at import of a 4-bit kernel that we do not use,
    # peft 0.21.2 asks transformers 5.23 by an old name.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
    try:
        app(list(argv) if argv is not None else None, standalone_mode=True)
    except LorayError as error:
        print(f"error [{error.code}]: {error}", file=sys.stderr)
        return 1
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    return 0
