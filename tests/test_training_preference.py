"""Preferences: the loss is TRL's, and a run is exact however its pairs are cut or spread."""

import json
import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gang import gang
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from preferences import preference_recipe, write_preferences
from runs import adapter_bytes, events_of, make_recipe, run_dir_of, run_here, train, write_rows
from safetensors.torch import load_file
from tiny import byte_tokenizer
from transformers import AutoModelForCausalLM

from cluster import config
from cluster.errors import ConfigError, DataError
from training import checkpoint, examples, loop, packing, sampler, strategy
from training.config import TrainRecipe
from training.special_ids import stop_ids
from training.tokens import IGNORE, Encoded, Encoder

FIELDS = ("rewards/chosen", "rewards/rejected", "accuracy", "margin")


def losses(recipe: TrainRecipe) -> list[float]:
    return [event.number("loss") for event in events_of(recipe, "step")]


def pairs_of(path: Path) -> list[tuple[Encoded, ...]]:
    tokenizer = byte_tokenizer()
    encoder = Encoder(tokenizer, max_length=128, stop_ids=stop_ids(tokenizer, None))
    rows = examples.read(str(path), format="preference").examples
    found = [encoder.encode_row(row) for row in rows]
    assert all(isinstance(pair, tuple) and len(pair) == 2 for pair in found)
    return [pair for pair in found if isinstance(pair, tuple)]


def test_a_preference_is_two_sequences_that_differ_in_the_last_turn(tmp_path: Path) -> None:
    turns = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "one"},
        {"role": "user", "content": "b"},
    ]
    row = {
        "input": {"messages": turns},
        "preferred_output": [{"role": "assistant", "content": "yes"}],
        "non_preferred_output": [{"role": "assistant", "content": "no"}],
    }
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    ((chosen, rejected),) = pairs_of(path)
    decode = byte_tokenizer().decode
    told = [decode(one.labels[one.labels != IGNORE].tolist()) for one in (chosen, rejected)]
    assert told == ["yes<|im_end|>", "no<|im_end|>"]
    assert (chosen.id, rejected.id) == ("rows.jsonl:1 (preferred)", "rows.jsonl:1 (other)")
    first = int((chosen.labels != IGNORE).argmax())
    assert chosen.input_ids[:first].tolist() == rejected.input_ids[:first].tolist()


def _trl_loss(
    base: Path, weights: Path, pairs: list[tuple[Encoded, ...]], beta: float, directory: Path
) -> tuple[float, dict[str, float]]:
    """What TRL's DPOTrainer makes of the same tokens and weights."""
    with warnings.catch_warnings():  # TRL 1.16 warns of what it has not settled yet
        warnings.simplefilter("ignore")
        trl = pytest.importorskip("trl", reason="trl is not installed: pip install -e '.[dev]'")
        import datasets

        model = get_peft_model(
            AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
            LoraConfig(r=4, lora_alpha=4, target_modules="all-linear", task_type="CAUSAL_LM"),
        )
        row = {"prompt": "a", "chosen": "b", "rejected": "c"}
        trainer = trl.DPOTrainer(
            model=model,
            args=trl.DPOConfig(
                output_dir=str(directory / "trl"), beta=beta, use_cpu=True, report_to="none",
                gradient_checkpointing=False, bf16=False,
            ),
            processing_class=byte_tokenizer(),
            train_dataset=datasets.Dataset.from_list([row] * 2),
        )  # fmt: skip
        # After its construction: what an adapter is by then is TRL's reference.
        set_peft_model_state_dict(trainer.model, load_file(weights))
        ordered = [pair[i] for i in (0, 1) for pair in pairs]
        width = max(len(one.input_ids) for one in ordered)
        inputs = {
            name: torch.zeros(len(ordered), width, dtype=torch.long)
            for name in ("input_ids", "attention_mask", "completion_mask")
        }
        for number, one in enumerate(ordered):
            size = len(one.input_ids)
            inputs["input_ids"][number, :size] = torch.from_numpy(one.input_ids)
            inputs["attention_mask"][number, :size] = 1
            inputs["completion_mask"][number, :size] = torch.from_numpy(one.labels != IGNORE)
        trainer.model.train()
        with torch.no_grad():
            loss = trainer.compute_loss(trainer.model, inputs).item()
        told: Any = trainer._metrics["train"]
        return loss, {name: float(np.mean(values)) for name, values in told.items()}


