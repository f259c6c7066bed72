"""Load what a serving file names, and keep it as the registry says while requests flow."""

import asyncio
import gc
import hashlib
import logging
import shutil
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from filelock import FileLock

from cluster import storage
from cluster.errors import AdapterError, ConfigError, LorayError, StorageError
from serving.adapters import Adapters, leave_the_cores
from serving.admission import Job, Step
from serving.config import ServeRecipe
from serving.engine import Engine
from serving.registry import Entry, Registry
from serving.schema import Sampling
from serving.service import Served, Service, created_now
from training import adapter as adapters
from training import merge
from training import model as models
from training.config import LoraConfig, ModelConfig

log = logging.getLogger(__name__)

_FOLLOW_S = 1.0
_PROBE_PROMPT = 32
_PROBE_TOKENS = 16
_MERGE_S = 3600.0
_GRACE_S = 10.0
_GAIN = 1.1
"""How much faster a merged model must be to be worth the memory of a second model (mode: auto)."""
_SWITCH_S = 1e-4
"""How long a thread may keep another from running Python, by default 5 ms. A step hands it over
hundreds of times, to what sends the one before it or proves an adapter, and waits for it again."""


@dataclass(kw_only=True, slots=True, eq=False)
class Replica:
    """A service and the state that it has been brought to."""

    recipe: ServeRecipe
    service: Service
    registry: Registry
    directory: Path
    """Of the registry; merged models are below it."""
    on_step: Callable[[Engine, float], None]
    done: dict[str, tuple[int, str]] = field(default_factory=dict)
    """Name -> version of its entry, and how it is served."""
    failed: dict[str, tuple[int, str]] = field(default_factory=dict)
    """Name -> version of an entry that cannot be served, and why."""
    _busy: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def follow(self) -> None:
        """Bring the service to what the registry says, over and over."""
        while True:
            await asyncio.sleep(_FOLLOW_S)
            try:
                await self.reconcile()
            except LorayError as error:
                log.warning("registry=%s", error)

    async def reconcile(self) -> None:
        """Bring the service to what the registry says now; what cannot be served is noted."""
        async with self._busy:
            entries = self.registry.entries()
            for name in [name for name in self.done if name not in entries]:
                await self._drop(name)
            for name, entry in entries.items():
                if self.done.get(name, (0, ""))[0] == entry.version:
                    continue
                if self.failed.get(name, (0, ""))[0] == entry.version:
                    continue
                try:
                    await self._serve(name, entry)
                except LorayError as error:
                    self.failed[name] = (entry.version, str(error))
                    log.warning("adapter=%s refused=%s", name, error)

    async def add(self, name: str, path: Path, mode: Literal["live", "merged"]) -> None:
        """Prove an adapter here, then have all replicas serve it. Raises AdapterError."""
        if name == self.service.base.name:
            raise ConfigError(f"{name!r} is the base's name; choose another")
        async with self._busy:
            trial = Entry(path=str(path), mode=mode, created=created_now(), version=0)
            await self._serve(name, trial)
            entry = self.registry.put(name, path, mode)
            self.done[name] = (entry.version, mode)
            self.failed.pop(name, None)

    async def remove(self, name: str) -> bool:
        """Have no replica serve a name any more; whether it was served."""
        found = self.registry.remove(name)
        await self.reconcile()
        return found

    async def switch(self, name: str, mode: Literal["live", "merged"]) -> None:
        """Serve a name the other way; answers that run end as they began."""
        entry = self.registry.entries()[name]
        await self.add(name, Path(entry.path), mode)

    def close(self) -> None:
        """Stop all engines."""
        for engine in self.service.engines():
            engine.close()

    async def _serve(self, name: str, entry: Entry) -> None:
        directory, service = Path(entry.path), self.service
        merged: Served | None = None
        mode = entry.mode
        if mode == "auto" and adapters.read_config(directory).variant == "dora":
            mode = "merged"  # cannot share a batch
        if mode == "merged":
            merged = await asyncio.to_thread(self._open_merged, name, directory)
        else:
            await service.adapters.put(name, directory)
            if mode == "auto":
                merged = await self._faster(name, directory)
        old = service.fixed.pop(name, None)
        if merged is not None:
            service.fixed[name] = merged
            await service.adapters.remove(name)
        if old is not None:
            _close_when_idle(old.engine)
        self.done[name] = (entry.version, "live" if merged is None else "merged")

    async def _drop(self, name: str) -> None:
        del self.done[name]
        old = self.service.fixed.pop(name, None)
        if old is not None:
            _close_when_idle(old.engine)
        await self.service.adapters.remove(name)

    async def _faster(self, name: str, directory: Path) -> Served | None:
        """The merged model, where it is worth its memory; measured against the live adapter."""
        merged = await asyncio.to_thread(self._open_merged, name, directory)
        async with self.service.live(name) as live:
            slow = await asyncio.to_thread(tokens_per_s, live)
        fast = await asyncio.to_thread(tokens_per_s, merged)
        is_faster = fast > _GAIN * slow
        log.warning(
            "adapter=%s mode=%s live_tokens_per_s=%.0f merged_tokens_per_s=%.0f",
            name, "merged" if is_faster else "live", slow, fast,
        )  # fmt: skip
        if is_faster:
            return merged
        merged.engine.close()
        return None

    def _open_merged(self, name: str, directory: Path) -> Served:
        leave_the_cores()
        base = self.service.base
        target = self._merged_directory(name, directory)
        device = _device()
        loaded = models.load_base(
            ModelConfig(
                base=str(target), quantization="none", precision=self.recipe.model.precision
            ),
            device=device,
        )
        engine = Engine(
            loaded.model, self.recipe.limits, autocast=loaded.autocast, on_step=self.on_step
        )
        start(engine, threads=self.recipe.num_cpus)
        return Served(
            name=name,
            engine=engine,
            encoder=adapters.encoder_for(str(directory), loaded),
            tokenizer=loaded.tokenizer,
            created=created_now(),
            parent=base.name,
        )

    def _merged_directory(self, name: str, directory: Path) -> Path:
        """Where the adapter is folded: beside it, or below the registry, if need be from now on."""
        weights = storage.read_manifest(directory).files if _has_manifest(directory) else {}
        own = self.directory / "merged" / hashlib.sha256(name.encode()).hexdigest()[:16]
        storage.make_directory(own.parent)
        for place in (directory.parent / "merged", own):
            if _is_merge_of(place, weights.get(adapters.WEIGHTS)):
                return place
        with FileLock(f"{own}.lock", timeout=_MERGE_S):
            if not _is_merge_of(own, weights.get(adapters.WEIGHTS)):
                if own.exists():
                    shutil.rmtree(own)
                merge.merge(directory, own, base=self.recipe.model.base)
        return own


