"""Tools in the prompt and calls in the answer: none is lost, none is invented, nothing raises."""

import json
from itertools import pairwise
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import CHATML, byte_tokenizer
from transformers import PreTrainedTokenizerFast

from cluster.errors import DataError
from serving.tools import (
    MAX_CALL_CHARS,
    Event,
    Format,
    Parsed,
    Tool,
    ToolCall,
    ToolStream,
    format_of,
    marker_ids,
    parse,
    render_tools,
)

TOOLS: list[Tool] = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Adds two numbers.",
            "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
        },
    },
    {"type": "function", "function": {"name": "now"}},
]
QWEN = (
    "{%- if tools %}<|im_start|>system\nYou may call functions:\n"
    "{%- for tool in tools %}\n{{ tool | tojson }}{% endfor %}\n"
    r"{{- 'Answer <tool_call>\n{\"name\": <name>, \"arguments\": <object>}\n</tool_call>' }}"
    "<|im_end|>\n{% endif %}"
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\n' + message.content }}"
    "{%- for call in message.tool_calls or [] %}"
    '{{- \'\n<tool_call>\n{"name": "\' + call.function.name + \'", "arguments": \' }}'
    "{{- call.function.arguments | tojson }}}\n</tool_call>"
    "{%- endfor %}{{- '<|im_end|>\n' }}{% endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA = (
    "{%- if tools %}Environment: ipython\nRespond in the format "
    '{"name": function name, "parameters": dictionary of argument name and its value}.'
    "{{ tools | tojson }}{% endif %}"
    "{%- for message in messages %}{{ message.role }}: {{ message.content }}\n"
    "{%- if message.tool_calls %}{%- if message.tool_calls | length != 1 %}"
    "{{- raise_exception('This model only supports single tool-calls at once!') }}{% endif %}"
    '{"name": "{{ message.tool_calls[0].function.name }}", "parameters": '
    "{{ message.tool_calls[0].function.arguments | tojson }}}{% endif %}{% endfor %}"
)
JOINED = QWEN.replace(
    "{{- call.function.arguments | tojson }}}", "{{- call.function.arguments + '}' }}"
)
XML = "{{ tools }}<tool_call>\n<function=name>{{ call.arguments }}</function></tool_call>"


def call(
    name: str = "add", arguments: object = None, format: Format = "hermes", **more: object
) -> str:
    """One call as a model of that format writes it, inside its frame."""
    key = "arguments" if format == "hermes" else "parameters"
    return json.dumps({"name": name, key: {"a": 1} if arguments is None else arguments, **more})


def framed(name: str = "add", arguments: object = None) -> str:
    return f"<tool_call>\n{call(name, arguments)}\n</tool_call>"


def parsed(text: str, format: Format = "hermes") -> Parsed:
    return parse(text, TOOLS, format, random=Random(0))


def made(found: Parsed) -> list[tuple[str, Any]]:
    return [(call.name, json.loads(call.arguments)) for call in found.calls]


def test_a_hermes_call_is_found() -> None:
    found = parsed(framed(arguments={"a": 1, "b": "é🙂"}))
    assert found.content is None
    (only,) = found.calls
    assert only.name == "add"
    assert only.arguments == '{"a": 1, "b": "é🙂"}'
    assert only.id.startswith("call_")
    assert len(only.id) == 29
    assert only.id[5:].isalnum()


def test_several_hermes_calls_and_the_text_around_them_are_told_apart() -> None:
    text = f"Let me see.\n\n{framed()}\n{framed('now', {})}\nThat is all. "
    found = parsed(text)
    assert found.content == "Let me see.\nThat is all."
    assert made(found) == [("add", {"a": 1}), ("now", {})]
    assert found.calls[0].id != found.calls[1].id


def test_the_ids_follow_from_the_random_source_alone() -> None:
    assert parsed(framed()) == parsed(framed())
    assert parse(framed(), TOOLS, "hermes", random=Random(1)) != parsed(framed())


def test_an_answer_without_a_call_is_content_to_the_last_space() -> None:
    for text in ("", " ", "  Hello.\n\n", "a <tool", "a < b {c} ;", '{"a": 1}', "\n" * 1000):
        for format in ("hermes", "llama"):
            assert parsed(text, format) == Parsed(content=text, calls=())


