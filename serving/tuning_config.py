"""The section `tuning` of a serving file: what fine-tuning over HTTP may take."""

from dataclasses import dataclass

from cluster.errors import ConfigError
from cluster.remote import is_url


@dataclass(frozen=True, kw_only=True, slots=True)
class TuningConfig:
    """Where files and runs lie, and how much of them there may be."""

    storage: str = "runs"
    """Directory that every node sees: files in `files/`, each job's run in `<job id>/`."""
    organization: str = "loray"
    """Stands in the names of models: ft:<base>:<organization>:<suffix>:<id>."""
    jobs_at_once: int = 1
    """Jobs that run at the same time, where the cluster has room for them."""
    unfinished_per_key: int = 100
    """Jobs of one key that are not at their end."""
    attempts: int = 5
    """How often a job's run may be lost, which ends the job then; it rests longer each time."""
    min_examples: int = 10
    """Examples that a training file must have."""
    max_file_bytes: int = 512 << 20
    """Largest file."""
    max_line_bytes: int = 8 << 20
    """Longest line of a file for fine-tuning."""
    max_project_bytes: int = 10 << 30
    """All files of a project."""
    recipe: tuple[str, ...] = ()
    """Settings of every job's recipe that win over the service's, as `section.field=value`."""
    search: tuple[str, ...] = ()
    """The same of a job that is a search, as `search.field=value`."""
    jobs_api: str | None = None
    """The cluster's Jobs API, such as http://127.0.0.1:8265; null: that of a private Ray."""

    def __post_init__(self) -> None:
        if not self.storage.strip() or is_url(self.storage):
            raise ConfigError(
                f"tuning.storage is {self.storage[:200]!r}; allowed: a directory that every node "
                "sees"
            )
        plain = self.organization.replace("-", "").replace("_", "")
        if not (plain.isascii() and plain.isalnum() and len(self.organization) <= 32):
            raise ConfigError(
                f"tuning.organization is {self.organization[:80]!r}; allowed: up to 32 letters, "
                "digits, - and _"
            )
        for name, low, high in (
            ("jobs_at_once", 1, 1024),
            ("unfinished_per_key", 1, 100_000),
            ("attempts", 1, 100),
            ("min_examples", 1, 100_000),
            ("max_file_bytes", 1 << 10, 8 << 30),
            ("max_line_bytes", 1 << 10, 256 << 20),
            ("max_project_bytes", 1 << 20, 1 << 50),
        ):
            value = getattr(self, name)
            if not low <= value <= high:
                raise ConfigError(f"tuning.{name} is {value}; allowed: {low} to {high}")
