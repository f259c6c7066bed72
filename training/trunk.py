"""The frozen base that adapters share, and batches laid out for it."""

from collections.abc import Sequence
from dataclasses import dataclass

from peft import PeftModel

from training import packing
from training.memory import MemoryPlan
from training.model import Base
from training.objective import Objective
from training.packing import MicroBatch
from training.routing import Router, Span
from training.tokens import Encoded


@dataclass(frozen=True, kw_only=True, slots=True)
class Trunk:
    """What all seats share and none of them changes: the frozen base with its routed layers."""

    base: Base
    objective: Objective
    router: Router
    memory: MemoryPlan

    @property
    def model(self) -> PeftModel:
        """The base with every seat's adapter."""
        return self.objective.model


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """A micro-batch of one seat, on its device."""

    batch: MicroBatch
    keys: Sequence[tuple[int, ...]]
    """For each example that the batch was planned from, what its dropout is keyed by."""
    weight: float = 1.0
    """0 where it only keeps step with the other workers."""


def layout(trunk: Trunk, examples: Sequence[Encoded], *, together: int = 1) -> list[MicroBatch]:
    """Examples as micro-batches on the trunk's device; so many in a row stay together."""
    batches = packing.plan(
        examples,
        micro_batch_tokens=trunk.memory.micro_batch_tokens,
        is_packed=trunk.memory.is_packed,
        pad_id=trunk.memory.pad_id,
        together=together,
    )
    return [batch.to(trunk.base.device) for batch in batches]


def spans_of(piece: Piece, adapter: str, length: int, first_row: int) -> tuple[Span, ...]:
    """Where the examples of a piece lie in a batch whose rows are `length` wide."""
    return tuple(
        Span(
            adapter=adapter,
            start=(first_row + s.row) * length + s.start,
            stop=(first_row + s.row) * length + s.stop,
            key=piece.keys[s.example],
        )
        for s in piece.batch.segments
    )
