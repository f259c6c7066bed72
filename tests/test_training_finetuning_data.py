"""An uploaded file: every line that cannot be trained on is told by its number."""

import io
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from cluster.errors import DataError
from training.finetuning_data import Check, Method, check

USER = {"role": "user", "content": "What is 2 + 2?"}
ANSWER = {"role": "assistant", "content": "4"}
CHAT: dict[str, object] = {"messages": [USER, ANSWER]}
PAIR: dict[str, object] = {"prompt": "What is 2 + 2?", "completion": "4"}
PREFERENCE: dict[str, object] = {
    "input": {"messages": [USER]},
    "preferred_output": [ANSWER],
    "non_preferred_output": [{"role": "assistant", "content": "5"}],
}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
CALLING = {
    "role": "assistant",
    "tool_calls": [
        {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 2}'}}
    ],
}


def file_of(directory: Path, *rows: object) -> Path:
    path = directory / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def of_bytes(directory: Path, body: bytes, method: Method = "supervised") -> Check:
    path = directory / "data.jsonl"
    path.write_bytes(body)
    return check(path, method=method)


@pytest.mark.parametrize(
    ("row", "method", "format"),
    [
        (CHAT, "supervised", "messages"),
        (PAIR, "supervised", "prompt_completion"),
        (
            {
                "messages": [USER, CALLING, {"role": "tool", "tool_call_id": "1", "content": "4"}],
                "tools": [TOOL],
                "parallel_tool_calls": True,
            },
            "supervised",
            "messages",
        ),
        ({"messages": [USER, {**ANSWER, "weight": 0}, USER, ANSWER]}, "supervised", "messages"),
        (PREFERENCE, "dpo", "preference"),
        (
            {
                "input": {"messages": [USER], "tools": [TOOL], "parallel_tool_calls": False},
                "preferred_completion": [CALLING],
                "non_preferred_completion": [ANSWER],
            },
            "dpo",
            "preference",
        ),
    ],
)
def test_good_lines_pass(tmp_path: Path, row: object, method: Method, format: str) -> None:
    found = check(file_of(tmp_path, *[row] * 10), method=method)
    assert found.is_ok
    assert found.error is None
    assert (found.examples, found.format, found.warnings) == (10, format, ())


@pytest.mark.parametrize(
    ("row", "code", "expected"),
    [
        ([1], "data_type", "expected an object with named fields, found a list"),
        ("x", "data_type", "found text"),
        ({}, "missing_messages_list", "no 'messages' (and no 'prompt' with 'completion') in the"),
        ({"messages": []}, "missing_messages_list", "messages is empty; expected a list of turns"),
        ({"messages": None, "x": 1}, "missing_messages_list", "no 'messages'"),
        ({"messages": "hi"}, "missing_messages_list", "messages is text; expected"),
        ({"conversations": []}, "missing_messages_list", "keys are conversations"),
        (PREFERENCE, "missing_messages_list", "a preference; it is trained with method dpo"),
        ({"messages": [{"content": "x"}]}, "message_missing_key", "messages[0] has no 'role'"),
        ({"messages": [USER, {"role": "assistant"}]}, "message_missing_key", "no 'content'"),
        (
            {"messages": [USER, {**ANSWER, "mood": "x"}]},
            "message_unrecognized_key",
            "messages[1]: unknown key 'mood'",
        ),
        (
            {"messages": [{"role": "robot", "content": "x"}]},
            "unrecognized_role",
            "unknown role 'robot'",
        ),
        ({"messages": [USER, {**ANSWER, "content": ""}]}, "missing_content", "content is empty"),
        ({"messages": [USER, {**ANSWER, "content": None}]}, "missing_content", "content is empty"),
        ({"messages": [USER, {**ANSWER, "content": 4}]}, "missing_content", "content is int '4'"),
        ({"messages": [USER]}, "example_missing_assistant_message", "no assistant turn"),
        (
            {"messages": [USER, {**ANSWER, "weight": 0}]},
            "example_missing_assistant_message",
            "every assistant message has weight 0",
        ),
        ({"messages": [ANSWER, USER]}, "missing_prompt", "messages[0] is the assistant's"),
        ({"messages": [USER, {**ANSWER, "weight": 2}]}, "invalid_weight", "weight is 2"),
        ({**CHAT, "tools": [{"type": "custom"}]}, "invalid_tools", "only 'function'"),
        ({"prompt": "x", "completion": " "}, "missing_content", "completion is empty"),
    ],
)
def test_each_problem_has_its_code_and_its_line(
    tmp_path: Path, row: object, code: str, expected: str
) -> None:
    good = PAIR if isinstance(row, dict) and "prompt" in row else CHAT
    found = check(file_of(tmp_path, row, good), method="supervised")
    (problem,) = found.problems
    assert (problem.code, problem.line, found.examples) == (code, 1, 1)
    assert expected in problem.message
    assert found.error is not None
    assert found.error["code"] == "invalid_training_file"
    assert f"Line {problem.line}: {problem.message}" in found.error["message"]


