"""The arithmetic of a rollout: which version answers a user, and when it does too badly."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from cluster.errors import ConfigError

MAX_TARGETS = 100
MAX_WEIGHT = 1_000_000.0
MAX_METRIC_CHARS = 64
_ROUNDING = 1e-9
"""Of the scores: a fall of just what is allowed is allowed, whatever a subtraction makes of it."""
_BITS = 53
"""Of a float's digits."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """A version that an alias stands for."""

    model: str
    weight: float = 0.0
    """Its share of the users, in proportion to the others' weights."""
    is_shadow: bool = False
    """Whether it gets copies of requests and its answers are dropped."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """A figure by which a version must not be much worse than the one that it follows."""

    metric: str
    better: Literal["higher", "lower"]
    max_fall: float
    """In the metric's own unit."""

    def __post_init__(self) -> None:
        if not 1 <= len(self.metric) <= MAX_METRIC_CHARS:
            raise ConfigError(f"guard.evaluation.metric: allowed: 1 to {MAX_METRIC_CHARS} letters")
        if self.better not in ("higher", "lower"):
            raise ConfigError(
                f"guard.evaluation.better is {self.better!r}; allowed: higher and lower"
            )
        if not 0 <= self.max_fall < math.inf:  # NaN is not, either
            raise ConfigError(
                f"guard.evaluation.max_fall is {self.max_fall}; allowed: from 0 up, and finite"
            )

    def fall(self, before: float, after: float) -> float | None:
        """By how much a score is too far below another; None where it is not."""
        fall = before - after if self.better == "higher" else after - before
        return fall if fall > self.max_fall + _ROUNDING * max(abs(before), abs(after)) else None


@dataclass(frozen=True, kw_only=True, slots=True)
class Guard:
    """When an alias goes back by itself."""

    error_rate: float | None = None
    """Of a version's requests of the last minute, above which it does badly."""
    min_requests: int = 50
    """Fewer than these in the last minute say nothing."""
    evaluation: Evaluation | None = None

    def __post_init__(self) -> None:
        if self.error_rate is None and self.evaluation is None:
            raise ConfigError("guard: it guards nothing; give an error_rate or an evaluation")
        if self.error_rate is not None and not 0 <= self.error_rate < 1:
            raise ConfigError(f"guard.error_rate is {self.error_rate}; allowed: from 0 to below 1")
        if not 1 <= self.min_requests <= 1_000_000:
            raise ConfigError(f"guard.min_requests is {self.min_requests}; allowed: 1 to 1000000")


@dataclass(frozen=True, kw_only=True, slots=True)
class Count:
    """What became of a version's requests."""

    requests: int = 0
    errors: int = 0
    """Of them: by the server's fault."""
    seconds: float = 0.0
    """Of all together."""

    def plus(self, other: "Count") -> "Count":
        """Both together."""
        return Count(
            requests=self.requests + other.requests,
            errors=self.errors + other.errors,
            seconds=self.seconds + other.seconds,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Rollout:
    """What an alias stands for."""

    project: str
    name: str
    revision: int
    targets: tuple[Target, ...]
    guard: Guard | None = None
    changed_at: float = 0.0
    """Seconds since the epoch."""

    @property
    def versions(self) -> tuple[str, ...]:
        """The models that answer users."""
        return versions(self.targets)

    @property
    def shadow(self) -> str | None:
        """The model that gets copies."""
        return next((target.model for target in self.targets if target.is_shadow), None)

    def choose(self, user: str) -> str:
        """The version that answers a user: always the same for the same targets.

        Weighted rendezvous hashing (Schindelhauer and Schomaker, 2005): the least of -ln(u) / w
        wins, where u is a number from 0 to 1 of the user and the version. Nobody moves between
        two versions whose weights keep their ratio, and going back moves everybody back.
        """
        salt = f"{self.project}\0{self.name}\0{user}\0"
        return min(
            (target for target in self.targets if target.weight > 0),
            key=lambda target: -math.log(_uniform(salt + target.model)) / target.weight,
        ).model


def versions(targets: Sequence[Target]) -> tuple[str, ...]:
    """The models that answer users."""
    return tuple(target.model for target in targets if target.weight > 0)


def check(targets: Sequence[Target]) -> None:
    """Raises ConfigError for targets among which nobody could choose."""
    if not 1 <= len(targets) <= MAX_TARGETS:
        raise ConfigError(f"targets are {len(targets)}; allowed: 1 to {MAX_TARGETS}")
    names = [target.model for target in targets]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(f"targets: {twice!r} stands twice; give each version once")
    for target in targets:
        if not 0 <= target.weight <= MAX_WEIGHT:  # NaN is not, either
            raise ConfigError(
                f"targets: the weight of {target.model!r} is {target.weight}; allowed: 0 to "
                f"{MAX_WEIGHT:.0f}"
            )
        if target.is_shadow and target.weight:
            raise ConfigError(
                f"targets: the shadow {target.model!r} has a weight; it answers nobody: leave that"
            )
    if not sum(target.weight for target in targets):
        raise ConfigError("targets: no version has a weight; give one at least")
    if sum(target.is_shadow for target in targets) > 1:
        raise ConfigError("targets: there are several shadows; allowed: one")


def breach(rollout: Rollout, counts: Mapping[str, Count]) -> str | None:
    """Why an alias has to go back, if it has to. counts: of each version's last minute."""
    guard = rollout.guard
    if guard is None or guard.error_rate is None:
        return None
    for model in rollout.versions:
        count = counts.get(model, Count())
        is_telling = count.requests >= guard.min_requests
        if is_telling and count.errors > guard.error_rate * count.requests:
            return (
                f"{count.errors} of {count.requests} requests to {model[:200]} failed within a "
                f"minute; the guard allows {guard.error_rate:.2%}"
            )
    return None


def fallen(
    evaluation: Evaluation, states: Sequence[Sequence[Target]], scores: Mapping[str, float]
) -> tuple[int, str] | None:
    """To which state an alias has to go back for a score, and why, if it has to.

    states: what the alias stands for, then what it stood for before that, and so on. Each version
    is held against the one with the most users in the last state in which it was not yet there;
    where one of the two has no score, nothing is told. scores: of the metric, by model.
    """
    for model in versions(states[0]):
        first = max(n for n, targets in enumerate(states) if model in versions(targets))
        if first + 1 == len(states):
            continue
        before = max(states[first + 1], key=lambda target: target.weight).model
        if model not in scores or before not in scores:
            continue
        fall = evaluation.fall(scores[before], scores[model])
        if fall is not None:
            return first + 1, (
                f"{evaluation.metric} of {model[:200]} is {scores[model]:g}, {fall:.4g} worse than "
                f"the {scores[before]:g} of {before[:200]}; the guard allows "
                f"{evaluation.max_fall:g}"
            )
    return None


def _uniform(text: str) -> float:
    """A number from 0 to 1, both excluded, that looks drawn by lot."""
    digest = hashlib.sha256(text.encode(errors="surrogatepass")).digest()
    return ((int.from_bytes(digest[:8], "big") >> (64 - _BITS)) + 0.5) / (1 << _BITS)