def test_the_loss_and_the_rewards_are_those_of_trl(tmp_path: Path, tiny_base: Path) -> None:
    recipe = preference_recipe(
        tmp_path,
        tiny_base,
        num_rows=6,
        optim={"global_batch_size": 6, "max_steps": 4, "learning_rate": 0.05},
        checkpoint={"every_steps": 1, "keep": 9},
    )
    train(recipe)
    pairs = pairs_of(tmp_path / "preferences.jsonl")
    steps = events_of(recipe, "step")
    for done in (1, 3):
        weights = checkpoint.directory(run_dir_of(recipe), done) / checkpoint.WEIGHTS
        loss, told = _trl_loss(tiny_base, weights, pairs, 0.5, tmp_path)
        ours = steps[done]  # the step after the checkpoint, on all pairs
        assert abs(ours.number("loss") - math.log(2)) > 1e-3
        assert ours.number("loss") == pytest.approx(loss, abs=1e-5)
        assert ours.number("rewards/chosen") == pytest.approx(told["rewards/chosen"], abs=1e-5)
        assert ours.number("rewards/rejected") == pytest.approx(told["rewards/rejected"], abs=1e-5)
        assert ours.number("accuracy") == pytest.approx(told["rewards/accuracies"])
        assert ours.number("margin") == pytest.approx(told["rewards/margins"], abs=1e-5)


@pytest.mark.parametrize("variant", ["lora", "dora"])
@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_preferences_are_learned(
    tmp_path: Path, tiny_base: Path, variant: str, quantization: str
) -> None:
    recipe = preference_recipe(
        tmp_path,
        tiny_base,
        model={"base": str(tiny_base), "quantization": quantization},
        lora={"rank": 4, "variant": variant},
        data={"eval": str(write_preferences(tmp_path / "eval.jsonl", 6))},
        optim={"max_steps": 20, "global_batch_size": 12, "learning_rate": 0.03},
        evaluation={"every_steps": 10},
    )
    last = train(recipe)
    steps, evals = events_of(recipe, "step"), events_of(recipe, "eval")
    assert losses(recipe)[0] == pytest.approx(math.log(2), abs=1e-5)  # adapter and base are one
    assert losses(recipe)[-1] < 0.4
    assert [steps[0].number(name) for name in FIELDS[:2]] == pytest.approx([0, 0], abs=1e-5)
    assert steps[-1].number("accuracy") == 1
    assert steps[-1].number("margin") > 0.5
    assert evals[-1].number("margin") == pytest.approx(
        evals[-1].number("rewards/chosen") - evals[-1].number("rewards/rejected")
    )
    assert evals[-1].number("accuracy") == 1
    assert evals[-1].number("loss") < evals[0].number("loss")
    assert 0 <= evals[-1].number("valid_mean_token_accuracy") <= 1
    assert last.kind == "finished"


def test_the_cut_into_micro_batches_packing_and_checkpointing_change_nothing(
    tmp_path: Path, tiny_base: Path
) -> None:
    ways: dict[str, dict[str, Any]] = {
        "whole": {"memory": {"micro_batch_tokens": 4096}},
        "pieces": {"memory": {"micro_batch_tokens": 1}},
        "padded": {"data": {"packing": "off"}},
        "checkpointed": {"memory": {"gradient_checkpointing": "on"}},
    }
    recipes = [
        preference_recipe(tmp_path, tiny_base, name=name, **sections)
        for name, sections in ways.items()
    ]
    for recipe in recipes:
        train(recipe)
    for recipe in recipes[1:]:
        assert np.allclose(losses(recipe), losses(recipes[0]), atol=2e-6)


def test_a_run_stopped_again_and_again_is_bitwise_the_uninterrupted_one(
    tmp_path: Path, tiny_base: Path
) -> None:
    settings: dict[str, Any] = {
        "model": {"base": str(tiny_base), "quantization": "int8"},
        "lora": {"rank": 4, "dropout": 0.1},
        "optim": {"max_steps": 5, "global_batch_size": 5, "learning_rate": 1e-2},
    }
    whole = preference_recipe(tmp_path, tiny_base, name="whole", **settings)
    train(whole)
    stopped = preference_recipe(tmp_path, tiny_base, name="stopped", **settings)
    for _ in range(2):
        run_dir_of(stopped).mkdir(parents=True, exist_ok=True)
        loop.stop_file(run_dir_of(stopped)).touch()
        assert train(stopped).fields["was_stopped"]
    loop.stop_file(run_dir_of(stopped)).unlink()
    assert not train(stopped).fields["was_stopped"]
    assert losses(stopped) == losses(whole)
    assert adapter_bytes(stopped) == adapter_bytes(whole)


