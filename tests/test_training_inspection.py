"""The report on the data, and the data that is refused."""

import dataclasses

import pytest
from tiny import CHATML, byte_tokenizer

from cluster.errors import DataError
from training.examples import Example, Message, Rows
from training.inspection import DataReport, inspect, refuse
from training.special_ids import stop_ids
from training.token_set import tokenize
from training.tokens import Encoder, Mask


def report_on(
    *answers: str,
    texts: tuple[str, ...] = (),
    mask: Mask = "completion",
    max_length: int = 1024,
    chat_template: str = CHATML,
    vocab_size: int | None = None,
) -> DataReport:
    tokenizer = byte_tokenizer(chat_template)
    encoder = Encoder(
        tokenizer, mask=mask, max_length=max_length, stop_ids=stop_ids(tokenizer, None)
    )
    user = Message(role="user", content="Hi")
    found = [
        Example(id=f"a.jsonl:{i}", messages=(user, Message(role="assistant", content=answer)))
        for i, answer in enumerate(answers, start=1)
    ] + [Example(id=f"b.jsonl:{i}", text=text) for i, text in enumerate(texts, start=1)]
    rows = Rows(examples=tuple(found), bad=(), fingerprint="")
    tokens = tokenize(rows, encoder, on_bad_row="skip")
    return inspect(tokens, encoder, tokenizer, vocab_size=vocab_size)


def test_the_report_gives_figures_and_a_marked_example() -> None:
    report = report_on("Hello", "Hello you")
    assert report.num_examples == 2
    assert report.num_supervised == 6 + 10
    assert report.length_percentiles["max"] == 32
    assert report.sample == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n⟦Hello<|im_end|>⟧\n"
    )
    text = "\n".join(report.lines())
    for part in ("examples      2", "p50 ", "truncated     0.0 %", "supervised", "⟦Hello"):
        assert part in text
    refuse(report)


def test_the_report_lists_bad_rows() -> None:
    report = report_on("Hello", *["x"] * 7, max_length=21)
    assert report.num_examples == 0
    assert len(report.bad) == 8
    lines = report.lines()
    assert "bad rows      8 (left out)" in lines
    assert "  and 3 more" in lines
    with pytest.raises(DataError, match=r"no examples to train on; 8 bad rows.*beyond max_length"):
        refuse(report)


def test_everything_longer_than_max_length_is_refused() -> None:
    report = report_on("x" * 100, "y" * 100, max_length=60)
    assert report.num_truncated == 2
    with pytest.raises(DataError, match=r"every example is longer than data.max_length \(60"):
        refuse(report)
    refuse(report_on("x" * 100, "y", max_length=60))


def test_an_end_that_is_never_learned_is_refused() -> None:
    template = CHATML.replace("<|im_end|>", "<|pad|>")
    report = report_on(*["x"] * 3, chat_template=template)
    assert report.num_without_end == 3
    with pytest.raises(DataError, match="3 of 3 examples do not teach the model where to stop"):
        refuse(report)


def test_an_end_missing_in_one_of_a_hundred_examples_is_let_through() -> None:
    report = report_on("x")
    refuse(dataclasses.replace(report, num_examples=100, num_without_end=1))
    with pytest.raises(DataError, match="2 of 100"):
        refuse(dataclasses.replace(report, num_examples=100, num_without_end=2))


@pytest.mark.parametrize("mask", ["completion", "all", "last_turn"])
def test_sound_data_passes_under_every_mask(mask: Mask) -> None:
    refuse(report_on("Hello", texts=("Once.",), mask=mask))


def test_nothing_supervised_is_refused() -> None:
    report = dataclasses.replace(report_on("x"), num_supervised=0)
    with pytest.raises(DataError, match=r"0 % of \d+ tokens are supervised"):
        refuse(report)


def test_ids_outside_the_models_vocabulary_are_refused() -> None:
    refuse(report_on("x", vocab_size=258))
    report = report_on("x", vocab_size=257)
    assert report.num_out_of_vocabulary == 2
    with pytest.raises(DataError, match=r"2 tokens are outside.*largest id is 257.*has 257"):
        refuse(report)
