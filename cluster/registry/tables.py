"""The tables of the registry.

Times are seconds since the epoch. `number` is the order in which rows came, which lists page by;
`id` is what clients see. Rows of people's things carry the project that owns them.
"""

from typing import Any, ClassVar

from sqlalchemy import JSON, BigInteger, ForeignKey, Index, Integer, MetaData, String
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

_NUMBER = BigInteger().with_variant(Integer, "sqlite")
"""SQLite counts up by itself in INTEGER columns only."""

_JSON = JSON(none_as_null=True)


class Table(DeclarativeBase):
    """What they share: names of constraints that migrations can rely on."""

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(column_0_label)s",
            "uq": "uq_%(table_name)s_%(column_0_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map: ClassVar = dict.fromkeys((dict[str, Any], list[Any], list[str]), _JSON)


class ApiKey(Table):
    """An API key; the secret itself is kept nowhere."""

    __tablename__ = "keys"

    id: Mapped[str] = mapped_column(String(16), primary_key=True)
    """The part after sk-loray-, which is no secret."""
    name: Mapped[str] = mapped_column(String(128))
    project: Mapped[str] = mapped_column(String(64), index=True)
    """Whose files, jobs and models it sees."""
    hash: Mapped[str] = mapped_column(String(64))
    """SHA-256 of the secret, in hex."""
    scopes: Mapped[list[str]]
    """Of infer, tune, admin."""
    models: Mapped[list[str] | None]
    """The models that it opens; null: all of its project."""
    requests_per_minute: Mapped[int | None]
    tokens_per_day: Mapped[int | None] = mapped_column(BigInteger)
    concurrent_jobs: Mapped[int | None]
    created_at: Mapped[float]
    revoked_at: Mapped[float | None]
    """From then on it opens nothing; in the future for a key that was rotated with grace."""
    rotated_from: Mapped[str | None] = mapped_column(String(16))


class Usage(Table):
    """What a key has used in a window of time, over all replicas."""

    __tablename__ = "usage"

    key_id: Mapped[str] = mapped_column(String(16), primary_key=True)
    kind: Mapped[str] = mapped_column(String(16), primary_key=True)
    """requests or tokens."""
    window: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    """When the window began."""
    used: Mapped[int] = mapped_column(BigInteger)


class File(Table):
    """A file of the files API; its bytes lie in storage."""

    __tablename__ = "files"

    number: Mapped[int] = mapped_column(_NUMBER, primary_key=True, autoincrement=True)
    id: Mapped[str] = mapped_column(String(64), unique=True)
    project: Mapped[str] = mapped_column(String(64), index=True)
    key_id: Mapped[str | None] = mapped_column(String(16))
    filename: Mapped[str] = mapped_column(String(255))
    purpose: Mapped[str] = mapped_column(String(32))
    bytes: Mapped[int] = mapped_column(BigInteger)
    sha256: Mapped[str] = mapped_column(String(64))
    path: Mapped[str] = mapped_column(String(1024))
    """Relative to the storage of the service."""
    created_at: Mapped[float]
    expires_at: Mapped[float | None]
    deleted_at: Mapped[float | None]
    """Such rows are kept for jobs that refer to them; clients do not see them."""
    status: Mapped[str] = mapped_column(String(16))
    """uploaded, processed or error."""
    status_details: Mapped[str | None] = mapped_column(String(8192))
    examples: Mapped[int | None]
    """Usable lines of a file for fine-tuning."""


