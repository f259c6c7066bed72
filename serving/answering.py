"""Chat and completion requests into answers, whole or streamed, in OpenAI's shapes."""

import asyncio
import json
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing, suppress
from dataclasses import dataclass, field
from random import SystemRandom
from typing import Any, Literal

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send
from transformers import PreTrainedTokenizerBase

from cluster import __version__
from cluster.errors import DataError
from serving import problems, replies, schema, tools
from serving.grammar import Grammars
from serving.replies import ChatCompletionChunk, Head, TokenLogprob
from serving.sampling import Matcher, Scored
from serving.schema import ChatRequest, CompletionRequest
from serving.service import Asked, Piece, Served, Service
from serving.text import token_text
from training.examples import Message

_POLL_S = 0.05
_GONE = 499
"""Status of an answer that nobody waits for (nginx's)."""
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
    clock: Callable[[], float] = time.perf_counter

    async def chat(self, body: ChatRequest, request: Request, *, key: str) -> Response:
        """Answer POST /v1/chat/completions. Raises ApiError, DataError."""
        return await self._answer(
            body, request, lambda served: _Chat.read(body, served, self.grammars, key)
        )

    async def complete(self, body: CompletionRequest, request: Request, *, key: str) -> Response:
        """Answer POST /v1/completions. Raises ApiError, DataError."""
        return await self._answer(body, request, lambda served: _Text.read(body, served, key))

    async def _answer(
        self,
        body: ChatRequest | CompletionRequest,
        request: Request,
        read: Callable[[Served], "_Chat | _Text"],
    ) -> Response:
        stack = AsyncExitStack()
        is_handed_over = False
        try:
            served = await stack.enter_async_context(self.service.use(body.model))
            form = await asyncio.to_thread(read, served)
            source = self._timed(served, form.asked)
            if body.stream:
                stream = await _begun(source, stack)
                response = _Sse(self._events(form, served, stream), stack)
                is_handed_over = True
                return response
            pieces = await _unless_gone(request, _collect(source))
            self._count(served, form.asked, pieces)
            return JSONResponse(form.whole(pieces))
        finally:
            if not is_handed_over:
                await stack.aclose()

    async def _timed(
        self, served: Served, asked: Sequence[Asked]
    ) -> AsyncGenerator[tuple[int, Piece], None]:
        """The pieces of all prompts as they come, each with its prompt's number."""
        started, is_first = self.clock(), True
        async with aclosing(_merged([self.service.answers(served, one) for one in asked])) as all_:
            async for number, piece in all_:
                if is_first and (piece.tokens or piece.finish):
                    is_first = False
                    self.on_first(served.name, self.clock() - started)
                yield number, piece

    async def _events(
        self,
        form: "_Chat | _Text",
        served: Served,
        stream: AsyncIterator[tuple[int, Piece]],
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
            yield _DONE
        except Exception as error:
            yield _event(problems.of_exception(error)[1])

    def _count(
        self, served: Served, asked: Sequence[Asked], pieces: Sequence[tuple[int, Piece]]
    ) -> None:
        prompt = sum(len(one.prompt_ids) for one in asked)
        self.on_end(served.name, prompt, sum(piece.num_new for _, piece in pieces))


@dataclass(kw_only=True, slots=True)
class _Chat:
    """One chat request on its way to its answer."""

    body: ChatRequest
    served: Served
    asked: list[Asked]
    """One."""
    head: Head
    streams: list[tools.ToolStream] = field(default_factory=list)
    """Of each choice, where the model may call tools."""
    calls: list[int] = field(default_factory=list)
    """Calls of each choice so far."""

    @classmethod
    def read(
        cls,
        body: ChatRequest,
        served: Served,
        grammars: Callable[[Served], Grammars],
        key: str,
    ) -> "_Chat":
        """Render the prompt; compiles what the answer has to follow."""
        given = [tool.model_dump(exclude_none=True) for tool in body.tools or ()]
        format = tools.format_of(served.tokenizer) if given else None
        if given and format is None:
            raise problems.unsupported(
                "tools", "this model's chat template calls tools in no way that is known here"
            )
        make_matcher = _matchers(body, given, format, served, grammars)
        asked = Asked(
            prompt_ids=_chat_ids(body, given, served),
            sampling=body.sampling(),
            num_choices=body.num_choices,
            make_matcher=make_matcher,
            visible_ids=tools.marker_ids(served.tokenizer, format) if format else frozenset(),
            key=key,
            param="messages",
        )
        random = SystemRandom()
        streams = [
            tools.ToolStream(given, format, random=random)  # pyright: ignore[reportArgumentType]
            for _ in range(body.num_choices)
            if format and body.tool_choice != "none"
        ]
        head = _head("chatcmpl", served)
        return cls(
            body=body, served=served, asked=[asked], head=head,
            streams=streams, calls=[0] * body.num_choices,
        )  # fmt: skip

    def whole(self, pieces: Sequence[tuple[int, Piece]]) -> replies.ChatCompletion:
        """The whole answer."""
        choices: list[replies.ChatChoice] = []
        for number in range(self.body.num_choices):
            own = [piece for _, piece in pieces if piece.choice == number]
            content, calls = self._taken_apart(number, "".join(piece.text for piece in own))
            message: replies.AssistantAnswer = {
                "role": "assistant", "content": content, "refusal": None,
            }  # fmt: skip
            if calls:
                message["tool_calls"] = [_call(call) for call in calls]
            scored = [token for piece in own for token in piece.tokens]
            choices.append(
                {
                    "index": number,
                    "message": message,
                    "logprobs": self._logprobs(scored),
                    "finish_reason": "tool_calls" if calls else _finish(own),
                }
            )
        return replies.chat_completion(self.head, choices, _usage(self.asked, pieces))

    def opening(self) -> list[ChatCompletionChunk]:
        """Who speaks, for each choice."""
        return [
            self._chunk(number, {"role": "assistant", "content": ""}, None, None)
            for number in range(self.body.num_choices)
        ]

    def chunks(self, _: int, piece: Piece) -> list[ChatCompletionChunk]:
        """What is to be sent of a piece."""
        number, found = piece.choice, []
        logprobs = self._logprobs(piece.tokens)
        events: list[tools.Event] = [piece.text] if piece.text else []
        if self.streams:
            events = self.streams[number].push(piece.text)
            events += self.streams[number].finish() if piece.finish else []
        for event in events:
            delta: replies.Delta = {"content": event} if isinstance(event, str) else {}
            if isinstance(event, tools.ToolCall):
                delta = {"tool_calls": [{"index": self.calls[number], **_call(event)}]}
                self.calls[number] += 1
            found.append(self._chunk(number, delta, logprobs, None))
            logprobs = None
        if logprobs and logprobs["content"]:  # tokens whose text is held back
            found.append(self._chunk(number, {"content": ""}, logprobs, None))
        if piece.finish:
            reason = "tool_calls" if self.calls[number] else piece.finish
            found.append(self._chunk(number, {}, None, reason))
        return found

    def usage_chunk(self, pieces: Sequence[tuple[int, Piece]]) -> ChatCompletionChunk:
        """The last chunk of a stream that asked for it."""
        usage = _usage(self.asked, pieces)
        return replies.chat_chunk(self.head, [], has_usage=True, usage=usage)

    def _taken_apart(self, number: int, text: str) -> tuple[str | None, tuple[tools.ToolCall, ...]]:
        if not self.streams:
            return text, ()
        stream = self.streams[number]
        events = [*stream.push(text), *stream.finish()]
        calls = tuple(event for event in events if isinstance(event, tools.ToolCall))
        content = "".join(event for event in events if isinstance(event, str))
        return content or (None if calls else ""), calls

    def _chunk(
        self,
        number: int,
        delta: replies.Delta,
        logprobs: replies.ChatLogprobs | None,
        finish: replies.FinishReason | None,
    ) -> ChatCompletionChunk:
        choice: replies.ChatChunkChoice = {
            "index": number, "delta": delta, "logprobs": logprobs, "finish_reason": finish,
        }  # fmt: skip
        return replies.chat_chunk(self.head, [choice], has_usage=self.body.has_usage_chunk)

    def _logprobs(self, scored: Sequence[Scored]) -> replies.ChatLogprobs | None:
        if not self.body.logprobs:
            return None
        return replies.chat_logprobs([_logprob(self.served.tokenizer, one) for one in scored])


@dataclass(kw_only=True, slots=True)
class _Text:
    """One completion request, of one prompt or several, on its way to its answer."""

    body: CompletionRequest
    served: Served
    asked: list[Asked]
    head: Head
    echoed: list[str]
    """The text of each prompt, where it is to be given back."""
    offsets: dict[int, int] = field(default_factory=dict)
    """Choice, over all prompts -> characters so far."""

    @classmethod
    def read(cls, body: CompletionRequest, served: Served, key: str) -> "_Text":
        """Prompts as ids."""
        sampling = body.sampling()
        is_scored = body.echo and body.logprobs is not None
        vocab_size = len(served.tokenizer)
        asked: list[Asked] = []
        echoed: list[str] = []
        for prompt in body.prompts:
            ids: list[int] = prompt if isinstance(prompt, list) else _ids(served.tokenizer, prompt)
            if not ids:
                raise problems.invalid("prompt", "it is empty; give at least one token")
            if max(ids) >= vocab_size:
                raise problems.invalid(
                    "prompt", f"token id {max(ids)} is not in the vocabulary of {vocab_size}"
                )
            asked.append(
                Asked(
                    prompt_ids=ids,
                    sampling=sampling,
                    num_choices=body.num_choices,
                    num_prompt_logprobs=body.logprobs if is_scored else None,
                    key=key,
                    param="prompt",
                )
            )
            text = prompt if isinstance(prompt, str) else _decode(served.tokenizer, ids)
            echoed.append(text if body.echo else "")
        return cls(body=body, served=served, asked=asked, head=_head("cmpl", served), echoed=echoed)

    def whole(self, pieces: Sequence[tuple[int, Piece]]) -> replies.TextCompletion:
        """The whole answer."""
        choices: list[replies.TextChoice] = []
        for number in range(len(self.asked)):
            scores = [p for i, piece in pieces if i == number for p in piece.prompt]
            for choice in range(self.body.num_choices):
                own = [p for i, p in pieces if i == number and p.choice == choice]
                text = "".join(piece.text for piece in own)
                scored = [token for piece in own for token in piece.tokens]
                if self.body.max_tokens == 0:  # the engine has to say something
                    text, scored = "", []
                choices.append(
                    self._choice(number, choice, text, scored, scores, _finish(own), is_first=True)
                )
        usage = _usage(self.asked, pieces, is_silent=self.body.max_tokens == 0)
        return replies.text_completion(self.head, choices, usage=usage)

    def opening(self) -> list[replies.TextCompletion]:
        """Nothing."""
        return []

    def chunks(self, number: int, piece: Piece) -> list[replies.TextCompletion]:
        """What is to be sent of a piece."""
        index = number * self.body.num_choices + piece.choice
        is_first = index not in self.offsets and not piece.prompt
        if piece.prompt:
            self._kept_scores[number] = piece.prompt
            return []
        text, scored = piece.text, piece.tokens
        if self.body.max_tokens == 0:
            text, scored = "", ()
        if not (text or scored or piece.finish or is_first):
            return []
        choice = self._choice(
            number, piece.choice, text, scored, self._kept_scores.get(number, ()),
            piece.finish, is_first=is_first,
        )  # fmt: skip
        has_usage = self.body.has_usage_chunk
        return [replies.text_completion(self.head, [choice], has_usage=has_usage)]

    def usage_chunk(self, pieces: Sequence[tuple[int, Piece]]) -> replies.TextCompletion:
        """The last chunk of a stream that asked for it."""
        usage = _usage(self.asked, pieces, is_silent=self.body.max_tokens == 0)
        return replies.text_completion(self.head, [], usage=usage)

    _kept_scores: dict[int, tuple[Scored, ...]] = field(default_factory=dict)

    def _choice(
        self,
        number: int,
        choice: int,
        text: str,
        scored: Sequence[Scored],
        prompt_scores: Sequence[Scored],
        finish: Literal["stop", "length"] | None,
        *,
        is_first: bool,
    ) -> replies.TextChoice:
        index = number * self.body.num_choices + choice
        if is_first:
            text = self.echoed[number] + text
            scored = [*prompt_scores, *scored] if self.body.echo else scored
        logprobs = None
        if self.body.logprobs is not None:
            tokens = [_logprob(self.served.tokenizer, one) for one in scored]
            offset, offsets = self.offsets.get(index, 0), []
            for token in tokens:
                offsets.append(offset)
                offset += len(token.token)
            self.offsets[index] = offset
            logprobs = replies.text_logprobs(tokens, offsets=offsets)
        else:
            self.offsets[index] = 0
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}


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