def open_replica(
    recipe: ServeRecipe,
    directory: Path,
    *,
    on_step: Callable[[Engine, float], None] = lambda engine, seconds: None,
) -> Replica:
    """Load the base of a serving file and start its engine; adapters come with `reconcile`.

    directory: of the registry, to which the file's adapters are added where it does not know them.
    Raises ModelError for a base that cannot be loaded.
    """
    leave_the_cores()
    base = models.load_base(recipe.model, device=_device())
    model, router = models.attach_lora(base, LoraConfig(rank=1), seed=0, adapter="base")
    router.is_frozen = True
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    gc.freeze()  # or the collector walks a million objects of libraries in the middle of a step
    engine = Engine(model, recipe.limits, router=router, autocast=base.autocast, on_step=on_step)
    start(engine, threads=recipe.num_cpus)
    served = Served(
        name=recipe.model_name,
        engine=engine,
        encoder=adapters.encoder_for("base", base),
        tokenizer=base.tokenizer,
        created=created_now(),
    )
    service = Service(
        limits=recipe.limits,
        fixed={served.name: served},
        base=served,
        adapters=Adapters(base, model, router, engine, recipe.limits),
    )
    registry = Registry(directory)
    known = registry.entries()
    for entry in recipe.adapters:
        path = str(Path(entry.path).resolve())
        if entry.name not in known or known[entry.name].path != path:
            registry.put(entry.name, Path(path), entry.mode or recipe.mode)
    return Replica(
        recipe=recipe, service=service, registry=registry, directory=directory, on_step=on_step
    )


def start(engine: Engine, *, threads: int) -> threading.Thread:
    """Run an engine in a thread of its own, which computes with so many threads."""
    sys.setswitchinterval(_SWITCH_S)
    is_set = threading.Event()

    def run() -> None:
        torch.set_num_threads(threads)
        # A thread takes over the last number that any thread has set when it first asks for its
        # own, which torch (2.13) does in the first product: ask now, before `leave_the_cores`.
        torch.get_num_threads()
        is_set.set()
        engine.run()

    thread = threading.Thread(target=run, name="engine", daemon=True)
    thread.start()
    is_set.wait()
    return thread


def tokens_per_s(served: Served) -> float:
    """New tokens a second of an engine whose rows are all taken."""
    over = threading.Semaphore(0)
    rows = min(8, served.engine.limits.rows)

    def tell(step: Step) -> None:
        if step.end:
            over.release()

    started = time.perf_counter()
    for number in range(rows):
        job = Job(
            prompt_ids=[(7 * number + place) % 200 for place in range(_PROBE_PROMPT)],
            sampling=Sampling(temperature=0),
            max_new_tokens=_PROBE_TOKENS,
            stop_ids=frozenset(),
            adapter=served.version.routed_as if served.version else "",
        )
        served.engine.submit(job, tell)
    for _ in range(rows):
        over.acquire(timeout=600)
    return rows * _PROBE_TOKENS / (time.perf_counter() - started)


def _close_when_idle(engine: Engine) -> None:
    """Stop an engine that nobody is sent to any more, once its last answer is over."""

    def wait() -> None:
        time.sleep(_GRACE_S)  # who was sent there a moment ago may still be reading its prompt
        while engine.num_running or len(engine.waiting):
            time.sleep(0.1)
        engine.close()

    threading.Thread(target=wait, name="closing", daemon=True).start()


def _has_manifest(directory: Path) -> bool:
    return (directory / storage.MANIFEST).is_file()


def _is_merge_of(target: Path, weights: object) -> bool:
    """Whether a merged directory is whole, and made of the adapter with these weights."""
    try:
        info = storage.verify(target).info
    except StorageError:
        return False
    sha256 = getattr(weights, "sha256", None)
    return sha256 is not None and info.get("adapter_sha256") == sha256


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def check_path(root: Path, given: str) -> Path:
    """The directory of an adapter that a client named, which must lie inside `root`.

    Raises AdapterError for absolute paths, `..` and links that lead out.
    """
    path = Path(given)
    if path.is_absolute() or ".." in path.parts or not given.strip() or "\0" in given:
        raise AdapterError(
            f"path is {given[:80]!r}; allowed: a directory inside the server's adapter root, "
            "relative to it, without `..`"
        )
    found = (root / path).resolve()
    if not found.is_relative_to(root.resolve()):
        raise AdapterError(f"path {given[:80]!r} leads out of the server's adapter root")
    return found
