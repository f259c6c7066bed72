"""ServeRecipe: every word of a serving file, with its unit, its default and its checks."""

import os
import re
import stat
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from cluster import config
from cluster.errors import ConfigError
from serving.tuning_config import TuningConfig
from serving.webhook import Webhook
from training.config import ModelConfig

Mode = Literal["auto", "live", "merged"]
NAME = r"[A-Za-z0-9][A-Za-z0-9_.:/-]{0,127}"
"""Grammar of the names under which models answer."""
_PASSWORD = re.compile(r"://[^:/]*:[^@]*@|[?&](ssl)?password=", re.IGNORECASE)
"""In a URL, as SQLAlchemy (2.0) takes it apart."""
_SHOWN_PASSWORD = re.compile(r"(://[^\s:/]*):\S*@|([?&](?:ssl)?password)=[^\s&]*", re.IGNORECASE)
_MAX_URL_BYTES = 4096


def require_name(name: str, where: str) -> None:
    """Raises ConfigError for a name that is not in the grammar or walks about in paths."""
    if not re.fullmatch(NAME, name) or ".." in name or "//" in name or name.endswith("/"):
        raise ConfigError(
            f"{where} is {name[:80]!r}; allowed: 1 to 128 letters, digits and _ . : / -, beginning "
            "with a letter or digit, without `..` or `//`"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterEntry:
    """An adapter and the name under which it answers."""

    name: str
    """What clients give as `model`."""
    path: str
    """The adapter's directory."""
    mode: Mode | None = None
    """live, merged or auto for this adapter alone; null is the file's mode."""

    def __post_init__(self) -> None:
        require_name(self.name, "adapters: name")
        if not self.path.strip():
            raise ConfigError(f"adapters: {self.name} has an empty path; name a directory")


@dataclass(frozen=True, kw_only=True, slots=True)
class HttpConfig:
    """Where the server listens."""

    host: str = "127.0.0.1"
    """Interface; another than the loopback one needs keys."""
    port: int = 8000
    """TCP port."""
    max_body_bytes: int = 4 << 20
    """Largest request body."""

    def __post_init__(self) -> None:
        _in_range("http.port", self.port, 1, 65535)
        _in_range("http.max_body_bytes", self.max_body_bytes, 1 << 10, 64 << 20)


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What a replica takes on at most; its memory follows from these numbers."""

    rows: int = 16
    """Answers that are decoded at the same time."""
    context_tokens: int = 8192
    """Prompt and answer together; the model's own context where that is shorter."""
    kv_tokens: int = 32768
    """Tokens of the batch's cache: answers at once times the longest of them."""
    prefill_tokens: int = 256
    """Tokens of prompts that go through between two tokens of the answers that run."""
    prefix_page: int = 16
    """Tokens of a page of the prefix cache."""
    prefix_tokens: int = 16384
    """Tokens of prompts whose keys and values are kept; 0 turns sharing off."""
    waiting: int = 256
    """Requests in the queue."""
    waiting_per_key: int = 128
    """Requests of one API key in the queue."""
    waiting_per_model: int = 128
    """Requests for one model in the queue."""
    request_s: float = 600.0
    """Seconds after which an answer ends as it is."""
    adapters: int = 32
    """Adapters that are loaded at the same time; those in use stay."""
    adapter_bytes: int = 2 << 30
    """Memory of the loaded adapters."""
    adapter_rank: int = 256
    """Largest rank of an adapter."""

    def __post_init__(self) -> None:
        for name, low, high in (
            ("rows", 1, 1024),
            ("context_tokens", 16, 1 << 20),
            ("kv_tokens", 16, 1 << 26),
            ("prefill_tokens", 16, 1 << 16),
            ("prefix_page", 1, 1024),
            ("prefix_tokens", 0, 1 << 24),
            ("waiting", 1, 1 << 16),
            ("waiting_per_key", 1, 1 << 16),
            ("waiting_per_model", 1, 1 << 16),
            ("request_s", 1, 86400),
            ("adapters", 1, 4096),
            ("adapter_bytes", 1 << 20, 1 << 40),
            ("adapter_rank", 1, 4096),
        ):
            _in_range(f"limits.{name}", getattr(self, name), low, high)


@dataclass(frozen=True, kw_only=True, slots=True)
class ServeRecipe:
    """A serving file."""

    model: ModelConfig
    """The base, which answers under its own name."""
    mode: Mode = "live"
    """live: adapters on the base as they are; merged: each folded into a model; auto: measured."""
    adapters: tuple[AdapterEntry, ...] = ()
    """Adapters that answer from the start."""
    adapters_root: str = "runs"
    """Directory in which adapters that are added over HTTP must lie."""
    registry: str | None = None
    """Directory that remembers what is served; null: `.loray/serve` beside the file."""
    database: str | None = None
    """URL of the registry of keys, files, jobs and models, sqlite:// or postgresql://; null: a
    SQLite file in the directory of `registry`. Replicas on several nodes need PostgreSQL. A URL
    with a password is named: file:PATH (mode 0600) or env:NAME, on every node."""
    tuning: TuningConfig | None = None
    """Fine-tuning over HTTP; null: off."""
    webhooks: tuple[Webhook, ...] = ()
    """Who is told of jobs' ends; nobody else can be."""
    http: HttpConfig = field(default_factory=HttpConfig)
    limits: Limits = field(default_factory=Limits)
    keys_file: str | None = None
    """API keys in a file, beside those of `loray keys`. On the loopback no key is asked where there
    is no such file and none was ever made."""
    replicas: int = 1
    """Copies of the engine; on several nodes, or GPUs."""
    max_replicas: int | None = None
    """Copies when there is much to do, from `replicas` on; null: always `replicas`."""
    max_surge_percent: int = 100
    """Replicas that an update may start before it stops old ones, in percent of `replicas`. They
    need room; 0 needs none, and an update of a single replica then interrupts."""
    cpus_per_replica: int | None = None
    """CPU cores that a replica computes with; null: this machine's, shared out evenly."""

    def __post_init__(self) -> None:
        _in_range("replicas", self.replicas, 1, 64)
        if self.max_replicas is not None:
            _in_range("max_replicas", self.max_replicas, self.replicas, 64)
        _in_range("max_surge_percent", self.max_surge_percent, 0, 100)
        if self.cpus_per_replica is not None:
            _in_range("cpus_per_replica", self.cpus_per_replica, 1, 1024)
        if self.database is not None and _PASSWORD.search(self.database):
            raise ConfigError(
                "database: there is a password in the URL, which `--config` and Serve would show; "
                "write the URL postgresql://USER:PASSWORD@HOST/NAME into a file of mode 0600 and "
                "set database: file:PATH, or into a variable of the environment and set env:NAME"
            )
        require_name(self.model_name, "model.base, as a name,")
        counts = Counter(entry.name for entry in self.adapters)
        twice = sorted(name for name, count in counts.items() if count > 1)
        if twice:
            raise ConfigError(f"adapters: the name {twice[0]!r} stands twice; give each its own")
        urls = Counter(hook.url for hook in self.webhooks)
        if len(urls) < len(self.webhooks):
            number = next(n for n, hook in enumerate(self.webhooks) if urls[hook.url] > 1)
            raise ConfigError(f"webhooks: the url of number {number + 1} stands twice; join them")
        if self.model_name in counts:
            raise ConfigError(f"adapters: {self.model_name!r} is the base's name; choose another")

    @property
    def num_cpus(self) -> int:
        """CPU cores of a replica."""
        return self.cpus_per_replica or max(1, (os.cpu_count() or 1) // self.replicas)

    @property
    def model_name(self) -> str:
        """What clients call the base: its hub id or `demo`; a directory goes by its last part."""
        path = Path(self.model.base).expanduser()
        return path.name if path.is_dir() or _is_local(self.model.base) else self.model.base


def load(path: Path, overrides: Sequence[str] = ()) -> ServeRecipe:
    """A serving file with overrides applied; its paths are absolute. Raises ConfigError."""
    try:
        recipe = config.load(ServeRecipe, path, list(overrides))
    except ConfigError as error:  # which quotes what it found, a URL of another field, too
        raise ConfigError(_SHOWN_PASSWORD.sub(r"\1\2***", str(error))) from None
    base, keys, database = recipe.model.base, recipe.keys_file, recipe.database
    if _is_local(base) and not Path(base).expanduser().is_dir():
        raise ConfigError(
            f"{path}: model.base is {base!r}: no such directory; name one, or a hub id"
        )
    return replace(
        recipe,
        adapters=tuple(replace(a, path=_absolute(a.path)) for a in recipe.adapters),
        adapters_root=_absolute(recipe.adapters_root),
        keys_file=_absolute(keys) if keys is not None else None,
        database=f"file:{_absolute(database[5:])}"
        if database and database.startswith("file:")
        else database,
        webhooks=tuple(replace(w, secret_file=_absolute(w.secret_file)) for w in recipe.webhooks),
        tuning=recipe.tuning and replace(recipe.tuning, storage=_absolute(recipe.tuning.storage)),
    )


def registry_of(recipe: ServeRecipe, path: Path) -> Path:
    """The directory that remembers what is served; path: of the serving file."""
    if recipe.registry is not None:
        return Path(_absolute(recipe.registry))
    return path.absolute().parent / ".loray" / "serve" / path.stem


def database_url(recipe: ServeRecipe, directory: Path) -> str:
    """Of the registry's database, with its password: not to be shown. directory: of the registry.

    Raises ConfigError for a file or variable that does not hold it.
    """
    given = recipe.database or f"sqlite:///{directory.absolute()}/registry.db"
    kind, _, name = given.partition(":")
    if kind == "file":
        return _secret_url(Path(name))
    if kind == "env":
        url = os.environ.get(name, "").strip()
        if not url:
            raise ConfigError(f"database: no variable {name!r} in the environment; set it to a URL")
        return url
    return given


def key_marks(recipe: ServeRecipe, directory: Path) -> tuple[Path, ...]:
    """Files that say that a key was once made, where the database is lost. directory: its own."""
    places = [directory] if recipe.tuning is None else [directory, Path(recipe.tuning.storage)]
    return tuple(place / "keys-were-made" for place in places)


def _secret_url(path: Path) -> str:
    """What a file holds that nobody else may read."""
    try:
        with path.open("rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            url = file.read(_MAX_URL_BYTES).decode().strip()
    except (OSError, ValueError) as error:
        raise ConfigError(f"database: {path} cannot be read ({type(error).__name__})") from None
    if mode & 0o027:
        raise ConfigError(f"database: {path} is open to others; run: chmod 600 {path}")
    if not url:
        raise ConfigError(f"database: {path} is empty; write postgresql://USER:PASSWORD@HOST/NAME")
    return url


def _is_local(base: str) -> bool:
    return base.startswith((".", "/", "~"))


def _absolute(path: str) -> str:
    return str(Path(path).expanduser().absolute())


def _in_range(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ConfigError(f"{name} is {value!r}; allowed: {low} to {high}")
