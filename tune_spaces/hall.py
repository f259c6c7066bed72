"""Where the trials of a search are, as its driver sees them: `AnyHall`, in either mode.

`Hall` is all benches of a packed search, one for each device of the cluster.
"""

import itertools
import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, Self

import ray
import ray.exceptions
from ray._private.state import available_resources_per_node  # Ray 2.60 has no public one
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster import config
from cluster.errors import ClusterError
from training.config import TrainRecipe
from training.events import EventReader
from tune_spaces import host
from tune_spaces.actor import CALLERS, BenchActor, occupancy_file
from tune_spaces.bench import BASE, NoSeat, SeatShed
from tune_spaces.capacity import Capacity
from tune_spaces.trial import GONE, SeatTrial, Trial

log = logging.getLogger(__name__)

_RESTART_TIMEOUT_S = 900.0
_RESTART_POLL_S = 0.5
_MAX_DEATHS = 3
"""Of benches, while the driver waits for one answer."""
_DEATHS = (
    f"benches died {_MAX_DEATHS} times while {{what}}; look for what killed them (memory?) in "
    "Ray's logs of the actors named bench0, bench1, ..., then go on by --resume"
)
_SAVE_TIMEOUT_S = 60.0
_CALL_TIMEOUT_S = 24 * 3600.0
_TRIAL_CPUS = 0.01
TO_THE_END = 1 << 60
"""More supervised tokens than any schedule has."""


