"""Routed LoRA against PEFT's own forward, and adapters side by side against each alone."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tiny import ARCHITECTURES, make_base

from training import model as model_room
from training import routing
from training.config import LoraConfig, ModelConfig
from training.routing import Router, Span

CPU = torch.device("cpu")


def build(base: Path, quantization: str = "none", **lora: object) -> tuple[PeftModel, Router]:
    loaded = model_room.load_base(
        ModelConfig(base=str(base), quantization=quantization),  # pyright: ignore
        device=CPU,
    )
    config = LoraConfig(**{"rank": 4, **lora})  # pyright: ignore
    model, router = model_room.attach_lora(loaded, config, seed=0)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(1)
        for name, parameter in model_room.trainable(model).items():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return model, router


def gradients(model: PeftModel, ids: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    logits = model(input_ids=ids, use_cache=False).logits
    logits.square().mean().backward()
    trainable = model_room.trainable(model).items()
    return logits.detach(), {n: p.grad.clone() for n, p in trainable if p.grad is not None}


def unpatch(model: PeftModel) -> None:
    for module in model.modules():
        if hasattr(module, "lora_A"):
            module.__dict__.pop("forward")


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
@pytest.mark.parametrize("quantization", ["none", "int8", "nf4"])
def test_one_adapter_is_what_peft_computes(
    tmp_path: Path, architecture: str, quantization: str
) -> None:
    model, _ = build(make_base(tmp_path / "base", architecture), quantization)
    ids = torch.randint(0, 255, (2, 12), generator=torch.Generator().manual_seed(0))
    logits, grads = gradients(model, ids)
    unpatch(model)
    peft_logits, peft_grads = gradients(model, ids)
    torch.testing.assert_close(logits, peft_logits, rtol=0, atol=1e-5)
    assert grads.keys() == peft_grads.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(grad, peft_grads[name], rtol=1e-4, atol=1e-7)


def build_two(base: Path) -> tuple[PeftModel, Router]:
    """Beside `default`, an adapter `other` of another rank on fewer layers."""
    model, router = build(base)
    model.add_adapter(
        "other",
        model.peft_config["default"].__class__(
            task_type="CAUSAL_LM", r=2, lora_alpha=6, target_modules=["q_proj", "down_proj"]
        ),
    )
    routing.attach(model, router)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(2)
        for name, parameter in model.named_parameters():
            if "lora_B.other" in name:
                parameter.normal_(std=0.1)
    return model, router


def test_rows_go_to_their_adapters_and_one_name_takes_them_all(tiny_base: Path) -> None:
    model, router = build_two(tiny_base)
    ids = torch.randint(0, 255, (4, 10), generator=torch.Generator().manual_seed(0))
    names = ["default", "other", "default", "nobody"]
    with router.by_row(names):
        mixed = model(input_ids=ids, use_cache=False).logits
    for row, name in enumerate(names):
        with router.by_row([name]):
            alone = model(input_ids=ids[row : row + 1], use_cache=False).logits
        torch.testing.assert_close(mixed[row], alone[0], rtol=0, atol=1e-6)
    with router.by_row(["other"]):
        assert not torch.allclose(model(input_ids=ids, use_cache=False).logits[0], mixed[0])
    assert router.rows is None


def test_frozen_adapters_are_stacked_once_for_all_that_come_back(tiny_base: Path) -> None:
    model, router = build_two(tiny_base)
    ids = torch.randint(0, 255, (3, 4), generator=torch.Generator().manual_seed(0))
    layer: Any = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")

    def logits(*names: str) -> torch.Tensor:
        with torch.no_grad(), router.by_row(names):
            return model(input_ids=ids[: len(names)], use_cache=False).logits

    batches = [
        ("default", "other", "default"), ("default", "nobody"), ("nobody", "other"),
        ("nobody", "noone"), ("other", "default"),
    ]  # fmt: skip
    expected = [logits(*names) for names in batches]
    router.is_frozen = True
    for count, (names, logits_BLV) in enumerate(zip(batches, expected, strict=True)):
        stack = layer.__dict__.get("_loray_stack")
        torch.testing.assert_close(logits(*names), logits_BLV, rtol=0, atol=1e-6)
        if count in (1, 2):  # as wide as twice what is wanted: kept
            assert layer._loray_stack is stack
    assert set(layer._loray_stack.columns) == {"default", "other"}


def test_a_stack_follows_the_adapters_that_are_taken_down(tiny_base: Path) -> None:
    model, router = build_two(tiny_base)
    ids = torch.randint(0, 255, (2, 4), generator=torch.Generator().manual_seed(0))
    router.is_frozen = True
    with torch.no_grad():
        with router.by_row(["default", "other"]):
            before = model(input_ids=ids, use_cache=False).logits
        routing.take_down(model, "other")
        with router.by_row(["default", "other"]):
            after = model(input_ids=ids, use_cache=False).logits
        with router.by_row(["default", "nobody"]):
            expected = model(input_ids=ids, use_cache=False).logits
    assert torch.equal(after, expected)
    assert not torch.allclose(after[1], before[1])


def test_an_adapter_never_runs_over_a_neighbour_that_a_layer_does_not_know(tiny_base: Path) -> None:
    model, router = build_two(tiny_base)
    ids = torch.randint(0, 255, (3, 10), generator=torch.Generator().manual_seed(0))
    names = ["default", "other", "default"]  # `other` is not in every layer
    with router.by_row(names):
        mixed = model(input_ids=ids, use_cache=False).logits
    with router.by_row(["other"]):
        alone = model(input_ids=ids[1:2], use_cache=False).logits
    torch.testing.assert_close(mixed[1], alone[0], rtol=0, atol=1e-6)


def test_two_adapters_side_by_side_are_each_alone(tiny_base: Path) -> None:
    model, router = build_two(tiny_base)
    ids = torch.randint(0, 255, (3, 10), generator=torch.Generator().manual_seed(0))
    with router.use(
        (Span(adapter="default", start=0, stop=10), Span(adapter="other", start=10, stop=20))
    ):
        mixed = model(input_ids=ids, use_cache=False).logits
    with router.use((Span(adapter="default", start=0, stop=10),)):
        first = model(input_ids=ids[:1], use_cache=False).logits
    with router.use((Span(adapter="other", start=0, stop=10),)):
        second = model(input_ids=ids[1:2], use_cache=False).logits
    with model.disable_adapter():
        third = model(input_ids=ids[2:], use_cache=False).logits
    torch.testing.assert_close(mixed, torch.cat([first, second, third]), rtol=0, atol=1e-6)


def test_dropout_depends_on_the_example_and_not_on_its_place(tiny_base: Path) -> None:
    model, router = build(tiny_base, dropout=0.5)
    model.train()
    ids = torch.randint(0, 255, (2, 10), generator=torch.Generator().manual_seed(0))

    def logits(rows: list[int], keys: list[int]) -> torch.Tensor:
        spans = tuple(
            Span(adapter="default", start=10 * i, stop=10 * i + 10, key=(0, 3, key))
            for i, key in enumerate(keys)
        )
        with router.use(spans):
            return model(input_ids=ids[rows], use_cache=False).logits.detach()

    together = logits([0, 1], [7, 8])
    torch.testing.assert_close(together, logits([1, 0], [8, 7]).flip(0), rtol=0, atol=1e-6)
    torch.testing.assert_close(together[:1], logits([0], [7]), rtol=0, atol=1e-6)
    assert not torch.allclose(together[:1], logits([0], [9]), atol=1e-3)


def test_dropout_keeps_the_mean(tiny_base: Path) -> None:
    model, router = build(tiny_base, dropout=0.25, target_modules=("q_proj",))
    layer = next(m for m in model.modules() if hasattr(m, "lora_A"))
    layer.train()
    x = torch.ones(4096, layer.in_features)
    spans = (Span(adapter="default", start=0, stop=4096, key=(0, 0, 0)),)
    dropped = routing._drop(layer, x, spans)
    assert abs(dropped.mean().item() - 1) < 0.02
    assert sorted(dropped.unique().tolist()) == [0.0, pytest.approx(1 / 0.75)]
    layer.eval()
    assert routing._drop(layer, x, spans) is x
    assert router.spans is None
