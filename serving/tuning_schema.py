"""Requests of the fine-tuning API, every field bounded, and its answers.

Fields follow OpenAI's client 3.57: types/fine_tuning/job_create_params.py. `lora` and `search` are
extensions (`extra_body`). What is not supported is refused by name.
"""

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError
from typing_extensions import TypedDict  # pydantic takes typing's from Python 3.12 on only

from cluster.errors import ConfigError
from serving.schema import Strict, T
from training import hyperparameters
from tune_spaces import config as search_config
from tune_spaces.config import SearchConfig
from tune_spaces.spaces import AT_RANK_16, LEARNING_RATE, RANK

SUFFIX = r"[A-Za-z0-9](?:[A-Za-z0-9_.-]{0,62}[A-Za-z0-9])?"
_MAX_SEED = (1 << 31) - 1
_MAX_RANK = 256
_BATCH_SIZE = "optim.global_batch_size"
_VARIABLE = (
    RANK, "lora.alpha", "lora.dropout", "lora.target_modules", "lora.variant",
    LEARNING_RATE, AT_RANK_16, "optim.weight_decay", _BATCH_SIZE,
)  # fmt: skip
"""What a search over HTTP may vary: nothing that makes a trial longer without end."""
_MAX_CHOICES = 64
Status = Literal[
    "validating_files", "queued", "running", "paused", "succeeded", "failed", "cancelled"
]


def _in_range(value: object, info: ValidationInfo) -> object:
    name = str(info.field_name)
    try:
        hyperparameters.check("dpo", {name: value})  # which has the others', too
    except ConfigError as error:
        why = f"allowed: {str(error).partition('allowed: ')[2]}"
        raise PydanticCustomError("invalid_value", "{why}", {"why": why}) from None
    return value


Number = Annotated[
    float | int | Literal["auto"] | None,
    BeforeValidator(_in_range),
    Field(description="`auto` or a number."),
]


class Hyperparameters(Strict):
    """Each `auto` where it is left out."""

    n_epochs: Number = None
    """1 to 50."""
    batch_size: Number = None
    """1 to 256."""
    learning_rate_multiplier: Number = None
    """Of the rate 3e-4."""

    def given(self) -> dict[str, float | str]:
        """What is not left out."""
        return {name: value for name, value in self.model_dump().items() if value is not None}


class DpoHyperparameters(Hyperparameters):
    """The same, and how far the adapter may go from the base."""

    beta: Number = None
    """Above 0, to 2."""


class Supervised(Strict):
    """Learns the answers as they are."""

    hyperparameters: Hyperparameters = Hyperparameters()


class Dpo(Strict):
    """Learns which of two answers is preferred."""

    hyperparameters: DpoHyperparameters = DpoHyperparameters()


class Method(Strict):
    """How a job learns."""

    type: Literal["supervised", "dpo"]
    supervised: Supervised | None = None
    dpo: Dpo | None = None

    @model_validator(mode="before")
    @classmethod
    def _supported(cls, value: Any) -> Any:
        if isinstance(value, Mapping) and value.get("type") == "reinforcement":
            raise PydanticCustomError(
                "unsupported_value", "reinforcement is not supported; allowed: supervised, dpo"
            )
        return value

    @model_validator(mode="after")
    def _one(self) -> "Method":
        other = self.dpo if self.type == "supervised" else self.supervised
        if other is not None:
            raise PydanticCustomError(
                "invalid_value", "only the settings of the method's own type may stand beside it"
            )
        return self


