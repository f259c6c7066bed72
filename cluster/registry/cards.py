"""card.json: what a run's directory says of its job, so that a lost registry can be made anew.

That a model was deleted is said by a file of its own, `<its directory>.deleted`: replicas delete
while the dispatcher writes cards.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from cluster import storage
from cluster.errors import StorageError

_FILE = "card.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Card:
    """The job that a run belongs to."""

    job_id: str
    project: str
    model: str
    """The name under which its result answers."""
    base: str
    created_at: float
    status: str
    checkpoints: tuple[tuple[int, str], ...] = ()
    """Steps, and the names under which their adapters answer."""
    result: str = "adapter"
    """Where in the run's directory its result lies."""


def mark_deleted(adapter: Path) -> None:
    """Have the model whose adapter lies there stay deleted for ever. Raises StorageError."""
    if adapter.parent.is_dir():  # else somebody has removed the run, and nothing can come back
        storage.write_file(_deleted(adapter), b"")


def is_deleted(adapter: Path) -> bool:
    """Whether the model whose adapter lies there was deleted."""
    return _deleted(adapter).exists()


def write(run_dir: Path, card: Card) -> None:
    """Replace a run's card. Raises StorageError."""
    storage.make_directory(run_dir)
    storage.write_file(run_dir / _FILE, json.dumps(asdict(card), indent=1).encode())


def read(run_dir: Path) -> Card | None:
    """A run's card; None where it has none. Raises StorageError for one that is damaged."""
    try:
        tree = json.loads((run_dir / _FILE).read_text(encoding="utf-8"))
        checkpoints = tuple((int(step), str(name)) for step, name in tree.pop("checkpoints"))
        return Card(**tree, checkpoints=checkpoints)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise StorageError(f"{run_dir / _FILE} is damaged ({error}); remove it") from None


def _deleted(adapter: Path) -> Path:
    return adapter.with_name(f"{adapter.name}.deleted")
