"""Chat and completion requests into answers, whole or streamed, in OpenAI's shapes."""

import asyncio
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, aclosing, suppress
from dataclasses import dataclass
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from serving import problems
from serving.chat import Chat
from serving.completions import Completion
from serving.grammar import Grammars
from serving.schema import ChatRequest, CompletionRequest
from serving.service import Asked, Piece, Served, Service

_DONE = b"data: [DONE]\n\n"


@dataclass(kw_only=True, slots=True, eq=False)
class Answering:
    """Answers requests out of a service."""

    service: Service
    grammars: Callable[[Served], Grammars]
    """Of a model's tokenizer."""
    on_first: Callable[[str, float], None] = lambda model, seconds: None
    """Told of the seconds to the first token."""
    on_end: Callable[[str, int, int], None] = lambda model, prompt, completion: None
    """Told of the tokens of an answered request."""
    on_spent: Callable[[str, int], None] = lambda key, tokens: None
    """Told of the tokens that a key has used, also where its client did not wait for the end."""
    clock: Callable[[], float] = time.perf_counter

    async def answer(
        self,
        body: ChatRequest | CompletionRequest,
        request: Request,
        *,
        key: str,
        on_outcome: Callable[[Exception | None], None] = lambda error: None,
    ) -> Response:
        """Answer POST /v1/chat/completions or /v1/completions. Raises ApiError, DataError.

        on_outcome: told why there was no answer, or None once it is whole; of an answer whose
        client has gone it is told nothing.
        """
        stack = AsyncExitStack()
        is_handed_over = False
        try:
            served = await stack.enter_async_context(self.service.use(body.model))
            form = await asyncio.to_thread(self.read, body, served, key)
            source = self._timed(served, form.asked)
            if body.stream:
                stream = await _begun(source, stack)
                response = _Sse(self._events(form, served, stream, request, on_outcome), stack)
                is_handed_over = True
                return response
            pieces = await _unless_gone(request, _collect(source))
            self._count(served, form.asked, pieces)
            on_outcome(None)
            return JSONResponse(form.whole(pieces))
        except Exception as error:
            on_outcome(error)
            raise
        finally:
            if not is_handed_over:
                await stack.aclose()

    def read(
        self, body: ChatRequest | CompletionRequest, served: Served, key: str
    ) -> Chat | Completion:
        """A request on its way. Raises ApiError, DataError."""
        if isinstance(body, ChatRequest):
            return Chat.read(body, served, self.grammars, key)
        return Completion.read(body, served, key)

    async def _timed(
        self, served: Served, asked: Sequence[Asked]
    ) -> AsyncGenerator[tuple[int, Piece], None]:
        """The pieces of all prompts as they come, each with its prompt's number."""
        started, is_first = self.clock(), True
        spent: dict[tuple[int, int], int] = {}
        try:
            async with aclosing(self.service.answers(served, asked)) as pieces:
                async for number, piece in pieces:
                    if is_first and (piece.tokens or piece.finish):
                        is_first = False
                        self.on_first(served.name, self.clock() - started)
                    place = (number, piece.choice)
                    spent[place] = piece.num_new or spent.get(place, 0) + len(piece.tokens)
                    yield number, piece
        finally:
            if spent:
                prompt = sum(len(one.prompt_ids) for one in asked)
                self.on_spent(asked[0].key, prompt + sum(spent.values()))

    async def _events(
        self,
        form: Chat | Completion,
        served: Served,
        stream: AsyncIterator[tuple[int, Piece]],
        request: Request,
        on_outcome: Callable[[Exception | None], None],
    ) -> AsyncGenerator[bytes, None]:
        """Server-sent events; an error in the middle is the last of them."""
        seen: list[tuple[int, Piece]] = []
        try:
            for chunk in form.opening():
                yield _event(chunk)
            async for number, piece in stream:
                if piece.finish:
                    seen.append((number, piece))
                for chunk in form.chunks(number, piece):
                    yield _event(chunk)
            self._count(served, form.asked, seen)
            if form.body.has_usage_chunk:
                yield _event(form.usage_chunk(seen))
            on_outcome(None)
            yield _DONE
        except Exception as error:
            on_outcome(error)
            problems.log_what_is_not_told(request, error)
            yield _event(problems.of_exception(error)[1])

    def _count(
        self, served: Served, asked: Sequence[Asked], pieces: Sequence[tuple[int, Piece]]
    ) -> None:
        prompt = sum(len(one.prompt_ids) for one in asked)
        self.on_end(served.name, prompt, sum(piece.num_new for _, piece in pieces))


class _Sse(StreamingResponse):
    """A stream whose resources are given back however it ends, also before its first byte."""

    def __init__(self, events: AsyncGenerator[bytes, None], stack: AsyncExitStack) -> None:
        super().__init__(
            events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"}
        )
        self._events = events
        self._stack = stack

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._events.aclose()
            await self._stack.aclose()


def _event(body: Any) -> bytes:
    return f"data: {json.dumps(body, ensure_ascii=False, separators=(',', ':'))}\n\n".encode()


async def _begun(
    source: AsyncGenerator[tuple[int, Piece], None], stack: AsyncExitStack
) -> AsyncIterator[tuple[int, Piece]]:
    """A stream whose first piece is there, so that what is refused is no stream at all."""
    await stack.enter_async_context(aclosing(source))
    first = await anext(source)

    async def all_() -> AsyncIterator[tuple[int, Piece]]:
        yield first
        async for item in source:
            yield item

    return all_()


async def _collect(source: AsyncGenerator[tuple[int, Piece], None]) -> list[tuple[int, Piece]]:
    async with aclosing(source):
        return [item async for item in source]


async def _unless_gone(request: Request, work: Any) -> Any:
    """The result of `work`, which is cancelled where the client has gone."""
    task = asyncio.ensure_future(work)

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    watcher = asyncio.create_task(watch())
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise problems.ApiError("The client has gone.", status=problems.GONE)
    finally:
        for one in (task, watcher):
            one.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await one
