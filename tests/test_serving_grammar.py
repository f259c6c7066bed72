"""Whatever a model would like to say, under the mask it says JSON that follows the schema."""

import json
import threading
import time
from collections.abc import Mapping
from functools import cache
from itertools import groupby
from random import Random
from typing import Any

import jsonschema
import llguidance
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher, LLTokenizer
from tiny import byte_tokenizer
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from cluster.errors import DataError, ResourceError
from serving import grammar as grammar_room
from serving.grammar import MAX_SCHEMA_BYTES, Grammar, Grammars, Matcher
from serving.tools import Format, Tool, parse

END = 257
VOCAB_SIZE = 300
"""Wider than the tokenizer's 259, as models round up."""


def grammars() -> Grammars:
    return Grammars(byte_tokenizer(), vocab_size=VOCAB_SIZE, stop_ids=[END, 258])


@cache
def shared() -> Grammars:
    return grammars()


def wanted(schema: object) -> dict[str, object]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}


def compiled(schema: object) -> Grammar:
    return shared().compile(wanted(schema))


def token(letter: str) -> int:
    return byte_tokenizer()(letter)["input_ids"][0]


def fed(matcher: Matcher, text: str) -> Matcher:
    for token_id in byte_tokenizer()(text, add_special_tokens=False)["input_ids"]:
        assert matcher.mask()[token_id], f"{text!r} is not allowed"
        matcher.accept(token_id)
    return matcher


def can_say(schema: object, text: str) -> bool:
    """Whether the grammar allows exactly this answer."""
    matcher = compiled(schema).matcher()
    for token_id in byte_tokenizer()(text, add_special_tokens=False)["input_ids"]:
        if not matcher.mask()[token_id]:
            return False
        matcher.accept(token_id)
    return bool(matcher.mask()[END])


def sampled(matcher: Matcher, random: Random, *, most: int = 4000) -> str:
    """An answer of random allowed tokens, which closes what it has opened in the end."""
    closers = [token(letter) for letter in '"}]']
    ids: list[int] = []
    while len(ids) < most:
        mask = matcher.mask()
        allowed = mask[:END].nonzero()[:, 0].tolist()
        handy = [token_id for token_id in closers if token_id in allowed]
        if mask[END] and (not allowed or random.random() < 0.5):
            matcher.accept(END)
            return str(byte_tokenizer().decode(ids))
        ids.append(random.choice(handy if handy and random.random() < 0.2 else allowed))
        matcher.accept(ids[-1])
    raise AssertionError("the answer runs for ever")


PERSON = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "title": "Person",
    "type": "object",
    "properties": {
        "name": {"type": "string", "description": "Given name", "maxLength": 40},
        "größe": {"type": ["number", "null"]},
        "role": {"enum": ["user", "größe", "a \"quoted\" \\ one", 3, None, {"a": [1]}]},
        "born": {"type": "string", "format": "date"},
        "code": {"type": "string", "pattern": "^[A-Z]{2,3}-\\d+$"},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "address": {
            "type": "object",
            "properties": {"street": {"type": "string"}, "at": {"$ref": "#/$defs/point"}},
            "required": ["at"],
            "additionalProperties": False,
        },
        "tags": {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": 4},
        "pair": {"type": "array", "prefixItems": [{"const": 1}, {"type": "boolean"}],
                 "items": False, "minItems": 2},
        "either": {"anyOf": [{"type": "boolean"}, {"$ref": "#/$defs/point"}]},
    },
    "required": ["name", "größe", "role", "tags", "pair"],
    "additionalProperties": False,
    "$defs": {
        "point": {
            "type": "object",
            "properties": {"x": {"type": "number"}, "y": {"type": "number"}},
            "required": ["x", "y"],
            "additionalProperties": False,
        }
    },
}  # fmt: skip
INTEGERS = {"type": "array", "items": {"type": "integer"}}
TREE = {
    "type": "object",
    "properties": {"value": {"type": "integer"}, "children": {"$ref": "#/$defs/trees"}},
    "required": ["value", "children"],
    "additionalProperties": False,
    "$defs": {"trees": {"type": "array", "items": {"$ref": "#"}, "maxItems": 2}},
}


@pytest.mark.parametrize("schema", [PERSON, TREE, {"type": "array"}, {"type": "string"}, {}])
@settings(max_examples=25, deadline=None)
@given(random=st.randoms(use_true_random=False))
def test_random_answers_follow_the_schema(schema: dict[str, object], random: Random) -> None:
    value = json.loads(sampled(compiled(schema).matcher(), random))
    jsonschema.validate(value, schema, jsonschema.Draft202012Validator)