class Job(Table):
    """A fine-tuning job."""

    __tablename__ = "jobs"

    number: Mapped[int] = mapped_column(_NUMBER, primary_key=True, autoincrement=True)
    id: Mapped[str] = mapped_column(String(64), unique=True)
    project: Mapped[str] = mapped_column(String(64), index=True)
    key_id: Mapped[str] = mapped_column(String(16), index=True)
    """Of the key that made it; empty where none was asked."""
    content_hash: Mapped[str] = mapped_column(String(64), index=True)
    """Of the request, or of its Idempotency-Key: the same twice is one job."""
    request: Mapped[dict[str, Any]]
    """The body as it was accepted, with its defaults."""
    model: Mapped[str] = mapped_column(String(255))
    suffix: Mapped[str | None] = mapped_column(String(64))
    seed: Mapped[int]
    method: Mapped[dict[str, Any]]
    """As it is echoed; "auto" until it is resolved."""
    labels: Mapped[dict[str, Any] | None] = mapped_column("metadata")
    """The client's metadata."""
    training_file: Mapped[str] = mapped_column(String(64))
    validation_file: Mapped[str | None] = mapped_column(String(64))
    num_examples: Mapped[int | None]
    """Of the training file; null until both files are checked."""
    status: Mapped[str] = mapped_column(String(24), index=True)
    """validating_files, queued, running, paused, succeeded, failed or cancelled."""
    wanted: Mapped[str] = mapped_column(String(16))
    """What its owner wants: run, pause or cancel."""
    attempt: Mapped[int]
    """Grows with each start of its run; part of the id of its Ray job."""
    losses: Mapped[int]
    """How often its run has ended without its word, or by the cluster's fault."""
    start_after: Mapped[float | None]
    """Its run, which was lost, is not started again before."""
    run_job: Mapped[str | None] = mapped_column(String(96))
    """Id of the Ray job that runs it now."""
    events_offset: Mapped[int] = mapped_column(BigInteger)
    """Bytes of the run's events.jsonl that are events of the job already."""
    last_step: Mapped[int]
    """The last step that is told of; a run that starts again does some of them again."""
    created_at: Mapped[float]
    started_at: Mapped[float | None]
    finished_at: Mapped[float | None]
    estimated_finish: Mapped[float | None]
    trained_tokens: Mapped[int | None] = mapped_column(BigInteger)
    fine_tuned_model: Mapped[str | None] = mapped_column(String(512))
    result_files: Mapped[list[str]]
    is_tidy: Mapped[bool] = mapped_column(default=False)
    """Whether what only a job that may go on has use for is gone from its directory."""
    winner: Mapped[dict[str, Any] | None]
    """Of a job that is a search: {trial, params, metric, value, base_value, trials}."""
    error: Mapped[dict[str, Any] | None]
    """{code, message, param}."""