def test_two_workers_give_the_losses_of_one(tmp_path: Path, tiny_base: Path) -> None:
    given: dict[str, Any] = {
        "data": {"eval": str(write_preferences(tmp_path / "eval.jsonl", 5))},
        "optim": {"max_steps": 4, "global_batch_size": 5, "learning_rate": 1e-2},
        "evaluation": {"every_steps": 2},
    }
    kinds = ("single", "ddp", "zero1", "zero2")
    recipes = [
        preference_recipe(
            tmp_path,
            tiny_base,
            name=kind,
            scale={"strategy": kind, "workers": 1 if kind == "single" else 2},
            **given,
        )
        for kind in kinds
    ]
    for recipe in recipes:
        run_dir_of(recipe).mkdir(parents=True)
    with gang(2) as workers:
        workers.call(run_here, recipes)
    for recipe in recipes[1:]:
        assert np.allclose(losses(recipe), losses(recipes[0]), atol=2e-6)
        for kind in ("step", "eval"):
            told = [
                [
                    [event.number(name) for name in (*FIELDS, "loss")]
                    for event in events_of(one, kind)
                ]
                for one in (recipe, recipes[0])
            ]
            assert np.allclose(told[0], told[1], atol=1e-5)


def test_pairs_stay_together_in_shares_and_micro_batches() -> None:
    bits = np.random.default_rng(0)
    for is_packed in (True, False):
        for budget in (1, 64, 200, 1000):
            sizes = bits.integers(2, 90, size=24)
            rows = [
                Encoded(
                    id=str(i),
                    input_ids=np.full(size, i, np.int32),
                    labels=np.full(size, i, np.int32),
                    is_truncated=False,
                    has_end=True,
                )
                for i, size in enumerate(sizes.tolist())
            ]
            batches = packing.plan(
                rows, micro_batch_tokens=budget, is_packed=is_packed, pad_id=0, together=2
            )
            seen: list[int] = []
            for batch in batches:
                here = sorted(segment.example for segment in batch.segments)
                assert all(
                    a % 2 == 0 and b == a + 1 for a, b in zip(here[::2], here[1::2], strict=True)
                )
                assert batch.input_ids_BL.numel() <= budget or len(here) == 2
                seen += here
            assert sorted(seen) == list(range(24))
    shares = [sampler.share(range(10), rank, 3, together=2) for rank in range(3)]
    assert shares == [[0, 1, 6, 7], [2, 3, 8, 9], [4, 5]]


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        ({"data": {"format": "messages"}}, "objective.kind is dpo with data.format messages"),
        ({"data": {"mask": "all"}}, "objective.kind is dpo with data.mask all"),
        ({"data": {"streaming": True}}, "objective.kind is dpo with data.streaming"),
        ({"objective": {"beta": 0}}, "objective.beta is 0.0; allowed: above 0, to 2"),
        (
            {"objective": {"kind": "supervised"}, "data": {"format": "preference"}},
            "data.format is preference, which objective.kind: supervised cannot learn from",
        ),
    ],
)
def test_settings_that_do_not_go_together_are_refused(
    tmp_path: Path, tiny_base: Path, sections: dict[str, Any], expected: str
) -> None:
    with pytest.raises(ConfigError, match=expected):
        preference_recipe(tmp_path, tiny_base, **sections)


def test_zero3_is_refused_with_the_reason(tmp_path: Path, tiny_base: Path) -> None:
    recipe = preference_recipe(
        tmp_path, tiny_base, scale={"strategy": "zero3", "workers": 2}, model={"base": "demo"}
    )
    with pytest.raises(ConfigError, match=r"objective.kind: dpo, scale.strategy: zero3: the ref"):
        strategy.check(recipe)


def test_preferences_are_not_learned_by_accident(tmp_path: Path, tiny_base: Path) -> None:
    path = write_preferences(tmp_path / "rows.jsonl", 2)
    with pytest.raises(DataError, match=r"set objective.kind: dpo to learn from preferences"):
        examples.read(str(path))
    rows = write_rows(tmp_path / "pairs.jsonl", 2)
    with pytest.raises(DataError, match=r"not in the format preference, which needs input"):
        train(preference_recipe(tmp_path, tiny_base, data={"train": str(rows)}))


def test_a_recipe_without_an_objective_is_supervised_as_before(
    tmp_path: Path, tiny_base: Path
) -> None:
    plain = config.plain(make_recipe(tmp_path, tiny_base))
    del plain["objective"]
    assert config.build(TrainRecipe, plain, where="old").objective.kind == "supervised"