def _matchers(
    body: ChatRequest,
    given: Sequence[Mapping[str, Any]],
    format: tools.Format | None,
    served: Served,
    grammars: Callable[[Served], Grammars],
) -> Callable[[], Matcher | None]:
    """What each choice has to follow: a response format, or a call that is required."""
    asked = body.response_format
    choice = body.tool_choice
    is_required = choice == "required" or isinstance(choice, schema.ChosenTool)
    if is_required and format is not None:
        wanted = [
            tool
            for tool in given
            if not isinstance(choice, schema.ChosenTool)
            or tool["function"]["name"] == choice.function.name
        ]
        try:
            return grammars(served).for_tools(wanted, format).matcher  # pyright: ignore[reportArgumentType]
        except DataError as error:
            raise problems.invalid("tools", str(error)) from None
    if asked is None or isinstance(asked, schema.TextFormat):
        return lambda: None
    if given and choice != "none":
        raise problems.unsupported(
            "response_format", "it cannot be combined with tools that may be called"
        )
    try:
        plain = asked.model_dump(by_alias=True, exclude_none=True)
        return grammars(served).compile(plain).matcher
    except DataError as error:
        raise problems.invalid("response_format", str(error)) from None


def _chat_ids(body: ChatRequest, given: Sequence[Mapping[str, Any]], served: Served) -> list[int]:
    has_calls = any(
        message.role == "tool" or (message.role == "assistant" and message.tool_calls)
        for message in body.messages
    )
    try:
        if given or has_calls:
            turns = tools.render_tools(
                served.tokenizer,
                [_turn(message) for message in body.messages],
                given,  # pyright: ignore[reportArgumentType]
            )
            rendered: Any = served.tokenizer.apply_chat_template(
                turns,  # pyright: ignore[reportArgumentType]
                tools=given or None,  # pyright: ignore[reportArgumentType]
                add_generation_prompt=True,
                tokenize=True,
                return_dict=False,
                sanitize_control_tokens=True,  # what a user types is text, not the end of a turn
            )
            return rendered
        messages = tuple(
            Message(
                role="system" if message.role == "developer" else message.role,
                content=schema.text_of(message),
            )
            for message in body.messages
        )
        return served.encoder.next_turn_ids(messages, where="messages")
    except DataError as error:
        raise problems.invalid("messages", str(error)) from None


