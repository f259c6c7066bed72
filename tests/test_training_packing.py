"""Packing: nothing lost, nothing doubled, nothing seen by a neighbour."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import VOCAB_SIZE, make_base
from transformers import AutoModelForCausalLM

from training.packing import MicroBatch, join, parity_probe, plan
from training.tokens import IGNORE, Encoded

PAD = 258


def encoded(length: int, seed: int = 0, *, num_prompt: int = 1) -> Encoded:
    ids = np.random.default_rng(seed).integers(0, 256, length).astype(np.int32)
    labels = ids.copy()
    labels[:num_prompt] = IGNORE
    return Encoded(id=str(seed), input_ids=ids, labels=labels, is_truncated=False, has_end=True)


LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=40)


@settings(max_examples=60, deadline=None)
@given(lengths=LENGTHS, budget=st.integers(1, 300), is_packed=st.booleans())
def test_every_token_of_every_example_appears_exactly_once(
    lengths: list[int], budget: int, is_packed: bool
) -> None:
    examples = [encoded(size, i, num_prompt=i % 3) for i, size in enumerate(lengths)]
    batches = plan(examples, micro_batch_tokens=budget, is_packed=is_packed, pad_id=PAD)
    seen: list[int] = []
    for batch in batches:
        is_real_BL = torch.zeros_like(batch.input_ids_BL, dtype=torch.bool)
        for segment in batch.segments:
            example = examples[segment.example]
            where = (segment.row, slice(segment.start, segment.stop))
            assert batch.input_ids_BL[where].tolist() == example.input_ids.tolist()
            assert batch.labels_BL[where].tolist() == [IGNORE, *example.labels[1:].tolist()]
            assert batch.position_ids_BL[where].tolist() == list(range(len(example.input_ids)))
            assert not is_real_BL[where].any()
            is_real_BL[where] = True
            seen.append(segment.example)
        assert (batch.labels_BL[~is_real_BL] == IGNORE).all()
        assert (batch.input_ids_BL[~is_real_BL] == PAD).all()
        assert batch.num_real_tokens == int(is_real_BL.sum())
        if batch.attention_mask_BL is not None:
            assert torch.equal(batch.attention_mask_BL.bool(), is_real_BL)
    assert sorted(seen) == list(range(len(lengths)))


@settings(max_examples=60, deadline=None)
@given(lengths=LENGTHS, budget=st.integers(1, 300), is_packed=st.booleans())
def test_the_budget_holds_but_for_a_lone_longer_example(
    lengths: list[int], budget: int, is_packed: bool
) -> None:
    examples = [encoded(size, i) for i, size in enumerate(lengths)]
    for batch in plan(examples, micro_batch_tokens=budget, is_packed=is_packed, pad_id=PAD):
        num_rows, width = batch.input_ids_BL.shape
        assert num_rows * width <= budget or (num_rows == 1 and len(batch.segments) == 1)


@settings(max_examples=30, deadline=None)
@given(lengths=LENGTHS, is_packed=st.booleans())
def test_supervised_tokens_are_counted_as_the_examples_count_them(
    lengths: list[int], is_packed: bool
) -> None:
    examples = [encoded(size, i, num_prompt=1 + i % 3) for i, size in enumerate(lengths)]
    batches = plan(examples, micro_batch_tokens=100, is_packed=is_packed, pad_id=PAD)
    total = sum(batch.num_supervised_tokens for batch in batches)
    assert total == sum(example.num_supervised for example in examples)


def test_the_first_label_of_an_example_is_never_supervised() -> None:
    examples = [encoded(5, 1, num_prompt=0), encoded(5, 2, num_prompt=0)]
    (batch,) = plan(examples, micro_batch_tokens=100, is_packed=True, pad_id=PAD)
    assert batch.num_supervised_tokens == 8


def test_packed_rows_have_no_mask_and_padding_starts_again_at_position_0() -> None:
    examples = [encoded(size, size) for size in (90, 89, 40, 39, 38)]
    batches = plan(examples, micro_batch_tokens=200, is_packed=True, pad_id=PAD)
    assert all(batch.attention_mask_BL is None for batch in batches)
    num_padded = 0
    for batch in batches:
        for row, positions in enumerate(batch.position_ids_BL.tolist()):
            used = max(s.stop for s in batch.segments if s.row == row)
            num_padded += len(positions) - used
            assert positions[used:] == list(range(len(positions) - used))
            assert batch.input_ids_BL[row, used:].tolist() == [PAD] * (len(positions) - used)
    assert num_padded


def test_padded_rows_hold_one_example_each() -> None:
    examples = [encoded(6, 1), encoded(5, 2)]
    (batch,) = plan(examples, micro_batch_tokens=100, is_packed=False, pad_id=PAD)
    assert batch.attention_mask_BL is not None
    assert batch.attention_mask_BL.tolist() == [[1] * 6, [1] * 5 + [0]]
    assert batch.position_ids_BL.tolist() == [list(range(6))] * 2


def test_plan_is_the_same_every_time_and_takes_the_longest_first() -> None:
    examples = [encoded(size, size) for size in (3, 50, 20, 20, 7)]
    first, second = (
        plan(examples, micro_batch_tokens=64, is_packed=True, pad_id=PAD) for _ in range(2)
    )
    assert [batch.segments for batch in first] == [batch.segments for batch in second]
    assert first[0].segments[0].example == 1
    assert plan([], micro_batch_tokens=64, is_packed=True, pad_id=PAD) == []


def test_mixed_lengths_pack_with_little_padding_and_short_rows() -> None:
    lengths = [1000, 400, 300, 120, 110, 90, 80, 70, 60, 50, 50, 40, 40, 30, 30, 30]
    examples = [encoded(size, i) for i, size in enumerate(lengths)]
    batches = plan(examples, micro_batch_tokens=2048, is_packed=True, pad_id=PAD)
    num_slots = sum(batch.input_ids_BL.numel() for batch in batches)
    assert sum(lengths) / num_slots > 0.95
    assert max(batch.input_ids_BL.shape[1] for batch in batches) == 1000


def logits_of(model: torch.nn.Module, batch: MicroBatch) -> torch.Tensor:
    return model(
        input_ids=batch.input_ids_BL,
        position_ids=batch.position_ids_BL,
        attention_mask=batch.attention_mask_BL,
        use_cache=False,
    ).logits


@pytest.mark.parametrize(
    ("architecture", "is_exact"),
    [
        *((name, True) for name in ("llama", "qwen3", "gpt_neox", "gpt2", "glm", "phi3")),
        *((name, False) for name in ("falcon", "bloom")),
    ],
)
def test_probe_tells_architectures_that_pack_exactly_from_those_that_do_not(
    tmp_path: Path, architecture: str, is_exact: bool
) -> None:
    model = AutoModelForCausalLM.from_pretrained(make_base(tmp_path, architecture)).eval()

    def forward(batch: MicroBatch) -> torch.Tensor:
        if architecture in ("bloom", "falcon"):  # Bloom takes no position_ids at all.
            return model(
                input_ids=batch.input_ids_BL,
                attention_mask=batch.attention_mask_BL,
                use_cache=False,
            ).logits
        return logits_of(model, batch)

    difference = parity_probe(forward, vocab_size=VOCAB_SIZE, pad_id=PAD)
    assert difference < 1e-4 if is_exact else difference > 1e-3, difference


def test_probe_does_not_hide_logits_that_are_not_finite() -> None:
    def broken(batch: MicroBatch) -> torch.Tensor:
        return torch.full((*batch.input_ids_BL.shape, VOCAB_SIZE), float("nan"))

    assert not parity_probe(broken, vocab_size=VOCAB_SIZE, pad_id=PAD) <= 1e-4


@pytest.mark.parametrize("is_packed", [True, False])
def test_joined_micro_batches_keep_their_rows(is_packed: bool) -> None:
    parts = [
        plan(
            [encoded(size, size) for size in sizes],
            micro_batch_tokens=100,
            is_packed=is_packed,
            pad_id=PAD,
        )[0]
        for sizes in ((20, 9, 9), (31, 30, 5), (4,))
    ]
    whole = join(parts, pad_id=PAD)
    row = 0
    for part in parts:
        rows, width = part.input_ids_BL.shape
        there = (slice(row, row + rows), slice(width))
        assert torch.equal(whole.input_ids_BL[there], part.input_ids_BL)
        assert torch.equal(whole.labels_BL[there], part.labels_BL)
        assert torch.equal(whole.position_ids_BL[there], part.position_ids_BL)
        more = (slice(row, row + rows), slice(width, None))
        assert (whole.input_ids_BL[more] == PAD).all()
        assert (whole.labels_BL[more] == IGNORE).all()
        assert (whole.attention_mask_BL is None) == is_packed
        if whole.attention_mask_BL is not None:
            assert not whole.attention_mask_BL[more].any()
        row += rows
    assert row == len(whole.input_ids_BL)
    assert whole.num_supervised_tokens == sum(part.num_supervised_tokens for part in parts)
    assert whole.num_real_tokens == sum(part.num_real_tokens for part in parts)
    assert join(parts[:1], pad_id=PAD) is parts[0]