class Lora(Strict):
    """The adapter (an extension)."""

    rank: Annotated[int, Field(ge=1, le=_MAX_RANK)] = 16
    alpha: Annotated[float, Field(gt=0, le=65536)] | None = None
    """Null: the rank."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target_modules: (
        Literal["all-linear"]
        | Annotated[
            list[Annotated[str, Field(pattern=r"^[A-Za-z0-9_.]{1,64}$")]],
            Field(min_length=1, max_length=64),
        ]
    ) = "all-linear"
    variant: Literal["lora", "rslora"] = "lora"


class SearchOptions(Strict):
    """A search in place of one run (an extension): words of a search file."""

    space: (
        Annotated[str, Field(max_length=64)]
        | Annotated[
            dict[Annotated[str, Field(max_length=64)], Any], Field(min_length=1, max_length=16)
        ]
    ) = "rank_lr"
    """A name, or a mapping of `section.field` to choices or a range."""
    trials: Annotated[int, Field(ge=1, le=256)] = 16
    metric: Literal["eval_loss", "train_loss", "exact_match", "json_valid", "rouge_l"] = "eval_loss"
    """All but train_loss want a validation file."""
    scheduler: Literal["fifo", "asha", "hyperband", "median", "pbt", "pb2"] = "asha"
    searcher: Literal["random", "grid", "optuna"] = "optuna"
    sampler: Literal["tpe", "gp"] = "tpe"
    finalists: Annotated[int, Field(ge=1, le=10)] = 3
    seeds: Annotated[int, Field(ge=1, le=10)] = 3
    budget_minutes: Annotated[float, Field(ge=0.01, le=1_000_000)] | None = None
    """Of the whole search."""

    @field_validator("space")
    @classmethod
    def _searchable(cls, value: str | dict[str, Any]) -> str | dict[str, Any]:
        for path, entry in value.items() if isinstance(value, dict) else ():
            choices = entry.get("choices") if isinstance(entry, dict) else entry
            if isinstance(choices, list) and len(choices) > _MAX_CHOICES:
                raise PydanticCustomError(
                    "invalid_value",
                    "{path} has {number} choices; allowed: up to {most}",
                    {"path": path, "number": len(choices), "most": _MAX_CHOICES},
                )
        try:
            found = search_config.parse(value).every_dimension()
        except ConfigError as error:
            raise PydanticCustomError("invalid_value", "{why}", {"why": str(error)}) from None
        for dimension in found:
            if dimension.path not in _VARIABLE:
                raise PydanticCustomError(
                    "invalid_value",
                    "{path} cannot vary over HTTP; allowed: {allowed}",
                    {"path": dimension.path, "allowed": ", ".join(_VARIABLE)},
                )
            if dimension.path == RANK and max(dimension.domain.ends()) > _MAX_RANK:
                raise PydanticCustomError(
                    "invalid_value",
                    "{path} is above {most}, the largest allowed",
                    {"path": RANK, "most": _MAX_RANK},
                )
        return value

    @model_validator(mode="after")
    def _usable(self) -> "SearchOptions":
        try:
            SearchConfig(**self.words())
        except ConfigError as error:
            raise PydanticCustomError("invalid_value", "{why}", {"why": str(error)}) from None
        return self

    def words(self) -> dict[str, Any]:
        """What stands under `search` in a search file."""
        return self.model_dump(exclude={"space"})

    def varied(self) -> set[str]:
        """The fields that the space varies, as `section.field`."""
        return {dimension.path for dimension in search_config.parse(self.space).every_dimension()}


class CreateJob(Strict):
    """The body of POST /v1/fine_tuning/jobs."""

    model: Annotated[str, Field(min_length=1, max_length=256)]
    training_file: Annotated[str, Field(min_length=1, max_length=64)]
    validation_file: Annotated[str, Field(min_length=1, max_length=64)] | None = None
    suffix: Annotated[str, Field(max_length=64)] | None = None
    seed: Annotated[int, Field(ge=0, le=_MAX_SEED)] | None = None
    method: Method | None = None
    hyperparameters: Hyperparameters | None = None
    """The older way to say `method.supervised.hyperparameters`."""
    metadata: (
        Annotated[
            dict[
                Annotated[str, Field(min_length=1, max_length=64)],
                Annotated[str, Field(max_length=512)],
            ],
            Field(max_length=16),
        ]
        | None
    ) = None
    integrations: list[Any] | None = None
    lora: Lora = Lora()
    search: SearchOptions | None = None

    @field_validator("suffix")
    @classmethod
    def _plain_suffix(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(SUFFIX, value):
            raise PydanticCustomError(
                "invalid_value",
                "allowed: 1 to 64 letters, digits and _ . -, beginning and ending with a letter "
                "or digit",
            )
        return value

    @field_validator("metadata")
    @classmethod
    def _printable(cls, value: dict[str, str] | None) -> dict[str, str] | None:
        if any("\0" in text for pair in (value or {}).items() for text in pair):
            raise PydanticCustomError("invalid_value", "a NUL character cannot be stored")
        return value

    @field_validator("integrations")
    @classmethod
    def _none(cls, value: list[Any] | None) -> None:
        if value:
            raise PydanticCustomError(
                "unsupported_value",
                "integrations are not supported; the operator sets `log.to` for all jobs",
            )

    @field_validator("hyperparameters")
    @classmethod
    def _one_way(cls, value: T, info: ValidationInfo) -> T:
        if value is not None and info.data.get("method") is not None:
            raise PydanticCustomError(
                "invalid_value", "give method or hyperparameters (deprecated), not both"
            )
        return value

    @field_validator("search")
    @classmethod
    def _goes_with_the_rest(
        cls, value: SearchOptions | None, info: ValidationInfo
    ) -> SearchOptions | None:
        why = value and _why_not(value, info.data)
        if why:
            raise PydanticCustomError("invalid_value", "{why}", {"why": why})
        return value

    @property
    def kind(self) -> Literal["supervised", "dpo"]:
        """The method's type."""
        return "supervised" if self.method is None else self.method.type

    @property
    def asked(self) -> dict[str, float | str]:
        """The hyperparameters that were given."""
        return _asked(self.method, self.hyperparameters)


