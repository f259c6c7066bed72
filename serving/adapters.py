"""The adapters of a live model: proved before they are let in, kept while they are used.

An adapter is untrusted until proved: name, headers, sizes, checksums, base, tokenizer, every value
finite, and another answer than the base's. All of that happens beside the engine; only hanging it
up (milliseconds) and the last proof (one short forward pass) take the engine's thread.

A name may get a new version at any time. What runs ends on the old one, which is taken down with
its last user; what comes gets the new one. Versions that nobody uses go in the order of their last
use when room is needed. The methods belong to one event loop.
"""

import asyncio
import itertools
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft import PeftModel

from cluster.errors import AdapterError, ResourceError
from serving.admission import NO_ADAPTER
from serving.config import Limits
from serving.engine import Engine
from training import adapter as adapters
from training import model as models
from training import routing
from training.adapter import AdapterConfig
from training.model import Base
from training.routing import Factors, Router
from training.tokens import Encoder

log = logging.getLogger(__name__)

_PROBE_TOKENS = 8
_NO_DIFFERENCE = 1e-6
"""Of the largest logit: an adapter that changes less changes nothing."""


@dataclass(kw_only=True, slots=True, eq=False)
class Version:
    """One adapter in memory."""

    name: str
    routed_as: str
    """What the model calls it; never used twice."""
    directory: Path
    encoder: Encoder
    num_bytes: int
    rank: int
    users: int = 0
    last_used: float = 0.0
    is_current: bool = True


@dataclass(kw_only=True, slots=True)
class CacheEvents:
    """How often what happened."""

    hits: int = 0
    misses: int = 0
    evictions: int = 0
    load_s: list[float] = field(default_factory=list)
    """Of loads that nobody has counted yet."""