class AnyHall(Protocol):
    """What a driver asks; `Hall` and `SoloHall` say what each means."""

    @property
    def namespace(self) -> str: ...
    @property
    def names(self) -> tuple[str, ...]: ...
    @property
    def seats(self) -> int: ...
    @property
    def capacities(self) -> tuple[Capacity, ...]: ...
    @property
    def trainable(self) -> type[Trial]: ...
    @property
    def trial_resources(self) -> Mapping[str, float]: ...
    def hosting(self) -> AbstractContextManager[None]: ...
    def size(self) -> tuple[int, int]: ...
    def base_loss(self) -> float | None: ...
    def scores(
        self, recipes: Mapping[str, TrainRecipe], metric: str, source: str | None = None
    ) -> dict[str, dict[str, list[float]]]: ...
    def clear(self) -> None: ...
    def occupancy(self) -> list[tuple[float, int]]: ...
    def peak_rss_bytes(self) -> int: ...
    def close(self) -> None: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Hall:
    """Named bench actors; trials find them by name, so that a restarted driver does too."""

    namespace: str
    names: tuple[str, ...]
    capacities: tuple[Capacity, ...]
    """Of each bench."""
    actors: tuple[Any, ...]
    directory: Path
    """Where benches keep their occupancy."""
    trainable: type[Trial] = SeatTrial
    trial_resources: Mapping[str, float] = field(default_factory=lambda: {"cpu": _TRIAL_CPUS})
    """Of a trial, which only asks."""

    @classmethod
    def open(
        cls,
        recipe: TrainRecipe,
        directory: Path,
        *,
        largest: TrainRecipe,
        seats: int | Literal["auto"],
        most: int,
        fill_window_s: float,
        timeout_s: float,
    ) -> Self:
        """Start a bench on each device, and wait until all have loaded the base.

        largest: the recipe of the search's largest adapter. seats: of each bench. most: seats
        that there are trials for. Raises ClusterError after `timeout_s`; what a bench raises comes
        through.
        """
        namespace = f"loray-search-{recipe.name}"
        places = places_of(ray.nodes(), available_resources_per_node())
        actors: list[Any] = []
        names = tuple(f"bench{number}" for number in range(len(places)))
        for name in names:  # of the driver that this one goes on for
            occupancy_file(directory, name).unlink(missing_ok=True)
        for name, place in zip(names, places, strict=True):
            remote: Any = ray.remote(BenchActor)
            actor = remote.options(
                name=name,
                namespace=namespace,
                max_concurrency=CALLERS,
                max_restarts=-1,
                scheduling_strategy=place.strategy,
                num_cpus=place.num_cpus,
                num_gpus=place.num_gpus,
            ).remote(
                config.plain(recipe),
                str(directory),
                largest=config.plain(largest),
                seats=seats,
                most=math.ceil(most / len(places)),
                threads=place.threads,
                fill_window_s=fill_window_s,
                name=name,
            )
            actors.append(actor)
        try:
            found = ray.get([actor.ready.remote() for actor in actors], timeout=timeout_s)
        except ray.exceptions.GetTimeoutError:
            raise ClusterError(
                f"{len(actors)} benches did not load the base within {timeout_s:.0f} s; see "
                "Ray's logs of the actors named bench0, bench1, ..."
            ) from None
        except ray.exceptions.RayTaskError as error:
            raise (error.cause if isinstance(error.cause, Exception) else error) from None
        except GONE as error:
            raise ClusterError(
                f"a bench died while it loaded the base, maybe for want of memory ({error}); see "
                "Ray's logs of the actors named bench0, bench1, ..."
            ) from None
        return cls(
            namespace=namespace,
            names=names,
            capacities=tuple(Capacity(**each) for each in found),
            actors=tuple(actors),
            directory=directory,
        )

    @property
    def seats(self) -> int:
        """Of all benches together."""
        return sum(each.seats for each in self.capacities)

    def hosting(self) -> AbstractContextManager[None]:
        """Where Tune runs the block: its trials share a process, which ends with the block."""
        return host.one_process(self.seats)

    def call(self, method: str, *arguments: Any) -> Any:
        """What a method of the first living bench returns or raises; asked again where it dies.

        Raises ClusterError where no bench is left, or they die of it every time.
        """
        for _ in range(_MAX_DEATHS):
            bench = self._living()[0]
            with _surviving(self.names[bench], method):
                return self._ask(bench, method, *arguments)
        raise ClusterError(_DEATHS.format(what=f"answering {method}"))

    def size(self) -> tuple[int, int]:
        """Training examples, and their supervised tokens."""
        num_examples, num_supervised = self.call("size")
        return num_examples, num_supervised

    def base_loss(self) -> float | None:
        """Of the bare base, on the evaluation data; None without any."""
        return self.call("base_loss")

    def scores(
        self, recipes: Mapping[str, TrainRecipe], metric: str, source: str | None = None
    ) -> dict[str, dict[str, list[float]]]:
        """Train each recipe to its end (or only load it) and score it, example by example.

        They are dealt to all benches, and what a bench that dies leaves is dealt again; see
        `BenchActor.scores`. Raises ClusterError where no bench is left, or benches die every time.
        """
        found: dict[str, dict[str, list[float]]] = {}
        for _ in range(_MAX_DEATHS):
            left = [name for name in recipes if name not in found]
            left.sort(key=lambda name: name == BASE or _is_trained(recipes[name]))
            benches = self._living()
            shares = [left[number :: len(benches)] for number in range(len(benches))]

            def score(number: int, benches: Any = benches, shares: Any = shares) -> Any:
                share = {name: recipes[name] for name in shares[number]}
                return self._score(benches[number], share, metric, source)

            with ThreadPoolExecutor(max_workers=len(benches)) as pool:
                for part in pool.map(score, range(len(benches))):
                    found |= part
            if len(found) == len(recipes):
                return found
        raise ClusterError(_DEATHS.format(what="scoring adapters"))

    def clear(self) -> None:
        """Free all seats, once Tune is done with them."""
        for bench in self._living():
            with _surviving(self.names[bench], "clear"):  # else they are free anyway
                self._ask(bench, "clear")

    def occupancy(self) -> list[tuple[float, int]]:
        """(seconds since the first seat was taken, seats taken from then on), all benches.

        The seats of a bench that died count until it restarts, or, where it never does, until they
        last changed.
        """
        changes: list[tuple[float, int]] = []
        living = self._living()
        for bench, name in enumerate(self.names):
            before, when = 0, 0.0
            for event in EventReader(occupancy_file(self.directory, name)).read():
                when, taken = event.time_s, int(event.number("taken"))
                if taken != before:
                    changes.append((when, taken - before))
                before = taken
            if before and bench not in living:
                changes.append((when, -before))
        return added_up(changes)

    def peak_rss_bytes(self) -> int:
        """Largest resident memory of the benches, as of when seats last changed, added up."""
        peaks = [
            max((event.number("peak_rss_bytes") for event in EventReader(path).read()), default=0)
            for path in (occupancy_file(self.directory, name) for name in self.names)
        ]
        return int(sum(peaks))

    def close(self) -> None:
        """End the bench processes; trials that still sit there (Ctrl-C) are saved first."""
        with suppress(ray.exceptions.RayError):
            futures = [actor.save_all.remote() for actor in self.actors]
            ray.get(futures, timeout=_SAVE_TIMEOUT_S)
        for actor in self.actors:
            ray.kill(actor, no_restart=True)

    def _ask(self, bench: int, method: str, *arguments: Any) -> Any:
        future = getattr(self.actors[bench], method).remote(*arguments)
        try:
            return ray.get(future, timeout=_CALL_TIMEOUT_S)
        except ray.exceptions.RayTaskError as error:
            raise (error.cause if isinstance(error.cause, Exception) else error) from None

    def _living(self) -> list[int]:
        """Benches that answer, after a wait for those that restart; ClusterError where none does.

        A bench is gone where its node is dead: it is bound to it.
        """
        deadline = time.monotonic() + _RESTART_TIMEOUT_S
        living: list[int] = []
        for bench, actor in enumerate(self.actors):
            while True:
                try:
                    ray.get(actor.ready.remote(), timeout=max(1.0, deadline - time.monotonic()))
                except ray.exceptions.ActorUnschedulableError:
                    break
                except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError):
                    if time.monotonic() > deadline:
                        break
                    time.sleep(_RESTART_POLL_S)
                except ray.exceptions.RayTaskError as error:
                    log.warning("bench=%s broken=%r", self.names[bench], str(error.cause))
                    break
                else:
                    living.append(bench)
                    break
        if not living:
            raise ClusterError(
                f"none of the {len(self.actors)} benches answers. Look at the nodes (`ray status`) "
                "and Ray's logs of the actors named bench0, bench1, ..., then go on by --resume"
            )
        return living

    def _score(
        self, bench: int, recipes: Mapping[str, TrainRecipe], metric: str, source: str | None
    ) -> dict[str, dict[str, list[float]]]:
        """What one bench finds, up to where it dies."""
        found: dict[str, dict[str, list[float]]] = {}
        with _surviving(self.names[bench], "scores"):
            self._ask(bench, "clear")
            per_wave = self._ask(bench, "room", BASE)[1]
            names = [name for name in recipes if name != BASE]
            waves = [names[i : i + per_wave] for i in range(0, len(names), per_wave)] or [[]]
            for wave in waves:
                with ThreadPoolExecutor(max_workers=max(1, len(wave))) as pool:
                    list(pool.map(lambda name: self._finish(bench, name, recipes[name]), wave))
                asked = [BASE, *wave] if BASE in recipes and BASE not in found else wave
                found |= self._ask(bench, "scores", asked, metric, source)
                for name in wave:
                    self._ask(bench, "leave", name)
        return found

    def _finish(self, bench: int, name: str, recipe: TrainRecipe) -> None:
        run_dir = Path(recipe.storage) / recipe.name
        run_dir.mkdir(parents=True, exist_ok=True)
        seat = self._ask(bench, "join", name, config.plain(recipe), str(run_dir))
        assert seat is not None, "more in a wave than there are seats"
        self._ask(bench, "train", name, TO_THE_END)
        self._ask(bench, "export", name)


