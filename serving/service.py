"""One replica: what answers under which name, and how a request becomes answers.

Plain asyncio over the engine's thread. HTTP shapes are `inference.py`'s; Ray is `app.py`'s.
"""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Literal

from transformers import PreTrainedTokenizerBase

from cluster.errors import DataError, LorayError
from serving import problems
from serving.adapters import Adapters, Version
from serving.admission import NO_ADAPTER, Answer, Job, Step
from serving.config import Limits
from serving.engine import Engine
from serving.sampling import Matcher, Scored
from serving.schema import Sampling
from serving.text import Detokenizer
from serving.waiting import Full
from training.tokens import Encoder

log = logging.getLogger(__name__)

Finish = Literal["stop", "length"]
_SEEDS = 1 << 63


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """A request, as far as any engine needs to know it."""

    prompt_ids: Sequence[int]
    sampling: Sampling
    num_choices: int = 1
    num_prompt_logprobs: int | None = None
    make_matcher: Callable[[], Matcher | None] = lambda: None
    """A matcher for each choice."""
    visible_ids: frozenset[int] = frozenset()
    """Special tokens that the text shows all the same."""
    key: str = ""
    param: Literal["messages", "prompt"] = "messages"
    """Where the prompt stands in the request, for errors."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """What is new of one choice."""

    choice: int
    text: str = ""
    tokens: tuple[Scored, ...] = ()
    prompt: tuple[Scored, ...] = ()
    """The scores of the prompt's tokens, where asked for; once, before the first token."""
    finish: Finish | None = None
    num_cached: int = 0
    """Tokens of the prompt that were known; with `finish`."""
    num_new: int = 0
    """Tokens of the whole choice; with `finish`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Served:
    """A model that answers: the base, an adapter on it, or a merged model."""

    name: str
    engine: Engine
    encoder: Encoder
    tokenizer: PreTrainedTokenizerBase
    created: int
    parent: str | None = None
    """The base's name, for an adapter."""
    version: Version | None = None
    """Of a live adapter, while it is used."""


@dataclass(kw_only=True, slots=True)
class _Choice:
    number: int
    detokenizer: Detokenizer
    answer: Answer
    num_new: int = 0
    is_over: bool = False