@pytest.mark.parametrize(
    ("change", "code", "expected"),
    [
        ({"input": "x"}, "data_type", "input is text; expected"),
        ({"input": {"messages": [USER, ANSWER]}}, "invalid_preference", "ends with an assistant"),
        ({"input": {"messages": []}}, "missing_messages_list", "input.messages is empty"),
        ({"preferred_output": None}, "invalid_preference", "neither preferred_output nor"),
        ({"preferred_completion": [ANSWER]}, "invalid_preference", "expected one of preferred_o"),
        ({"preferred_output": [USER]}, "data_type", "preferred_output has turns of user"),
        ({"preferred_output": [ANSWER, ANSWER]}, "data_type", "turns of assistant, assistant"),
        ({"preferred_output": ANSWER}, "missing_messages_list", "preferred_output is an object"),
        ({"non_preferred_output": [ANSWER]}, "invalid_preference", "both answers are the same"),
        ({"preferred_output": [{**ANSWER, "weight": 1}]}, "invalid_weight", "no meaning"),
    ],
)
def test_each_problem_of_a_preference_is_told(
    tmp_path: Path, change: dict[str, object], code: str, expected: str
) -> None:
    found = check(file_of(tmp_path, PREFERENCE, {**PREFERENCE, **change}), method="dpo")
    (problem,) = found.problems
    assert (problem.line, problem.code) == (2, code)
    assert expected in problem.message


def test_chat_lines_are_no_preferences(tmp_path: Path) -> None:
    (problem,) = check(file_of(tmp_path, CHAT), method="dpo").problems
    assert problem.code == "invalid_preference"
    assert problem.message == (
        "no 'input' with 'preferred_output' and 'non_preferred_output' in the line; "
        "keys are messages"
    )


def test_too_few_examples_are_told_in_openais_words(tmp_path: Path) -> None:
    found = check(file_of(tmp_path, *[CHAT] * 3), method="supervised")
    assert found.error == {
        "code": "invalid_n_examples",
        "message": "Training file has 3 example(s), but must have at least 10 examples",
        "param": "training_file",
    }
    empty = check(file_of(tmp_path), method="supervised", param="validation_file", minimum=1)
    assert empty.error == {
        "code": "invalid_n_examples",
        "message": "Validation file has 0 example(s), but must have at least 1 examples",
        "param": "validation_file",
    }
    assert check(file_of(tmp_path, *[CHAT] * 3), method="supervised", minimum=3).is_ok


def test_problems_are_counted_and_the_first_listed(tmp_path: Path) -> None:
    found = check(file_of(tmp_path, *[{}] * 30), method="supervised", max_problems=5)
    assert (found.num_problems, [p.line for p in found.problems]) == (30, [1, 2, 3, 4, 5])
    assert found.error is not None
    assert found.error["message"].startswith("Training file has 30 problem(s). Line 1: no ")
    assert found.error["message"].endswith("; and 27 more")
    assert len(found.error["message"]) < 1000


def _zip() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("data.jsonl", json.dumps(CHAT))
    return out.getvalue()


