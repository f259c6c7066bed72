"""training/generation.py and training/evaluate.py on tiny models and on figures known by heart."""

import math
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from tiny import ARCHITECTURES, make_base

from cluster.config import plain
from cluster.errors import ConfigError, DataError
from training import evaluate as room
from training import generation, special_ids
from training.config import LoraConfig, ModelConfig
from training.evaluate import evaluate, mean, paired, score, share
from training.examples import Example, Message
from training.model import Base, attach_lora, load_base
from training.tokens import Encoder

PROMPTS = [[1, 2, 3], [4] * 9, [5, 6], [7, 8, 9, 10, 11, 12, 13], [14]]


def load(directory: Path) -> Base:
    config = ModelConfig(base=str(directory), quantization="none")
    return load_base(config, device=torch.device("cpu"))


def generate(model: Any, base: Base, prompts: list[list[int]] = PROMPTS, **kw: Any) -> list[str]:
    settings = {"max_new_tokens": 8, "stop_ids": {257}, "batch_size": 2, "pad_id": 258, **kw}
    return generation.generate(model, base.tokenizer, prompts, **settings)


def example(user: str, assistant: str, name: str = "x:1") -> Example:
    turns = (Message(role="user", content=user), Message(role="assistant", content=assistant))
    return Example(id=name, messages=turns)


@pytest.fixture
def base(tiny_base: Path) -> Base:
    return load(tiny_base)


@pytest.fixture
def encoder(base: Base) -> Encoder:
    return Encoder(
        base.tokenizer, stop_ids=special_ids.stop_ids(base.tokenizer, base.generation_eos)
    )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_batched_answers_are_those_of_each_prompt_alone(architecture: str, tmp_path: Path) -> None:
    base = load(make_base(tmp_path / "base", architecture))
    alone = [generate(base.model, base, [prompt])[0] for prompt in PROMPTS]
    assert generate(base.model, base, batch_size=len(PROMPTS)) == alone
    assert generate(base.model, base, batch_size=2) == alone
    assert any(alone)


def test_generation_is_greedy_by_the_models_own_logits(base: Base) -> None:
    ids = [1, 2, 3]
    for _ in range(8):
        with torch.no_grad():
            ids.append(int(base.model(torch.tensor([ids])).logits[0, -1].argmax()))
    expected = base.tokenizer.decode(ids[3:], skip_special_tokens=True)
    assert generate(base.model, base, [[1, 2, 3]], stop_ids=()) == [expected]


def test_answer_ends_before_the_stop_id(base: Base) -> None:
    with torch.no_grad():
        first = int(base.model(torch.tensor([[1, 2, 3]])).logits[0, -1].argmax())
    assert generate(base.model, base, [[1, 2, 3]], stop_ids={first}) == [""]


def test_disabled_adapter_answers_as_the_base(base: Base) -> None:
    before = generate(base.model, base)
    model, _ = attach_lora(base, LoraConfig(rank=4), seed=0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape)
    assert generate(model, base) != before
    with model.disable_adapter():
        assert generate(model, base) == before


def test_training_state_and_settings_are_as_before_after_generation(base: Base) -> None:
    model, _ = attach_lora(base, LoraConfig(rank=4), seed=0)
    model.train()
    base.model.eval()
    base.model.config.use_cache = False
    base.model.activation_checkpointing_enable({"use_reentrant": False})
    config = base.model.generation_config
    modes = [module.training for module in model.modules()]
    generate(model, base)
    assert [module.training for module in model.modules()] == modes
    assert base.model.config.use_cache is False
    assert base.model.generation_config is config


def test_sampling_settings_of_a_base_are_set_aside_without_warnings(base: Base) -> None:
    expected = generate(base.model, base)
    config = base.model.generation_config
    assert config is not None
    config.do_sample, config.temperature, config.top_p, config.max_length = True, 0.6, 0.9, 4
    assert generate(base.model, base) == expected


def test_prompt_that_is_empty_or_fills_the_context_is_refused(tmp_path: Path) -> None:
    base = load(make_base(tmp_path / "base", "gpt2"))
    with pytest.raises(DataError, match="prompt 1 has 0 tokens"):
        generate(base.model, base, [[1], []])
    with pytest.raises(DataError, match="prompt 0 has 512 tokens; allowed: 1 to 511"):
        generate(base.model, base, [[1] * 512])
    assert generate(base.model, base, [[1] * 510], stop_ids=()) != []


def test_progress_counts_answered_prompts(base: Base) -> None:
    seen: list[int] = []
    generate(base.model, base, on_progress=seen.append)
    assert seen == [2, 4, 5]


def test_prompt_from_the_shell_is_answered_through_the_chat_template(
    base: Base, tiny_base: Path
) -> None:
    text = generation.answer("base", "hi", system="be", base=str(tiny_base), max_new_tokens=4)
    assert isinstance(text, str)
    with pytest.raises(DataError, match="the prompt is empty"):
        generation.answer("base", " ", system=None, base=str(tiny_base), max_new_tokens=4)


def test_share_has_the_exact_binomial_interval() -> None:
    # Clopper-Pearson for 45 of 50, and the closed form 1 - 0.025^(1/n) for 0 of n.
    found = share(45, 50)
    assert found.value == 0.9
    assert found.low == pytest.approx(0.7819, abs=1e-4)
    assert found.high == pytest.approx(0.9667, abs=1e-4)
    nothing = share(0, 50)
    assert nothing.low == 0.0
    assert nothing.high == pytest.approx(1 - 0.025 ** (1 / 50))


