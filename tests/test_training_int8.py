"""The int8 layer against plain arithmetic on its dequantised weight."""

import bitsandbytes as bnb
import pytest
import torch

from training import int8


@pytest.fixture
def layer() -> bnb.nn.Linear8bitLt:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer = bnb.nn.Linear8bitLt(24, 10, has_fp16_weights=False)
        layer.weight = bnb.nn.Int8Params(torch.randn(10, 24), requires_grad=False).to("cpu")
        layer.bias.data.normal_()
    return layer.requires_grad_(False)


def test_forward_and_backward_equal_the_dequantised_weight(layer: bnb.nn.Linear8bitLt) -> None:
    weight = layer.weight.data.float() * layer.weight.SCB.view(-1, 1) / 127
    assert int8.adopt(torch.nn.ModuleList([layer])) == 1
    x = torch.randn(3, 5, 24, requires_grad=True)
    out = layer(x)
    torch.testing.assert_close(out, x @ weight.t() + layer.bias)
    (grad,) = torch.autograd.grad(out.square().sum(), x)
    torch.testing.assert_close(grad, (2 * out) @ weight)


def test_a_row_does_not_depend_on_its_neighbours(layer: bnb.nn.Linear8bitLt) -> None:
    int8.adopt(torch.nn.ModuleList([layer]))
    x = torch.randn(4, 24)
    alone = layer(x[:1])
    x[2] *= 1000  # an outlier that LLM.int8's threshold would spread over all rows
    torch.testing.assert_close(layer(x)[:1], alone, rtol=0, atol=1e-6)


def test_no_activation_is_kept_for_the_backward_pass(layer: bnb.nn.Linear8bitLt) -> None:
    int8.adopt(torch.nn.ModuleList([layer]))
    kept: list[torch.Size] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        layer(torch.randn(7, 24, requires_grad=True))
    assert torch.Size([7, 24]) not in kept


def test_it_computes_in_fp16_under_autocast_without_overflow(layer: bnb.nn.Linear8bitLt) -> None:
    int8.adopt(torch.nn.ModuleList([layer]))
    x = torch.full((2, 24), 200.0)  # 24 * 200 * 127 is beyond fp16 unless the scale comes first
    with torch.autocast("cpu", torch.float16):
        out = layer(x)
    assert out.dtype == torch.float16
    assert torch.isfinite(out).all()