@pytest.mark.parametrize(
    "text",
    [
        call(format="llama"),
        f"<|python_tag|>{call(format='llama')}",
        f"  <|python_tag|>\n {call(format='llama')}\n",
        call(format="llama", type="function"),
        call(format="hermes"),
        f"{call(format='llama')};",
    ],
)
def test_a_llama_call_is_found(text: str) -> None:
    found = parsed(text, "llama")
    assert made(found) == [("add", {"a": 1})]
    assert found.content in (None, ";")


def test_several_llama_calls_are_found_whatever_stands_between_them() -> None:
    one, two = call(format="llama"), call("now", {}, format="llama")
    for between in (";", "; ", "\n", " ;\n", "", "; <|python_tag|>"):
        found = parsed(f"{one}{between}{two}", "llama")
        assert made(found) == [("add", {"a": 1}), ("now", {})]
        assert found.content is None


def test_json_amid_a_llama_answer_is_a_call_only_after_its_tag() -> None:
    one = call(format="llama")
    assert parsed(f"Say {one}", "llama") == Parsed(content=f"Say {one}", calls=())
    found = parsed(f"Say <|python_tag|>{one}", "llama")
    assert (found.content, made(found)) == ("Say", [("add", {"a": 1})])


@pytest.mark.parametrize(
    "body",
    [
        call("multiply"),
        call(arguments=[1]),
        call(arguments="{}"),
        '{"name": "add"}',
        '{"name": ["add"], "arguments": {}}',
        '{"arguments": {"a": 1}}',
        "{}",
        '{"name": "add", "arguments": {"a": 1}',
        "{'name': 'add', 'arguments': {}}",
        '{"name": "add", "arguments": {"a": NaN}}',
        '{"name": "add", "arguments": {"a": 1e999}}',
        '{"name": "add", "arguments": {"a": "\\ud800"}}',
        '{"name": "add", "arguments": {"a": ' + "9" * 5000 + "}}",
        '{"name": "add", "arguments": ' + '{"a": ' * 5000 + "1" + "}" * 5001,
        '{"name": "add", "arguments": {"a": "\n"}}',
        "add(a=1)",
        "",
    ],
)
def test_what_is_no_valid_call_of_a_tool_stays_content(body: str) -> None:
    text = f"<tool_call>\n{body}\n</tool_call>"
    assert parsed(text) == Parsed(content=text, calls=())
    assert parsed(f"a {text} b").content == f"a {text} b"
    found = parsed(f"{text}\n{framed()}")
    assert (found.content, made(found)) == (text, [("add", {"a": 1})])
    assert parsed(body, "llama") == Parsed(content=body, calls=())


def test_markers_inside_of_arguments_are_arguments() -> None:
    arguments = {"a": 'x</tool_call><tool_call>{"name": "add"} ; <|python_tag|> \\" }{ \\'}
    assert made(parsed(framed(arguments=arguments))) == [("add", arguments)]
    text = call(arguments=arguments, format="llama")
    assert made(parsed(f"{text};{text}", "llama")) == [("add", arguments)] * 2


def test_a_call_whose_frame_is_not_closed_is_a_call_nevertheless() -> None:
    text = f"<tool_call>{call()}"
    assert made(parsed(text)) == [("add", {"a": 1})]
    found = parsed(f"{text} and so on")
    assert (found.content, made(found)) == (" and so on", [("add", {"a": 1})])
    assert made(parsed(f"{text}\n{text}")) == [("add", {"a": 1})] * 2


def test_a_brace_too_many_is_content() -> None:
    found = parsed(f"<tool_call>\n{call()}}}\n</tool_call>")
    assert (found.content, made(found)) == ("}\n</tool_call>", [("add", {"a": 1})])


def test_a_call_that_is_cut_off_is_content() -> None:
    whole = framed(arguments={"a": "}"})
    for length in range(whole.index("}}") + 1):
        assert parsed(whole[:length]) == Parsed(content=whole[:length], calls=())


def test_a_broken_call_does_not_swallow_the_next_one() -> None:
    broken = '<tool_call>{"name": "add", "arguments": {</tool_call>'
    found = parsed(f"{broken}{framed()}")
    assert (found.content, made(found)) == (broken, [("add", {"a": 1})])


