"""The faster product of the output layer: the same logits, and only where it is meant for."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from serving import head

VOCAB = 1 << 14


def make(vocab: int = VOCAB) -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 8, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocab, num_hidden_layers=1, **sizes)).eval()


@pytest.mark.parametrize("rows", [1, 2, 3, 8, 15, 64])
def test_logits_are_those_of_the_plain_layer(rows: int) -> None:
    model = make()
    layer = model.get_output_embeddings()
    assert isinstance(layer, nn.Linear)
    x = torch.randn(rows, 2, 32)
    expected = F.linear(x, layer.weight)
    head.quicken(model)
    with torch.inference_mode():
        found = layer(x)
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer(x), expected)  # with gradients, as it was
    assert layer(x).requires_grad


def test_torch_still_has_the_product() -> None:
    x, weight = torch.randn(4, 8), torch.randn(16, 8)
    found = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    torch.testing.assert_close(found, x @ weight.t())


def test_a_layer_that_is_narrow_or_of_another_kind_is_left_alone() -> None:
    narrow, half, other = make(256), make().half(), make()
    other.set_output_embeddings(nn.Sequential(nn.Linear(32, VOCAB)))
    for model in (narrow, half, other):
        head.quicken(model)
        assert "forward" not in vars(model.get_output_embeddings())
