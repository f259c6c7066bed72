"""Search spaces: which fields of a training recipe vary, over which values, and on what evidence.

Parameters are flat, `{"lora.rank": 16, "optim.learning_rate_at_rank_16": 3e-4}`, and become a
recipe in one place (`recipe_for`), through the same checks as a recipe that a person wrote.

`optim.learning_rate_at_rank_16` is no field of a recipe. It trains with
`learning_rate = at_rank_16 * sqrt(16 / rank)`, so that rank and learning rate can be searched
independently. The best learning rate hardly depends on the rank where the update is scaled by a
constant alpha over the rank ("LoRA Without Regret", Thinking Machines 2025). Under Adam, a scale k
times as large with A's init and both learning rates divided by sqrt(k) is the same training, and
alpha = rank is a scale rank / 16 times as large as alpha = 16. The rule leaves A's init as it is,
so it is close, not exact.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from cluster import config
from cluster.errors import ConfigError
from training.config import (
    DataConfig,
    LoraConfig,
    MemoryConfig,
    ModelConfig,
    OptimConfig,
    ScaleConfig,
    TrainRecipe,
)

if TYPE_CHECKING:  # Optuna takes a second to import, which a typing error must not cost.
    from optuna.trial import BaseTrial

RANK = "lora.rank"
LEARNING_RATE = "optim.learning_rate"
AT_RANK_16 = "optim.learning_rate_at_rank_16"
SEARCHABLE: tuple[str, ...] = (
    *(f"lora.{field.name}" for field in dataclasses.fields(LoraConfig)),
    *(f"optim.{field.name}" for field in dataclasses.fields(OptimConfig)),
    AT_RANK_16,
)
"""What can vary between trials that share one base model and one data set."""
SEARCHABLE_SOLO: tuple[str, ...] = (
    *(f"model.{field.name}" for field in dataclasses.fields(ModelConfig)),
    *(f"data.{field.name}" for field in dataclasses.fields(DataConfig) if field.name != "eval"),
    *SEARCHABLE,
    *(f"memory.{field.name}" for field in dataclasses.fields(MemoryConfig)),
    *(f"scale.{field.name}" for field in dataclasses.fields(ScaleConfig)),
)
"""What can vary between trials that are training jobs of their own, `search.mode: solo`."""
Mode = Literal["packed", "solo"]

BARE = TrainRecipe(name="space", model=ModelConfig(base="demo"), data=DataConfig(train="train"))
"""A recipe of defaults, for a space that belongs to no recipe."""

_TARGETS = "lora.target_modules"
_BATCH = "optim.global_batch_size"
_MUTABLE = (LEARNING_RATE, AT_RANK_16, "optim.weight_decay", "lora.dropout")
_CHANGE_WHAT_IS_SCORED = ("model.base", "data.template", "data.mask", "data.max_length")
_MAX_GRID = 100_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Choices:
    """One of several values: numbers, words, null, or lists of them."""

    values: tuple[Any, ...]

    def sample(self, rng: np.random.Generator) -> Any:
        return self.values[int(rng.integers(len(self.values)))]

    def grid(self, points: int) -> list[Any]:
        return list(self.values)

    def suggest(self, trial: "BaseTrial", path: str) -> Any:
        # Optuna stores scalars only, so a list goes by its JSON text.
        labels = [json.dumps(v) if isinstance(v, list) else v for v in self.values]
        return self.values[labels.index(trial.suggest_categorical(path, labels))]

    def ends(self) -> tuple[Any, ...]:
        """The values that stand for all where a recipe's checks are run."""
        return self.values

    def __str__(self) -> str:
        return ", ".join(v if isinstance(v, str) else json.dumps(v) for v in self.values)


