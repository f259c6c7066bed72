"""Copies of requests that a version answers beside the one that is asked; its answers are dropped.

A copy begins once the real answer is over, and only while less than half of the engine's rows are
taken and nobody waits; it ends as soon as that changes, and then counts as nothing. A few run at a
time; further ones are left out.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass, field

from serving.aliases import Aliases, fault_of
from serving.answering import Answering
from serving.engine import Engine
from serving.rollout import Rollout
from serving.schema import ChatRequest, CompletionRequest

log = logging.getLogger(__name__)

_KEY = "(shadow)"
"""In the queue, copies are nobody's."""
_LOOK_S = 0.02
_ROWS_PER_COPY = 4


@dataclass(kw_only=True, slots=True, eq=False)
class Shadows:
    """The copies of one replica."""

    answering: Answering
    aliases: Aliases
    clock: Callable[[], float] = time.perf_counter
    _running: set["asyncio.Task[None]"] = field(default_factory=set)

    def start(
        self,
        one: Rollout,
        model: str,
        body: ChatRequest | CompletionRequest,
        ready: Callable[[str], Awaitable[None]],
    ) -> None:
        """Have a version answer a copy of a request, where there is room for that."""
        service = self.answering.service
        engine = service.fixed[model].engine if model in service.fixed else service.base.engine
        limit = max(1, engine.limits.rows // _ROWS_PER_COPY)
        is_there = model in service.fixed or model in service.adapters.loaded
        has_slot = len(service.adapters.loaded) < service.limits.adapters  # nobody's is taken
        if len(self._running) >= limit or _is_busy(engine, 0) or not (is_there or has_slot):
            return
        copy = body.model_copy(update={"model": model, "stream": False, "stream_options": None})
        task = asyncio.create_task(self._run(one, copy, engine, ready))
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def _run(
        self,
        one: Rollout,
        copy: ChatRequest | CompletionRequest,
        engine: Engine,
        ready: Callable[[str], Awaitable[None]],
    ) -> None:
        started = self.clock()
        work = asyncio.create_task(self._answer(copy, ready))
        try:
            while not work.done():
                await asyncio.wait({work}, timeout=_LOOK_S)
                if not work.done() and _is_busy(engine, copy.num_choices):
                    return
            error = work.exception()
        finally:
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)
        if error is not None and not isinstance(error, Exception):
            return
        is_fault = fault_of(error)
        if is_fault is not None:
            seconds = self.clock() - started
            self.aliases.count(one, copy.model, seconds=seconds, is_fault=is_fault)

    async def _answer(
        self, copy: ChatRequest | CompletionRequest, ready: Callable[[str], Awaitable[None]]
    ) -> None:
        service = self.answering.service
        await ready(copy.model)
        async with service.use(copy.model) as served:
            form = await asyncio.to_thread(self.answering.read, copy, served, _KEY)
            async with aclosing(service.answers(served, form.asked)) as pieces:
                async for _ in pieces:
                    pass


def _is_busy(engine: Engine, own: int) -> bool:
    """Whether others than `own` rows need the engine."""
    return len(engine.waiting) > own or engine.num_running - own >= max(1, engine.limits.rows // 2)
