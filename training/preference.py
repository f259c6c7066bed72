"""Direct preference optimisation: of two answers, the preferred one becomes the likelier.

The loss of a pair is -log sigmoid(r_chosen - r_rejected), where the reward r of an answer is
beta times what the adapter adds to its log-probability (Rafailov et al., arXiv 2305.18290). The
reference is the same base with the adapter switched off, in a pass without gradients over the same
micro-batch: no second model is in memory, and nothing is kept between steps.

N supervised tokens, P pairs. In a token set, and in whatever is made of it, sequence 2i is the
preferred answer of pair i and 2i + 1 the other.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from training import routing
from training.packing import MicroBatch, Segment
from training.trunk import Trunk


@dataclass(frozen=True, kw_only=True, slots=True)
class Rewards:
    """Means over pairs."""

    chosen: float
    """Of the preferred answers."""
    rejected: float
    """Of the others."""
    accuracy: float
    """Share of the pairs whose preferred answer has the higher reward."""

    @property
    def margin(self) -> float:
        """By which the preferred answers are ahead."""
        return self.chosen - self.rejected

    def fields(self) -> dict[str, float]:
        """As events carry them."""
        return {
            "rewards/chosen": self.chosen,
            "rewards/rejected": self.rejected,
            "accuracy": self.accuracy,
            "margin": self.margin,
        }


def reference_losses(trunk: Trunk, batch: MicroBatch) -> Tensor:
    """Cross entropies (N,) of a micro-batch under the base alone, without dropout or gradient."""
    was_training = trunk.model.training
    trunk.model.eval()
    with torch.no_grad(), routing.bare(trunk.model), trunk.base.autocast():
        loss_N = trunk.objective.losses(batch)
    trunk.model.train(was_training)
    return loss_N


def rewards(
    loss_N: Tensor, reference_N: Tensor, segments: Sequence[Segment], *, beta: float
) -> tuple[Tensor, Tensor]:
    """Rewards (P,) of the preferred and (P,) of the other answers, in the order of pairs.

    loss_N, reference_N: cross entropies with and without the adapter, in the order of `segments`.
    """
    gain_N = reference_N - loss_N  # log-probabilities are the losses' negatives
    counts = [segment.num_supervised for segment in segments]
    gains = torch.stack([part.sum() for part in gain_N.split(counts)])
    order = sorted(range(len(segments)), key=lambda place: segments[place].example)
    pairs_P2 = beta * gains[torch.tensor(order, device=gains.device)].view(-1, 2)
    return pairs_P2[:, 0], pairs_P2[:, 1]


def losses(chosen_P: Tensor, rejected_P: Tensor) -> Tensor:
    """The loss (P,) of each pair."""
    return -F.logsigmoid(chosen_P - rejected_P)


def sums(chosen_P: Tensor, rejected_P: Tensor) -> Tensor:
    """(3,) rewards of the preferred, of the others, and pairs that are in the right order."""
    won_P = chosen_P > rejected_P
    return torch.stack([chosen_P.sum(), rejected_P.sum(), won_P.sum()]).detach()


def means(sums: Sequence[float], num_pairs: float) -> Rewards:
    """Of `sums` over all pairs."""
    chosen, rejected, won = sums
    return Rewards(
        chosen=chosen / num_pairs, rejected=rejected / num_pairs, accuracy=won / num_pairs
    )


def chosen_hits(hit_N: Tensor, segments: Sequence[Segment]) -> Tensor:
    """Tokens of the preferred answers that were the likeliest, as a sum."""
    parts = hit_N.split([segment.num_supervised for segment in segments])
    of_chosen = [p for p, s in zip(parts, segments, strict=True) if s.example % 2 == 0]
    return torch.stack([part.sum() for part in of_chosen]).sum()