@dataclass(kw_only=True, slots=True, eq=False)
class Service:
    """The models of a replica by name."""

    limits: Limits
    base: Served
    fixed: dict[str, Served]
    """The base and merged models."""
    adapters: Adapters
    """On the live base."""
    clock: Callable[[], float] = time.monotonic

    def names(self) -> list[str]:
        """Whatever may be asked for."""
        return [*self.fixed, *(name for name in self.adapters.paths if name not in self.fixed)]

    def engines(self) -> list[Engine]:
        """The base's and those of merged models."""
        return [served.engine for served in self.fixed.values()]

    def is_healthy(self) -> bool:
        """Whether every engine lives."""
        return all(engine.error is None for engine in self.engines())

    @asynccontextmanager
    async def use(self, name: str) -> AsyncIterator[Served]:
        """The model of a name, which stays as it is inside the block. Raises ApiError (404)."""
        if name in self.fixed:
            yield self.fixed[name]
            return
        async with self.live(name) as served:
            yield served

    @asynccontextmanager
    async def live(self, name: str) -> AsyncIterator[Served]:
        """An adapter on the base, which stays as it is inside the block. Raises ApiError (404)."""
        try:
            version = await self.adapters.acquire(name)
        except KeyError:
            raise problems.model_not_found(name) from None
        try:
            yield replace(
                self.base, name=name, parent=self.base.name,
                encoder=version.encoder, version=version,
            )  # fmt: skip
        finally:
            self.adapters.release(version)

    def check_length(self, served: Served, asked: Asked) -> int:
        """The tokens that each answer may have. Raises ApiError where prompt and answer do not
        fit the context."""
        limit, prompt = served.engine.context_tokens, len(asked.prompt_ids)
        wanted = asked.sampling.max_tokens
        if prompt + (1 if wanted is None else wanted) > limit:
            raise problems.context_length_exceeded(limit, prompt, wanted, asked.param)
        return limit - prompt if wanted is None else wanted

    async def answers(
        self, served: Served, asked: Sequence[Asked]
    ) -> AsyncGenerator[tuple[int, Piece], None]:
        """The choices of all prompts, piece by piece as they come, each with its prompt's number.

        Closing it cancels them. Raises ApiError where a prompt is too long or the queue is full,
        and LorayError where the engine dies.
        """
        lengths = [self.check_length(served, one) for one in asked]
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[tuple[int, Step]] = asyncio.Queue()
        choices: list[tuple[int, _Choice]] = []
        try:
            for prompt, (one, num_new) in enumerate(zip(asked, lengths, strict=True)):
                for number in range(one.num_choices):

                    def tell(step: Step, index: int = len(choices)) -> None:
                        loop.call_soon_threadsafe(events.put_nowait, (index, step))

                    choices.append((prompt, self._submit(served, one, number, num_new, tell)))
            num_left = len(choices)
            while num_left:
                index, step = await events.get()
                prompt, choice = choices[index]
                if not choice.is_over:
                    yield prompt, self._piece(served, choice, step)
                    num_left -= choice.is_over
        finally:
            for _, choice in choices:
                if not choice.answer.is_over:
                    served.engine.cancel(choice.answer)

    def _submit(
        self, served: Served, asked: Asked, number: int, num_new: int, tell: Callable[[Step], None]
    ) -> _Choice:
        sampling = asked.sampling
        if sampling.seed is not None:  # choices differ, and the same request says the same again
            sampling = replace(sampling, seed=(sampling.seed + number) % _SEEDS)
        stop_ids = served.encoder.stop_ids
        job = Job(
            prompt_ids=asked.prompt_ids,
            sampling=sampling,
            max_new_tokens=num_new,
            stop_ids=frozenset(stop_ids),
            adapter=served.version.routed_as if served.version else NO_ADAPTER,
            model=served.name,
            key=asked.key,
            matcher=asked.make_matcher(),
            num_prompt_logprobs=asked.num_prompt_logprobs if number == 0 else None,
            deadline=self.clock() + self.limits.request_s,
        )
        detokenizer = Detokenizer(
            served.tokenizer, stop=sampling.stop, stop_ids=(), visible_ids=asked.visible_ids
        )
        try:
            answer = served.engine.submit(job, tell)
        except Full as full:
            if full.is_everybodys:
                raise problems.overloaded(full.retry_after_s) from None
            raise problems.rate_limited(full.retry_after_s, str(full)) from None
        return _Choice(number=number, detokenizer=detokenizer, answer=answer)

    def _piece(self, served: Served, choice: _Choice, step: Step) -> Piece:
        if isinstance(step.error, DataError):  # the grammar cannot go on
            raise problems.invalid("response_format", str(step.error))
        if step.error is not None:
            raise step.error
        if step.end == "error":
            raise LorayError("the engine has stopped")
        if step.prompt:
            return Piece(choice=choice.number, prompt=step.prompt)
        if step.token is not None:
            choice.num_new += 1
            delta = choice.detokenizer.push(step.token.id)
            if not delta.is_stopped:
                return Piece(choice=choice.number, text=delta.text, tokens=(step.token,))
            served.engine.cancel(choice.answer)
            return self._last(choice, delta.text, "stop", tokens=(step.token,))
        choice.num_new += step.end == "stop"  # the end token, which has no text
        finish: Finish = "stop" if step.end == "stop" else "length"
        return self._last(choice, choice.detokenizer.finish().text, finish)

    def _last(
        self, choice: _Choice, text: str, finish: Finish, *, tokens: tuple[Scored, ...] = ()
    ) -> Piece:
        choice.is_over = True
        return Piece(
            choice=choice.number,
            text=text,
            tokens=tokens,
            finish=finish,
            num_cached=choice.answer.num_cached,
            num_new=choice.num_new,
        )


def created_now() -> int:
    """Seconds since the epoch, as the API counts them."""
    return int(time.time())
