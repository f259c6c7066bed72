"""A fine-tuning job's hyperparameters: OpenAI's names, their ranges, and what "auto" comes to.

The number of epochs is that of OpenAI's cookbook (Chat_finetuning_data_prep); the batch is a
five-hundredth of the examples, 1 to 16, so that short files still take a hundred steps and more.

Nothing here imports torch.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

from cluster.config import nearest
from cluster.errors import ConfigError

Method: TypeAlias = Literal["supervised", "dpo"]

LEARNING_RATE = 3.0e-4
"""What a learning_rate_multiplier of 1 comes to: the default of `optim.learning_rate`."""
AUTO_MULTIPLIER: Mapping[Method, float] = {"supervised": 1.0, "dpo": 0.1}
"""dpo has no data to fit in the end, only a margin to widen: it takes a tenth, as the recipes of
DPO's authors and of TRL do against their supervised ones."""
AUTO_BETA = 0.1
_TARGET_EPOCHS = 3
_MOST_AUTO_EPOCHS = 25
_LEAST_EXAMPLES, _MOST_EXAMPLES = 100, 25_000
"""Examples seen in all epochs together that "auto" aims for."""
_BATCH_SHARE = 0.002
_MOST_AUTO_BATCH = 16
_NAMES: Mapping[Method, tuple[str, ...]] = {
    "supervised": ("n_epochs", "batch_size", "learning_rate_multiplier"),
    "dpo": ("n_epochs", "batch_size", "learning_rate_multiplier", "beta"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Hyperparameters:
    """Every value, resolved."""

    n_epochs: int
    """Passes over the training examples."""
    batch_size: int
    """Examples (for dpo, pairs) of one optimiser step."""
    learning_rate_multiplier: float
    learning_rate: float
    """What the multiplier comes to."""
    beta: float | None
    """How far dpo may go from the base; None for supervised."""

    def echo(self) -> dict[str, float]:
        """As a job shows them."""
        shown: dict[str, float] = {
            "n_epochs": self.n_epochs,
            "batch_size": self.batch_size,
            "learning_rate_multiplier": self.learning_rate_multiplier,
        }
        return shown if self.beta is None else {**shown, "beta": self.beta}


def check(method: Method, given: Mapping[str, object], *, where: str = "hyperparameters") -> None:
    """Refuse what no file could make right. Raises ConfigError naming field, value and range."""
    resolve(method, given, num_examples=1, where=where)


def resolve(
    method: Method,
    given: Mapping[str, object],
    *,
    num_examples: int,
    where: str = "hyperparameters",
) -> Hyperparameters:
    """What a job trains with; fields that are left out or null are "auto".

    num_examples: training examples (pairs for dpo), at least 1. where: begins the names of fields
    in errors. Raises ConfigError naming the field, its value and what is allowed.
    """
    assert num_examples >= 1, num_examples
    names = _NAMES[method]
    for name in given:
        if name not in names:
            raise ConfigError(
                f"{where}.{name} is not a hyperparameter of method {method}."
                f"{nearest(name, names)} Allowed: {', '.join(names)}"
            )
    epochs = _whole(given, "n_epochs", 1, 50, where)
    batch = _whole(given, "batch_size", 1, 256, where)
    multiplier = _number(given, "learning_rate_multiplier", None, where)
    beta = _number(given, "beta", 2.0, where) if method == "dpo" else None
    multiplier = AUTO_MULTIPLIER[method] if multiplier is None else multiplier
    rate = LEARNING_RATE * multiplier
    if not 0 < rate <= 10:
        raise ConfigError(
            f"{where}.learning_rate_multiplier is {multiplier:g}, a learning rate of {rate:g} "
            f"(it multiplies {LEARNING_RATE:g}); allowed: a learning rate above 0, to 10"
        )
    return Hyperparameters(
        n_epochs=auto_epochs(num_examples) if epochs is None else epochs,
        batch_size=auto_batch(num_examples) if batch is None else batch,
        learning_rate_multiplier=multiplier,
        learning_rate=rate,
        beta=(AUTO_BETA if beta is None else beta) if method == "dpo" else None,
    )


def auto_epochs(num_examples: int) -> int:
    """3, more while that is below 100 examples in all (up to 25), fewer where above 25,000."""
    if num_examples * _TARGET_EPOCHS < _LEAST_EXAMPLES:
        return min(_MOST_AUTO_EPOCHS, math.ceil(_LEAST_EXAMPLES / num_examples))
    if num_examples * _TARGET_EPOCHS > _MOST_EXAMPLES:
        return max(1, _MOST_EXAMPLES // num_examples)
    return _TARGET_EPOCHS


def auto_batch(num_examples: int) -> int:
    """0.2 % of the examples, 1 to 16."""
    return min(_MOST_AUTO_BATCH, max(1, round(num_examples * _BATCH_SHARE)))


def _whole(given: Mapping[str, object], name: str, least: int, most: int, where: str) -> int | None:
    value = given.get(name)
    if value is None or value == "auto":
        return None
    if isinstance(value, float) and value.is_integer():  # JSON has one kind of number
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ConfigError(
            f"{where}.{name} is {_shown(value)}; allowed: 'auto', or a whole number from {least} "
            f"to {most}"
        )
    return value


def _number(given: Mapping[str, object], name: str, most: float | None, where: str) -> float | None:
    """A number above 0, up to `most`."""
    value = given.get(name)
    if value is None or value == "auto":
        return None
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not (0 < value < math.inf and (most is None or value <= most))
    ):
        limit = "" if most is None else f", to {most:g}"
        raise ConfigError(
            f"{where}.{name} is {_shown(value)}; allowed: 'auto', or a number above 0{limit}"
        )
    return float(value)


def _shown(value: object) -> str:
    return repr(value)[:60]