@settings(max_examples=25, deadline=None)
@given(random=st.randoms(use_true_random=False))
def test_random_answers_are_objects_where_any_object_is_asked_for(random: Random) -> None:
    matcher = shared().compile({"type": "json_object"}).matcher()
    assert isinstance(json.loads(sampled(matcher, random)), dict)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**12), 10**12)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=("Cs", "Cc"))),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.text(st.characters(exclude_categories=("Cs", "Cc"))), inner, max_size=3
        )
    ),
    max_leaves=8,
)


@settings(max_examples=60, deadline=None)
@given(value=st.dictionaries(st.text("abé🙂"), JSON, max_size=3), indent=st.sampled_from([None, 2]))
def test_any_object_can_be_said_in_the_usual_layouts(
    value: dict[str, object], indent: int | None
) -> None:
    text = json.dumps(value, ensure_ascii=False, indent=indent)
    assert can_say({"type": "object"}, text)
    compact = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    assert can_say({"type": "object"}, compact)


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        ({"enum": ["ja", "nein"]}, '"ja"', '"jawohl"'),
        ({"const": {"a": [1, None]}}, '{"a": [1, null]}', '{"a": [1]}'),
        ({"type": "integer", "minimum": 3, "maximum": 12}, "12", "13"),
        ({"type": "string", "minLength": 2, "maxLength": 3}, '"é🙂"', '"é"'),
        ({"type": "object", "properties": {"a": {}}, "required": ["a"]}, '{"a": 1}', "{}"),
        ({"type": "object", "additionalProperties": False}, "{}", '{"a": 1}'),
        ({"type": "array", "maxItems": 1}, "[{}]", "[1, 2]"),
        ({"type": "boolean"}, "true", "True"),
        ({"type": "string"}, '"\\n\\u0001"', '"\\ud800"'),
    ],
)
def test_a_schema_allows_what_follows_it_and_nothing_else(
    schema: dict[str, object], good: str, bad: str
) -> None:
    assert can_say(schema, good)
    assert not can_say(schema, bad)


def test_end_tokens_are_allowed_exactly_when_the_answer_is_whole() -> None:
    matcher = compiled(INTEGERS).matcher()
    for text in ("[", "1", "2", ",", " ", "3"):
        mask = fed(matcher, text).mask()
        assert not mask[END]
        assert not mask[258]
        assert not matcher.is_finished
    mask = fed(matcher, "]").mask()
    assert mask.nonzero()[:, 0].tolist() == [END, 258]
    assert matcher.is_finished
    matcher.accept(258)
    assert matcher.is_finished
    assert matcher.mask().nonzero()[:, 0].tolist() == [END, 258]


def test_a_whole_answer_may_go_on_where_the_schema_lets_it() -> None:
    matcher = fed(compiled({"type": "integer"}).matcher(), "12")
    mask = matcher.mask()
    assert mask[END]
    assert mask[token("0")]
    assert not matcher.is_finished
    matcher.accept(END)
    assert matcher.is_finished


def test_the_mask_is_as_wide_as_the_logits_and_ids_without_a_token_are_never_allowed() -> None:
    for vocab_size in (200, 259, 260, 288, 320, 1000):
        wide = Grammars(byte_tokenizer(), vocab_size=vocab_size, stop_ids=[150])
        mask = wide.compile(wanted({"type": "string"})).matcher().mask()
        assert mask.shape == (vocab_size,)
        assert mask.dtype == torch.bool
        assert not mask[200:].any()
        assert mask.sum() == 1


def test_special_tokens_are_no_text() -> None:
    mask = fed(compiled({"type": "string"}).matcher(), '"a').mask()
    assert mask[:256].sum() > 100
    assert not mask[256:].any()


def test_white_space_does_not_run_for_ever() -> None:
    spaces = [token(letter) for letter in " \n\r\t"]
    matcher, random, ids = compiled({**INTEGERS, "minItems": 20}).matcher(), Random(0), []
    while not matcher.is_finished:
        allowed = matcher.mask()[:END].nonzero()[:, 0].tolist()
        ids.append(random.choice([i for i in spaces if i in allowed] or allowed))
        matcher.accept(ids[-1])
    text = byte_tokenizer().decode(ids)
    assert max(len([*run]) for is_blank, run in groupby(text, str.isspace) if is_blank) == 34


def test_answers_of_one_grammar_do_not_disturb_each_other() -> None:
    grammar = compiled({"type": "array", "items": {"enum": ["a", "b"]}})
    first, second = grammar.matcher(), grammar.matcher()
    fed(first, '["a"')
    assert fed(second, "[]").is_finished
    assert not first.is_finished
    assert fed(first, ', "b"]').is_finished