def _asked(method: Method | None, older: Hyperparameters | None) -> dict[str, float | str]:
    if method is None:
        return {} if older is None else older.given()
    settings = method.supervised or method.dpo
    return {} if settings is None else settings.hyperparameters.given()


def _why_not(search: SearchOptions, rest: Mapping[str, Any]) -> str | None:
    """Why a search does not go with the rest of a request; what is wrong in itself is left out."""
    method: Method | None = rest.get("method")
    if method is not None and method.type == "dpo":
        return "a search is supervised; leave it out, or method.type dpo"
    if search.metric != "train_loss" and rest.get("validation_file") is None:
        return (
            f"its metric is {search.metric}, which needs held-out examples; give validation_file, "
            "or the metric train_loss"
        )
    lora: Lora | None = rest.get("lora")
    fixed = {f"lora.{name}": f"lora.{name}" for name in (lora.model_fields_set if lora else ())}
    asked = _asked(method, rest.get("hyperparameters"))
    for name, path in (
        ("batch_size", _BATCH_SIZE),
        ("learning_rate_multiplier", LEARNING_RATE),
        ("learning_rate_multiplier", AT_RANK_16),
    ):
        if asked.get(name, "auto") != "auto":
            fixed[path] = f"hyperparameters.{name}"
    both = sorted(fixed[path] for path in search.varied() & fixed.keys())
    return f"{both[0]} is given, and space varies it; leave one of them out" if both else None


class JobError(TypedDict):
    """Why a job has failed."""

    code: str
    message: str
    param: str | None


class JobObject(TypedDict):
    """A fine-tuning job."""

    id: str
    object: Literal["fine_tuning.job"]
    created_at: int
    model: str
    organization_id: str
    status: Status
    training_file: str
    validation_file: str | None
    hyperparameters: dict[str, Any]
    method: dict[str, Any]
    seed: int
    result_files: list[str]
    trained_tokens: int | None
    fine_tuned_model: str | None
    finished_at: int | None
    estimated_finish: int | None
    error: JobError | None
    integrations: list[Any]
    metadata: dict[str, str] | None
    user_provided_suffix: str | None
    lora: dict[str, Any]
    search: dict[str, Any] | None


class JobList(TypedDict):
    """A page of jobs, the newest first."""

    object: Literal["list"]
    data: list[JobObject]
    has_more: bool


class EventObject(TypedDict):
    """A line of a job's story."""

    id: str
    object: Literal["fine_tuning.job.event"]
    created_at: int
    level: Literal["info", "warn", "error"]
    message: str
    type: Literal["message", "metrics"]
    data: dict[str, Any] | None


class EventList(TypedDict):
    """A page of events, the newest first."""

    object: Literal["list"]
    data: list[EventObject]
    has_more: bool


class CheckpointObject(TypedDict):
    """A checkpoint that answers under a name of its own."""

    id: str
    object: Literal["fine_tuning.job.checkpoint"]
    created_at: int
    fine_tuned_model_checkpoint: str
    fine_tuning_job_id: str
    step_number: int
    metrics: dict[str, float | None]


class CheckpointList(TypedDict):
    """A page of checkpoints, the newest first."""

    object: Literal["list"]
    data: list[CheckpointObject]
    first_id: str | None
    last_id: str | None
    has_more: bool