class JobEvent(Table):
    """One line of a job's story, in order."""

    __tablename__ = "job_events"
    __table_args__ = (Index("ix_job_events_job_place", "job_id", "place", unique=True),)

    number: Mapped[int] = mapped_column(_NUMBER, primary_key=True, autoincrement=True)
    id: Mapped[str] = mapped_column(String(64), unique=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"))
    place: Mapped[int]
    """Its place in the job's story, from 1; no two writers can take the same."""
    created_at: Mapped[float]
    level: Mapped[str] = mapped_column(String(8))
    message: Mapped[str] = mapped_column(String(4096))
    type: Mapped[str] = mapped_column(String(16))
    """message or metrics."""
    data: Mapped[dict[str, Any] | None]


class JobCheckpoint(Table):
    """A checkpoint of a job, which answers under a name of its own."""

    __tablename__ = "job_checkpoints"
    __table_args__ = (Index("ix_job_checkpoints_job_step", "job_id", "step", unique=True),)

    number: Mapped[int] = mapped_column(_NUMBER, primary_key=True, autoincrement=True)
    id: Mapped[str] = mapped_column(String(64), unique=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"))
    step: Mapped[int]
    created_at: Mapped[float]
    model: Mapped[str] = mapped_column(String(512))
    """The name under which it answers."""
    metrics: Mapped[dict[str, Any]]


class Model(Table):
    """A model that came out of a job. Its files are the adapter's directory."""

    __tablename__ = "models"

    number: Mapped[int] = mapped_column(_NUMBER, primary_key=True, autoincrement=True)
    name: Mapped[str] = mapped_column(String(512), unique=True)
    """What clients give as `model`: looked up, never split."""
    project: Mapped[str] = mapped_column(String(64), index=True)
    job_id: Mapped[str | None] = mapped_column(String(64), index=True)
    base: Mapped[str] = mapped_column(String(255))
    step: Mapped[int | None]
    """Of a checkpoint; null: the job's result."""
    path: Mapped[str] = mapped_column(String(1024))
    """The adapter's directory."""
    created_at: Mapped[float]
    deleted_at: Mapped[float | None]


class Alias(Table):
    """A name that stands for versions, each with its share of the users."""

    __tablename__ = "aliases"

    project: Mapped[str] = mapped_column(String(64), primary_key=True)
    name: Mapped[str] = mapped_column(String(128), primary_key=True)
    revision: Mapped[int]
    """Grows with every change."""
    targets: Mapped[list[Any]]
    """[{model, weight, is_shadow}]."""
    guard: Mapped[dict[str, Any] | None]
    """When to go back by itself: {error_rate, min_requests, evaluation}."""
    updated_at: Mapped[float]


class AliasChange(Table):
    """What an alias stood for, so that it can go back."""

    __tablename__ = "alias_changes"
    __table_args__ = (
        Index("ix_alias_changes_alias_revision", "project", "name", "revision", unique=True),
    )

    number: Mapped[int] = mapped_column(_NUMBER, primary_key=True, autoincrement=True)
    project: Mapped[str] = mapped_column(String(64))
    name: Mapped[str] = mapped_column(String(128))
    revision: Mapped[int]
    restored: Mapped[int | None]
    """The revision to which this one went back; null: its targets were new."""
    targets: Mapped[list[Any]]
    """Empty: the alias was removed."""
    guard: Mapped[dict[str, Any] | None]
    reason: Mapped[str] = mapped_column(String(512))
    by: Mapped[str] = mapped_column(String(64))
    """Id of the key, or `loray` for what happened by itself."""
    created_at: Mapped[float]


class AliasCount(Table):
    """Answers and errors of an alias's version, counted by each replica in spans of 10 s."""

    __tablename__ = "alias_counts"

    project: Mapped[str] = mapped_column(String(64), primary_key=True)
    name: Mapped[str] = mapped_column(String(128), primary_key=True)
    revision: Mapped[int] = mapped_column(primary_key=True)
    model: Mapped[str] = mapped_column(String(512), primary_key=True)
    replica: Mapped[str] = mapped_column(String(64), primary_key=True)
    span: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    """When it began."""
    requests: Mapped[int]
    errors: Mapped[int]
    """Of the requests: those that failed by the server's fault."""
    seconds: Mapped[float]
    """Of all requests together."""


class AliasScore(Table):
    """What a version was last found to be worth, by a metric that an alias's guard names."""

    __tablename__ = "alias_scores"

    project: Mapped[str] = mapped_column(String(64), primary_key=True)
    name: Mapped[str] = mapped_column(String(128), primary_key=True)
    metric: Mapped[str] = mapped_column(String(64), primary_key=True)
    model: Mapped[str] = mapped_column(String(512), primary_key=True)
    value: Mapped[float]
    by: Mapped[str] = mapped_column(String(64))
    """Id of the key that told it."""
    created_at: Mapped[float]


class Delivery(Table):
    """A webhook on its way."""

    __tablename__ = "deliveries"
    __table_args__ = (Index("ix_deliveries_due", "done_at", "due_at"),)

    number: Mapped[int] = mapped_column(_NUMBER, primary_key=True, autoincrement=True)
    id: Mapped[str] = mapped_column(String(64), unique=True)
    """Of the event, the same in every try."""
    project: Mapped[str] = mapped_column(String(64))
    url: Mapped[str] = mapped_column(String(1024))
    body: Mapped[str] = mapped_column(String(4096))
    created_at: Mapped[float]
    due_at: Mapped[float]
    tries: Mapped[int]
    done_at: Mapped[float | None]
    outcome: Mapped[str | None] = mapped_column(String(256))


class Lease(Table):
    """Who of several processes does a thing that only one may do."""

    __tablename__ = "leases"

    name: Mapped[str] = mapped_column(String(64), primary_key=True)
    holder: Mapped[str] = mapped_column(String(128))
    token: Mapped[int] = mapped_column(BigInteger)
    """Grows with each holder: whoever has an older one must not write any more."""
    expires_at: Mapped[float]