@dataclass(frozen=True, kw_only=True, slots=True)
class Floats:
    """A number from low to high, uniform or uniform in its logarithm."""

    low: float
    high: float
    is_log: bool = False

    def sample(self, rng: np.random.Generator) -> float:
        if not self.is_log:
            return float(rng.uniform(self.low, self.high))
        value = math.exp(rng.uniform(math.log(self.low), math.log(self.high)))
        return min(max(value, self.low), self.high)  # exp(log(x)) can miss x by one bit

    def grid(self, points: int) -> list[Any]:
        cut = np.geomspace if self.is_log else np.linspace
        return [float(value) for value in cut(self.low, self.high, points)]

    def suggest(self, trial: "BaseTrial", path: str) -> float:
        return trial.suggest_float(path, self.low, self.high, log=self.is_log)

    def ends(self) -> tuple[Any, ...]:
        return self.low, self.high

    def __str__(self) -> str:
        return f"{self.low:g} to {self.high:g}{', log' if self.is_log else ''}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Ints:
    """A whole number from low to high: every step-th, or uniform in its logarithm."""

    low: int
    high: int
    step: int = 1
    is_log: bool = False

    def sample(self, rng: np.random.Generator) -> int:
        if not self.is_log:
            return self.low + self.step * int(rng.integers(len(self._values())))
        # Half a unit more on each side gives the two ends their full share.
        value = math.exp(rng.uniform(math.log(self.low - 0.5), math.log(self.high + 0.5)))
        return min(max(round(value), self.low), self.high)

    def grid(self, points: int) -> list[Any]:
        values = self._values()
        if len(values) <= points:
            return list(values)
        if self.is_log:
            return [round(value) for value in np.geomspace(self.low, self.high, points)]
        return [values[round(index)] for index in np.linspace(0, len(values) - 1, points)]

    def suggest(self, trial: "BaseTrial", path: str) -> int:
        high = self._values()[-1]  # Optuna warns where the step misses the upper end
        return trial.suggest_int(path, self.low, high, step=self.step, log=self.is_log)

    def ends(self) -> tuple[Any, ...]:
        return self.low, self.high

    def __str__(self) -> str:
        step = f", step {self.step}" if self.step > 1 else ""
        return f"{self.low} to {self.high}{step}{', log' if self.is_log else ''}"

    def _values(self) -> range:
        return range(self.low, self.high + 1, self.step)


@dataclass(frozen=True, kw_only=True, slots=True)
class Dimension:
    """One field that varies."""

    path: str
    """Such as `lora.rank`; one of SEARCHABLE or SEARCHABLE_SOLO."""
    domain: Choices | Floats | Ints
    """The values it takes."""
    when: Mapping[str, tuple[Any, ...]] | None = None
    """Other fields and their values for which this one varies; elsewhere it is the recipe's."""

    def applies(self, params: Mapping[str, Any]) -> bool:
        conditions = (self.when or {}).items()
        return all(path in params and params[path] in values for path, values in conditions)


@dataclass(frozen=True, kw_only=True, slots=True)
class Space:
    """What a search varies: dimensions, or stages of them (never both).

    A stage is searched with the best parameters of the stages before it held fixed:
    `{**best, **params}`. A space with stages cannot be sampled itself.
    """

    name: str
    """The name in the search file, or `inline`."""
    dimensions: tuple[Dimension, ...] = ()
    """In order: a conditional one stands after those it depends on."""
    stages: tuple["Space", ...] = ()
    """Spaces to search one after another."""
    is_lr_scaled: bool = True
    """Whether the learning rate at rank 16 is scaled by sqrt(16 / rank)."""

    def every_dimension(self) -> tuple[Dimension, ...]:
        """Its dimensions, or those of all its stages."""
        return sum((stage.every_dimension() for stage in self.stages), self.dimensions)

    def mutable(self) -> tuple[Dimension, ...]:
        """The dimensions that may change during a trial, as population based training does."""
        return tuple(d for d in self.every_dimension() if d.path in _MUTABLE)

    def sample(self, rng: np.random.Generator) -> dict[str, Any]:
        """Parameters drawn at random, the same ones for the same state of `rng`."""
        return self._draw(lambda dimension: dimension.domain.sample(rng))

    def suggest(self, trial: "BaseTrial") -> dict[str, Any]:
        """Parameters that an Optuna trial asks for, define-by-run."""
        return self._draw(lambda dimension: dimension.domain.suggest(trial, dimension.path))

    def grid(self, points: int = 4) -> list[dict[str, Any]]:
        """Every combination once, ranges cut into `points` values from end to end."""
        assert self.dimensions, "a space with stages is searched stage by stage"
        rows: list[dict[str, Any]] = [{}]
        for dimension in self.dimensions:
            values = dimension.domain.grid(points)
            rows = [
                more
                for row in rows
                for more in (
                    [{**row, dimension.path: value} for value in values]
                    if dimension.applies(row)
                    else [row]
                )
            ]
            if len(rows) > _MAX_GRID:
                raise ConfigError(
                    f"the grid of space {self.name!r} has more than {_MAX_GRID} points; "
                    "give fewer choices, or search.searcher: random or optuna"
                )
        return list({self.key(row): row for row in rows}.values())

    @staticmethod
    def key(params: Mapping[str, Any]) -> str:
        """Canonical JSON: the same text for the same parameters in any order."""
        return json.dumps(params, sort_keys=True, separators=(",", ":"))

    def _draw(self, value_of: Callable[[Dimension], Any]) -> dict[str, Any]:
        assert self.dimensions, "a space with stages is searched stage by stage"
        params: dict[str, Any] = {}
        for dimension in self.dimensions:
            if dimension.applies(params):
                params[dimension.path] = value_of(dimension)
        return params