def _turn(message: schema.Message) -> dict[str, object]:
    turn = message.model_dump(exclude_none=True)
    turn["role"] = "system" if message.role == "developer" else message.role
    return {**turn, "content": schema.text_of(message)}


def _call(call: tools.ToolCall) -> replies.ToolCall:
    function: replies.FunctionCall = {"name": call.name, "arguments": call.arguments}
    return {"id": call.id, "type": "function", "function": function}


def _logprob(tokenizer: PreTrainedTokenizerBase, one: Scored) -> TokenLogprob:
    text, data = token_text(tokenizer, one.id)
    top = [
        TokenLogprob(token=token, bytes=bytes_, logprob=logprob)
        for token_id, logprob in one.top
        for token, bytes_ in (token_text(tokenizer, token_id),)
    ]
    return TokenLogprob(token=text, bytes=data, logprob=one.logprob, top=top)


def _usage(
    asked: Sequence[Asked], pieces: Sequence[tuple[int, Piece]], *, is_silent: bool = False
) -> replies.Usage:
    ends = [piece for _, piece in pieces if piece.finish]
    return replies.usage_of(
        sum(len(one.prompt_ids) for one in asked),
        0 if is_silent else sum(piece.num_new for piece in ends),
        cached_tokens=sum(piece.num_cached for piece in ends if piece.choice == 0),
    )


