"""The int8 layer against plain arithmetic on its dequantised weight."""

import bitsandbytes as bnb
import pytest
import torch

from training import digits, int8


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


def test_digits_keep_24_bits_below_the_largest_value_of_a_row() -> None:
    generator = torch.Generator().manual_seed(0)
    for rows, features, outputs in ((1, 24, 7), (300, 96, 33), (3, 1536, 8)):
        x = torch.randn(rows, features, generator=generator)
        x *= torch.logspace(-30, 30, rows)[:, None]  # each row has a scale of its own
        x[:, 0] *= 1000
        weight = torch.randint(-127, 128, (outputs, features), dtype=torch.int8)
        scale = torch.rand(outputs, generator=generator)
        exact = (x.double() @ weight.double().t()) * scale.double()
        error = (digits.matmul(x, weight.t(), scale) - exact).abs()
        half_step = x.double().abs().amax(1) / (2 * 127 * 65536)
        off = half_step[:, None] * weight.double().abs().sum(1) * scale.double()
        assert torch.all(error <= 1.5 * off + 1.2e-7 * exact.abs())


def test_digits_of_a_row_are_bitwise_its_own() -> None:
    x = torch.randn(300, 64)
    weight = torch.randint(-127, 128, (64, 48), dtype=torch.int8)
    whole = digits.matmul(x, weight, None)
    x[5], x[6] = 0.0, 1e-40
    x[7, 3], x[8, 0] = torch.inf, torch.nan
    again = digits.matmul(x, weight, None)
    own = [row for row in range(300) if row not in (5, 6, 7, 8)]
    assert torch.equal(again[own], whole[own])
    for row in (0, 255, 256, 299):
        assert torch.equal(digits.matmul(x[row : row + 1], weight, None), whole[row : row + 1])
    assert not again[5].any()
    assert again[6].abs().max() < 1e-34  # what is below 3e-39 may count as nothing
    assert again[7].isnan().all()
    assert again[8].isnan().all()


def test_the_private_names_that_digits_want_are_there() -> None:
    assert isinstance(torch.cpu._is_vnni_supported(), bool)
    ones = torch.ones(2, digits.MAX_FEATURES, dtype=torch.int8)
    out = torch.empty(2, 2, dtype=torch.int32)
    found = torch._int_mm(-128 * ones, 127 * ones.t(), out=out)
    if digits.is_fast():  # elsewhere oneDNN may saturate, and digits are not used
        assert found.tolist() == [[-128 * 127 * digits.MAX_FEATURES] * 2] * 2
