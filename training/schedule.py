"""The learning rate as a pure function of the step, so that a resume needs no scheduler state."""

import math

from training.config import OptimConfig

_DECAY_SHARE = 0.2
"""The part of a warm-up / stable / decay schedule that decays (MiniCPM, arXiv 2404.06395)."""


def learning_rate(config: OptimConfig, *, step: int, num_steps: int) -> float:
    """The learning rate of 0-based `step` of `num_steps`. Never 0: a step is never wasted."""
    warmup = warmup_steps(config, num_steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / (warmup + 1)
    span = max(1, num_steps - warmup)
    done = (step - warmup) / span
    if config.schedule == "linear":
        return config.learning_rate * (1 - done)
    if config.schedule == "cosine":
        return config.learning_rate * 0.5 * (1 + math.cos(math.pi * done))
    if config.schedule == "wsd":
        return config.learning_rate * min(1.0, (1 - done) / _DECAY_SHARE)
    return config.learning_rate


def warmup_steps(config: OptimConfig, num_steps: int) -> int:
    """Steps of warm-up: `optim.warmup` is a fraction below 1, a number of steps from 1."""
    steps = config.warmup if config.warmup >= 1 else config.warmup * num_steps
    return min(round(steps), num_steps - 1)