def test_a_token_that_is_not_allowed_is_refused_and_harms_no_other_answer() -> None:
    grammar = compiled({"type": "array"})
    for token_id in (token("x"), END, 256):
        matcher = grammar.matcher()
        with pytest.raises(DataError, match="cannot go on"):
            matcher.accept(token_id)
    assert fed(compiled({"type": "array"}).matcher(), "[]").is_finished


def nested(depth: int) -> dict[str, object]:
    schema: dict[str, object] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return schema


def doubling(kind: str, length: int) -> dict[str, object]:
    """Definitions that each name the one before twice."""
    first = {"anyOf": [{"type": "string", "pattern": "a.*b"}, {"type": "object"}]}
    refs = {
        f"d{i}": {kind: [{"$ref": f"#/$defs/d{i - 1}", "minLength": n} for n in (i, i + 1)]}
        for i in range(1, length)
    }
    return {"$defs": {"d0": first, **refs}, "$ref": f"#/$defs/d{length - 1}"}


RECURSIVE: dict[str, object] = {}
RECURSIVE["properties"] = {"a": RECURSIVE}


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        (None, "must be a JSON Schema that is an object"),
        (True, "must be a JSON Schema"),
        ("{}", "must be a JSON Schema"),
        ([{}], "must be a JSON Schema"),
        ({"type": "strin"}, "Invalid type: strin"),
        ({"type": "object", "properties": 3}, "properties must be an object"),
        ({"type": "object", "required": "a"}, "Expected array for 'required'"),
        ({"enum": "ab"}, "enum must be an array"),
        ({"type": "number", "minimum": "3"}, "Expected f64 for 'minimum'"),
        ({"not": {"type": "string"}}, 'Unimplemented keys: ."not"'),
        ({"properties": {"a": {"if": {}}}}, 'Unimplemented keys: ."if"'),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "oneOf"),
        ({"type": "string", "format": "colour"}, "Unknown format: colour"),
        ({"type": "string", "pattern": "("}, "unclosed group"),
        ({"type": "string", "pattern": "(?=a)b"}, "look-around"),
        ({"type": "string", "pattern": "(" * 500 + ")" * 500}, "regex"),
        ({"$ref": "https://example.com/schema.json"}, "not present in a registry"),
        ({"$ref": "file:///etc/passwd"}, "not present in a registry"),
        ({"$ref": "#/$defs/lost"}, "'/.defs/lost' does not exist"),
        ({"x-guidance": {"lenient": True}}, "x-guidance is not supported"),
        ({"const": "\ud800"}, "cannot be used"),
        ({"const": float("nan")}, "cannot be written as JSON"),
        ({"const": {1, 2}}, "cannot be written as JSON"),
        (RECURSIVE, "cannot be written as JSON"),
        (nested(100), "recursion limit"),
        (nested(1000), "cannot be written as JSON"),
        ({"enum": []}, "Unsatisfiable"),
        ({"type": "integer", "minimum": 3, "maximum": 2}, "Unsatisfiable"),
        ({"$ref": "#"}, "cannot be followed by any answer"),
        ({"enum": [f"value {i}" for i in range(6000)]}, "bytes; at most 65,536"),
        ({"description": "x" * MAX_SCHEMA_BYTES}, "bytes; at most 65,536"),
        (doubling("anyOf", 24), "schema too large"),
        (doubling("allOf", 30), "too expensive"),
        ({"allOf": [{"type": "integer", "multipleOf": n} for n in (97, 101, 103, 107)]},
         "too expensive"),
        ({"allOf": [{"anyOf": [{"properties": {f"a{i}": {"minLength": i}}} for i in range(4)]}]
          * 6}, "too large"),
        ({"properties": {f"p{i}": {"type": "string"} for i in range(1500)}},
         "max is 2000"),
        ({"type": "integer", "multipleOf": 10**9 + 7}, "fuel exhausted"),
    ],
)  # fmt: skip
def test_a_bad_schema_is_refused_with_the_reason_in_bounded_time(
    schema: object, reason: str
) -> None:
    start = time.monotonic()
    with pytest.raises(DataError, match=reason) as caught:
        grammars().compile(wanted(schema))
    assert time.monotonic() - start < 20
    message = str(caught.value)
    assert message.startswith("response_format.json_schema.schema")
    assert len(message) < 500
    assert "\n" not in message


