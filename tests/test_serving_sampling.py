"""The next token, at the edges of what a request may ask."""

import pytest
import torch

from serving.sampling import Picker
from serving.schema import Sampling


@pytest.mark.parametrize("temperature", [0.0, 5e-324, 1e-40, 1e-6])
@pytest.mark.parametrize("top_p", [1.0, 1e-3, 1e-40, 5e-324])
def test_the_smallest_settings_leave_the_likeliest_token(temperature: float, top_p: float) -> None:
    logits_V = torch.tensor([3.0, 900.0, -5.0, 899.0])
    picker = Picker(sampling=Sampling(temperature=temperature, top_p=top_p, seed=1))
    assert picker.choose(logits_V.clone()) == 1


@pytest.mark.parametrize("top_p", [5e-324, 1e-3])
def test_a_tiny_top_p_leaves_one_token_at_any_temperature(top_p: float) -> None:
    picker = Picker(sampling=Sampling(temperature=2.0, top_p=top_p, seed=1))
    assert picker.choose(torch.tensor([1.0, 2.0, 1.5])) == 1
