"""Answers held to JSON: which tokens may come next, by a JSON Schema or the form of a tool call.

The library is llguidance 1.9.1. It compiles in milliseconds, where xgrammar precomputes masks for
seconds where a schema is unlucky (llguidance's README), and it refuses the keywords that it does
not know instead of ignoring them. All that this project knows of it is in this file.

What is covered: json_object, json_schema, one forced tool call.
What is not covered: remote `$ref`, `not`, `if`, `uniqueItems`, `oneOf` whose cases may overlap,
look-around in patterns: each is refused. Properties come in the schema's order.
"""

import hashlib
import json
import subprocess
import sys
import threading
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from typing import cast

import llguidance.hf
import numpy as np
import torch
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from cluster.errors import DataError, ResourceError
from serving.tools import Format, Tool

MAX_SCHEMA_BYTES = 65_536
"""JSON text of a schema, or of all tools' schemas."""
_MAX_GRAMMARS = 16
"""Compiled grammars that are kept, the most recently used ones."""
_MAX_TRIALS = 2
"""Schemas that are tried out at the same time."""
_TRIAL_CPU_S = 2
_TRIAL_BYTES = 1 << 30
_TRIAL_WAIT_S = 60.0
"""Wall clock, for a turn and for the trial itself: a busy machine is no reason to refuse."""
_TRIAL_STEPS = 64
_REASON_CHARS = 300

# Each step ends at the library's own limits of 14 ms for the lexer and 2.5 ms for the parser.
# A lexer state takes up to 5 KB; a schema with every string format needs about 3,000 of them.
_LIMITS = {
    "max_lexer_states": 32_000,
    "precompute_large_lexemes": False,  # its cost grows with the vocabulary, unseen by the trial
    "verbose_errors": False,  # they quote the answer
}
# One space, or one line break and an indent: models may write as they like, but not for ever.
_OPTIONS = {"whitespace_pattern": r" |\r?\n[ \t]{0,32}", "lenient": False, "coerce_one_of": False}
_ANY_OBJECT = {"type": "object"}
_NO_ARGUMENTS = {"type": "object", "properties": {}, "additionalProperties": False}

# llguidance 1.9.1 does not bound everything: 24 `allOf` that each name the one before twice, or
# multiples of four primes at once, go on for more than 20 s and cannot be stopped. So every new
# schema is first compiled in a process that the kernel ends after 2 s of CPU or 1 GiB. There, the
# beginning of a random answer, an object where it may be one (`{` is the last of all beginnings),
# shows whether the parser's limits let it pass.
_TRIAL = f"""
import random, resource, sys
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
resource.setrlimit(resource.RLIMIT_CPU, ({_TRIAL_CPU_S}, {_TRIAL_CPU_S}))
resource.setrlimit(resource.RLIMIT_AS, ({_TRIAL_BYTES}, {_TRIAL_BYTES}))
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
limits = LLParserLimits(**{_LIMITS!r})
matcher = LLMatcher(LLTokenizer("byte"), sys.stdin.read(), log_level=0, limits=limits)
draw = random.Random(0)
for step in range({_TRIAL_STEPS}):
    mask = matcher.compute_bitmask()
    allowed = [byte for byte in range(256) if mask[byte // 8] >> byte % 8 & 1]
    if not allowed or not matcher.consume_token(draw.choice(allowed if step else allowed[-1:])):
        break
sys.stdout.write(matcher.get_error())
"""


class Matcher:
    """Where one answer stands in its grammar. For one thread at a time."""

    def __init__(self, grammar: "Grammar") -> None:
        self._grammar = grammar
        self._inner = grammar.template.deep_copy()  # shares what the lexer has learned
        self._has_ended = False

    @property
    def is_finished(self) -> bool:
        """Whether the answer is whole, and nothing but an end token may follow."""
        return self._has_ended or (self._inner.is_stopped() and self._inner.is_accepting())

    def mask(self) -> Tensor:
        """(V,) bool on CPU: the tokens that may come next; end tokens where the answer is whole.

        Raises DataError where none may, or where the grammar has become too complex.
        """
        grammar = self._grammar
        packed = bytes(1)  # none would do, but NumPy 2.4 pads empty arrays with rubbish
        if not self.is_finished:
            packed = self._inner.compute_bitmask()
            self._check()
        # NumPy, as torch would start its threads for as many elements, which may take milliseconds.
        allowed_V = np.unpackbits(
            np.frombuffer(packed, np.uint8), count=grammar.vocab_size, bitorder="little"
        ).view(np.bool_)
        allowed_V[grammar.stop_ids] = self._has_ended or self._inner.is_accepting()
        if not allowed_V.any():
            raise DataError("no token continues the answer so that it can still follow the schema")
        return torch.from_numpy(allowed_V)

    def accept(self, token_id: int) -> None:
        """Take a token that the mask allows. Raises DataError as `mask`, and for any other."""
        if token_id in self._grammar.stop_ids and self._inner.is_accepting():
            self._has_ended = True
        elif not self._inner.consume_token(token_id):
            self._check()

    def _check(self) -> None:
        if self._inner.is_error():
            # The states of its lexer are shared, so the grammar may be of no use to others either.
            self._grammar.is_worn = True
            raise DataError(f"the answer cannot go on: {_reason(self._inner.get_error())}")


