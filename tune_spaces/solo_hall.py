"""What the driver of a solo search asks for: how many runs fit, the base's figures, the finalists'.

Finalists with other seeds are ordinary runs too. A model is scored in a short-lived Ray task, which
holds a base only while it does.
"""

import logging
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, cast

import ray
import ray.exceptions
import torch

from cluster import config
from training import adapter, dataset, evaluate, examples, loop, model, run
from training.config import ScaleConfig, TrainRecipe
from training.events import Event, EventReader
from tune_spaces import solo, spaces
from tune_spaces.bench import BASE
from tune_spaces.capacity import Capacity
from tune_spaces.hall import added_up
from tune_spaces.solo import LEFT, SEATED, Run, SoloTrial
from tune_spaces.spaces import Space
from tune_spaces.trial import Trial

log = logging.getLogger(__name__)

_SCORE_TIMEOUT_S = 24 * 3600.0
_STOP_TIMEOUT_S = 120.0
_CLOSE_TIMEOUT_S = 20.0
_MEMORY_BYTES = 1 << 20
"""What a trial's own process asks for: no CPU, which its run's workers may need to the last one."""
Scores = dict[str, list[float]]


@dataclass(frozen=True, kw_only=True, slots=True)
class SoloHall:
    """Stands where the benches are in a packed search."""

    recipe: TrainRecipe
    """What trials have in common, its paths absolute."""
    directory: Path
    """Of the search."""
    seats: int
    """Runs at once."""
    nodes: list[solo.Node]
    namespace: str = ""
    names: tuple[str, ...] = ()
    capacities: tuple[Capacity, ...] = ()
    trainable: type[Trial] = SoloTrial
    trial_resources: Mapping[str, float] = field(
        default_factory=lambda: {"cpu": 0, "memory": _MEMORY_BYTES}
    )
    _base: dict[tuple[str, str | None], Scores] = field(default_factory=dict)

    @classmethod
    def open(
        cls,
        recipe: TrainRecipe,
        directory: Path,
        *,
        space: Space,
        wanted: int | None,
        trials: int,
    ) -> Self:
        """wanted: runs at once, None for as many as fit. trials: of the search.

        Raises ResourceError where the cluster has no room for `wanted` runs, or for one.
        """
        there = solo.nodes()
        wanted = None if wanted is None else min(wanted, trials)
        seats = min(solo.runs_at_once(s, there, wanted) for s in _scales(recipe, space))
        return cls(recipe=recipe, directory=directory, seats=min(seats, trials), nodes=there)

    def hosting(self) -> AbstractContextManager[None]:
        """A process for each trial, which takes with it whatever is left of its run."""
        return nullcontext()

    def size(self) -> tuple[int, int]:
        """Training examples, and their supervised tokens; of a stream, its first rows."""
        report = run.inspect(self.recipe, lambda _: None).report
        return report.num_examples, report.num_supervised

    def base_loss(self) -> float | None:
        """Of the bare base, on the evaluation data; None without any."""
        if self.recipe.data.eval is None:
            return None
        found = self.scores({BASE: self.recipe}, "eval_loss")[BASE]
        pairs = zip(found["values"], found["weights"], strict=True)
        return math.fsum(v * w for v, w in pairs) / math.fsum(found["weights"])

    def scores(
        self, recipes: Mapping[str, TrainRecipe], metric: str, source: str | None = None
    ) -> dict[str, Scores]:
        """Train each recipe to its end (or find it trained) and score it, example by example."""
        names = [name for name in recipes if name != BASE]
        for start in range(0, len(names), self.seats):
            self._finish([recipes[name] for name in names[start : start + self.seats]])
        groups: dict[str, list[str]] = {}  # what shares a base and its examples is scored together
        for name in names:
            groups.setdefault(repr((recipes[name].model, recipes[name].data)), []).append(name)
        found: dict[str, Scores] = {}
        if BASE in recipes:
            key = (metric, source)
            if key not in self._base:
                adapters = {BASE: None}
                self._base[key] = self._score(recipes[BASE], adapters, metric, source)[BASE]
            found[BASE] = self._base[key]
        for group in groups.values():
            adapters = {name: str(_run_dir(recipes[name]) / "adapter") for name in group}
            found |= self._score(recipes[group[0]], adapters, metric, source)
        return found

    def clear(self) -> None:
        """End what processes of trials that died have left."""
        from training import trainer  # Ray Train takes seconds to import

        trainer.end_workers({path.name for path in self.directory.glob("trials/*")})

    def occupancy(self) -> list[tuple[float, int]]:
        """(seconds since the first trial was taken up, trials live from then on)."""
        spans: list[tuple[float, float]] = []
        for path in self.directory.glob("trials/*/events.jsonl"):
            spans += live_spans(EventReader(path).read())
        return added_up([(t, 1) for t, _ in spans] + [(t, -1) for _, t in spans])

    def peak_rss_bytes(self) -> int:
        """Largest resident memory of a run's first worker, for each that ran at once."""
        peaks = [
            int(event.number("peak_rss_bytes"))
            for path in self.directory.glob("trials/*/events.jsonl")
            for event in EventReader(path).read()
            if event.kind == "finished"
        ]
        return max(peaks, default=0) * self.seats

    def close(self) -> None:
        """Ask runs that are still there to end, and give them a moment for a checkpoint."""
        live = [path.parent for path in self.directory.glob("trials/*/.lock-owner")]
        deadline = time.monotonic() + _CLOSE_TIMEOUT_S
        while live and time.monotonic() < deadline:
            for run_dir in live:
                loop.stop_file(run_dir).touch()
            time.sleep(0.2)
            live = [run_dir for run_dir in live if (run_dir / ".lock-owner").exists()]

    def _finish(self, recipes: Sequence[TrainRecipe]) -> None:
        def start(recipe: TrainRecipe) -> Run:
            return Run(lambda: solo.train(recipe, self._scale(recipe)), _run_dir(recipe))

        runs = [start(recipe) for recipe in recipes]
        try:
            for one in runs:
                one.result()
        except BaseException:
            for one in runs:
                one.stop(_STOP_TIMEOUT_S)
            raise

    def _scale(self, recipe: TrainRecipe) -> ScaleConfig:
        return solo.scale_of(recipe.scale, self.nodes, self.seats)

    def _score(
        self,
        recipe: TrainRecipe,
        adapters: Mapping[str, str | None],
        metric: str,
        source: str | None,
    ) -> dict[str, Scores]:
        scale = self._scale(recipe)
        task: Any = ray.remote(cast(Any, score))
        task = task.options(num_cpus=scale.cpus_per_worker, num_gpus=scale.gpus_per_worker)
        future = task.remote(
            config.plain(recipe), adapters, metric, source, threads=scale.cpus_per_worker
        )
        try:
            return ray.get(future, timeout=_SCORE_TIMEOUT_S)
        except ray.exceptions.RayTaskError as error:
            raise (error.cause if isinstance(error.cause, Exception) else error) from None


