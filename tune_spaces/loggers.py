"""Who else hears of the trials: `search.log`, through Ray Tune's own callbacks.

All write below the search's directory: TensorBoard's event files beside Tune's state of each trial
(`tensorboard --logdir <search>`), MLflow's database `mlflow/mlflow.db`, Weights & Biases' runs in
`wandb/`. The last stay on this machine unless WANDB_API_KEY or WANDB_MODE says otherwise.
"""

import importlib.util
import os
from pathlib import Path

from ray.tune import Callback
from ray.tune.logger import TBXLoggerCallback

from cluster.errors import ConfigError
from tune_spaces.config import SearchConfig
from tune_spaces.schedulers import POPULATION


def require(search: SearchConfig) -> None:
    """Raises ConfigError for a logger whose package is not installed."""
    for name in search.log:
        if name != "tensorboard" and importlib.util.find_spec(name) is None:
            raise ConfigError(
                f"search.log: {name} needs the package {name}, which is not installed: "
                f"pip install 'loray[{name}]', or take {name} out of search.log"
            )


def environment(search: SearchConfig) -> dict[str, str]:
    """What must be set in this process's environment while they write."""
    is_silent = not (os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_MODE"))
    return {"WANDB_MODE": "offline"} if "wandb" in search.log and is_silent else {}


def make(search: SearchConfig, name: str, directory: Path) -> list[Callback]:
    """The callbacks of search `name`; imports what they need, which takes seconds."""
    callbacks: list[Callback] = []
    if "tensorboard" in search.log:
        callbacks.append(TBXLoggerCallback())
    if "mlflow" in search.log:
        from ray.air.integrations.mlflow import MLflowLoggerCallback

        where = directory / "mlflow"
        where.mkdir(exist_ok=True)
        callbacks.append(
            MLflowLoggerCallback(
                tracking_uri=f"sqlite:///{where / 'mlflow.db'}",
                experiment_name=name,
                # MLflow refuses parameters that change, so a population's are logged at the end.
                log_params_on_trial_end=search.scheduler in POPULATION,
            )
        )
    if "wandb" in search.log:
        from ray.air.integrations.wandb import WandbLoggerCallback

        # wandb.init runs in a process of its own, which does not have this one's environment; it
        # adds a `wandb` to the directory.
        mode = os.environ.get("WANDB_MODE", "online")
        callbacks.append(WandbLoggerCallback(project=name, dir=str(directory), mode=mode))
    return callbacks
