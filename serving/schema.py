"""Requests as OpenAI's clients send them, and what the engine takes from them.

Nothing is coerced and nothing ignored. A field of OpenAI's that this server cannot honour may
hold the value that asks for nothing; any other is refused by name (`unsupported_value`), as is a
name that is no field's (`unknown_field`). `null` is the same as leaving a field out.

`top_k` is an extension. Fields follow OpenAI's client 3.57: types/chat/completion_create_params.py
and types/completion_create_params.py.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, TypeAlias, TypeVar, cast

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from cluster.config import nearest

T = TypeVar("T")

MAX_TEXT_CHARS = 4_000_000
"""In all messages or prompts of a request together: a million tokens of plain English."""
MAX_PROMPT_TOKENS = 1 << 20
"""In all prompts of a request together."""
MAX_PROMPTS = 64
MAX_CHOICES = 8
MAX_MESSAGES = 2048
MAX_TOOLS = 64
MAX_SCHEMA_BYTES = 1 << 16
_MAX_INT = (1 << 31) - 1


def _invalid(why: str) -> PydanticCustomError:
    return PydanticCustomError("invalid_value", cast(Any, why))


def _unsupported(why: str) -> PydanticCustomError:
    return PydanticCustomError("unsupported_value", cast(Any, why))


def _only_neutral(value: object, handler: ValidatorFunctionWrapHandler) -> object:
    try:
        taken = handler(value)
    except ValidationError as error:
        allowed = error.errors()[0]["msg"].replace("None", "null")
        raise _unsupported(f"This server does not support it; leave it out. {allowed}") from None
    if type(taken) is not type(value):  # Literal[False] takes 0 (pydantic 2.14).
        raise _unsupported("This server does not support it; leave it out")
    return taken


NEUTRAL = WrapValidator(_only_neutral)
"""The type says which values ask for nothing; all others are refused as unsupported."""


def _only(kind: str) -> BeforeValidator:
    """Refuses an object of another `type` as a whole, before its fields are read."""

    def check(value: object) -> object:
        given = value.get("type") if isinstance(value, dict) else kind
        if isinstance(given, str) and given != kind:
            raise _unsupported(f"Only type {kind!r} is supported here, not {given[:64]!a}")
        return value

    return BeforeValidator(check)


def _few(limit: int) -> BeforeValidator:
    """Refuses a large mapping at once; pydantic reports each bad entry before it counts them."""

    def check(value: object) -> object:
        if isinstance(value, dict) and len(value) > limit:
            raise _invalid(f"At most {limit} entries are allowed, not {len(value)}")
        return value

    return BeforeValidator(check)


def _needs(flag: str) -> AfterValidator:
    """Refuses a value that asks for something unless the field `flag`, declared before, is true."""

    def check(value: T, info: ValidationInfo) -> T:
        if value != 0 and not info.data.get(flag, True):
            raise _invalid(f"Only allowed together with {flag}: true")
        return value

    return AfterValidator(check)


# pydantic would try every branch of a union and report each one's errors, so the branch is chosen
# here. Its name stands in an error's place; serving/problems.py knows it by the `~`.


def _by(key: str, *names: str) -> Discriminator:
    def branch(value: object) -> str | None:
        name = value.get(key) if isinstance(value, dict) else getattr(value, key, None)
        return f"~{name}" if name in names else None

    why = f"{key} should be one of: {', '.join(names)}"
    return Discriminator(branch, custom_error_type="invalid_value", custom_error_message=why)


def _shape(value: object) -> str | None:
    if not isinstance(value, list):
        return {str: "~text", dict: "~object"}.get(type(value))
    first = value[0] if value else None
    return "~ids" if isinstance(first, int) else "~batch" if isinstance(first, list) else "~list"


def _shaped(why: str) -> Discriminator:
    return Discriminator(_shape, custom_error_type="invalid_value", custom_error_message=why)


def _plain_schema(schema: dict[str, Any]) -> dict[str, Any]:
    try:
        num_bytes = len(json.dumps(schema, ensure_ascii=False, allow_nan=False).encode())
    except (ValueError, RecursionError):
        raise _invalid("This is no plain JSON: NaN, broken text, or nested too deeply") from None
    return _within(schema, num_bytes, MAX_SCHEMA_BYTES, "bytes")


def _within(value: T, size: int, limit: int, unit: str) -> T:
    if size > limit:
        raise _invalid(f"At most {limit} {unit} are allowed, not {size}")
    return value


Text: TypeAlias = Annotated[str, Field(max_length=MAX_TEXT_CHARS)]
Label: TypeAlias = Annotated[str, Field(min_length=1, max_length=64)]
FunctionName: TypeAlias = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
JsonSchema: TypeAlias = Annotated[dict[str, Any], AfterValidator(_plain_schema)]
MaxTokens: TypeAlias = Annotated[int, Field(ge=1, le=_MAX_INT)]
Penalty: TypeAlias = Annotated[float, Field(ge=-2, le=2)]
Unused: TypeAlias = Annotated[None, NEUTRAL]


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How the tokens of an answer are chosen, and where it ends."""

    temperature: float = 1.0
    """0 takes the likeliest token."""
    top_p: float = 1.0
    """The share of the probability that is drawn from; 1 is all of it."""
    top_k: int = 0
    """How many of the likeliest tokens are drawn from; 0 is all of them."""
    seed: int | None = None
    """None: another answer each time."""
    presence_penalty: float = 0.0
    """Off the logits of tokens that are in the answer already."""
    frequency_penalty: float = 0.0
    """The same, for each time that they are."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Token id -> what is added to its logit."""
    num_logprobs: int | None = None
    """How many of the likeliest tokens to report; 0: only the chosen one; None: nothing."""
    stop: tuple[str, ...] = ()
    """Texts before which the answer ends."""
    max_tokens: int | None = None
    """None: as many as the context holds."""


