"""The chunked loss against the model's own logits."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import VOCAB_SIZE, make_base

from training import memory, objective, packing
from training import model as model_room
from training.config import LoraConfig, ModelConfig
from training.model import Base
from training.objective import Objective
from training.tokens import Encoded

CPU = torch.device("cpu")


def load(directory: Path, precision: str = "fp32") -> tuple[Base, Objective]:
    config = ModelConfig(base=str(directory), quantization="none", precision=precision)  # pyright: ignore
    base = model_room.load_base(config, device=CPU)
    model, _ = model_room.attach_lora(base, LoraConfig(rank=4), seed=0)
    probe = memory.random_probe(VOCAB_SIZE, 258)
    return base, objective.probe(model, probe, base.autocast)


def rows(seed: int = 0) -> list[Encoded]:
    bits = np.random.default_rng(seed)
    out: list[Encoded] = []
    for index, length in enumerate((9, 30, 17)):
        ids = bits.integers(255, size=length, dtype=np.int32)
        labels = np.where(bits.random(length) < 0.5, ids, -100).astype(np.int32)
        labels[0] = -100
        out.append(
            Encoded(id=str(index), input_ids=ids, labels=labels, is_truncated=False, has_end=True)
        )
    return out


def test_the_loss_and_its_gradient_are_those_of_the_full_logits(
    tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objective, "CHUNK", 5)  # several chunks, the last one short
    _, chosen = load(tiny_base)
    assert chosen.uses_bare_head
    own = Objective(model=chosen.model, accepts_position_ids=True, uses_bare_head=False)
    (batch,) = packing.plan(rows(), micro_batch_tokens=256, is_packed=True, pad_id=258)
    results = []
    for way in (chosen, own):
        way.model.zero_grad()
        loss = way.losses(batch).sum()
        loss.backward()
        grads = [p.grad.clone() for p in way.model.parameters() if p.grad is not None]
        results.append((loss.detach(), grads))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-6, atol=0)
    for first, second in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-7)


def test_only_supervised_tokens_count_and_each_is_predicted_from_the_one_before() -> None:
    (batch,) = packing.plan(rows()[:1], micro_batch_tokens=64, is_packed=True, pad_id=258)
    position_N, target_N = objective.shifted_targets(batch)
    assert len(target_N) == batch.num_supervised_tokens == rows()[0].num_supervised
    assert torch.equal(batch.input_ids_BL.flatten()[position_N + 1], target_N)


def test_a_model_that_transforms_its_logits_is_found_out(tmp_path: Path) -> None:
    directory = make_base(tmp_path / "base")
    base, chosen = load(directory)
    head = base.model.get_output_embeddings()
    head.register_forward_hook(lambda _module, _inputs, logits: logits * 3)
    probe = memory.random_probe(VOCAB_SIZE, 258)
    assert not objective.probe(chosen.model, probe, base.autocast).uses_bare_head


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_gives_the_loss_of_the_cpu(tiny_base: Path) -> None:
    _, chosen = load(tiny_base)
    (batch,) = packing.plan(rows(), micro_batch_tokens=256, is_packed=True, pad_id=258)
    expected = chosen.losses(batch).sum().item()
    config = ModelConfig(base=str(tiny_base), quantization="none", precision="fp32")
    base = model_room.load_base(config, device=torch.device("cuda"))
    model, _ = model_room.attach_lora(base, LoraConfig(rank=4), seed=0)
    there = Objective(model=model, accepts_position_ids=True, uses_bare_head=True)
    assert there.losses(batch.to("cuda")).sum().item() == pytest.approx(expected, rel=1e-4)


def test_a_token_is_a_hit_where_it_is_the_likeliest(
    tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objective, "CHUNK", 5)
    _, chosen = load(tiny_base)
    own = Objective(model=chosen.model, accepts_position_ids=True, uses_bare_head=False)
    example = rows()[1]
    (blank,) = packing.plan([example], micro_batch_tokens=64, is_packed=True, pad_id=258)
    with torch.no_grad():
        best_L = own.logits(blank)[0].argmax(-1).numpy().astype(np.int32)
    labels = example.labels.copy()
    is_told = np.flatnonzero(labels != -100)
    labels[is_told[::2]] = best_L[is_told[::2] - 1]  # the model's own choice at every second one
    told = Encoded(
        id="1", input_ids=example.input_ids, labels=labels, is_truncated=False, has_end=True
    )
    (batch,) = packing.plan([told], micro_batch_tokens=64, is_packed=True, pad_id=258)
    hits = [way.measure(batch)[1].tolist() for way in (chosen, own)]
    assert hits[0] == hits[1]
    assert all(hits[0][::2])
    assert not all(hits[0])