class Adapters:
    """Names -> directories, and the versions that are in memory."""

    def __init__(
        self,
        base: Base,
        model: PeftModel,
        router: Router,
        engine: Engine,
        limits: Limits,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """model: of `attach_lora`, with every linear layer routed by `router`."""
        self._base = base
        self._model = model
        self._router = router
        self._engine = engine
        self._limits = limits
        self._clock = clock
        self._tokenizer = models.tokenizer_fingerprint(base.tokenizer)
        # Read once: proving an adapter must not walk modules that the engine's thread changes.
        self._features = adapters.features_of(model.get_base_model())
        self._dtype = next(p for n, p in model.named_parameters() if "lora_A" in n).dtype
        self._paths: dict[str, Path] = {}
        self._loaded: dict[str, Version] = {}
        self._leaving: set[Version] = set()
        """Versions that have been replaced or removed and still have users."""
        self._loading: dict[str, asyncio.Task[Version]] = {}
        self._numbers = itertools.count()
        self._freed = asyncio.Event()
        self._hanging = asyncio.Lock()
        self.events = CacheEvents()

    @property
    def paths(self) -> Mapping[str, Path]:
        """What may be asked for."""
        return self._paths

    async def put(self, name: str, directory: Path) -> Version:
        """Let an adapter in under a name, or a new version of it, once it is proved.

        Raises AdapterError where it is refused; an older version goes on then.
        """
        # Whoever asked may go; half an adapter must not stay.
        return await asyncio.shield(self._load(name, directory, is_new=True))

    def know(self, name: str, directory: Path) -> None:
        """Let an adapter in under a name; it is proved and loaded when it is first asked for."""
        self._paths.setdefault(name, directory)

    async def remove(self, name: str) -> None:
        """Forget a name; answers that run end as they began."""
        self._paths.pop(name, None)
        self._replace(name, None)

    async def acquire(self, name: str) -> Version:
        """The current version, loaded if need be; `release` gives it back.

        Raises KeyError for a name that is not served, AdapterError where it cannot be loaded, and
        ResourceError where all slots stay in use too long.
        """
        version = self._loaded.get(name)
        if version is not None:
            self.events.hits += 1
        else:
            self.events.misses += 1
            while version is None or not version.is_current:  # others may have needed its room
                version = await self._get(name)
        version.users += 1
        version.last_used = self._clock()
        return version

    def release(self, version: Version) -> None:
        """One user less."""
        version.users -= 1
        assert version.users >= 0, "released more often than acquired"
        if version.users == 0:
            if not version.is_current:
                self._leaving.discard(version)
                self._take_down(version)
            self._freed.set()

    @property
    def num_bytes(self) -> int:
        """Memory of all versions."""
        return sum(v.num_bytes for v in (*self._loaded.values(), *self._leaving))

    @property
    def loaded(self) -> Mapping[str, Version]:
        """Current versions in memory, by name."""
        return self._loaded

    async def _get(self, name: str) -> Version:
        """Loaded once, however many ask."""
        task = self._loading.get(name)
        if task is None:
            task = asyncio.create_task(self._load(name, self._paths[name], is_new=False))
            self._loading[name] = task
            task.add_done_callback(lambda _: self._loading.pop(name, None))
        return await asyncio.shield(task)

    def _replace(self, name: str, version: Version | None) -> None:
        old = self._loaded.pop(name, None)
        if old is not None and old is not version:
            self._retire(old)
        if version is not None:
            self._loaded[name] = version

    def _retire(self, version: Version) -> None:
        version.is_current = False
        if version.users:
            self._leaving.add(version)
        else:
            self._take_down(version)

    def _take_down(self, version: Version) -> None:
        if self._engine.error is None:
            self._engine.between_steps(lambda: routing.take_down(self._model, version.routed_as))

    async def _load(self, name: str, directory: Path, *, is_new: bool) -> Version:
        started = self._clock()
        config, factors, encoder = await asyncio.to_thread(self._prove, directory)
        num_bytes = sum(
            matrix.numel() * matrix.element_size()
            for factor in factors.values()
            for matrix in (factor.A_RI, factor.B_OR)
        )
        async with self._hanging:
            await self._make_room(num_bytes)
            version = Version(
                name=name,
                routed_as=f"v{next(self._numbers)}",
                directory=directory,
                encoder=encoder,
                num_bytes=num_bytes,
                rank=config.rank,
                last_used=self._clock(),
            )
            hang = self._engine.between_steps(lambda: self._hang(version, factors))
            await asyncio.wrap_future(hang)
            if is_new or self._paths.get(name) == directory:
                self._paths[name] = directory
                self._replace(name, version)
            else:  # it was removed or replaced while it was loaded
                self._retire(version)
        self.events.load_s.append(self._clock() - started)
        log.info("adapter=%s rank=%d load_s=%.2f", name, config.rank, self.events.load_s[-1])
        return version

    def _prove(self, directory: Path) -> tuple[AdapterConfig, dict[str, Factors], Encoder]:
        """Everything that can be told without the engine; its factors on the base's device."""
        leave_the_cores()
        config = adapters.read_config(directory)
        if config.rank > self._limits.adapter_rank:
            raise AdapterError(
                f"{directory}: its rank is {config.rank}; limits.adapter_rank is "
                f"{self._limits.adapter_rank}: raise that, or train a smaller one"
            )
        if config.variant == "dora":
            raise AdapterError(
                f"{directory}: a DoRA adapter cannot share a batch with others; serve it merged "
                "(mode: merged)"
            )
        adapters.check_base(directory, self._base.fingerprint, self._base.name, is_chosen=False)
        adapters.check_tokenizer(directory, self._tokenizer)
        adapters.check_fits(config, self._features)
        tensors = adapters.read_tensors(config)
        device, dtype = self._base.device, self._dtype
        factors = {
            name: Factors(
                A_RI=tensors[f"base_model.model.{name}.lora_A.weight"].to(device, dtype),
                B_OR=tensors[f"base_model.model.{name}.lora_B.weight"].to(device, dtype),
                scaling=layer.scaling,
            )
            for name, layer in config.layers.items()
        }
        for name, factor in factors.items():  # neighbours in a batch meet what is scaled as zeros
            if not torch.isfinite(
                (factor.B_OR * factor.scaling).abs().max() + factor.A_RI.abs().max()
            ):
                raise AdapterError(f"{directory}: {name} leaves the range of {dtype} when scaled")
        return config, factors, adapters.encoder_for(str(directory), self._base)

    def _hang(self, version: Version, factors: Mapping[str, Factors]) -> None:
        """In the engine's thread: make it answerable, if it answers otherwise than the base."""
        routing.hang(self._model, version.routed_as, factors)
        vocab = self._base.model.config.get_text_config().vocab_size
        ids = torch.arange(_PROBE_TOKENS, device=self._base.device) * (vocab // _PROBE_TOKENS)
        with self._router.by_row([NO_ADAPTER, version.routed_as]), self._base.autocast():
            logits_BLV = self._base.model(input_ids=ids.expand(2, -1), use_cache=False).logits
        difference = (logits_BLV[0] - logits_BLV[1]).abs().max()
        problem = ""
        if not torch.isfinite(logits_BLV).all():
            problem = "its answers are not finite numbers; use an earlier checkpoint"
        elif difference <= _NO_DIFFERENCE * logits_BLV[0].abs().max():
            problem = "it changes nothing: its answers are the base's; train it, or use another"
        if problem:
            routing.take_down(self._model, version.routed_as)
            raise AdapterError(f"{version.directory}: {problem}")

    async def _make_room(self, num_bytes: int) -> None:
        """Take down what nobody uses until one more fits; wait where all is in use."""
        limits = self._limits
        if num_bytes > limits.adapter_bytes:
            raise ResourceError(
                f"the adapter takes {num_bytes} bytes; limits.adapter_bytes is "
                f"{limits.adapter_bytes}: raise that"
            )

        def is_full() -> bool:
            count = len(self._loaded) + len(self._leaving)
            return count >= limits.adapters or self.num_bytes + num_bytes > limits.adapter_bytes

        deadline = self._clock() + limits.request_s
        while is_full():
            idle = [v for v in self._loaded.values() if not v.users]
            if idle:
                oldest = min(idle, key=lambda v: v.last_used)
                del self._loaded[oldest.name]
                self._retire(oldest)
                self.events.evictions += 1
                continue
            self._freed.clear()
            try:
                await asyncio.wait_for(self._freed.wait(), max(0.0, deadline - self._clock()))
            except TimeoutError:
                raise ResourceError(
                    f"all {limits.adapters} adapter slots are in use; raise limits.adapters"
                ) from None


def leave_the_cores() -> None:
    """Have torch compute with one thread wherever this thread calls it.

    Where two threads have teams of OpenMP workers, there are more workers than cores, libgomp no
    longer lets any of them wait actively, and the engine decodes a third slower, for ever.
    """
    torch.set_num_threads(1)
