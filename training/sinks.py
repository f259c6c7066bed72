"""Who else hears of a run: watchers that copy its events to other tools."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from cluster import storage
from training.events import Event

log = logging.getLogger(__name__)

_STEP_FIGURES = ("loss", "lr", "grad_norm", "real_tokens", "step_s")
_PREFERENCE_FIGURES = ("rewards/chosen", "rewards/rejected", "accuracy", "margin")


@contextmanager
def opened(names: Sequence[str], run_dir: Path) -> Iterator[Callable[[Event], None]]:
    """A watcher that tells every sink of `log.to`, until one cannot write, as on a full disk."""
    with ExitStack() as stack:
        sinks = {name: stack.enter_context(_KINDS[name](run_dir)) for name in names}

        def watch(event: Event) -> None:
            for name, sink in list(sinks.items()):
                try:
                    sink(event)
                except OSError as error:
                    del sinks[name]
                    log.warning("log_given_up=%s reason=%r", name, str(error))

        yield watch


@contextmanager
def _tensorboard(run_dir: Path) -> Iterator[Callable[[Event], None]]:
    """Scalars under `train/` and `eval/`, in <run>/tensorboard."""
    from torch.utils.tensorboard import SummaryWriter

    with storage.explained(run_dir / "tensorboard"):
        writer = SummaryWriter(str(run_dir / "tensorboard"))

    def watch(event: Event) -> None:
        if event.kind == "step":
            for name in _STEP_FIGURES:
                writer.add_scalar(f"train/{name}", event.number(name), _step(event))
        elif event.kind == "eval":
            writer.add_scalar("eval/loss", event.number("loss"), _step(event))
        for name in _PREFERENCE_FIGURES:
            if name in event.fields:
                part = "eval" if event.kind == "eval" else "train"
                writer.add_scalar(f"{part}/{name}", event.number(name), _step(event))

    try:
        yield watch
    finally:
        with suppress(OSError):  # it has been said by then
            writer.close()


def _step(event: Event) -> int:
    return int(event.number("step"))


_KINDS = {"tensorboard": _tensorboard}
