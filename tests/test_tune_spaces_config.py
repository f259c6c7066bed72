"""Search files: what they say, what they may not say, and how that is said."""

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import ConfigError
from training.config import DataConfig, ModelConfig, OptimConfig, ScaleConfig, TrainRecipe
from tune_spaces import config, spaces
from tune_spaces.config import SearchConfig
from tune_spaces.spaces import AT_RANK_16, Choices, Dimension, Floats, Ints

RECIPE = "name: a\nmodel: {base: demo}\ndata: {train: train.jsonl, eval: eval.jsonl}\n"
PLAIN = TrainRecipe(
    name="a",
    model=ModelConfig(base="demo"),
    data=DataConfig(train="train.jsonl", eval="eval.jsonl"),
    optim=OptimConfig(global_batch_size=4),
)
INLINE = """\
space:
  lora.variant: [lora, rslora]
  lora.rank: {int: [4, 64], log: true}
  lora.target_modules: [all-linear, [q_proj, v_proj]]
  optim.learning_rate_at_rank_16: {log_uniform: [2e-5, 2e-3]}
  optim.weight_decay: {uniform: [0, 1e-1]}
  optim.global_batch_size: {int: [8, 64], step: 8}
  lora.dropout: {choices: [0, 5e-2], when: {lora.variant: [lora]}}
  scale_learning_rate: false
"""


def _file(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "search.yaml"
    path.write_text(text)
    return path


def test_recipe_alone_is_a_search_with_every_default(tmp_path: Path) -> None:
    search = config.load(_file(tmp_path, RECIPE))
    assert search.search == SearchConfig()
    assert search.space == spaces.rank_lr()
    assert search.space_spec == "rank_lr"
    data = DataConfig(train="train.jsonl", eval="eval.jsonl")
    assert search.recipe == TrainRecipe(name="a", model=ModelConfig(base="demo"), data=data)


def test_inline_space_says_what_was_written(tmp_path: Path) -> None:
    search = config.load(_file(tmp_path, RECIPE + INLINE))
    assert search.space == spaces.Space(
        name="inline",
        is_lr_scaled=False,
        dimensions=(
            Dimension(path="lora.variant", domain=Choices(values=("lora", "rslora"))),
            Dimension(path="lora.rank", domain=Ints(low=4, high=64, is_log=True)),
            Dimension(
                path="lora.target_modules",
                domain=Choices(values=("all-linear", ["q_proj", "v_proj"])),
            ),
            Dimension(path=AT_RANK_16, domain=Floats(low=2e-5, high=2e-3, is_log=True)),
            Dimension(path="optim.weight_decay", domain=Floats(low=0.0, high=0.1)),
            Dimension(path="optim.global_batch_size", domain=Ints(low=8, high=64, step=8)),
            Dimension(
                path="lora.dropout",
                domain=Choices(values=(0.0, 0.05)),
                when={"lora.variant": ("lora",)},
            ),
        ),
    )


def test_numbers_that_yaml_reads_as_text_are_numbers_in_choices_too() -> None:
    space = config.parse({AT_RANK_16: ["1e-4", 3e-4], "optim.warmup": ["1e1", 0]})
    assert [d.domain for d in space.dimensions] == [
        Choices(values=(1e-4, 3e-4)),
        Choices(values=(10.0, 0.0)),
    ]


@pytest.mark.parametrize("text", [RECIPE, RECIPE + INLINE])
def test_plain_is_the_inverse_of_load(tmp_path: Path, text: str) -> None:
    overrides = ["search.trials=4", "search.log=[tensorboard]", "search.budget_minutes=1.5"]
    search = config.load(_file(tmp_path, text), overrides)
    again = tmp_path / "again.json"
    again.write_text(json.dumps(config.plain(search)))
    assert config.load(again) == search


def test_overrides_reach_the_recipe_the_search_and_the_space(tmp_path: Path) -> None:
    path = _file(tmp_path, RECIPE + "space: targets\nsearch: {trials: 2, seeds: 1}\n")
    overrides = ["lora.rank=8", "search.trials=5", "search.scheduler=pbt", "space=batch"]
    search = config.load(path, overrides)
    assert (search.recipe.lora.rank, search.search.trials, search.search.seeds) == (8, 5, 1)
    assert search.search.scheduler == "pbt"
    assert search.space == spaces.batch()
    inline = config.load(path, ["space={lora.rank: [4, 8]}"])
    assert inline.space.dimensions[0].domain == Choices(values=(4, 8))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("spac: x\n", ["unknown key 'spac'", "Did you mean 'space'?", "search", "lora"]),
        ("search: {trails: 3}\n", ["search", "unknown key 'trails'", "'trials'"]),
        ("search: {trials: 0}\n", ["search.trials is 0", "1 to 10000"]),
        ("search: {trials: many}\n", ["search.trials is 'many'", "a whole number"]),
        ("search: {seats: none}\n", ["search.seats is 'none'", "auto"]),
        ("search: {scheduler: bohb}\n", ["search.scheduler is 'bohb'", "hyperband"]),
        ("search: {metric: bleu}\n", ["search.metric is 'bleu'", "eval_loss", "rouge_l"]),
        ("search: {budget_tokens: 10, grace_tokens: 11}\n", ["search.grace_tokens is 11", "10"]),
        ("search: {sampler: gp, searcher: grid}\n", ["sampler is gp", "searcher is grid"]),
        ("search: {scheduler: fifo, grace_tokens: 5}\n", ["grace_tokens", "fifo"]),
        ("search: {test: eval.jsonl}\n", ["search.test is 'eval.jsonl'", "no decision"]),
        ("search: {log: [print]}\n", ["search.log", "a list of tensorboard"]),
        ("space: rank_lt\n", ["no space 'rank_lt'", "Did you mean 'rank_lr'?", "seed_article"]),
        ("space: 3\n", ["space is 3", "expected a name"]),
        ("lora: {rank: 0}\n", ["lora.rank is 0"]),
        ("objective: {kind: dpo}\n", ["objective.kind is dpo", "search", "supervised"]),
    ],
)
def test_bad_search_file_is_refused_with_where_what_and_allowed(
    tmp_path: Path, text: str, words: list[str]
) -> None:
    path = _file(tmp_path, RECIPE + text)
    with pytest.raises(ConfigError) as caught:
        config.load(path)
    message = str(caught.value)
    assert message.startswith(str(path))
    for word in words:
        assert word in message


