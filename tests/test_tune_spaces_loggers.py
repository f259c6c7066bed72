"""Who else hears of the trials of a search."""

import importlib.util
from pathlib import Path

import pytest

from cluster.errors import ConfigError
from tune_spaces import loggers
from tune_spaces.config import SearchConfig


@pytest.mark.parametrize("name", ["mlflow", "wandb"])
def test_a_package_that_is_missing_is_named_with_its_command(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda module: None if module == name else found(module)
    )
    with pytest.raises(ConfigError, match=rf"pip install 'loray\[{name}\]'"):
        loggers.require(SearchConfig(log=("tensorboard", name)))  # pyright: ignore
    loggers.require(SearchConfig(log=("tensorboard",)))


def test_nobody_hears_of_a_search_unless_asked(tmp_path: Path) -> None:
    assert loggers.make(SearchConfig(), "s", tmp_path) == []
    assert loggers.environment(SearchConfig()) == {}
    assert list(tmp_path.iterdir()) == []


def test_weights_and_biases_stays_offline_without_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    search = SearchConfig(log=("wandb",))
    assert loggers.environment(search) == {"WANDB_MODE": "offline"}
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    assert loggers.environment(search) == {}