class Grammar:
    """A compiled grammar, for any number of answers and threads."""

    def __init__(self, template: LLMatcher, *, vocab_size: int, stop_ids: Sequence[int]) -> None:
        self.template = template
        self.vocab_size = vocab_size
        self.stop_ids = list(stop_ids)
        self.is_worn = False
        """Whether an answer ran into a limit of what all answers share."""

    def matcher(self) -> Matcher:
        """The state of a new answer."""
        return Matcher(self)


class Grammars:
    """Compiles grammars for one tokenizer, and keeps the latest. For any number of threads.

    vocab_size: the width of the model's logits; ids without a token are never allowed.
    stop_ids: the tokens that end an answer, at least one.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, *, vocab_size: int, stop_ids: Collection[int]
    ) -> None:
        assert stop_ids, "without an end token no answer would end"
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._stop_ids = sorted(stop_ids)
        self._lock = threading.Lock()
        self._trials = threading.BoundedSemaphore(_MAX_TRIALS)
        self._compiled_tokenizer: LLTokenizer | None = None
        self._kept: OrderedDict[bytes, Grammar] = OrderedDict()

    def compile(self, response_format: Mapping[str, object]) -> Grammar:
        """The grammar of OpenAI's `response_format`, json_object or json_schema.

        Takes up to seconds for a schema that is new. Raises DataError where the schema is
        invalid, has unsupported keywords, cannot be followed, or is too large or too expensive,
        and ResourceError where too many others are being compiled.
        """
        kind, schema = response_format.get("type"), _ANY_OBJECT
        if kind == "json_schema":
            named = response_format.get("json_schema")
            schema = named.get("schema") if isinstance(named, Mapping) else None
        elif kind != "json_object":
            raise DataError(f"response_format is {kind!r:.40}; allowed: json_object, json_schema")
        where = "response_format.json_schema.schema"
        text = _text([{"json_schema": _with_options(schema, where)}], where)
        return self._grammar(text, text, where)

    def for_tools(self, tools: Sequence[Tool], format: Format) -> Grammar:
        """The grammar of one call of one of these tools. Raises as `compile`."""
        schemas = [
            {
                "name": f"tool_{i}",
                "json_schema": _arguments(tool, f"tools[{i}].function.parameters"),
            }
            for i, tool in enumerate(tools)
        ]
        # The trial has no tokenizer, so there the frame of a call is plain text.
        text, plain = (
            _text([{"lark_grammar": _call_grammar(tools, format, special)}, *schemas], "tools")
            for special in (_special_ids(self._tokenizer), {})
        )
        return self._grammar(text, plain, "tools")

    def _grammar(self, text: str, plain: str, where: str) -> Grammar:
        """The grammar that `text` describes; `plain` is as hard to compile."""
        key = hashlib.sha256(text.encode()).digest()
        if found := self._find(key):
            return found
        if not self._trials.acquire(timeout=_TRIAL_WAIT_S):
            raise ResourceError(f"{where}: too many schemas are being compiled; try again later")
        try:
            found = self._find(key)  # perhaps another thread's, meanwhile
            if found is None:
                _try_out(plain, where)
                found = self._compile(text, where)
                with self._lock:
                    self._kept[key] = found
                    if len(self._kept) > _MAX_GRAMMARS:
                        self._kept.popitem(last=False)
            return found
        finally:
            self._trials.release()

    def _find(self, key: bytes) -> Grammar | None:
        with self._lock:
            found = self._kept.pop(key, None)
            if found is None or found.is_worn:
                return None
            self._kept[key] = found
            return found

    def _compile(self, text: str, where: str) -> Grammar:
        limits = LLParserLimits(**_LIMITS)
        template = LLMatcher(self._llguidance(), text, log_level=0, limits=limits)
        if template.is_error():
            raise _refusal(where, template.get_error())
        return Grammar(template, vocab_size=self._vocab_size, stop_ids=self._stop_ids)

    def _llguidance(self) -> LLTokenizer:
        """The tokenizer as the library wants it: takes up to a second, once."""
        with self._lock:
            if self._compiled_tokenizer is None:
                try:
                    self._compiled_tokenizer = llguidance.hf.from_tokenizer(
                        cast(PreTrainedTokenizerFast, self._tokenizer),
                        eos_token=self._stop_ids[0],
                        slices=LLTokenizer.json_slices(),
                    )
                except ValueError as error:
                    raise DataError(
                        f"this model's tokenizer cannot be held to a grammar ({error}); "
                        "ask without response_format and without a required tool"
                    ) from None
            return self._compiled_tokenizer


def _with_options(schema: object, where: str) -> dict[str, object]:
    """A user's schema with our options. Raises DataError where it is none or brings its own."""
    if not isinstance(schema, Mapping):
        raise DataError(f"{where} must be a JSON Schema that is an object")
    if "x-guidance" in schema:
        raise DataError(f"{where}: x-guidance is not supported")
    return {**schema, "x-guidance": _OPTIONS}