@pytest.mark.parametrize("metric", ["eval_loss", "exact_match", "json_valid", "rouge_l"])
def test_metric_on_held_out_examples_needs_some(tmp_path: Path, metric: str) -> None:
    path = _file(tmp_path, "name: a\nmodel: {base: demo}\ndata: {train: train.jsonl}\n")
    with pytest.raises(ConfigError, match=r"data\.eval, or use search\.metric: train_loss"):
        config.load(path, [f"search.metric={metric}"])
    assert config.load(path, ["search.metric=train_loss"]).recipe.data.eval is None


BAD_SPACES: list[tuple[dict[Any, Any], list[str]]] = [
    ({}, ["names no field"]),
    ({"scale_learning_rate": True}, ["names no field"]),
    ({"scale_learning_rate": "no", "lora.rank": [8]}, ["scale_learning_rate is 'no'", "false"]),
    ({"lora.rnk": [8]}, ["unknown field 'lora.rnk'", "'lora.rank'", "lora.dropout"]),
    ({"lora": {"rank": [8]}}, ["unknown field 'lora'", "lora.rank"]),
    ({1: [8]}, ["unknown field '1'"]),
    ({"optim.learning_rate_at_rank16": [1]}, ["'optim.learning_rate_at_rank_16'"]),
    ({"lora.rank": []}, ["lora.rank is []", "at least one"]),
    ({"lora.rank": {"choices": 8}}, ["lora.rank is 8", "expected a list"]),
    ({"lora.rank": 8}, ["lora.rank is 8", "choices", "recipe"]),
    ({"lora.rank": [8, 8]}, ["lora.rank: 8 stands twice"]),
    ({"lora.rank": {}}, ["lora.rank needs one of", "found none"]),
    ({"lora.rank": {"choices": [8], "int": [1, 2]}}, ["found choices and int"]),
    ({"lora.rank": {"log_unifrom": [1, 2]}}, ["unknown kind of range", "'log_uniform'"]),
    ({"lora.rank": [8, 0]}, ["lora.rank is 0", "1..4096"]),
    ({"lora.rank": ["eight"]}, ["lora.rank is 'eight'", "a whole number"]),
    ({"lora.rank": {"int": [0, 8]}}, ["lora.rank is 0", "1..4096"]),
    ({"lora.rank": {"int": [8, 5000]}}, ["lora.rank is 5000"]),
    ({"lora.rank": {"int": [8]}}, ["int is [8]", "[low, high]"]),
    ({"lora.rank": {"int": [1.5, 8]}}, ["1.5 in int", "a whole number"]),
    ({"lora.rank": {"int": [8, 8]}}, ["[8, 8]", "below"]),
    ({"lora.rank": {"int": [1, 8], "step": 0}}, ["step is 0", "1 or more"]),
    ({"lora.rank": {"int": [1, 8], "step": 2, "log": True}}, ["step is 2", "1 with log"]),
    ({"lora.rank": {"int": [1, 8], "log": "yes"}}, ["log is 'yes'", "true or false"]),
    ({"lora.rank": {"uniform": [1, 8]}}, ["lora.rank is 1.0", "a whole number"]),
    ({"optim.seed": {"int": [0, 8], "log": True}}, ["cannot reach zero", "above zero"]),
    ({"optim.weight_decay": {"log_uniform": [0, 1]}}, ["cannot reach zero"]),
    ({"optim.weight_decay": {"log_uniform": [-1, 1]}}, ["cannot reach zero"]),
    ({"optim.weight_decay": {"uniform": [0.5, 0.1]}}, ["[0.5, 0.1]", "below"]),
    ({"optim.weight_decay": {"uniform": [0, 11]}}, ["optim.weight_decay is 11", "0 to 10"]),
    ({"optim.weight_decay": {"uniform": [0, "x"]}}, ["'x' in uniform", "a finite number"]),
    ({"optim.weight_decay": {"uniform": [0, True]}}, ["True in uniform"]),
    ({"optim.weight_decay": {"uniform": [0, ".inf"]}}, ["'.inf'", "a finite number"]),
    ({"optim.weight_decay": {"uniform": [0, 1], "step": 1}}, ["step and log go with int"]),
    ({"optim.learning_rate": [1e-4], AT_RANK_16: [1e-4]}, ["both given", "keep one"]),
    ({AT_RANK_16: [9.0], "lora.rank": [1]}, ["optim.learning_rate is 36.0", "to 10"]),
    ({"lora.dropout": {"choices": [0], "when": []}}, ["when is []", "a mapping"]),
    ({"lora.dropout": {"choices": [0], "when": {"lora.rank": [8]}}}, ["no field", "none"]),
    (
        {"lora.dropout": {"choices": [0], "when": {"lora.rank": [8]}}, "lora.rank": [8]},
        ["'lora.rank'", "stands before it"],
    ),
    (
        {"lora.rank": [8], "lora.dropout": {"choices": [0], "when": {"lora.rnk": [8]}}},
        ["'lora.rnk'", "Did you mean 'lora.rank'?"],
    ),
    (
        {"lora.rank": [8], "lora.dropout": {"choices": [0], "when": {"lora.rank": [9]}}},
        ["lora.rank = 9", "not among its choices [8]"],
    ),
    (
        {"lora.rank": [8], "lora.dropout": {"choices": [0], "when": {"lora.rank": 8}}},
        ["lora.rank is 8", "expected a list"],
    ),
]