@pytest.mark.parametrize(
    "response_format",
    [{}, {"type": "text"}, {"type": "grammar"}, {"type": "json_schema"},
     {"type": "json_schema", "json_schema": None}, {"type": "json_schema", "json_schema": {}}],
)  # fmt: skip
def test_a_response_format_without_a_schema_is_refused(
    response_format: Mapping[str, object],
) -> None:
    with pytest.raises(DataError, match="response_format"):
        grammars().compile(response_format)


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string", "pattern": "((a{1,1000}){1,1000}){1,1000}"},
        {"type": "string", "pattern": "^(.*a.{1,200}){1,50}$"},
        {"type": "string", "pattern": "(x+x+)+y"},
        {"type": "string", "minLength": 10**9},
        {"type": "array", "minItems": 10**9, "items": {"type": "string"}},
        {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(400)}},
        doubling("allOf", 8),
    ],
)
def test_what_a_large_schema_costs_stays_small_at_every_step(schema: dict[str, object]) -> None:
    matcher, random, worst = compiled(schema).matcher(), Random(0), 0.0
    for _ in range(300):
        start = time.process_time()
        mask = matcher.mask()
        worst = max(worst, time.process_time() - start)
        if matcher.is_finished:
            break
        matcher.accept(random.choice(mask.nonzero()[:, 0].tolist()))
    assert worst < 0.5


def test_many_threads_compile_at_once() -> None:
    room, found, failed = grammars(), [], []
    schemas = [{"type": "object", "required": [f"key{i % 4}"]} for i in range(12)]
    start = threading.Barrier(len(schemas))

    def run(schema: dict[str, object]) -> None:
        start.wait(30)
        try:
            text = sampled(room.compile(wanted(schema)).matcher(), Random(0))
            jsonschema.validate(json.loads(text), schema)
            found.append(text)
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=run, args=(schema,)) for schema in schemas]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not failed
    assert len(found) == len(schemas)
    assert len({room.compile(wanted(schema)) for schema in schemas}) == 4


