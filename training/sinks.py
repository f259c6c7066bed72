"""Who else hears of a run: watchers that copy its events to other tools."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from training.events import Event

_STEP_FIGURES = ("loss", "lr", "grad_norm", "real_tokens", "step_s")


@contextmanager
def opened(names: Sequence[str], run_dir: Path) -> Iterator[Callable[[Event], None]]:
    """A watcher that tells every sink of `log.to`."""
    with ExitStack() as stack:
        sinks = [stack.enter_context(_KINDS[name](run_dir)) for name in names]

        def watch(event: Event) -> None:
            for sink in sinks:
                sink(event)

        yield watch


@contextmanager
def _tensorboard(run_dir: Path) -> Iterator[Callable[[Event], None]]:
    """Scalars under `train/` and `eval/`, in <run>/tensorboard."""
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(run_dir / "tensorboard")) as writer:

        def watch(event: Event) -> None:
            if event.kind == "step":
                for name in _STEP_FIGURES:
                    writer.add_scalar(f"train/{name}", event.number(name), _step(event))
            elif event.kind == "eval":
                writer.add_scalar("eval/loss", event.number("loss"), _step(event))

        yield watch


def _step(event: Event) -> int:
    return int(event.number("step"))


_KINDS = {"tensorboard": _tensorboard}