@pytest.mark.parametrize(("spec", "words"), BAD_SPACES, ids=lambda value: str(value)[:50])
def test_bad_space_is_refused_with_what_and_allowed(spec: dict[Any, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        config.parse(spec)
    message = str(caught.value)
    assert message.startswith("space")
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    "path",
    [
        "name",
        "storage",
        "model.base",
        "data.train",
        "data.mask",
        "data.max_length",
        "memory.micro_batch_tokens",
        "scale.workers",
        "checkpoint.keep",
        "evaluation.best",
        "log.to",
    ],
)
def test_field_that_trials_have_in_common_cannot_vary(path: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config.parse({path: ["x"]})
    assert f"{path} cannot vary" in str(caught.value)
    assert "lora.rank" in str(caught.value)


@pytest.mark.parametrize(
    ("path", "values"),
    [
        ("model.quantization", ["int8", "none"]),
        ("data.train", ["a.jsonl", ["a.jsonl", "b.jsonl"]]),
        ("data.max_length", [64, 128]),
        ("memory.gradient_checkpointing", ["on", "off"]),
        ("scale.workers", [1, 2]),
    ],
)
def test_solo_searches_what_packed_has_in_common_and_packed_says_so(
    tmp_path: Path, path: str, values: list[Any]
) -> None:
    space = yaml.safe_dump({"space": {path: values}})
    file = _file(tmp_path, RECIPE + space)
    [dimension] = config.load(file, ["search.mode=solo"]).space.dimensions
    assert dimension.domain == Choices(values=tuple(values))
    assert spaces.recipe_for(PLAIN, {path: values[1]}, mode="solo") != PLAIN
    with pytest.raises(ConfigError, match=rf"{path} cannot vary .* set search\.mode: solo"):
        config.load(file)


@pytest.mark.parametrize("path", ["name", "storage", "data.eval", "evaluation.best", "log.to"])
def test_solo_keeps_and_compares_its_trials_in_one_way(path: str) -> None:
    with pytest.raises(ConfigError, match=rf"{path} cannot vary inside a search, which keeps"):
        config.parse({path: ["x"]}, mode="solo")
    with pytest.raises(ConfigError, match=r"Did you mean 'data.mask'\? Valid: model.base"):
        config.parse({"data.maks": ["all"]}, mode="solo")


def test_what_no_bench_takes_is_refused_when_the_file_is_read(tmp_path: Path) -> None:
    dora = "space: {lora.variant: [lora, dora]}\n"
    for text, override in (
        ("", "lora.variant=dora"),
        (dora, "lora.rank=8"),
        ("optim: {max_steps: 4}\n", "data.streaming=true"),
    ):
        file = _file(tmp_path, RECIPE + text)
        with pytest.raises(ConfigError, match=r"on one base; set search\.mode: solo"):
            config.load(file, [override])
        assert config.load(file, [override, "search.mode=solo"]).search.mode == "solo"


def test_named_space_is_checked_against_the_recipe() -> None:
    recipe = TrainRecipe(
        name="a",
        model=ModelConfig(base="demo"),
        data=DataConfig(train="x"),
        scale=ScaleConfig(workers=9),
    )
    with pytest.raises(ConfigError, match=r"space 'batch'.*global_batch_size is 8 for 9 workers"):
        config.parse("batch", recipe)


def test_schema_takes_what_load_takes_and_describes_it(tmp_path: Path) -> None:
    schema = config.schema()
    validator = jsonschema.Draft202012Validator(schema)
    validator.check_schema(schema)
    tree = yaml.safe_load(RECIPE + INLINE)
    for text in (RECIPE, RECIPE + "space: batch\nsearch: {seats: 4}\n"):
        validator.validate(yaml.safe_load(text))
    validator.validate({**tree, "search": {"trials": 3}})
    for bad in ({"space": "x"}, {"space": {"lora.rnk": [8]}}, {"search": {"trails": 1}}):
        assert not validator.is_valid({**tree, **bad})
    search = schema["properties"]["search"]["properties"]
    assert all(entry["description"] for entry in search.values())
    assert search["metric"]["default"] == "eval_loss"


ENTRIES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-2, 70)
    | st.floats()
    | st.sampled_from(["1e-4", "x", ".inf", "lora"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["choices", "uniform", "log_uniform", "int", "step", "log", "when"]),
            inner,
            max_size=3,
        )
    ),
    max_leaves=6,
)


@given(
    spec=st.dictionaries(
        st.sampled_from([*spaces.SEARCHABLE, "data.mask", "x"]), ENTRIES, max_size=3
    )
)
def test_any_mapping_is_a_space_or_a_config_error(spec: dict[str, Any]) -> None:
    try:
        space = config.parse(spec)
    except ConfigError as error:
        assert str(error).startswith("space")  # noqa: PT017
    else:
        for params in space.grid(2)[:20]:
            spaces.recipe_for(spaces.BARE, params, is_lr_scaled=space.is_lr_scaled)


def test_every_shipped_search_file_is_read() -> None:
    shipped = sorted((Path(config.__file__).parent / "searches").glob("*.yaml"))
    assert shipped
    for path in shipped:
        assert config.load(path).search.trials > 1, path
