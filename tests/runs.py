"""Small real runs, in this process and without Ray."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from cluster import config
from training import worker
from training.config import TrainRecipe
from training.events import Event, EventReader
from training.mirror import Mirror
from training.strategy import Workers

COLOURS = ("red", "green", "blue", "white", "black", "amber")


def write_rows(path: Path, num_rows: int = 24) -> Path:
    """Prompt/completion rows of uneven lengths."""
    with path.open("w", encoding="utf-8") as file:
        for i in range(num_rows):
            prompt = f"Say {COLOURS[i % 6]}" + " please" * (i % 5)
            file.write(json.dumps({"prompt": prompt, "completion": COLOURS[i % 6] * (1 + i % 3)}))
            file.write("\n")
    return path


def make_recipe(directory: Path, base: Path, **sections: Mapping[str, Any]) -> TrainRecipe:
    """A recipe of few steps on a tiny base; sections win over the defaults here."""
    data = directory / "train.jsonl"
    if not data.exists():
        write_rows(data)
    tree: dict[str, Any] = {
        "name": "run",
        "storage": str(directory / "runs"),
        "model": {"base": str(base), "quantization": "none"},
        "data": {"train": str(data), "max_length": 128},
        "lora": {"rank": 4},
        "optim": {"learning_rate": 1e-2, "max_steps": 6, "global_batch_size": 4},
        "memory": {"micro_batch_tokens": 256},
        "checkpoint": {"every_steps": 2},
        "log": {"to": []},
    }
    for name, values in sections.items():
        tree[name] = {**tree.get(name, {}), **values} if isinstance(values, Mapping) else values
    return config.build(TrainRecipe, tree, where="test")


def run_dir_of(recipe: TrainRecipe) -> Path:
    """Where the run of a recipe is."""
    mirror = Mirror.of(recipe)
    return Path(recipe.storage) / recipe.name if mirror is None else mirror.run_dir


def train(recipe: TrainRecipe, *, is_held: bool = False) -> Event:
    """Run a recipe in this process, on one thread; returns its last event."""
    run_dir = run_dir_of(recipe)
    run_dir.mkdir(parents=True, exist_ok=True)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        worker.run(
            recipe,
            run_dir,
            workers=Workers(),
            device=torch.device("cpu"),
            workers_here=1,
            is_held=is_held,
        )
    finally:
        torch.set_num_threads(threads)
    return events_of(recipe)[-1]


def run_here(workers: Workers, recipes: Sequence[TrainRecipe]) -> None:
    """Run recipes one after the other as one of `workers`; of single ones, the first does all."""
    for recipe in recipes:
        is_single = recipe.scale.strategy == "single"
        if is_single and not workers.is_first:
            continue
        worker.run(
            recipe,
            run_dir_of(recipe),
            workers=Workers() if is_single else workers,
            device=torch.device("cpu"),
            workers_here=workers.size,
        )


def events_of(recipe: TrainRecipe, kind: str | None = None) -> list[Event]:
    """The events of a run so far."""
    events = EventReader(run_dir_of(recipe) / "events.jsonl").read()
    return [event for event in events if kind in (None, event.kind)]


def adapter_bytes(recipe: TrainRecipe) -> bytes:
    """The bytes of the weights that a run ended with."""
    return (run_dir_of(recipe) / "adapter" / "adapter_model.safetensors").read_bytes()