def score(
    recipe: Mapping[str, Any],
    adapters: Mapping[str, str | None],
    metric: str,
    source: str | None,
    *,
    threads: int,
) -> dict[str, Scores]:
    """Each adapter's score of each held-out example, as `BenchActor.scores` gives it.

    adapters: directories by name; None is the bare base. source: other examples than the recipe's
    evaluation data.
    """
    torch.set_num_threads(threads)
    shared = config.build(TrainRecipe, recipe, where="search")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    base = model.load_base(shared.model, device=device)
    encoder = dataset.make_encoder(shared, base.tokenizer, base.generation_eos)
    where = source or shared.data.eval
    assert where is not None
    data = shared.data
    rows = examples.read(where, format=data.format, on_bad_row=data.on_bad_row).examples
    found: dict[str, Scores] = {}
    hung = base.model
    for number, (name, directory) in enumerate(adapters.items()):
        if directory is not None:
            hung = adapter.attach(hung, Path(directory), f"scored{number}")
            hung.set_adapter(f"scored{number}")
        if metric == "eval_loss":
            sums, counts = evaluate.losses(base, hung, rows, encoder)
            values = [total / count for total, count in zip(sums, counts, strict=True)]
            found[name] = {"values": values, "weights": [float(count) for count in counts]}
        else:
            records = evaluate.evaluate(base, hung, rows, encoder, [metric]).records
            values = [record.scores[metric] for record in records]
            found[name] = {"values": values, "weights": [1.0] * len(values)}
    return found


def live_spans(events: Iterable[Event]) -> list[tuple[float, float]]:
    """(start, end) of each time that a trial was live, in seconds since the epoch."""
    spans: list[tuple[float, float]] = []
    start: float | None = None
    last = 0.0
    for event in events:
        if start is not None and event.kind in (SEATED, LEFT):
            # One that was killed says nothing: it lived until its last word.
            spans.append((start, last if event.kind == SEATED else event.time_s))
            start = None
        if event.kind == SEATED:
            start = event.time_s
        last = event.time_s
    return [*spans, (start, last)] if start is not None else spans


def _run_dir(recipe: TrainRecipe) -> Path:
    return Path(recipe.storage) / recipe.name


def _scales(recipe: TrainRecipe, space: Space) -> list[ScaleConfig]:
    """The recipe's scale, and those of the space's ends."""
    found = [recipe.scale]
    for dimension in space.every_dimension():
        if dimension.path.startswith("scale."):
            found += [
                spaces.recipe_for(recipe, {dimension.path: end}, mode="solo").scale
                for end in dimension.domain.ends()
            ]
    return found
