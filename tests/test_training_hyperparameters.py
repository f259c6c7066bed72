"""Hyperparameters of a job: ranges, and what "auto" comes to."""

import math
import re

import pytest

from cluster.errors import ConfigError
from training import hyperparameters
from training.config import ObjectiveConfig, OptimConfig
from training.hyperparameters import Method, auto_batch, auto_epochs, check, resolve


@pytest.mark.parametrize(
    ("num_examples", "epochs"),
    [
        (1, 25), (3, 25), (4, 25), (10, 10), (30, 4), (33, 4), (34, 3), (100, 3), (8333, 3),
        (8334, 2), (12_500, 2), (12_501, 1), (25_000, 1), (1_000_000, 1),
    ],
)  # fmt: skip
def test_auto_epochs_are_the_cookbooks(num_examples: int, epochs: int) -> None:
    assert auto_epochs(num_examples) == epochs


@pytest.mark.parametrize(
    ("num_examples", "batch"), [(1, 1), (500, 1), (1000, 2), (8000, 16), (10**6, 16)]
)
def test_auto_batches_are_a_five_hundredth(num_examples: int, batch: int) -> None:
    assert auto_batch(num_examples) == batch


def test_auto_left_out_and_null_are_the_same() -> None:
    names = ("n_epochs", "batch_size", "learning_rate_multiplier", "beta")
    ways = [{}, dict.fromkeys(names, "auto"), dict.fromkeys(names)]
    found = [resolve("dpo", given, num_examples=100) for given in ways]
    assert found[0] == found[1] == found[2]
    assert found[0].echo() == {
        "n_epochs": 3, "batch_size": 1, "learning_rate_multiplier": 0.1, "beta": 0.1,
    }  # fmt: skip
    assert "beta" not in resolve("supervised", {}, num_examples=100).echo()


def test_the_defaults_are_those_of_a_recipe() -> None:
    assert OptimConfig().learning_rate == hyperparameters.LEARNING_RATE
    assert ObjectiveConfig().beta == hyperparameters.AUTO_BETA


def test_what_is_given_is_taken() -> None:
    given = {"n_epochs": 50, "batch_size": 256.0, "learning_rate_multiplier": 2, "beta": 2}
    found = resolve("dpo", given, num_examples=10)
    assert (found.n_epochs, found.batch_size, found.beta) == (50, 256, 2.0)
    assert found.learning_rate == pytest.approx(6e-4)


@pytest.mark.parametrize(
    ("method", "given", "expected"),
    [
        ("supervised", {"n_epochs": 0}, "n_epochs is 0; allowed: 'auto', or a whole number from 1"),
        ("supervised", {"n_epochs": 51}, "n_epochs is 51; .* to 50"),
        ("supervised", {"n_epochs": 1.5}, r"n_epochs is 1\.5"),
        ("supervised", {"n_epochs": True}, "n_epochs is True"),
        ("supervised", {"n_epochs": "3"}, "n_epochs is '3'"),
        ("supervised", {"batch_size": 257}, "batch_size is 257; .* from 1 to 256"),
        ("supervised", {"learning_rate_multiplier": 0}, "multiplier is 0; .* above 0$"),
        ("supervised", {"learning_rate_multiplier": -1.0}, "multiplier is -1"),
        ("supervised", {"learning_rate_multiplier": math.inf}, "multiplier is inf"),
        ("supervised", {"learning_rate_multiplier": math.nan}, "multiplier is nan"),
        ("supervised", {"learning_rate_multiplier": 1e9}, "a learning rate of 300000 .*to 10"),
        ("supervised", {"learning_rate_multiplier": [1]}, r"multiplier is \[1\]"),
        ("supervised", {"beta": 0.1}, "beta is not a hyperparameter of method supervised"),
        ("supervised", {"n_epoch": 3}, r"Did you mean 'n_epochs'\? Allowed: n_epochs, batch_size"),
        ("dpo", {"beta": 0}, "beta is 0; allowed: 'auto', or a number above 0, to 2"),
        ("dpo", {"beta": 2.1}, "beta is 2.1"),
    ],
)
def test_what_is_out_of_range_is_named(
    method: Method, given: dict[str, object], expected: str
) -> None:
    with pytest.raises(ConfigError, match=expected) as caught:
        check(method, given, where="method.dpo.hyperparameters")
    assert re.match(r"method\.dpo\.hyperparameters\.", str(caught.value))