def test_a_call_longer_than_the_bound_is_content_and_is_not_held_back_for_ever() -> None:
    start = '<tool_call>{"name": "add", "arguments": {"a": "'
    stream = ToolStream(TOOLS, "hermes", random=Random(0))
    assert stream.push(start) == []
    sent = 0
    for _ in range(3 * MAX_CALL_CHARS // 1000):
        sent += sum(len(event) for event in stream.push("x" * 1000) if isinstance(event, str))
    assert 3 * MAX_CALL_CHARS + len(start) - sent < 3000
    fits = framed(arguments={"a": "x" * (MAX_CALL_CHARS - len(call(arguments={"a": ""})))})
    assert len(parsed(fits).calls) == 1
    longer = fits.replace("xx", "xxx", 1)
    assert parsed(longer) == Parsed(content=longer, calls=())


def test_content_streams_as_soon_as_it_is_no_part_of_a_call() -> None:
    stream = ToolStream(TOOLS, "hermes", random=Random(0))
    assert stream.push("Let") == ["Let"]
    assert stream.push(" me see <") == [" me see"]
    assert stream.push("b> <to") == [" <b>"]
    assert stream.push("ol_call>\n") == []
    assert stream.push(call()[:-1]) == []
    (event,) = stream.push("}\n</tool")
    assert isinstance(event, ToolCall)
    assert stream.push("_call>\n") == []
    assert stream.push("Done.") == ["\nDone."]
    assert stream.finish() == []


FRAGMENTS = st.sampled_from(
    [
        *("<tool_call>", "</tool_call>", "<|python_tag|>", "<tool", "_call>", "<", ">", ";", "{"),
        *("}", '"', "\\", "\n", " ", " " * 70, "text", "é🙂", '"name"', '"x": 1'),
        *(call(), call("now", {}), call("nope"), call(format="llama"), framed(), framed("nope")),
        *(framed(arguments={"a": "</tool_call>"}), call()[:-1], call()[1:]),
    ]
)


@settings(max_examples=500, deadline=None)
@given(
    fragments=st.lists(FRAGMENTS, max_size=12),
    format=st.sampled_from(["hermes", "llama"]),
    cuts=st.lists(st.integers(0, 400), max_size=12),
    is_by_letter=st.booleans(),
)
def test_an_answer_is_taken_apart_alike_however_it_comes(
    fragments: list[str], format: Format, cuts: list[int], is_by_letter: bool
) -> None:
    text = "".join(fragments)
    stream = ToolStream(TOOLS, format, random=Random(0))
    events: list[Event] = []
    edges = [*range(len(text) + 1)] if is_by_letter else sorted({0, len(text), *cuts})
    for start, stop in pairwise(edges):
        events += stream.push(text[start:stop])
    events += stream.finish()
    whole = parsed(text, format)
    content = "".join(event for event in events if isinstance(event, str))
    calls = tuple(event for event in events if isinstance(event, ToolCall))
    assert all(events)
    assert (content or (None if calls else ""), calls) == (whole.content, whole.calls)
    if not calls:
        assert content == text
    letters = iter(text)
    assert all(letter in letters for letter in content), "content is no part of the answer"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(st.characters(exclude_categories=("Cs",))),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab{}<"), inner),
    max_leaves=8,
)


@settings(max_examples=200, deadline=None)
@given(
    arguments=st.lists(st.dictionaries(st.text("abc"), JSON, max_size=3), min_size=1, max_size=3),
    said=st.text("ab {}<>\n;", max_size=10),
)
def test_whatever_the_arguments_are_they_come_through(
    arguments: list[dict[str, object]], said: str
) -> None:
    text = said + "\n".join(framed(arguments=one) for one in arguments)
    found = parsed(text)
    assert made(found) == [("add", one) for one in arguments]
    assert (found.content or "") == said.rstrip()
    text = "; ".join(call(arguments=one, format="llama") for one in arguments)
    assert made(parsed(text, "llama")) == [("add", one) for one in arguments]