class Strict(BaseModel):
    """Takes what is declared and as it is declared; `str` of an error does not quote the input."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        frozen=True,
        allow_inf_nan=False,
        hide_input_in_errors=True,
        use_attribute_docstrings=True,
    )

    @model_validator(mode="before")
    @classmethod
    def _known_fields_only(cls, value: object) -> object:
        names = [info.alias or name for name, info in cls.model_fields.items()]
        for key in value if isinstance(value, dict) else ():
            if key not in names:
                name = key[:64] if isinstance(key, str) else ""
                found = {
                    "name": ascii(name),
                    "hint": nearest(name, names),
                    "valid": ", ".join(names),
                }
                raise PydanticCustomError(
                    "unknown_field", "Unknown field {name}.{hint} Valid: {valid}", found
                )
        return value


class TextPart(Strict):
    """The one kind of content that a language model reads."""

    type: Literal["text"]
    text: Text
    prompt_cache_breakpoint: Unused = None


Parts: TypeAlias = Annotated[
    list[Annotated[TextPart, _only("text")]],
    Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True),
]
Content: TypeAlias = Annotated[
    Annotated[Text, Tag("~text")] | Annotated[Parts, Tag("~list")],
    _shaped("Input should be a text or a list of text parts"),
]


class SystemMessage(Strict):
    """How to answer; `developer` is OpenAI's newer word for it."""

    role: Literal["system", "developer"]
    content: Content
    name: Label | None = None


class UserMessage(Strict):
    role: Literal["user"]
    content: Content
    name: Label | None = None


class CalledFunction(Strict):
    name: FunctionName
    arguments: Text
    """JSON as the model wrote it."""


class CalledTool(Strict):
    """A call that the model made in an earlier turn."""

    id: Label
    type: Literal["function"]
    function: CalledFunction


class AssistantMessage(Strict):
    """What the model said or called in an earlier turn."""

    role: Literal["assistant"]
    tool_calls: (
        Annotated[
            list[Annotated[CalledTool, _only("function")]],
            Field(min_length=1, max_length=MAX_TOOLS, fail_fast=True),
        ]
        | None
    ) = None
    content: Annotated[Content | None, Field(validate_default=True)] = None
    """May be left out where there are tool calls."""
    name: Label | None = None
    refusal: Unused = None
    audio: Unused = None
    function_call: Unused = None
    annotations: Annotated[Annotated[list[Any], Field(max_length=0)] | None, NEUTRAL] = None

    @field_validator("content")
    @classmethod
    def _says_something(cls, value: T, info: ValidationInfo) -> T:
        if value is None and info.data.get("tool_calls", ()) is None:
            raise _invalid("An assistant's message needs content or tool_calls")
        return value


class ToolMessage(Strict):
    """What a called tool gave back."""

    role: Literal["tool"]
    content: Content
    tool_call_id: Label
    name: Label | None = None


Message: TypeAlias = Annotated[
    Annotated[SystemMessage, Tag("~system")]
    | Annotated[SystemMessage, Tag("~developer")]
    | Annotated[UserMessage, Tag("~user")]
    | Annotated[AssistantMessage, Tag("~assistant")]
    | Annotated[ToolMessage, Tag("~tool")],
    _by("role", "system", "developer", "user", "assistant", "tool"),
]


def text_of(message: Message) -> str:
    """What a message says, its parts joined; empty where it only calls tools."""
    if isinstance(message.content, list):
        return "".join(part.text for part in message.content)
    return message.content or ""


