"""The harness of EleutherAI scores a served adapter as it scores the same model in its process."""

import json
import random
from pathlib import Path
from typing import Any

import lm_eval
import pytest
import torch
import yaml
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from server import serving
from test_training_adapter import make_adapter

from training import adapter
from training import model as models
from training.config import ModelConfig

NUM_QUESTIONS = 24


def write_task(directory: Path) -> None:
    """A multiple-choice task of two choices in a local file."""
    generator = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz "
    with (directory / "questions.jsonl").open("w") as file:
        for _ in range(NUM_QUESTIONS):
            texts = ["".join(generator.choices(letters, k=k)).strip() + "x" for k in (20, 5, 5)]
            row = {"question": texts[0], "choices": texts[1:], "answer": generator.randrange(2)}
            file.write(json.dumps(row) + "\n")
    task = {
        "task": "local_questions",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(directory / "questions.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        "metadata": {"version": 1},
    }
    (directory / "local_questions.yaml").write_text(yaml.safe_dump(task))


def scores(model: Any, directory: Path, **settings: Any) -> tuple[dict[str, Any], list[float]]:
    """The task's metrics, and the log likelihood of each choice."""
    found: Any = lm_eval.simple_evaluate(
        model=model,
        tasks=["local_questions"],
        task_manager=TaskManager(include_path=str(directory)),
        bootstrap_iters=0,
        verbosity="ERROR",
        **settings,
    )
    likelihoods = [
        float(response[0][0])
        for sample in found["samples"]["local_questions"]
        for response in sample["resps"]
    ]
    return found["results"]["local_questions"], likelihoods


@pytest.mark.filterwarnings("ignore")
def test_lm_eval_scores_a_served_adapter_as_in_process(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    write_task(tmp_path)
    path = make_adapter(tmp_path / "first", tiny_base, seed=1)
    config = ModelConfig(base=str(tiny_base), quantization="int8")
    base = models.load_base(config, device=torch.device("cpu"))
    alone: Any = adapter.attach(base.model, path)
    inside, expected = scores(
        HFLM(pretrained=alone, tokenizer=base.tokenizer, batch_size=1), tmp_path
    )
    sections: Any = {
        "model": {"base": str(tiny_base), "quantization": "int8"},
        "adapters": [{"name": "first", "path": str(path)}],
    }
    with serving(tmp_path, tiny_base, **sections) as running:
        over_http, likelihoods = scores(
            "local-completions",
            tmp_path,
            model_args={
                "model": "first",
                "base_url": f"{running.url}/v1/completions",
                "tokenizer_backend": "huggingface",
                "tokenizer": str(tiny_base),
                "num_concurrent": 4,
                "max_length": 256,
            },
        )
    assert len(expected) == 2 * NUM_QUESTIONS
    assert likelihoods == pytest.approx(expected, abs=1e-4)
    for metric in ("acc,none", "acc_norm,none"):
        assert over_http[metric] == inside[metric]