def _arguments(tool: Tool, where: str) -> dict[str, object]:
    """The schema of a tool's arguments, which are an object even if it does not say so."""
    parameters = tool["function"].get("parameters")
    schema = _with_options(_NO_ARGUMENTS if parameters is None else parameters, where)
    if schema.setdefault("type", "object") != "object":
        raise DataError(f"{where}.type must be object")
    return schema


def _text(grammars: Sequence[object], where: str) -> str:
    """What llguidance reads: grammars, of which the first may name the others."""
    try:
        text = json.dumps({"grammars": grammars}, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise DataError(f"{where} cannot be written as JSON: {error}") from None
    if len(text) > MAX_SCHEMA_BYTES:
        raise DataError(f"{where}: {len(text):,} bytes; at most {MAX_SCHEMA_BYTES:,} are allowed")
    return text


def _call_grammar(tools: Sequence[Tool], format: Format, special_ids: Mapping[str, int]) -> str:
    """Lark for one call; `tool_0` and so on are the grammars of the arguments."""

    def literal(text: str) -> str:
        return f"<[{special_ids[text]}]>" if text in special_ids else json.dumps(text)

    calls = " | ".join(f"call_{i}" for i in range(len(tools)))
    start, key = f"({calls})", "parameters"
    if format == "hermes":
        start = rf'{literal("<tool_call>")} "\n" {start} "\n" {literal("</tool_call>")}'
        key = "arguments"
    lines = [f"start: {start}"]
    for i, tool in enumerate(tools):
        head = f'{{"name": {json.dumps(tool["function"]["name"])}, "{key}": '
        lines.append(f'call_{i}: {json.dumps(head)} @tool_{i} "}}"')
    return "\n".join(lines)


def _special_ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    added = tokenizer.added_tokens_decoder.items()
    return {token.content: token_id for token_id, token in added if token.special}


def _try_out(text: str, where: str) -> None:
    """Compile in a process of its own. Raises DataError where that fails or takes too much."""
    try:
        trial = subprocess.run(  # noqa: S603  (our own interpreter and our own program)
            [sys.executable, "-P", "-c", _TRIAL],
            input=text.encode(),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=_TRIAL_WAIT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        raise ResourceError(
            f"{where} cannot be tried out: no process, or no time for it; try again later"
        ) from None
    if trial.returncode < 0:  # a signal: a limit, or memory that was not given
        raise DataError(
            f"{where} is too expensive: compiling it takes more than {_TRIAL_CPU_S} s or "
            f"{_TRIAL_BYTES >> 20} MB; simplify it (fewer allOf, smaller multipleOf and bounds)"
        )
    if trial.returncode:
        raise ResourceError(
            f"{where} cannot be tried out: the process ended with code {trial.returncode}"
        )
    if trial.stdout:
        raise _refusal(where, trial.stdout.decode(errors="replace"))


def _refusal(where: str, error: str) -> DataError:
    if error.startswith("panic"):
        return DataError(f"{where} is too large once its references are followed; simplify it")
    if error.startswith("NoExtension"):
        return DataError(f"{where} cannot be followed by any answer")
    return DataError(f"{where} cannot be used: {_reason(error)}")


def _reason(error: str) -> str:
    """The library's message without what it says of its own state, on one line."""
    return " ".join(error.split("\n<")[0].split())[:_REASON_CHARS]
