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

SUFFIX = r"[A-Za-z0-9](?:[A-Za-z0-9_.-]{0,62}[A-Za-z0-9])?"
_MAX_SEED = (1 << 31) - 1
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

    rank: Annotated[int, Field(ge=1, le=256)] = 16
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
    search: Any = None
    """Refused (an extension to come)."""

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

    @field_validator("search")
    @classmethod
    def _not_yet(cls, value: Any) -> None:
        if value is not None:
            raise PydanticCustomError(
                "unsupported_value", "a search over HTTP is not supported yet; use `loray search`"
            )

    @field_validator("hyperparameters")
    @classmethod
    def _one_way(cls, value: T, info: ValidationInfo) -> T:
        if value is not None and info.data.get("method") is not None:
            raise PydanticCustomError(
                "invalid_value", "give method or hyperparameters (deprecated), not both"
            )
        return value

    @property
    def kind(self) -> Literal["supervised", "dpo"]:
        """The method's type."""
        return "supervised" if self.method is None else self.method.type

    @property
    def asked(self) -> dict[str, float | str]:
        """The hyperparameters that were given."""
        if self.method is None:
            return {} if self.hyperparameters is None else self.hyperparameters.given()
        settings = self.method.supervised or self.method.dpo
        return {} if settings is None else settings.hyperparameters.given()


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
