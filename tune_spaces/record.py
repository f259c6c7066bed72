"""What a search leaves for readers: search.json, and trials.jsonl with a line a trial.

The dataclasses are the schema of both, names and types alike.
"""

import dataclasses
import json
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import Any, Literal

from cluster import storage
from cluster.config import nearest
from cluster.errors import StorageError

RESULT = "result.json"
"""What `--json` prints: there once a search is complete."""
BEST = "best"
"""Directory of the winner's adapter."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Space:
    """What was searched."""

    name: str
    """Name of a named space, or of an inline one."""
    dimensions: Mapping[str, str]
    """`section.field` -> its choices or range in words."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """A metric with its 95 % interval."""

    value: float
    low: float | None
    high: float | None
    n: int
    """Evaluation items."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Winner(Estimate):
    """The trial that was chosen."""

    trial: str
    test_value: float | None
    """The metric on a split that no decision used."""
    test_low: float | None
    test_high: float | None
    test_n: int | None
    is_tie: bool
    """The difference to another finalist cannot be told from zero."""
    tied_with: tuple[str, ...]
    """Trials it ties with."""
    why: str
    """Why this one was taken."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SeedValue:
    """A finalist's metric with one seed."""

    seed: int
    value: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Finalist:
    """A trial that was repeated with more seeds."""

    trial: str
    seeds: tuple[SeedValue, ...]
    mean: float
    """Over the seeds."""
    low: float | None
    """Lower end of the mean's 95 % interval."""
    high: float | None
    """Its upper end."""
    diff_low: float | None
    """Lower end of the paired 95 % interval of the difference to the best; null for the best."""
    diff_high: float | None
    """Its upper end."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """Wall time against one process per trial."""

    measured_s: float
    """Wall time of this search."""
    one_process_per_trial_s: float | None
    """Of the same trials in a process each; null where it was not measured."""
    how: str
    """How the figures were obtained."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """A line of trials.jsonl."""

    trial: str
    state: Literal["finished", "stopped", "failed", "running"]
    reason: str
    """Why it ended; may be empty."""
    params: Mapping[str, object]
    """`section.field` -> the value that was tried."""
    rank: int
    learning_rate: float
    """Peak learning rate that was trained with."""
    learning_rate_at_rank_16: float
    """The same, scaled to rank 16."""
    value: float | None
    """The metric at its end, or at the report that a guard has kept."""
    low: float | None
    """Lower end of the 95 % interval."""
    high: float | None
    """Its upper end."""
    tokens: int
    """Supervised tokens trained on."""
    train_s: float
    bench: str
    """The bench it sat on."""
    history: tuple[tuple[int, float | None, float | None, float], ...]
    """(supervised tokens, training loss, metric, seconds since the start of the search)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchRecord:
    """search.json, and the lines of trials.jsonl."""

    name: str
    metric: str
    mode: Literal["min", "max"]
    """Which end of the metric is better."""
    space: Space
    wall_s: float
    isolation: Literal["exact", "coupled"]
    """Whether a trial can tell that it has neighbours."""
    seats: int
    """Possible seats."""
    seats_filled: tuple[tuple[float, int], ...]
    """(seconds, seats taken from then on)."""
    mean_seats_filled: float
    base: Estimate | None
    """The untouched base model."""
    winner: Winner | None
    rungs: tuple[int, ...]
    """Supervised tokens at which the scheduler judges."""
    finalists: tuple[Finalist, ...]
    cost: Cost | None
    versions: Mapping[str, str]
    """Library -> version."""
    started: str
    """ISO time."""
    trials: tuple[Trial, ...]

    def trial(self, name: str) -> Trial:
        """The trial of that name."""
        return next(trial for trial in self.trials if trial.trial == name)


def read(search_dir: Path) -> SearchRecord:
    """The record of a search; a figure that is not finite is read as null.

    Raises StorageError where a file is missing or not what a search writes.
    """
    tree = _json(search_dir / "search.json", _text(search_dir / "search.json"))
    path = search_dir / "trials.jsonl"
    lines = [_json(path, line) for line in _text(path).splitlines() if line]
    if not isinstance(tree, dict):
        raise StorageError(f"{search_dir / 'search.json'}: expected a mapping; write it anew")
    record: SearchRecord = _value(SearchRecord, {**tree, "trials": lines}, str(search_dir))
    names = [trial.trial for trial in record.trials]
    chosen = [record.winner.trial] if record.winner else []
    for name in [*chosen, *(finalist.trial for finalist in record.finalists)]:
        if name not in names:
            raise StorageError(
                f"{search_dir}: search.json names trial {name!r}, which trials.jsonl does not "
                f"have.{nearest(name, names)} The two belong to different searches: resume this one"
            )
    return record


def write(search_dir: Path, record: SearchRecord) -> None:
    """Leave a record that `read` gives back."""
    tree: Any = _finite(dataclasses.asdict(record))
    trials = "".join(json.dumps(trial) + "\n" for trial in tree.pop("trials"))
    storage.write_file(search_dir / "trials.jsonl", trials.encode())
    storage.write_file(search_dir / "search.json", json.dumps(tree, indent=1).encode())


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise StorageError(
            f"{path} cannot be read ({error}); name the directory of a search"
        ) from None


def _json(path: Path, text: str) -> Any:
    try:
        return json.loads(text, parse_constant=lambda _: None)
    except ValueError as error:
        raise StorageError(f"{path}: not JSON ({error}), cut short or altered") from None


def _value(kind: Any, raw: Any, at: str) -> Any:
    """JSON as a dataclass, tuple, mapping, Literal, `X | None` or plain type, nothing coerced."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is types.UnionType:
        return None if raw is None else _value(inner[0], raw, at)
    if is_dataclass(kind) and isinstance(raw, dict):
        hints = typing.get_type_hints(kind)
        for name in sorted(raw.keys() ^ hints.keys()):
            is_known = name in hints
            problem = "is missing" if is_known else f"is unknown.{nearest(name, list(hints))}"
            raise StorageError(f"{at}: {name!r} {problem}; was it written by another version?")
        fields = {name: _value(hint, raw[name], f"{at}: {name}") for name, hint in hints.items()}
        return typing.cast(type, kind)(**fields)
    if origin is tuple and isinstance(raw, list):
        kinds = inner[:1] * len(raw) if inner[-1] is ... else inner
        if len(kinds) == len(raw):
            pairs = enumerate(zip(kinds, raw, strict=True))
            return tuple(_value(one, item, f"{at}[{number}]") for number, (one, item) in pairs)
    if origin is Mapping and isinstance(raw, dict):
        return {name: _value(inner[1], item, f"{at}: {name}") for name, item in raw.items()}
    if kind is float and isinstance(raw, int | float) and not isinstance(raw, bool):
        return float(raw)
    if kind is object or type(raw) is kind or (origin is Literal and raw in inner):
        return raw
    raise StorageError(f"{at} is {str(raw)[:80]!r}, which a search never writes; resume the search")


def _finite(value: object) -> object:
    """The same with null for what JSON cannot say."""
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