def test_many_threads_follow_one_grammar_at_once() -> None:
    grammar, texts = compiled(PERSON), {}

    def run(i: int) -> None:
        texts[i] = [sampled(grammar.matcher(), Random(i)) for _ in range(3)]

    threads = [threading.Thread(target=run, args=(i % 4 + 10 * (i // 4),)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert len(texts) == 8
    for i, some in texts.items():
        assert some == [sampled(grammar.matcher(), Random(i)) for _ in range(3)]
        for text in some:
            jsonschema.validate(json.loads(text), PERSON)


def test_the_latest_grammars_are_kept_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar_room, "_MAX_GRAMMARS", 2)
    room = grammars()
    one, two, three = (wanted({"const": i}) for i in range(3))
    first, second = room.compile(one), room.compile(two)
    assert room.compile(one) is first
    room.compile(three)
    assert room.compile(one) is first
    assert room.compile(two) is not second


def test_a_grammar_whose_shared_states_are_used_up_is_compiled_anew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(grammar_room._LIMITS, "max_lexer_states", 300)
    room, schema = grammars(), wanted({"type": "string", "pattern": "^[ab]*a[ab]{20}$"})
    worn = room.compile(schema)
    random = Random(0)
    text = '"' + "".join(random.choice("ab") for _ in range(1000))
    with pytest.raises(DataError, match="too many states"):
        fed(worn.matcher(), text)
    fresh = room.compile(schema)
    assert fresh is not worn
    fed(fresh.matcher(), '"ab')


@pytest.mark.parametrize(
    "program", ["import time; time.sleep(60)", "import no_such_module", "raise SystemExit(3)"]
)
def test_a_trial_that_says_nothing_is_no_fault_of_the_schema(
    program: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammar_room, "_TRIAL", program)
    monkeypatch.setattr(grammar_room, "_TRIAL_WAIT_S", 1.0)
    with pytest.raises(ResourceError, match="cannot be tried out"):
        grammars().compile({"type": "json_object"})


POINT: Tool = {
    "type": "function",
    "function": {
        "name": "point",
        "parameters": {
            "type": "object",
            "properties": {"x": {"$ref": "#/$defs/one"}, "label": {"type": "string"}},
            "required": ["x"],
            "additionalProperties": False,
            "$defs": {"one": {"type": "integer"}},
        },
    },
}
POINTS: Tool = {
    "type": "function",
    "function": {
        "name": "points",
        "parameters": {
            "properties": {"all": {"type": "array", "items": {"$ref": "#/$defs/one"}}},
            "required": ["all"],
            "additionalProperties": False,
            "$defs": {"one": {"enum": ["</tool_call>", "é"]}},
        },
    },
}
NOW: Tool = {"type": "function", "function": {"name": "now", "parameters": None}}


@pytest.mark.parametrize("format", ["hermes", "llama"])
@settings(max_examples=40, deadline=None)
@given(random=st.randoms(use_true_random=False))
def test_a_forced_call_is_one_valid_call_of_a_tool(format: Format, random: Random) -> None:
    tools = [POINT, POINTS, NOW]
    text = sampled(shared().for_tools(tools, format).matcher(), random)
    found = parse(text, tools, format, random=Random(0))
    assert found.content is None
    (call,) = found.calls
    (tool,) = (tool for tool in tools if tool["function"]["name"] == call.name)
    schema = tool["function"].get("parameters") or {"maxProperties": 0}
    jsonschema.validate(json.loads(call.arguments), schema)


@pytest.mark.parametrize("format", ["hermes", "llama"])
def test_every_tool_can_be_called_and_a_named_one_alone(format: Format) -> None:
    names = [
        {parse(sampled(grammar.matcher(), Random(i)), tools, format, random=Random(0)).calls[0].name
         for i in range(40)}
        for tools in ([POINT, POINTS, NOW], [NOW])
        for grammar in [shared().for_tools(tools, format)]
    ]  # fmt: skip
    assert names == [{"point", "points", "now"}, {"now"}]


def test_markers_that_are_special_tokens_are_forced_as_tokens() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": ["<tool_call>", "</tool_call>"]})
    room = Grammars(tokenizer, vocab_size=300, stop_ids=[END])
    matcher = room.for_tools([NOW], "hermes").matcher()
    assert matcher.mask().nonzero()[:, 0].tolist() == [259]
    matcher.accept(259)
    fed(matcher, '\n{"name": "now", "arguments": {}}\n')
    assert matcher.mask().nonzero()[:, 0].tolist() == [260]
    matcher.accept(260)
    assert matcher.is_finished


def tool(parameters: Any) -> Tool:
    return {"type": "function", "function": {"name": "f", "parameters": parameters}}


@pytest.mark.parametrize(
    ("parameters", "reason"),
    [
        ({"type": "string"}, r"tools\[1\].function.parameters.type must be object"),
        ([], r"tools\[1\].function.parameters must be a JSON Schema"),
        ({"x-guidance": {}}, r"tools\[1\].function.parameters: x-guidance"),
        ({"not": {}}, "tools cannot be used: Unimplemented keys"),
        ({"description": "x" * MAX_SCHEMA_BYTES}, "tools: .* bytes; at most"),
        (doubling("allOf", 30), "tools is too expensive"),
    ],
)
def test_a_tool_with_a_bad_schema_is_refused(parameters: object, reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        grammars().for_tools([POINT, tool(parameters)], "hermes")


def test_a_tokenizer_that_cannot_be_masked_is_refused() -> None:
    plain = Tokenizer(models.WordLevel({"{": 0, "}": 1, "<end>": 2}, unk_token="{"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<end>")
    room = Grammars(tokenizer, vocab_size=3, stop_ids=[2])
    with pytest.raises(DataError, match="tokenizer cannot be held to a grammar"):
        room.compile({"type": "json_object"})


def test_a_grammar_without_end_tokens_is_a_bug_of_the_caller() -> None:
    with pytest.raises(AssertionError, match="end token"):
        Grammars(byte_tokenizer(), vocab_size=300, stop_ids=[])


def test_an_answer_that_no_token_continues_is_an_error_and_no_empty_mask() -> None:
    narrow = Grammars(byte_tokenizer(), vocab_size=100, stop_ids=[99])
    matcher = fed(narrow.compile(wanted({"const": "aé"})).matcher(), '"a')
    with pytest.raises(DataError, match="no token continues"):
        matcher.mask()


def test_the_library_is_the_one_that_this_was_written_for() -> None:
    """Fails with every new version: read its changes, try the schemas of this file, and move on."""
    assert llguidance.__version__ == "1.9.1"
    tokenizer = LLTokenizer("byte")
    template = LLMatcher(tokenizer, LLMatcher.grammar_from_json_schema({"const": 1}), log_level=0)
    copy = template.deep_copy()
    assert len(copy.compute_bitmask()) == (tokenizer.vocab_size + 31) // 32 * 4
    assert copy.consume_token(ord("1"))
    assert copy.is_accepting()
    assert copy.is_stopped()
    assert not template.is_accepting()
    assert not copy.consume_token(ord("2"))
    assert copy.is_error()
    assert copy.get_error()
    stuck = LLMatcher(tokenizer, LLMatcher.grammar_from_json_schema({"$ref": "#"}), log_level=0)
    stuck.compute_bitmask()
    assert stuck.get_error().startswith("NoExtension")
