"""The words of a search file: a training recipe's, and two more, `space` and `search`.

`space` is a name of `spaces.NAMED`, or a mapping of `section.field` to what it takes:

    lora.rank: [8, 16, 32, 64]
    optim.learning_rate_at_rank_16: {log_uniform: [2e-5, 2e-3]}
    optim.weight_decay: {uniform: [0, 0.1]}
    optim.global_batch_size: {int: [8, 64], step: 8}        # or log: true
    lora.dropout: {choices: [0, 0.1], when: {lora.rank: [32, 64]}}
    scale_learning_rate: false                              # optional, true by default
"""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from cluster import config
from cluster.errors import ConfigError
from training.config import TrainRecipe
from tune_spaces import spaces
from tune_spaces.guards import Guards
from tune_spaces.spaces import (
    AT_RANK_16,
    LEARNING_RATE,
    RANK,
    Choices,
    Dimension,
    Floats,
    Ints,
    Mode,
    Space,
)

_SCALE = "scale_learning_rate"
_VARIANT = "lora.variant"
_KINDS = ("choices", "uniform", "log_uniform", "int")
_BOUNDS: dict[str, tuple[float, float]] = {
    "trials": (1, 10_000),
    "seats": (1, 1024),
    "budget_tokens": (1, 10**12),
    "budget_minutes": (0.01, 10**6),
    "report_every_tokens": (1, 10**12),
    "finalists": (1, 100),
    "seeds": (1, 100),
    "seed": (0, 2**31 - 1),
    "reduction_factor": (2, 100),
    "grace_tokens": (1, 10**12),
    "fill_window_s": (0, 3600),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchConfig:
    """How a space is searched."""

    mode: Mode = "packed"
    """packed: trials share one base on each device; solo: each is an ordinary training job."""
    trials: int = 16
    """Trials in all; a grid has as many as it has points, up to this number."""
    seats: int | Literal["auto"] = "auto"
    """Trials at once. auto: packed, as many on one base as make it faster, found by a short probe;
    solo, as many as the cluster has room for."""
    scheduler: Literal["fifo", "asha", "hyperband", "median", "pbt", "pb2"] = "asha"
    """What stops weak trials early; fifo stops none; pbt and pb2 also change the strong ones."""
    searcher: Literal["random", "grid", "optuna"] = "optuna"
    """What chooses the parameters of a trial."""
    sampler: Literal["tpe", "gp"] = "tpe"
    """Optuna's model: Parzen estimators or a Gaussian process."""
    metric: Literal["eval_loss", "train_loss", "exact_match", "json_valid", "rouge_l"] = "eval_loss"
    """What is compared; the last three are measured on generated text."""
    budget_tokens: int | None = None
    """Supervised tokens of one trial; null is what optim.epochs or optim.max_steps come to."""
    budget_minutes: float | None = None
    """Minutes of the whole search; null is no limit."""
    report_every_tokens: int | None = None
    """Supervised tokens between two reports of a trial; null is an eighth of its budget."""
    finalists: int = 3
    """Best trials that are run again with other seeds."""
    seeds: int = 3
    """Seeds of each finalist, the first run included."""
    seed: int = 0
    """Seeds the choice of parameters."""
    reduction_factor: int = 3
    """asha and hyperband keep one trial in so many at each rung."""
    grace_tokens: int | None = None
    """Supervised tokens before a trial may be stopped; null is one report."""
    fill_window_s: float = 10
    """Seconds that the first trials wait for others, so that they do not travel alone."""
    test: str | None = None
    """Held-out examples that no decision uses, for the winner's figure."""
    guards: Guards = field(default_factory=Guards)
    """What ends a trial early on its own account."""
    log: tuple[Literal["tensorboard", "mlflow", "wandb"], ...] = ()
    """Who else hears of the trials."""

    def __post_init__(self) -> None:
        for name, (low, high) in _BOUNDS.items():
            value = getattr(self, name)
            if value not in (None, "auto") and not low <= value <= high:
                raise ConfigError(f"search.{name} is {value!r}; allowed: {low} to {high}")
        for name in ("report_every_tokens", "grace_tokens"):
            value = getattr(self, name)
            if value and self.budget_tokens and value > self.budget_tokens:
                raise ConfigError(
                    f"search.{name} is {value}, more than search.budget_tokens "
                    f"({self.budget_tokens}); give at most that"
                )
        if self.sampler == "gp" and self.searcher != "optuna":
            raise ConfigError(
                f"search.sampler is gp, but search.searcher is {self.searcher}; use optuna"
            )
        for name in ("overfit_patience", "overfit_margin", "plateau_patience", "plateau_gain"):
            value = getattr(self.guards, name)
            if self.mode == "solo" and value not in (None, getattr(Guards(), name)):
                raise ConfigError(
                    f"search.guards.{name} is {value}, but search.mode: solo keeps no earlier "
                    "report of a trial, and ends it at a divergence only; leave it out"
                )
        if self.grace_tokens is not None and self.scheduler == "fifo":
            raise ConfigError("search.grace_tokens has no use with search.scheduler: fifo")


@dataclass(frozen=True, kw_only=True, slots=True)
class Search:
    """A search file, read and checked."""

    recipe: TrainRecipe
    """What all trials have in common."""
    space: Space
    """What varies."""
    search: SearchConfig
    """How it is searched."""
    space_spec: str | Mapping[str, Any]
    """The space as it was written."""

    def __post_init__(self) -> None:
        if self.recipe.objective.kind == "dpo":
            raise ConfigError(
                "objective.kind is dpo, which a search does not vary: trials share tokens of a "
                "budget and are compared by the loss of an answer, and a preference has two. "
                "Search with objective.kind: supervised, or train with `loray train`"
            )
        held_out = _sources(self.recipe.data.eval)
        if self.search.metric != "train_loss" and not held_out:
            raise ConfigError(
                f"search.metric is {self.search.metric}, which needs held-out examples: add "
                "data.eval, or use search.metric: train_loss"
            )
        if self.search.test in (*held_out, *_sources(self.recipe.data.train)):
            raise ConfigError(
                f"search.test is {self.search.test!r}, which is data.train or data.eval too; "
                "name examples that no decision uses"
            )
        if self.search.mode == "packed":
            self._require_shareable()

    def _require_shareable(self) -> None:
        """Refuse before Ray is started what no bench would take."""
        variants = [d.domain.ends() for d in self.space.every_dimension() if d.path == _VARIANT]
        if "dora" in (self.recipe.lora.variant, *sum(variants, ())):
            raise ConfigError(
                "lora.variant: dora cannot sit beside other trials on one base; set "
                "search.mode: solo, or leave dora out"
            )
        if self.recipe.data.streaming:
            raise ConfigError(
                "data.streaming cannot be shared by trials on one base; set search.mode: solo"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Words(TrainRecipe):
    """Every key of a search file, for the strict loader."""

    space: str = "rank_lr"
    search: SearchConfig = field(default_factory=SearchConfig)


def load(path: Path, overrides: Sequence[str] = ()) -> Search:
    """Read a search file; `section.field=value`, `search.field=value` and `space=name` override.

    Raises ConfigError as a recipe does, and for a space or a search that cannot be used.
    """
    return build(config.read(path), overrides, where=str(path))


def build(tree: dict[str, Any], overrides: Sequence[str] = (), *, where: str) -> Search:
    """The same of a file's tree; where: begins what an error says."""
    for override in overrides:
        config.apply_override(_Words, tree, override)
    tree = dict(tree)
    spec = tree.pop("space", None)
    spec = "rank_lr" if spec is None else spec
    words = config.build(_Words, tree, where=where)
    fields = dataclasses.fields(TrainRecipe)
    recipe = TrainRecipe(**{field.name: getattr(words, field.name) for field in fields})
    try:
        space = parse(spec, recipe, words.search.mode)
        return Search(recipe=recipe, space=space, search=words.search, space_spec=spec)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def plain(search: Search) -> dict[str, Any]:
    """The search as a file's tree: nested dicts and lists, ready for JSON."""
    spec = json.loads(json.dumps(search.space_spec))
    return {**config.plain(search.recipe), "space": spec, "search": config.plain(search.search)}


def schema() -> dict[str, Any]:
    """JSON Schema of a search file."""
    tree = config.schema(TrainRecipe)
    search = config.schema(SearchConfig)
    del search["$schema"]
    words = {"space": {**_space_schema(), "default": "rank_lr"}, "search": search}
    return {**tree, "properties": {**tree["properties"], **words}}


def parse(
    spec: str | Mapping[str, Any], recipe: TrainRecipe = spaces.BARE, mode: Mode = "packed"
) -> Space:
    """A named or an inline space, every value of which `recipe` accepts.

    Raises ConfigError for an unknown name, field or kind of range, an empty choice, a range that
    is empty or cannot be logarithmic, a condition on nothing, and a value that a recipe refuses.
    """
    if isinstance(spec, str):
        if spec not in spaces.NAMED:
            raise ConfigError(
                f"space: there is no space {spec!r}.{config.nearest(spec, list(spaces.NAMED))} "
                f"Valid: {', '.join(spaces.NAMED)}, or a mapping of section.field to choices "
                "or a range"
            )
        space = spaces.NAMED[spec]()
    else:
        space = _inline(spec, recipe, mode)
    _check(space, recipe, mode)
    return space


def _sources(names: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else names or ()


def _space_schema() -> dict[str, Any]:
    pair = {"type": "array", "minItems": 2, "maxItems": 2}
    several = {"type": "array", "minItems": 1}
    kinds = {"choices": several, "uniform": pair, "log_uniform": pair, "int": pair}
    options = {
        "step": {"type": "integer", "minimum": 1},
        "log": {"type": "boolean"},
        "when": {"type": "object", "additionalProperties": several},
    }
    entry = {
        "type": "object",
        "properties": {**kinds, **options},
        "additionalProperties": False,
        "oneOf": [{"required": [kind]} for kind in kinds],
    }
    fields = {path: {"anyOf": [several, entry]} for path in spaces.SEARCHABLE_SOLO}
    inline = {
        "type": "object",
        "properties": {**fields, _SCALE: {"type": "boolean", "default": True}},
        "additionalProperties": False,
    }
    return {"anyOf": [{"enum": list(spaces.NAMED)}, inline]}


def _check(space: Space, recipe: TrainRecipe, mode: Mode) -> None:
    """Every value by itself, and the scaled learning rate at each rank of the space."""
    dimensions = space.every_dimension()
    ranks = [v for d in dimensions if d.path == RANK for v in d.domain.ends()]
    for dimension in dimensions:
        for value in dimension.domain.ends():
            for rank in ranks or [recipe.lora.rank]:
                spaces.recipe_for(
                    recipe,
                    {RANK: rank, dimension.path: value},
                    is_lr_scaled=space.is_lr_scaled,
                    mode=mode,
                    where=f"space {space.name!r}",
                )


def _inline(spec: object, recipe: TrainRecipe, mode: Mode) -> Space:
    if not isinstance(spec, Mapping):
        raise ConfigError(
            f"space is {spec!r}; expected a name ({', '.join(spaces.NAMED)}) or a mapping of "
            "section.field to choices or a range"
        )
    entries = {str(path): entry for path, entry in spec.items()}
    is_lr_scaled = entries.pop(_SCALE, True)
    if not isinstance(is_lr_scaled, bool):
        raise ConfigError(f"space: {_SCALE} is {is_lr_scaled!r}; allowed: true or false")
    if not entries:
        raise ConfigError("space names no field; give one, such as lora.rank: [8, 16, 32, 64]")
    dimensions: list[Dimension] = []
    for path, entry in entries.items():
        spaces.require_searchable(path, mode)
        dimensions.append(_dimension(path, entry, dimensions, recipe))
    if LEARNING_RATE in entries and AT_RANK_16 in entries:
        raise ConfigError(f"space: {LEARNING_RATE} and {AT_RANK_16} are both given; keep one")
    return Space(name="inline", dimensions=tuple(dimensions), is_lr_scaled=is_lr_scaled)


def _dimension(
    path: str, entry: object, earlier: Sequence[Dimension], recipe: TrainRecipe
) -> Dimension:
    fields = {"choices": entry} if isinstance(entry, list | tuple) else entry
    if not isinstance(fields, Mapping):
        raise ConfigError(
            f"space: {path} is {entry!r}; expected a list of choices or one of "
            f"{', '.join(_KINDS)}. A fixed value belongs into the recipe"
        )
    valid = (*_KINDS, "step", "log", "when")
    for key in map(str, fields):
        if key not in valid:
            raise ConfigError(
                f"space: {path}: unknown kind of range {key!r}.{config.nearest(key, valid)} "
                f"Valid: {', '.join(valid)}"
            )
    kinds = [kind for kind in _KINDS if kind in fields]
    if len(kinds) != 1:
        found = " and ".join(kinds) or "none"
        raise ConfigError(f"space: {path} needs one of {', '.join(_KINDS)}; found {found}")
    kind = kinds[0]
    if kind != "int" and ("step" in fields or "log" in fields):
        raise ConfigError(f"space: {path}: step and log go with int, not with {kind}")
    if kind == "choices":
        domain = Choices(values=_values(path, fields[kind], recipe))
    else:
        domain = _range(path, kind, fields)
        for end in domain.ends():
            _accepted(path, end, recipe)
    when = _when(path, fields["when"], earlier, recipe) if "when" in fields else None
    return Dimension(path=path, domain=domain, when=when)


def _values(path: str, raw: object, recipe: TrainRecipe) -> tuple[Any, ...]:
    if not isinstance(raw, list | tuple) or not raw:
        raise ConfigError(f"space: {path} is {raw!r}; expected a list with at least one value")
    values = tuple(_accepted(path, value, recipe) for value in raw)
    for index, value in enumerate(values):
        if value in values[:index]:
            raise ConfigError(f"space: {path}: {value!r} stands twice; keep one of them")
    return values


def _accepted(path: str, value: object, recipe: TrainRecipe) -> Any:
    """The value as a recipe holds it: `2e-5`, which YAML 1.1 reads as text, is a number there."""
    field = LEARNING_RATE if path == AT_RANK_16 else path
    section, _, name = field.partition(".")
    # Whether the mode lets it vary has been asked before.
    built = spaces.recipe_for(recipe, {field: value}, mode="solo", where=f"space: {path}")
    return config.plain(built)[section][name]


def _range(path: str, kind: str, fields: Mapping[str, Any]) -> Floats | Ints:
    ends = fields[kind]
    if not isinstance(ends, list | tuple) or len(ends) != 2:
        raise ConfigError(f"space: {path}: {kind} is {ends!r}; expected [low, high]")
    is_log, step = fields.get("log", False), fields.get("step", 1)
    if not isinstance(is_log, bool):
        raise ConfigError(f"space: {path}: log is {is_log!r}; allowed: true or false")
    if type(step) is not int or step < 1 or (is_log and step != 1):
        raise ConfigError(f"space: {path}: step is {step!r}; allowed: 1 or more, and 1 with log")
    is_log = is_log or kind == "log_uniform"
    low, high = (_number(path, kind, end) for end in ends)
    if low >= high:
        raise ConfigError(f"space: {path}: {kind} is {ends!r}; the low end must be below the high")
    if is_log and low <= 0:
        raise ConfigError(
            f"space: {path}: a log range cannot reach zero, but it starts at {low!r}; "
            "start above zero, or leave the log away"
        )
    if kind == "int":
        return Ints(low=int(low), high=int(high), step=step, is_log=is_log)
    return Floats(low=float(low), high=float(high), is_log=is_log)


def _number(path: str, kind: str, raw: object) -> float:
    if kind == "int":
        if type(raw) is int:
            return raw
        raise ConfigError(f"space: {path}: {raw!r} in int; allowed: a whole number")
    try:
        value = float("nan") if isinstance(raw, bool) else float(raw)  # pyright: ignore[reportArgumentType]
    except (TypeError, ValueError):
        value = float("nan")
    if not math.isfinite(value):
        raise ConfigError(f"space: {path}: {raw!r} in {kind}; allowed: a finite number")
    return value


def _when(
    path: str, raw: object, earlier: Sequence[Dimension], recipe: TrainRecipe
) -> dict[str, tuple[Any, ...]]:
    if not isinstance(raw, Mapping) or not raw:
        raise ConfigError(
            f"space: {path}: when is {raw!r}; expected a mapping such as {{lora.variant: [lora]}}"
        )
    choices = {d.path: d.domain.values for d in earlier if isinstance(d.domain, Choices)}
    when: dict[str, tuple[Any, ...]] = {}
    for other, wanted in raw.items():
        if other not in choices:
            names = ", ".join(choices) or "none"
            raise ConfigError(
                f"space: {path}: when names {other!r}, which is no field with choices that stands "
                f"before it in the space.{config.nearest(str(other), list(choices))} "
                f"Those are: {names}"
            )
        values = _values(other, wanted, recipe)
        for value in values:
            if value not in choices[other]:
                raise ConfigError(
                    f"space: {path}: when waits for {other} = {value!r}, which is not among its "
                    f"choices {list(choices[other])}"
                )
        when[other] = values
    return when
