"""A fine-tuning job as the recipe of a training run, or the file of a search."""

import json
import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster import config, storage
from cluster.errors import DataError
from cluster.registry.tables import Job
from serving import job_files
from serving.tuning_config import TuningConfig
from training.config import ModelConfig, TrainRecipe
from training.hyperparameters import LEARNING_RATE
from tune_spaces import config as search_config

_FILE = "job.json"
_KEEP = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What a job is to run."""

    recipe: TrainRecipe
    """Of the run, or what all trials of a search have in common."""
    tree: Mapping[str, Any]
    """The whole file."""


def run_dir(tuning: TuningConfig, job: Job) -> Path:
    """Where a job's run lies."""
    return Path(tuning.storage) / job.id


def is_search(job: Job) -> bool:
    """Whether a job is a search, whose winner becomes its model."""
    return job.request.get("search") is not None


def words(tuning: TuningConfig, job: Job) -> list[str]:
    """What comes after `python -m` to run a job, or to go on with it."""
    directory = run_dir(tuning, job)
    path = str(directory / _FILE)
    if not is_search(job):
        return ["training", path, "--json"]
    is_begun = (directory / "config.json").exists()  # what a search leaves first
    return ["tune_spaces", path, "--json", *(["--resume"] if is_begun else [])]


def write(tuning: TuningConfig, job: Job, plan: Plan, files: Mapping[str, Path]) -> None:
    """Write the file of a job's plan, and take hold of its files.

    files: paths by `training_file` and `validation_file`. The run reads links of its own, so that
    what is deleted while it trains does not end it; they go with `tidy`. Raises DataError
    where a file is gone.
    """
    directory = run_dir(tuning, job)
    storage.make_directory(directory)
    for param, path in files.items():
        link = _link(tuning, job, param)
        try:
            if not link.exists():
                os.link(path, link)
        except FileNotFoundError:
            name = param.replace("_", " ")
            raise DataError(f"The {name} was deleted before the job could read it.") from None
    storage.write_file(directory / _FILE, json.dumps(plan.tree, indent=1).encode())


def tidy(tuning: TuningConfig, job: Job) -> None:
    """Give back what a job at its end has held: its files, and what it would have gone on from."""
    for param in job_files.PARAMS:
        _link(tuning, job, param).unlink(missing_ok=True)
    directory = run_dir(tuning, job)
    for path in (directory / "checkpoints", directory / "trials", *directory.glob("tune-*")):
        shutil.rmtree(path, ignore_errors=True)


def plan_of(tuning: TuningConfig, model: ModelConfig, job: Job) -> Plan:
    """What a job whose files are checked is to run. Raises ConfigError."""
    recipe = _recipe(tuning, model, job)
    tree = config.plain(recipe)
    if not is_search(job):
        return Plan(recipe=recipe, tree=tree)
    asked = dict(job.request["search"])
    space = asked.pop("space")
    tree |= {"space": space, "search": {**asked, "seed": job.seed}}
    found = search_config.build(tree, tuning.search, where="tuning")
    return Plan(recipe=found.recipe, tree=search_config.plain(found))


def _recipe(tuning: TuningConfig, model: ModelConfig, job: Job) -> TrainRecipe:
    kind = job.method["type"]
    chosen = job.method[kind]["hyperparameters"]
    epochs, batch = int(chosen["n_epochs"]), int(chosen["batch_size"])
    steps_of_epoch = max(1, math.ceil((job.num_examples or 1) / batch))
    tree: dict[str, Any] = {
        "name": job.id,
        "storage": str(Path(tuning.storage).absolute()),
        "model": config.plain(model),
        "data": {"train": str(_link(tuning, job, "training_file"))},
        "lora": {name: value for name, value in job.request["lora"].items() if value is not None},
        "optim": {
            "learning_rate": LEARNING_RATE * float(chosen["learning_rate_multiplier"]),
            "epochs": epochs,
            "global_batch_size": batch,
            "seed": job.seed,
        },
        "scale": {"cpus_per_worker": 1},
        "checkpoint": {"every_steps": steps_of_epoch, "keep": _KEEP, "keep_adapters": True},
        "log": {"to": []},
    }
    if job.validation_file is not None:
        tree["data"]["eval"] = str(_link(tuning, job, "validation_file"))
        tree["evaluation"] = {"every_steps": steps_of_epoch}
    if kind == "dpo":
        tree["data"]["format"] = "preference"
        tree["objective"] = {"kind": "dpo", "beta": float(chosen["beta"])}
    for override in tuning.recipe:
        config.apply_override(TrainRecipe, tree, override)
    workers = tree["scale"].get("workers", 1)
    most = max(workers) if isinstance(workers, list) else int(workers)
    tree["optim"]["global_batch_size"] = max(tree["optim"]["global_batch_size"], most)
    return config.build(TrainRecipe, tree, where="tuning")


def needs(recipe: TrainRecipe, total: Mapping[str, float]) -> Mapping[str, float]:
    """What a run takes at least of a cluster that has so much in all."""
    scale, workers = recipe.scale, recipe.scale.least_workers
    cpus = 1 if scale.cpus_per_worker == "auto" else scale.cpus_per_worker
    gpus = scale.gpus_per_worker
    if gpus == "auto":
        gpus = 1 if total.get("GPU", 0) >= workers else 0
    return {"CPU": float(workers * cpus), **({"GPU": float(workers * gpus)} if gpus else {})}


def _link(tuning: TuningConfig, job: Job, param: str) -> Path:
    return run_dir(tuning, job) / f"{param}.jsonl"