def test_a_hostile_answer_takes_linear_time() -> None:
    for text in (
        "<tool_call>{" * 20_000,
        '<tool_call>{"' + '<tool_call>{\\"' * 20_000,
        "<tool_call>" + " " * 300_000,
        "<" * 300_000,
        call("nope", format="llama") * 5000,
    ):
        for format in ("hermes", "llama"):
            assert parsed(text, format) == Parsed(content=text, calls=())


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (QWEN, "hermes"),
        (LLAMA, "llama"),
        (XML, None),
        (CHATML, None),
        (None, None),
        ({"default": CHATML, "tool_use": QWEN}, "hermes"),
        ({"default": CHATML}, None),
    ],
)
def test_the_format_is_read_from_the_chat_template(template: Any, expected: Format | None) -> None:
    assert format_of(byte_tokenizer(template)) == expected


def test_markers_that_are_special_tokens_are_named() -> None:
    tokenizer = byte_tokenizer(QWEN)
    assert marker_ids(tokenizer, "hermes") == frozenset()
    tokenizer.add_special_tokens(
        {"extra_special_tokens": ["<tool_call>", "</tool_call>", "<|python_tag|>"]}
    )
    assert marker_ids(tokenizer, "hermes") == {259, 260}
    assert marker_ids(tokenizer, "llama") == {261}


HISTORY: list[dict[str, Any]] = [
    {"role": "user", "content": "1 + 1?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {
                "id": "call_1",
                "type": "function",
                "function": {"name": "add", "arguments": '{"a": 1}'},
            }
        ],
    },
    {"role": "tool", "tool_call_id": "call_1", "content": "2"},
]


def rendered(
    tokenizer: PreTrainedTokenizerFast, messages: list[dict[str, Any]], tools: list[Tool]
) -> str:
    turns: Any = render_tools(tokenizer, messages, tools)
    given: Any = tools
    text = tokenizer.apply_chat_template(
        turns, tools=given, add_generation_prompt=True, tokenize=False
    )
    assert isinstance(text, str)
    return text


@pytest.mark.parametrize("template", [QWEN, JOINED])
def test_tools_calls_and_results_reach_the_prompt(template: str) -> None:
    text = rendered(byte_tokenizer(template), HISTORY, TOOLS)
    assert "Adds two numbers." in text
    assert '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>' in text
    assert "<|im_start|>tool\n2<|im_end|>" in text
    assert text.endswith("<|im_start|>assistant\n")
    assert parsed(text.split("<|im_start|>assistant\n")[1]).calls


def test_the_messages_that_were_given_stay_as_they_are() -> None:
    before = json.dumps(HISTORY)
    render_tools(byte_tokenizer(QWEN), HISTORY, TOOLS)
    assert json.dumps(HISTORY) == before


def test_earlier_calls_are_rendered_without_tools_too() -> None:
    assert "<tool_call>" in rendered(byte_tokenizer(QWEN), HISTORY, [])


def test_a_template_that_ignores_tools_is_refused() -> None:
    with pytest.raises(DataError, match="no place for tools"):
        render_tools(byte_tokenizer(CHATML), HISTORY[:1], TOOLS)


def test_a_template_that_ignores_earlier_calls_is_refused() -> None:
    with pytest.raises(DataError, match="no place for the `tool_calls`"):
        render_tools(byte_tokenizer(CHATML), HISTORY, [])


def test_what_the_template_refuses_is_told() -> None:
    twice = [*HISTORY[:1], {**HISTORY[1], "tool_calls": HISTORY[1]["tool_calls"] * 2}]
    with pytest.raises(DataError, match="only supports single tool-calls"):
        render_tools(byte_tokenizer(LLAMA), twice, TOOLS)


@pytest.mark.parametrize("arguments", ["", "{", "[1]", "3", "NaN", '{"a": Infinity}', "[" * 9999])
def test_arguments_of_earlier_calls_must_be_objects(arguments: str) -> None:
    broken: list[dict[str, Any]] = json.loads(json.dumps(HISTORY))
    broken[1]["tool_calls"][0]["function"]["arguments"] = arguments
    with pytest.raises(DataError, match=r"messages\[1\].tool_calls\[0\].function.arguments is no"):
        render_tools(byte_tokenizer(QWEN), broken, TOOLS)
