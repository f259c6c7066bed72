"""What a replica tells Prometheus. The labels are bounded, whatever clients send."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)

from serving.engine import Engine
from serving.problems import GONE, of_exception
from serving.service import Service

_OTHER = "other"
_MAX_MODELS = 128
"""Names that have a label of their own, in the life of a replica."""
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """The counters of one replica, in a registry of their own."""

    def __init__(
        self, *, known: Sequence[str], clock: Callable[[], float] = time.perf_counter
    ) -> None:
        """known: models that are served; more are known by `observe`, and by answering."""
        self._known: set[str] = set()
        self._know(known)
        self._clock = clock
        self.registry = CollectorRegistry()
        r = self.registry
        self._requests = Counter(
            "loray_requests", "Requests", ["model", "endpoint", "status"], registry=r
        )
        self._request_s = Histogram(
            "loray_request_seconds", "To the end of a request, or of its first byte for a stream",
            ["model"], buckets=_SECONDS, registry=r,
        )  # fmt: skip
        self._tokens = Counter("loray_tokens", "Tokens", ["model", "kind"], registry=r)
        self._first_s = Histogram(
            "loray_time_to_first_token_seconds", "From the request to its first token",
            ["model"], buckets=_SECONDS, registry=r,
        )  # fmt: skip
        self._step_s = Histogram(
            "loray_inter_token_seconds", "Of an engine's step, which gives each row a token",
            buckets=_SECONDS, registry=r,
        )  # fmt: skip
        self._rows = Histogram("loray_batch_size", "Rows of a step", buckets=_ROWS, registry=r)
        self._running = Gauge("loray_running", "Answers on their way", registry=r)
        self._waiting = Gauge("loray_waiting", "Requests in the queue", registry=r)
        self._kv = Gauge("loray_kv_used_tokens", "Tokens of the batch's cache", registry=r)
        self._kv_capacity = Gauge("loray_kv_capacity_tokens", "Room for tokens", registry=r)
        self._prefix = Gauge("loray_prefix_hit_tokens", "Prompt tokens found", registry=r)
        self._cache = Counter("loray_adapter_cache", "Hits and so on", ["event"], registry=r)
        self._counted: dict[str, int] = {}
        """What of the cache's events has been counted."""
        self._load_s = Histogram(
            "loray_adapter_load_seconds", "To prove and load an adapter",
            buckets=_SECONDS, registry=r,
        )  # fmt: skip

    @contextmanager
    def request(self, endpoint: str, model: str) -> Iterator[None]:
        """Count a request, with the status that its exception means. model: as the client says."""
        started, status = self._clock(), 200
        try:
            yield
        except BaseException as error:
            status = of_exception(error)[0] if isinstance(error, Exception) else GONE
            raise
        finally:
            label = self._label(model)
            self._requests.labels(label, endpoint, str(status)).inc()
            self._request_s.labels(label).observe(self._clock() - started)

    def first_token(self, model: str, seconds: float) -> None:
        """A request has got its first token, of a model that is served."""
        self._know([model])
        self._first_s.labels(self._label(model)).observe(seconds)

    def tokens(self, model: str, prompt: int, completion: int) -> None:
        """A request has been answered, by a model that is served."""
        self._know([model])
        label = self._label(model)
        self._tokens.labels(label, "prompt").inc(prompt)
        self._tokens.labels(label, "completion").inc(completion)

    def step(self, engine: Engine, seconds: float) -> None:
        """An engine has made a step; called in its thread."""
        self._step_s.observe(seconds)
        self._rows.observe(engine.num_running)

    def observe(self, service: Service) -> None:
        """Read what a service has to say of itself."""
        self._know(service.names())
        engines = service.engines()
        self._running.set(sum(engine.num_running for engine in engines))
        self._waiting.set(sum(len(engine.waiting) for engine in engines))
        self._kv.set(sum(engine.kv_tokens for engine in engines))
        self._kv_capacity.set(sum(e.limits.kv_tokens for e in engines))
        self._prefix.set(sum(engine.prefixes.hits for engine in engines))
        events = service.adapters.events
        for name in ("hits", "misses", "evictions"):
            total = getattr(events, name)
            self._cache.labels(name).inc(total - self._counted.get(name, 0))
            self._counted[name] = total
        while events.load_s:
            self._load_s.observe(events.load_s.pop())

    def render(self) -> tuple[bytes, str]:
        """The text for Prometheus, and its content type."""
        return generate_latest(self.registry), CONTENT_TYPE_LATEST

    def snapshot(self) -> Mapping[str, float]:
        """Every sample by its name and labels' values: `loray_tokens_total a prompt` -> 3."""
        return {
            " ".join([sample.name, *sample.labels.values()]): sample.value
            for family in self.registry.collect()
            for sample in family.samples
        }

    def _know(self, models: Sequence[str]) -> None:
        """Give models labels of their own, as long as there are any left."""
        for model in models:
            if len(self._known) < _MAX_MODELS:
                self._known.add(model)

    def _label(self, model: str) -> str:
        return model if model in self._known else _OTHER