def largest(space: Space, recipe: TrainRecipe) -> TrainRecipe:
    """The recipe of the space's largest adapter, at its smallest batch: what seats are sized by."""
    params: dict[str, Any] = {}
    for dimension in space.every_dimension():
        ends = dimension.domain.ends()
        if dimension.path == RANK:
            params[RANK] = max(ends)
        elif dimension.path == _TARGETS:
            params[_TARGETS] = max(ends, key=_width)
        elif dimension.path == _BATCH:
            params[_BATCH] = min(ends)
    return recipe_for(recipe, params, where=f"space {space.name!r}") if params else recipe


def _width(targets: Any) -> float:
    if isinstance(targets, str):
        return math.inf if targets == "all-linear" else 1
    return len(targets)


def recipe_for(
    recipe: TrainRecipe,
    params: Mapping[str, Any],
    *,
    is_lr_scaled: bool = True,
    mode: Mode = "packed",
    where: str = "parameters of a trial",
) -> TrainRecipe:
    """The recipe of a trial. Raises ConfigError, which starts with `where`, if it is refused."""
    tree = config.plain(recipe)
    for path, value in params.items():
        require_searchable(path, mode)
        if path != AT_RANK_16:
            section, _, field = path.partition(".")
            tree[section][field] = value
    result = config.build(TrainRecipe, tree, where=where)
    if AT_RANK_16 not in params:
        return result
    tree["optim"]["learning_rate"] = params[AT_RANK_16] * _factor(result.lora.rank, is_lr_scaled)
    return config.build(TrainRecipe, tree, where=where)


def require_searchable(path: str, mode: Mode = "packed") -> None:
    """Raises ConfigError for a path that names no field, or one that trials have in common."""
    searchable = SEARCHABLE_SOLO if mode == "solo" else SEARCHABLE
    if path in searchable:
        return
    section, _, field = path.partition(".")
    known = config.plain(BARE)
    is_field = field in known[section] if isinstance(known.get(section), dict) else path in known
    if path in SEARCHABLE_SOLO:
        raise ConfigError(
            f"space: {path} cannot vary with search.mode: packed, whose trials share one base "
            "model, one data set and one machine; set search.mode: solo, where each trial is a "
            f"training job. What can vary in packed: {', '.join(SEARCHABLE)}"
        )
    if is_field:
        raise ConfigError(
            f"space: {path} cannot vary inside a search, which keeps and compares all its trials "
            f"in one way; run a search for each value. What can vary: {', '.join(searchable)}"
        )
    raise ConfigError(
        f"space: unknown field {path!r}.{config.nearest(path, searchable)} "
        f"Valid: {', '.join(searchable)}"
    )


def learning_rates(
    recipe: TrainRecipe,
    params: Mapping[str, Any],
    *,
    is_lr_scaled: bool = True,
    mode: Mode = "packed",
) -> tuple[float, float]:
    """A trial's learning rate at rank 16 and the one that it trains with."""
    result = recipe_for(recipe, params, is_lr_scaled=is_lr_scaled, mode=mode)
    actual = result.optim.learning_rate
    at_rank_16 = params.get(AT_RANK_16, actual / _factor(result.lora.rank, is_lr_scaled))
    return float(at_rank_16), actual


def rank_lr() -> Space:
    """Rank and learning rate, the default.

    The best learning rate moves with the base and the data, so the range is a decade to each side
    of the 2e-4 that QLoRA (arXiv 2305.14314) used up to 13B. Rank is capacity: with enough of it
    LoRA learns like full fine-tuning, with too little it falls behind late in a run ("LoRA Without
    Regret", Thinking Machines 2025); QLoRA found that it hardly matters once all linear layers are
    adapted. Alpha and the target modules are the recipe's, whose defaults are alpha = rank and
    all-linear.
    """
    return Space(name="rank_lr", dimensions=(_ranks(8, 16, 32, 64), _rates()))