LINE = json.dumps(CHAT).encode() + b"\n"


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (_zip(), "the file is a zip archive (or an Office file), not JSON Lines; unpack it"),
        (b"\x1f\x8b" + bytes(20), "compressed with gzip"),
        (LINE.decode().encode("utf-16"), "UTF-16 text; save it as UTF-8"),
        (LINE.decode().encode("utf-16-le"), "UTF-16 text; save it as UTF-8"),
        (LINE.decode().encode("utf-16-be"), "UTF-16 text; save it as UTF-8"),
        (bytes(100_000), "binary, not JSON Lines"),
        (b"\x7fELF\x02\x01\x00" + bytes(range(256)), "binary, not JSON Lines"),
    ],
)
def test_what_is_no_text_at_all_is_told_once(tmp_path: Path, body: bytes, expected: str) -> None:
    found = of_bytes(tmp_path, body)
    (problem,) = found.problems
    assert (problem.line, problem.code) == (0, "data_type")
    assert expected in problem.message


@pytest.mark.parametrize(
    "body",
    [
        b"\xef\xbb\xbf" + LINE * 10,
        LINE.replace(b"\n", b"\r\n") * 10,
        LINE * 10 + b"\n\n  \n",
        (LINE * 10).rstrip(),
    ],
)
def test_what_editors_do_to_text_is_no_problem(tmp_path: Path, body: bytes) -> None:
    found = of_bytes(tmp_path, body)
    assert found.is_ok
    assert found.examples == 10


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b'{"messages": ', "broken JSON"),
        (b'{"messages": "\xff"}', "not UTF-8 text"),
        (b'{"messages": NaN}', "NaN is not JSON"),
        (b'{"messages": [], "messages": []}', "'messages' stands twice"),
        (b"[" * 10_000 + b"]" * 10_000, "nested too deeply"),
        (b'{"messages": "' + b"x" * (9 << 20) + b'"}', "longer than 8 MB"),
        (b'[{"messages": []},', "the file seems to be one JSON array"),
    ],
)
def test_a_broken_line_is_one_problem_and_the_next_is_read(
    tmp_path: Path, line: bytes, expected: str
) -> None:
    is_array = expected.startswith("the file")
    body = line + b"\n" + LINE if is_array else LINE + line + b"\n" + LINE
    found = of_bytes(tmp_path, body)
    (problem,) = found.problems
    assert problem.line == (1 if is_array else 2)
    assert problem.code == "data_type"
    assert expected in problem.message
    assert found.examples == (1 if is_array else 2)


def test_one_file_has_one_format(tmp_path: Path) -> None:
    (problem,) = check(file_of(tmp_path, CHAT, PAIR), method="supervised").problems
    assert (problem.line, problem.code) == (2, "missing_messages_list")
    assert "looks like prompt_completion; one source has one format" in problem.message


def test_what_may_not_be_meant_is_a_warning(tmp_path: Path) -> None:
    system = {"role": "system", "content": "Be brief."}
    rows: list[object] = [
        CHAT,
        {"messages": [system, USER, ANSWER], "source": "x"},
        {"messages": [system, ANSWER]},
    ]
    path = file_of(tmp_path, *rows)
    path.write_bytes(b"\n" + path.read_bytes())
    found = check(path, method="supervised", minimum=1)
    assert found.is_ok
    assert found.warnings == (
        "1 empty line(s) were passed over",
        "1 of 3 examples have no system message, the others have one",
        "1 of 3 examples have no user message",
        "keys that are not used: source",
    )


def test_a_file_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="training_file: the file cannot be read"):
        check(tmp_path / "none.jsonl", method="supervised")


def test_no_text_of_an_example_is_told(tmp_path: Path) -> None:
    canary = "canary 7"
    rows: list[object] = [
        {"messages": [{"role": "user", "content": [canary]}, ANSWER]},
        {"messages": [USER, {**ANSWER, "content": {"a": canary}}]},
        {"messages": [USER, ANSWER, canary]},
        {"messages": canary},
        {"prompt": canary, "completion": canary},
    ]
    found = check(file_of(tmp_path, *rows), method="supervised")
    assert found.num_problems == len(rows)
    assert canary not in repr(found)


def test_the_check_needs_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, training.finetuning_data, training.hyperparameters\n"
        "print([n for n in ('torch', 'transformers', 'datasets', 'ray') if n in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "[]"
