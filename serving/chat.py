"""A chat request on its way: its prompt, what its answer has to follow, and the answer's shape."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from random import SystemRandom
from typing import Any

from cluster.errors import DataError
from serving import forms, problems, replies, schema, tools
from serving.grammar import Grammars
from serving.replies import ChatCompletionChunk, Head
from serving.sampling import Matcher, Scored
from serving.schema import ChatRequest
from serving.service import Asked, Piece, Served
from training.examples import Message


@dataclass(kw_only=True, slots=True)
class Chat:
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
    ) -> "Chat":
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
        head = forms.head("chatcmpl", served)
        return cls(
            body=body, served=served, asked=[asked], head=head,
            streams=streams, calls=[0] * body.num_choices,
        )  # fmt: skip

    def whole(self, pieces: Sequence[tuple[int, Piece]]) -> replies.ChatCompletion:
        """The whole answer."""
        choices: list[replies.ChatChoice] = []
        for number in range(self.body.num_choices):
            own = [piece for _, piece in pieces if piece.choice == number]
            text = "".join(piece.text for piece in own)
            said = tools.Parsed(content=text, calls=())
            if self.streams:
                said = self.streams[number].whole(text)
            message: replies.AssistantAnswer = {
                "role": "assistant", "content": said.content, "refusal": None,
            }  # fmt: skip
            if said.calls:
                message["tool_calls"] = [_call(call) for call in said.calls]
            scored = [token for piece in own for token in piece.tokens]
            choices.append(
                {
                    "index": number,
                    "message": message,
                    "logprobs": self._logprobs(scored),
                    "finish_reason": "tool_calls" if said.calls else forms.finish(own),
                }
            )
        return replies.chat_completion(self.head, choices, forms.usage(self.asked, pieces))

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
        usage = forms.usage(self.asked, pieces)
        return replies.chat_chunk(self.head, [], has_usage=True, usage=usage)

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
        return replies.chat_logprobs([forms.logprob(self.served.tokenizer, one) for one in scored])


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