def test_mean_has_a_reproducible_interval_that_covers_it() -> None:
    values = [0.1, 0.4, 0.4, 0.9, 0.3, 0.7, 0.2, 0.6]
    found = mean(values)
    assert found.value == pytest.approx(sum(values) / 8)
    assert found.low < found.value < found.high
    assert mean(values) == found
    # The normal approximation, which the bootstrap of a mean comes close to.
    spread = 1.96 * float(torch.tensor(values).std(correction=0)) / math.sqrt(8)
    assert found.high - found.low == pytest.approx(2 * spread, rel=0.1)


def test_mean_of_equal_or_single_values_is_a_point() -> None:
    assert (mean([0.5]).low, mean([0.5] * 4).high) == (0.5, 0.5)


def test_weights_make_it_a_mean_over_tokens() -> None:
    assert mean([1.0, 2.0], [1, 3]).value == pytest.approx(1.75)


def test_paired_difference_is_narrower_than_the_two_apart() -> None:
    before = [0.1, 0.5, 0.9, 0.3, 0.7]
    found = paired(before, [value + 0.1 for value in before])
    assert found.value == pytest.approx(0.1)
    assert found.high - found.low < 1e-9
    with pytest.raises(DataError, match="5 scores before and 1 after"):
        paired(before, [0.1])


def test_estimate_is_plain_for_manifests() -> None:
    assert plain(share(1, 2))["n"] == 2


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ('{"a": 1}', '{"a": 1}', (1, 1, 1)),
        (' {"a": 1}\n', '{"a": 1}', (1, 1, 1)),
        ('{"a": 1} ok', '{"a": 1}', (0, 0, 0.8)),
        ('{"a": NaN}', '{"a": 1}', (0, 0, 0.5)),
        ("5", "5", (1, 0, 1)),
        ("", "x", (0, 0, 0)),
        ("привет мир", "привет", (0, 0, 2 / 3)),
        ("[" * 100_000, "[]", (0, 0, 0)),
    ],
)
def test_score_of_an_answer(
    prediction: str, reference: str, expected: tuple[float, float, float]
) -> None:
    found = score(prediction, reference)
    assert (found["exact_match"], found["json_valid"]) == expected[:2]
    assert found["rouge_l"] == pytest.approx(expected[2])


def test_evaluation_gives_estimates_and_records(base: Base, encoder: Encoder) -> None:
    held_out = [example("one", "two", "f:1"), example("three", "four five", "f:2")]
    found = evaluate(
        base, base.model, held_out, encoder, ["rouge_l", "loss", "exact_match"], max_new_tokens=4
    )
    assert list(found.metrics) == ["rouge_l", "loss", "exact_match"]
    assert found.metrics["loss"].n == 2
    assert [(r.id, r.reference) for r in found.records] == [("f:1", "two"), ("f:2", "four five")]
    assert found.as_json()["metrics"]["exact_match"]["n"] == 2
    assert len(found.lines()) == 3


def test_model_that_knows_the_answer_scores_one(
    base: Base, encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = example("one", "\x02\x02\x02\x02")
    reference = generation.generate(
        base.model,
        base.tokenizer,
        [encoder.prompt_ids(known)],
        max_new_tokens=4,
        stop_ids=(),
        batch_size=1,
        pad_id=258,
    )[0]
    found = evaluate(
        base, base.model, [example("one", reference)], encoder, ["exact_match"], max_new_tokens=4
    )
    assert found.metrics["exact_match"].value == float(found.records[0].prediction == reference)


def test_loss_is_the_mean_over_supervised_tokens(base: Base, encoder: Encoder) -> None:
    held_out = [example("one", "two"), example("three", "a longer answer")]
    total, count = 0.0, 0
    for item in held_out:
        encoded = encoder.encode(item)
        ids = torch.from_numpy(encoded.input_ids).long()
        labels = torch.from_numpy(encoded.labels).long()
        with torch.no_grad():
            logits = base.model(ids[None]).logits[0, :-1]
        total += float(torch.nn.functional.cross_entropy(logits, labels[1:], reduction="sum"))
        count += int((labels[1:] != -100).sum())
    found = evaluate(base, base.model, held_out, encoder, ["loss"])
    assert found.metrics["loss"].value == pytest.approx(total / count, rel=1e-5)
    assert found.records == ()


def test_unknown_metric_and_no_examples_are_refused(base: Base, encoder: Encoder) -> None:
    with pytest.raises(ConfigError, match="metric 'accuracy' is not known; allowed: loss"):
        evaluate(base, base.model, [example("a", "b")], encoder, ["accuracy"])
    with pytest.raises(DataError, match="no examples"):
        evaluate(base, base.model, [], encoder, ["loss"])


def test_adapter_directory_is_measured_from_files(tiny_base: Path, tmp_path: Path) -> None:
    base = load(tiny_base)
    model = peft.get_peft_model(
        base.model, peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape)
    model.save_pretrained(tmp_path / "adapter")
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "c", "completion": "d"}\n')
    found = room.evaluate_adapter(str(tmp_path / "adapter"), str(data), max_new_tokens=2)
    assert list(found.metrics) == list(room.METRICS)
    bare = room.evaluate_adapter("base", str(data), metrics=["loss"], base=str(tiny_base))
    assert bare.metrics["loss"].value != found.metrics["loss"].value