def _finish(pieces: Sequence[Piece]) -> Literal["stop", "length"]:
    finish = pieces[-1].finish
    assert finish is not None
    return finish


def _head(kind: str, served: Served) -> Head:
    return {
        "id": f"{kind}-{secrets.token_hex(12)}",
        "created": int(time.time()),
        "model": served.name,
        "system_fingerprint": f"loray-{__version__}",
    }


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text).input_ids


def _decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    text = tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text


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


async def _merged(
    sources: Sequence[AsyncGenerator[Piece, None]],
) -> AsyncGenerator[tuple[int, Piece], None]:
    """What all sources give, with the number of the source, in the order in which it comes."""
    ready: asyncio.Queue[tuple[int, Piece | BaseException | None]] = asyncio.Queue(maxsize=1024)

    async def drain(number: int, source: AsyncGenerator[Piece, None]) -> None:
        try:
            async with aclosing(source):
                async for piece in source:
                    await ready.put((number, piece))
            await ready.put((number, None))
        except Exception as error:
            await ready.put((number, error))

    tasks = [asyncio.create_task(drain(n, source)) for n, source in enumerate(sources)]
    try:
        left = len(tasks)
        while left:
            number, item = await ready.get()
            if item is None:
                left -= 1
            elif isinstance(item, BaseException):
                raise item
            else:
                yield number, item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _unless_gone(request: Request, work: Any) -> Any:
    """The result of `work`, which is cancelled where the client has gone."""
    task = asyncio.ensure_future(work)

    async def watch() -> None:
        while not await request.is_disconnected():
            await asyncio.sleep(_POLL_S)

    watcher = asyncio.create_task(watch())
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise problems.ApiError("The client has gone.", status=_GONE)
    finally:
        for one in (task, watcher):
            one.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await one