@contextmanager
def _surviving(bench: str, method: str) -> Iterator[None]:
    """Go on after the block where the bench dies in it, or seats are lost to it or to memory."""
    try:
        yield
    except (*GONE, NoSeat, SeatShed) as error:
        log.warning("bench=%s lost=%r method=%s", bench, str(error), method)


def _is_trained(recipe: TrainRecipe) -> bool:
    return (Path(recipe.storage) / recipe.name / "adapter").exists()


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where a bench goes."""

    strategy: Any
    threads: int
    num_cpus: float
    num_gpus: int


def places_of(
    nodes: Sequence[Mapping[str, Any]], available: Mapping[str, Mapping[str, float]]
) -> list[Place]:
    """One for each free GPU, or for each node where there are none.

    nodes: as `ray.nodes()`. available: what is free of each, by its id. Raises ClusterError.
    """
    places: list[Place] = []
    for node in nodes:
        if not node["Alive"]:
            continue
        cpus, gpus = int(node["Resources"].get("CPU", 0)), int(node["Resources"].get("GPU", 0))
        strategy = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        # What others hold, such as a server, they keep for as long as they like. Trials are
        # processes too, which ask for a hundredth of a core each.
        free = available.get(node["NodeID"], {})
        free_cpus = int(free.get("CPU", 0))
        rest = float(free_cpus - 1) if free_cpus > 1 else 0.5
        number = int(free.get("GPU", 0)) if gpus else 1
        places += [
            Place(
                strategy=strategy,
                threads=max(1, cpus // max(1, gpus)),
                num_cpus=rest if not gpus else min(1.0, rest),
                num_gpus=min(1, gpus),
            )
            for _ in range(number if cpus else 0)
        ]
    if not places:
        raise ClusterError(
            "no node of the cluster has a CPU or a free GPU for a bench; start one, or end what "
            "holds the GPUs"
        )
    return places


def added_up(changes: Sequence[tuple[float, int]]) -> list[tuple[float, int]]:
    """(seconds, seats more or fewer) -> (seconds since the first, seats taken from then on)."""
    ordered = sorted(changes)
    taken = itertools.accumulate(change for _, change in ordered)
    return [
        (round(when - ordered[0][0], 3), n) for (when, _), n in zip(ordered, taken, strict=True)
    ]


def mean_filled(steps: Sequence[tuple[float, int]]) -> float:
    """Mean seats taken from the first step to the last."""
    if len(steps) < 2 or steps[-1][0] <= steps[0][0]:
        return float(steps[0][1]) if steps else 0.0
    area = math.fsum(
        taken * (after[0] - when) for (when, taken), after in itertools.pairwise(steps)
    )
    return area / (steps[-1][0] - steps[0][0])
