"""How many seats a bench has: as many as its memory holds, and no more than it gains from.

A pass over the base costs little more for a second seat until the device is saturated. A short
probe on the search's own data finds where that is; what it finds is kept with the search, since a
restarted bench must not measure, and then choose, anew.
"""

import json
import logging
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

from cluster import storage
from cluster.errors import ResourceError
from training import memory
from training.config import TrainRecipe
from tune_spaces.bench import Bench

_log = logging.getLogger(__name__)

_GAIN = 0.05
"""More seats must bring at least this much more speed."""
_PASSES = 3
"""Passes timed for each number of seats, of which the fastest counts: others may use the device."""
_EVER = 10**9
_BYTES_PER_PARAMETER = {"adamw": 16, "adamw_8bit": 10}
"""Weight, gradient and Adam's two moments."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Capacity:
    """The seats of one bench, and why."""

    seats: int
    fitting: int
    """Seats of the search's largest adapter that the memory holds."""
    seat_bytes: int
    """Of the search's largest adapter, while it trains."""
    load_s: float = 0.0
    """Seconds that base and data took to load."""
    speeds: dict[str, float] = field(default_factory=dict)
    """Real tokens a second by number of seats; empty where the number was given."""

    def __str__(self) -> str:
        """For people."""
        room = f"memory holds {self.fitting}, of {self.seat_bytes / 1e6:.0f} MB each"
        if not self.speeds:
            return f"{self.seats} seats ({room})"
        speeds = ", ".join(f"{count}: {speed:.0f}" for count, speed in self.speeds.items())
        why = "one seat saturates the device" if self.seats == 1 else "more bring less than 5 %"
        if str(self.seats) == list(self.speeds)[-1]:
            why = "all that trials or memory have use for"
        return f"{self.seats} seats, {why} (real tokens/s by seats: {speeds}; {room})"


def find(
    bench: Bench,
    recipe: TrainRecipe,
    wanted: int | Literal["auto"],
    *,
    most: int,
    kept: Path,
) -> Capacity:
    """The capacity that `kept` holds, else a new one, which is written there.

    recipe: of the largest adapter of the search. wanted: the number of seats, or `auto`. most:
    seats that there would be trials for. Raises ResourceError for more seats than memory.
    """
    if kept.exists():
        return Capacity(**json.loads(kept.read_text(encoding="utf-8")))
    with tempfile.TemporaryDirectory(prefix="loray-probe-") as directory:
        found = _measure(bench, recipe, wanted, most, Path(directory))
    storage.write_file(kept, json.dumps(asdict(found), indent=1).encode())
    return found


def _measure(
    bench: Bench,
    recipe: TrainRecipe,
    wanted: int | Literal["auto"],
    most: int,
    directory: Path,
) -> Capacity:
    recipe = replace(recipe, optim=replace(recipe.optim, max_steps=_EVER))
    names: list[str] = []

    def sit(count: int) -> None:
        while len(names) < count:
            names.append(f"probe{len(names)}")
            run_dir = directory / names[-1]
            run_dir.mkdir()
            bench.join(names[-1], recipe, run_dir)
            bench.ask(names[-1], supervised_tokens=1 << 60)

    free = memory.free_bytes(bench.device)
    try:
        sit(1)
        seat_bytes = _BYTES_PER_PARAMETER[recipe.optim.optimizer] * bench.num_parameters(names[0])
        fitting = memory.fitting(free - bench.trunk.memory.activation_bytes, seat_bytes)
        if wanted != "auto":
            if wanted > fitting:
                raise ResourceError(
                    f"search.seats is {wanted}, but the memory of a bench holds {fitting} seats: "
                    f"{seat_bytes / 1e6:.0f} MB for rank {recipe.lora.rank}, "
                    f"{free / 1e9:.1f} GB free. Lower search.seats, or the ranks of the space"
                )
            return Capacity(
                seats=min(wanted, most), fitting=fitting, seat_bytes=seat_bytes, load_s=bench.load_s
            )
        if not fitting:
            raise ResourceError(
                f"not even one seat fits: {seat_bytes / 1e6:.0f} MB for rank {recipe.lora.rank}, "
                f"{free / 1e9:.1f} GB free. Lower the ranks of the space, or memory."
                "micro_batch_tokens, or use a larger machine"
            )
        bench.turn()  # the first pass is slow

        def speed(count: int) -> float:
            sit(count)
            return max(_speed(bench) for _ in range(_PASSES))

        seats, speeds = knee(speed, most=min(most, fitting))
    finally:
        for name in names:
            bench.leave(name)
    return Capacity(
        seats=seats,
        fitting=fitting,
        seat_bytes=seat_bytes,
        load_s=bench.load_s,
        speeds={str(count): round(value, 1) for count, value in speeds.items()},
    )


def knee(speed: Callable[[int], float], *, most: int) -> tuple[int, dict[int, float]]:
    """The fewest seats that are about as fast as any number tried: 1, 2, 4 and so on to `most`.

    Stops where twice the seats bring less than 5 %.
    """
    speeds: dict[int, float] = {}
    for count in _doublings(most):
        speeds[count] = speed(count)
        before = list(speeds.values())[-2:][0]
        if count > 1 and speeds[count] < (1 + _GAIN) * before:
            break
    best = max(speeds.values())
    return next(c for c, value in speeds.items() if (1 + _GAIN) * value >= best), speeds


def _doublings(most: int) -> Sequence[int]:
    counts = [1 << power for power in range(most.bit_length()) if 1 << power < most]
    return [*counts, most]


def _speed(bench: Bench) -> float:
    started = bench.clock()
    tokens = bench.turn()
    return tokens / max(bench.clock() - started, 1e-9)
