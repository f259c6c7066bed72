"""Rows of preferences that can be learned: the colour that is asked for, not another one."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from runs import COLOURS, make_recipe

from training.config import TrainRecipe


def write_preferences(path: Path, num_rows: int = 12) -> Path:
    """Answers of uneven lengths to prompts of uneven lengths."""
    with path.open("w", encoding="utf-8") as file:
        for i in range(num_rows):
            asked, other = COLOURS[i % 6], COLOURS[(i + 1 + i // 6) % 6]
            prompt = f"Say {asked}" + " please" * (i % 4)
            row = {
                "input": {"messages": [{"role": "user", "content": prompt}]},
                "preferred_output": [{"role": "assistant", "content": asked * (1 + i % 3)}],
                "non_preferred_output": [{"role": "assistant", "content": other * (1 + i % 2)}],
            }
            file.write(json.dumps(row) + "\n")
    return path


def preference_recipe(
    directory: Path, base: Path, num_rows: int = 12, **sections: Any
) -> TrainRecipe:
    """As `make_recipe`, for dpo on `num_rows` preferences."""
    data = directory / "preferences.jsonl"
    if not data.exists():
        write_preferences(data, num_rows)
    given: Mapping[str, Any] = {
        "data": {"train": str(data), "max_length": 128},
        "objective": {"kind": "dpo", "beta": 0.5},
    }
    merged = {
        name: {**given.get(name, {}), **sections.get(name, {})}
        if isinstance(sections.get(name, {}), Mapping)
        else sections[name]
        for name in {*given, *sections}
    }
    return make_recipe(directory, base, **merged)
