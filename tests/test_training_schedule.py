"""Learning rates by hand."""

import pytest

from training.config import OptimConfig
from training.schedule import learning_rate, warmup_steps


def rates(num_steps: int, **settings: object) -> list[float]:
    config = OptimConfig(learning_rate=1.0, **settings)  # pyright: ignore[reportArgumentType]
    return [learning_rate(config, step=s, num_steps=num_steps) for s in range(num_steps)]


def test_linear_falls_to_its_last_step_without_reaching_zero() -> None:
    assert rates(4, schedule="linear", warmup=0) == [1.0, 0.75, 0.5, 0.25]


def test_cosine_is_half_in_the_middle() -> None:
    assert rates(4, schedule="cosine", warmup=0)[2] == pytest.approx(0.5)


def test_wsd_is_flat_and_decays_in_its_last_fifth() -> None:
    values = rates(10, schedule="wsd", warmup=0)
    assert values[:8] == [1.0] * 8
    assert values[9] == pytest.approx(0.5)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "wsd"])
def test_warmup_rises_and_no_step_is_wasted(schedule: str) -> None:
    values = rates(20, schedule=schedule, warmup=4)
    assert values[:5] == [pytest.approx(x) for x in (0.2, 0.4, 0.6, 0.8, 1.0)]
    assert all(0 < value <= 1 for value in values)


def test_warmup_is_a_fraction_below_one_and_never_the_whole_run() -> None:
    assert warmup_steps(OptimConfig(warmup=0.1), 50) == 5
    assert warmup_steps(OptimConfig(warmup=100), 8) == 7