def lr_first() -> Space:
    """The learning rate at the largest rank, then the rank at the learning rate found.

    Where the rule of this module's docstring holds ("LoRA Without Regret"), the two are independent
    and searching them in turn costs their sum instead of their product. Where it does not (alpha
    fixed in the recipe, rslora), the second stage compares ranks at a rate that suits only the
    largest: take rank_lr.
    Seeds come last, as for every space: the finalists are run again with search.seeds. They are no
    stage, since keeping the best of several seeds would only keep the luckiest.
    """
    return Space(
        name="lr_first",
        stages=(
            Space(name="lr_first: learning rate", dimensions=(_ranks(64), _rates())),
            Space(name="lr_first: rank", dimensions=(_ranks(8, 16, 32, 64),)),
        ),
    )


def seed_article() -> Space:
    """Ranks 1 to 64 by the layers adapted, the comparison that LoRA articles repeat.

    The LoRA paper (arXiv 2106.09685, section 7) found very small ranks enough, and more matrices
    at a smaller rank better than fewer at a larger one. Its tasks were narrow: "LoRA Without
    Regret" sees small ranks run out of capacity on instruction data, hence the warning below rank
    8. The learning rate stays the recipe's; with alpha = rank that is hotter for larger ranks, so
    take rank_lr or targets to decide, and this one to see the effect.
    """
    return Space(
        name="seed_article",
        dimensions=(_ranks(1, 2, 4, 8, 16, 32, 64), _targets(*_ATTENTION, "all-linear")),
    )


def targets() -> Space:
    """Which layers are adapted, each with its own learning rate.

    All linear layers were needed to match full fine-tuning in QLoRA (arXiv 2305.14314, figure 2),
    and attention alone was worse than the MLP alone in "LoRA Without Regret", even at equal
    parameter counts. Layer names are those of Llama, Mistral, Qwen and SmolLM; for other bases
    write the choices inline.
    """
    mlp = ["gate_proj", "up_proj", "down_proj"]
    return Space(name="targets", dimensions=(_targets(*_ATTENTION, mlp, "all-linear"), _rates()))


def batch() -> Space:
    """Examples per step, each with its own learning rate.

    "LoRA Without Regret" found LoRA to lose more than full fine-tuning at large batches, whatever
    the rank. At a fixed number of tokens a larger batch also means fewer steps, so the two are
    only compared fairly where the learning rate is searched with it.
    """
    sizes = Dimension(path="optim.global_batch_size", domain=Choices(values=(8, 16, 32, 64)))
    return Space(name="batch", dimensions=(sizes, _rates()))


NAMED: dict[str, Callable[[], Space]] = {
    space.__name__: space for space in (rank_lr, lr_first, seed_article, targets, batch)
}


def warnings_for(space: Space, recipe: TrainRecipe) -> list[str]:
    """What the evidence says against a space; it is searched all the same."""
    dimensions = {d.path: d for d in space.every_dimension()}
    warnings: list[str] = []
    ranks = dimensions[RANK].domain.ends() if RANK in dimensions else ()
    if small := [rank for rank in ranks if rank < 8]:
        warnings.append(
            f"rank below 8 is small for instruction data: space {space.name!r} tries rank "
            f"{min(small)}, which may run out of capacity"
        )
    is_rule_unfit = (
        {"lora.alpha", "lora.variant"} & set(dimensions)
        or recipe.lora.alpha is not None
        or recipe.lora.variant == "rslora"
    )
    if len(ranks) > 1 and AT_RANK_16 in dimensions and space.is_lr_scaled and is_rule_unfit:
        warnings.append(
            "the rule learning_rate = at_rank_16 * sqrt(16 / rank) is for alpha = rank and "
            "variant lora, which this search does not keep; "
            "scale_learning_rate: false in an inline space turns it off"
        )
    if other := [path for path in dimensions if path in _CHANGE_WHAT_IS_SCORED]:
        warnings.append(
            f"{', '.join(other)}: trials are then scored on other tokens of the held-out examples, "
            "so their losses are not losses of the same thing; compare them by exact_match or "
            "rouge_l"
        )
    return warnings


_ATTENTION = (["q_proj", "v_proj"], ["q_proj", "k_proj", "v_proj", "o_proj"])


def _ranks(*ranks: int) -> Dimension:
    return Dimension(path=RANK, domain=Choices(values=ranks))


def _rates() -> Dimension:
    return Dimension(path=AT_RANK_16, domain=Floats(low=2e-5, high=2e-3, is_log=True))


def _targets(*layers: str | list[str]) -> Dimension:
    return Dimension(path="lora.target_modules", domain=Choices(values=layers))


def _factor(rank: int, is_lr_scaled: bool) -> float:
    return math.sqrt(16 / rank) if is_lr_scaled else 1.0
