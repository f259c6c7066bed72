"""What held-out examples say of an adapter that shares its base with others.

Measured in the micro-batches of training; `training.evaluate` measures a finished adapter.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from training import preference, routing
from training.model import ADAPTER
from training.preference import Rewards
from training.sampler import share
from training.strategy import Workers
from training.tokens import Encoded
from training.trunk import Piece, Trunk, layout, spans_of


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """An adapter's figures on held-out examples."""

    loss: float
    """Mean of a supervised token, or for dpo of a pair."""
    token_accuracy: float
    """Share of the supervised tokens (for dpo, of the preferred answers) that were the likeliest,
    each after the true ones before."""
    rewards: Rewards | None = None
    """For dpo."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExampleScores:
    """The same for each example, in sums."""

    losses: list[float]
    """Cross entropies of its supervised tokens."""
    hits: list[int]
    """Those that were the likeliest."""
    counts: list[int]
    """Supervised tokens."""


def score(
    trunk: Trunk,
    examples: Sequence[Encoded],
    *,
    adapter: str = ADAPTER,
    workers: Workers | None = None,
) -> Score:
    """Figures of an adapter on `examples`, over all workers."""
    workers = workers or Workers()
    mine = share(examples, workers.rank, workers.size)
    found = score_examples(trunk, mine, adapter=adapter)
    if trunk.objective.engine is not None:  # every pass is one of all workers
        num_passes = len(layout(trunk, mine))
        for _ in range(workers.most(num_passes) - num_passes):
            score_examples(trunk, examples[:1], adapter=adapter)
    totals = torch.tensor(
        [math.fsum(found.losses), float(sum(found.counts)), float(sum(found.hits))],
        dtype=torch.float64,
    )
    totals = totals.to(trunk.base.device)
    workers.sum_([totals])
    loss, count, hits = totals.tolist()
    return Score(loss=loss / count, token_accuracy=hits / count)


def score_pairs(
    trunk: Trunk, examples: Sequence[Encoded], *, beta: float, workers: Workers
) -> Score:
    """Figures of the adapter of a run on preferences, as `training.preference` orders them."""
    mine = share(examples, workers.rank, workers.size, together=2)
    found = score_examples(trunk, mine, together=2)
    with routing.bare(trunk.model):
        bases = score_examples(trunk, mine, together=2)
    gains = [base - own for own, base in zip(found.losses, bases.losses, strict=True)]
    pairs_P2 = beta * torch.tensor(gains, dtype=torch.float64).view(-1, 2)
    chosen_P, rejected_P = pairs_P2[:, 0], pairs_P2[:, 1]
    counted = [float(sum(found.hits[::2])), float(sum(found.counts[::2])), float(len(mine) // 2)]
    totals = torch.cat(
        [
            preference.losses(chosen_P, rejected_P).sum()[None],
            preference.sums(chosen_P, rejected_P),
            torch.tensor(counted, dtype=torch.float64),
        ]
    )
    totals = totals.to(trunk.base.device)
    workers.sum_([totals])
    loss, *rewards, hits, tokens, num_pairs = totals.tolist()
    return Score(
        loss=loss / num_pairs,
        token_accuracy=hits / tokens,
        rewards=preference.means(rewards, num_pairs),
    )


def score_examples(
    trunk: Trunk, examples: Sequence[Encoded], *, adapter: str = ADAPTER, together: int = 1
) -> ExampleScores:
    """Figures of each example under an adapter; so many in a row share a micro-batch."""
    sums = [0.0] * len(examples)
    hits = [0] * len(examples)
    counts = [example.num_supervised for example in examples]
    trunk.model.eval()
    for batch in layout(trunk, examples, together=together):
        piece = Piece(batch=batch, keys=[()] * len(examples))
        spans = spans_of(piece, adapter, batch.input_ids_BL.shape[1], 0)
        with torch.no_grad(), trunk.router.use(spans), trunk.base.autocast():
            loss_N, hit_N = trunk.objective.measure(batch)
        numbers = [segment.example for segment in batch.segments]
        sizes = [counts[number] for number in numbers]
        parts = zip(loss_N.double().split(sizes), hit_N.split(sizes), strict=True)
        for number, (part_N, hits_N) in zip(numbers, parts, strict=True):
            sums[number] = part_N.sum().item()
            hits[number] = int(hits_N.sum())
    trunk.model.train()
    return ExampleScores(losses=sums, hits=hits, counts=counts)