class Function(Strict):
    name: FunctionName
    description: Annotated[str, Field(max_length=8192)] | None = None
    parameters: JsonSchema | None = None
    """What its arguments have to be; without, it has none."""
    strict: bool | None = None


class Tool(Strict):
    type: Literal["function"]
    function: Function


class ChosenFunction(Strict):
    name: FunctionName


class ChosenTool(Strict):
    """The one tool that the model has to call."""

    type: Literal["function"]
    function: ChosenFunction


class TextFormat(Strict):
    type: Literal["text"]


class JsonFormat(Strict):
    type: Literal["json_object"]


class NamedSchema(Strict):
    name: FunctionName
    description: Annotated[str, Field(max_length=8192)] | None = None
    schema_: JsonSchema = Field(alias="schema")
    strict: bool | None = None
    """Answers follow the schema in any case."""


class SchemaFormat(Strict):
    type: Literal["json_schema"]
    json_schema: NamedSchema


class StreamOptions(Strict):
    include_usage: bool | None = None
    """Send one more chunk at the end, with the tokens used."""
    include_obfuscation: Annotated[Literal[False] | None, NEUTRAL] = None


ToolChoice: TypeAlias = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("~text")]
    | Annotated[ChosenTool, _only("function"), Tag("~object")],
    _shaped("Input should be none, auto, required or an object that names a function"),
]
ResponseFormat: TypeAlias = Annotated[
    Annotated[TextFormat, Tag("~text")]
    | Annotated[JsonFormat, Tag("~json_object")]
    | Annotated[SchemaFormat, Tag("~json_schema")],
    _by("type", "text", "json_object", "json_schema"),
]
StopText: TypeAlias = Annotated[str, Field(min_length=1, max_length=256)]
Stop: TypeAlias = Annotated[
    Annotated[StopText, Tag("~text")]
    | Annotated[list[StopText], Field(max_length=4, fail_fast=True), Tag("~list")],
    _shaped("Input should be a text or a list of texts"),
]
LogitBias: TypeAlias = Annotated[
    dict[
        Annotated[str, Field(pattern=r"^(0|[1-9][0-9]{0,8})$")],
        Annotated[float, Field(ge=-100, le=100)],
    ],
    Field(max_length=1024, json_schema_extra={"additionalProperties": False}),
    _few(1024),
]
Metadata: TypeAlias = Annotated[
    dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]],
    Field(max_length=16),
    _few(16),
]


class _Request(Strict):
    """What both kinds of request have in common."""

    model: Annotated[str, Field(min_length=1, max_length=256)]
    """A base model's name, or an adapter's."""
    frequency_penalty: Penalty | None = None
    logit_bias: LogitBias | None = None
    """Token id, in decimal -> what is added to its logit."""
    metadata: Metadata | None = None
    """Taken for the client's own use."""
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    """Answers for each prompt."""
    presence_penalty: Penalty | None = None
    seed: Annotated[int, Field(ge=-(1 << 63), le=(1 << 63) - 1)] | None = None
    """The same seed gives the same answer, whatever else the server does."""
    stop: Stop | None = None
    """Texts before which the answer ends."""
    stream: bool | None = None
    stream_options: Annotated[StreamOptions, _needs("stream")] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=1000)] | None = None
    """Draw from so many of the likeliest tokens; 0 and -1: from all."""
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    user: Annotated[str, Field(max_length=512)] | None = None

    @property
    def num_choices(self) -> int:
        """Answers for each prompt."""
        return self.n or 1

    @property
    def has_usage_chunk(self) -> bool:
        """Whether the stream ends in a chunk with the tokens used."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def _sampling(self, *, num_logprobs: int | None, max_tokens: int | None) -> Sampling:
        return Sampling(
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=self.top_p or 1.0,
            top_k=max(self.top_k or 0, 0),
            seed=self.seed,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            logit_bias={int(key): bias for key, bias in (self.logit_bias or {}).items()},
            num_logprobs=num_logprobs,
            stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()),
            max_tokens=max_tokens,
        )


def _bounded_messages(messages: list[Message]) -> list[Message]:
    num_chars = sum(len(text_of(message)) for message in messages)
    for message in messages:
        if isinstance(message, AssistantMessage):
            num_chars += sum(len(call.function.arguments) for call in message.tool_calls or ())
    return _within(messages, num_chars, MAX_TEXT_CHARS, "characters in all messages together")


class ChatRequest(_Request):
    """The body of POST /v1/chat/completions."""

    messages: Annotated[
        list[Message],
        Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True),
        AfterValidator(_bounded_messages),
    ]
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20), _needs("logprobs")] | None = None
    max_tokens: MaxTokens | None = None
    """OpenAI's older name for max_completion_tokens."""
    max_completion_tokens: MaxTokens | None = None
    """None: as many as the context holds."""
    response_format: ResponseFormat | None = None
    tools: (
        Annotated[
            list[Annotated[Tool, _only("function")]], Field(max_length=MAX_TOOLS, fail_fast=True)
        ]
        | None
    ) = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: Annotated[Literal[True] | None, NEUTRAL] = None
    audio: Unused = None
    function_call: Unused = None
    functions: Unused = None
    modalities: Annotated[
        Annotated[list[Literal["text"]], Field(min_length=1, max_length=1)] | None, NEUTRAL
    ] = None
    moderation: Unused = None
    prediction: Unused = None
    prompt_cache_key: Unused = None
    prompt_cache_options: Unused = None
    prompt_cache_retention: Unused = None
    reasoning_effort: Unused = None
    safety_identifier: Unused = None
    service_tier: Annotated[Literal["auto", "default"] | None, NEUTRAL] = None
    store: Annotated[Literal[False] | None, NEUTRAL] = None
    verbosity: Unused = None
    web_search_options: Unused = None

    @field_validator("max_completion_tokens")
    @classmethod
    def _is_the_only_limit(cls, value: int | None, info: ValidationInfo) -> int | None:
        if None not in (value, older := info.data.get("max_tokens")) and value != older:
            raise _invalid("It differs from max_tokens, its older name; give one of them")
        return value

    @field_validator("tools")
    @classmethod
    def _have_names_of_their_own(cls, value: list[Tool] | None) -> list[Tool] | None:
        names = [tool.function.name for tool in value or ()]
        if len(set(names)) < len(names):
            raise _invalid("Two functions have the same name")
        return value

    @field_validator("tool_choice")
    @classmethod
    def _can_be_chosen(cls, value: T, info: ValidationInfo) -> T:
        if "tools" in info.data and value not in (None, "none", "auto"):
            names = [tool.function.name for tool in info.data["tools"] or ()]
            if not names:
                raise _invalid("Only allowed together with tools")
            if isinstance(value, ChosenTool) and value.function.name not in names:
                raise _invalid(f"It names a function that is not in tools: {', '.join(names)}")
        return value

    def sampling(self) -> Sampling:
        """What the engine needs to know."""
        return self._sampling(
            num_logprobs=(self.top_logprobs or 0) if self.logprobs else None,
            max_tokens=self.max_completion_tokens or self.max_tokens,
        )


TokenIds: TypeAlias = Annotated[
    list[Annotated[int, Field(ge=0, le=_MAX_INT)]],
    Field(min_length=1, max_length=MAX_PROMPT_TOKENS, fail_fast=True),
]
_SEVERAL = Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)
Prompt: TypeAlias = Annotated[
    Annotated[Text, Tag("~text")]
    | Annotated[list[Text], _SEVERAL, Tag("~list")]
    | Annotated[TokenIds, Tag("~ids")]
    | Annotated[list[TokenIds], _SEVERAL, Tag("~batch")],
    _shaped("Input should be a text, a list of texts, a list of token ids or a list of such lists"),
]


class CompletionRequest(_Request):
    """The body of POST /v1/completions."""

    prompt: Prompt
    """A text, several texts, one prompt in token ids, or several of those."""
    echo: bool | None = None
    """Give back the prompt in front of the answer."""
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    """How many of the likeliest tokens to report beside each one."""
    max_tokens: Annotated[int, Field(ge=0, le=_MAX_INT)] | None = 16
    """0 only together with echo."""
    best_of: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    """Nothing but 1 or n is supported: all answers are given back."""
    suffix: Unused = None

    @field_validator("prompt")
    @classmethod
    def _is_bounded(cls, value: T) -> T:
        if isinstance(value, list) and not isinstance(value[0], int):
            unit = "characters" if isinstance(value[0], str) else "tokens"
            limit = MAX_TEXT_CHARS if isinstance(value[0], str) else MAX_PROMPT_TOKENS
            _within(value, sum(map(len, value)), limit, f"{unit} in all prompts together")
        return value

    @field_validator("max_tokens")
    @classmethod
    def _asks_for_something(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value == 0 and not info.data.get("echo", True):
            raise _invalid("0 is only allowed together with echo: true")
        return value

    @field_validator("best_of")
    @classmethod
    def _chooses_nothing(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value not in (None, 1, info.data.get("n", value)):
            raise _unsupported("This server supports 1 or the value of n only")
        return value

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts one by one, as texts or as token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        is_one = isinstance(self.prompt[0], int)
        return cast(list[str] | list[list[int]], [self.prompt] if is_one else self.prompt)

    def sampling(self) -> Sampling:
        """What the engine needs to know."""
        max_tokens = 16 if self.max_tokens is None else self.max_tokens
        return self._sampling(num_logprobs=self.logprobs, max_tokens=max_tokens)
