"""Reading rows: every format and source, and a clear word for everything that is wrong."""

import json
import os
import re
from pathlib import Path

import datasets
import pytest

from cluster.errors import DataError
from training import sources
from training.examples import BadRow, Example, Message, read, stream

USER = {"role": "user", "content": "What is 2 + 2?"}
ANSWER = {"role": "assistant", "content": "4"}
CHAT: dict[str, object] = {"messages": [USER, ANSWER]}
PAIR: dict[str, object] = {"prompt": "What is 2 + 2?", "completion": "4"}


def write(path: Path, *rows: object) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def only(path: Path, row: object) -> Example:
    return read(write(path / "rows.jsonl", row)).examples[0]


def reason(path: Path, row: object) -> str:
    """Why a row is bad."""
    (item,) = stream(write(path / "rows.jsonl", row))
    assert isinstance(item, BadRow)
    assert item.where == f"{path / 'rows.jsonl'}:1"
    return item.reason


EXPECTED = (Message(role="user", content="What is 2 + 2?"), Message(role="assistant", content="4"))


@pytest.mark.parametrize(
    "row",
    [
        CHAT,
        PAIR,
        {"instruction": "What is 2 + 2?", "input": "", "output": "4"},
        {"instruction": "What is 2 + 2?", "output": "4", "text": "the same once more"},
        {
            "conversations": [
                {"from": "human", "value": "What is 2 + 2?"},
                {"from": "gpt", "value": "4"},
            ]
        },
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "What is 2 + 2?"}]},
                ANSWER,
            ]
        },
        {"messages": [USER, {**ANSWER, "weight": None, "tool_calls": None}], "tools": []},
    ],
)
def test_every_format_becomes_the_same_turns(tmp_path: Path, row: object) -> None:
    assert only(tmp_path, row) == Example(id="rows.jsonl:1", messages=EXPECTED)


def test_plain_text_has_no_turns(tmp_path: Path) -> None:
    assert only(tmp_path, {"text": "Once."}) == Example(id="rows.jsonl:1", text="Once.")


def test_alpaca_input_is_kept_apart_and_joined_on_demand(tmp_path: Path) -> None:
    example = only(tmp_path, {"instruction": "Add.", "input": "2, 2", "output": "4"})
    assert example.messages[0].context == "2, 2"
    assert example.messages[0].full_content == "Add.\n\n2, 2"


def test_weights_systems_and_several_turns_are_kept(tmp_path: Path) -> None:
    row = {
        "messages": [
            {"role": "system", "content": "Be brief."},
            USER,
            {**ANSWER, "weight": 0},
            USER,
            {**ANSWER, "weight": 1},
        ]
    }
    turns = only(tmp_path, row).messages
    assert [turn.role for turn in turns] == ["system", "user", "assistant", "user", "assistant"]
    assert [turn.weight for turn in turns] == [None, None, 0, None, 1]
    assert only(tmp_path, {**PAIR, "system": "Be brief."}).messages[0].role == "system"


def test_sharegpt_names_of_speakers_are_known(tmp_path: Path) -> None:
    said = [("system", "a"), ("human", "b"), ("gpt", "c"), ("observation", "d"), ("gpt", "e")]
    row = {"conversations": [{"from": who, "value": what} for who, what in said]}
    roles = [turn.role for turn in only(tmp_path, row).messages]
    assert roles == ["system", "user", "assistant", "tool", "assistant"]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": [USER]}, r"no assistant turn to learn from \(roles: user\)"),
        ({"messages": []}, "messages is empty; expected a list of turns"),
        ({"messages": "hello"}, r"messages is text; expected a list"),
        ({"messages": ["hello"]}, r"messages\[0\] is text; expected an object"),
        (
            {"messages": [{"role": "robot", "content": "x"}]},
            r"unknown role 'robot'; allowed: system, user",
        ),
        ({"messages": [{"role": "developer", "content": "x"}]}, "unknown role 'developer'"),
        ({"messages": [{"content": "x"}]}, r"messages\[0\] has no 'role' \(keys: content\)"),
        (
            {"messages": [USER, {"role": "assistant", "content": ""}]},
            r"messages\[1\].content is empty",
        ),
        ({"messages": [USER, {"role": "assistant", "content": " \n"}]}, "content is empty"),
        ({"messages": [USER, {"role": "assistant", "content": None}]}, "content is empty"),
        (
            {"messages": [USER, {"role": "assistant", "content": 4}]},
            "content is int '4'; expected text",
        ),
        (
            {"messages": [{**USER, "content": [{"type": "image_url"}]}, ANSWER]},
            "of type 'image_url'; only text",
        ),
        (
            {"messages": [USER, {**ANSWER, "tool_calls": [{}]}]},
            r"messages\[1\].tool_calls\[0\].function is nothing; expected an object",
        ),
        ({"messages": [USER, {**ANSWER, "audio": {"id": "a"}}]}, "audio is not supported"),
        (
            {"messages": [USER, {**ANSWER, "contents": "x"}]},
            r"unknown key 'contents' in an assistant turn. Did you mean 'content'\? Valid: role,",
        ),
        ({"messages": [{**USER, "tool_call_id": "1"}, ANSWER]}, "unknown key 'tool_call_id'"),
        ({"messages": [USER, {"role": "assistant"}]}, r"messages\[1\] has no 'content' \(keys"),
        ({"messages": [USER, {**ANSWER, "weight": 2}]}, "weight is 2; allowed: 0 or 1"),
        ({"messages": [USER, {**ANSWER, "weight": True}]}, "weight is True; allowed: 0 or 1"),
        ({"messages": [{**USER, "weight": 1}, ANSWER]}, "weight stands on a user turn"),
        ({**CHAT, "tools": [{}]}, r"tools\[0\].type is nothing; only 'function' is supported"),
        ({**CHAT, "history": ["x"]}, "'history' is not supported"),
        (
            {"input": {"messages": [USER]}, "preferred_output": [ANSWER]},
            "a preference .* set objective.kind: dpo",
        ),
        (
            {"conversations": [{"from": "alien", "value": "x"}]},
            "unknown role 'alien'; allowed: human",
        ),
        ({"conversations": [USER, ANSWER]}, "has no 'from'"),
        ({"prompt": "", "completion": "4"}, "prompt is empty"),
        ({"prompt": ["a"], "completion": "4"}, "prompt is a list; expected text"),
        ({"instruction": "Add.", "output": " "}, "output is empty"),
        ({"text": "\n"}, "text is empty"),
        ({"text": "\ud800"}, "surrogate"),
        (
            {"question": "2 + 2?", "answer": "4"},
            "unknown format: keys are answer, question; expected",
        ),
        ({}, "unknown format: keys are none"),
        ([1], "expected an object with named fields, found a list"),
        (7, "found int '7'"),
    ],
)
def test_a_bad_row_is_told_by_place_and_reason(tmp_path: Path, row: object, expected: str) -> None:
    assert re.search(expected, reason(tmp_path, row))


def test_broken_json_names_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps(PAIR) + "\n\n" + '{"prompt": \n')
    with pytest.raises(DataError, match=r"1 of 2 rows are bad.*\n.*train.jsonl:3: broken JSON"):
        read(str(path))


def test_bad_bytes_and_deep_nesting_are_bad_rows(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_bytes(b'{"text": "\xff"}\n' + b"[" * 100_000 + b"\n" + b'{"text": "ok"}\n')
    rows = read(str(path), on_bad_row="skip")
    assert [row.where for row in rows.bad] == [f"{path}:1", f"{path}:2"]
    assert "UTF-8" in rows.bad[0].reason
    assert [example.id for example in rows.examples] == ["train.jsonl:3"]


def test_the_error_lists_the_first_five_bad_rows_and_the_count(tmp_path: Path) -> None:
    source = write(tmp_path / "train.jsonl", PAIR, *[{"prompt": "x", "completion": ""}] * 7)
    with pytest.raises(DataError) as caught:
        read(source)
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("7 of 8 rows are bad; repair them, or set data.on_bad_row: skip")
    assert lines[1:6] == [
        f"  {source}:{n}: completion is empty; expected text" for n in range(2, 7)
    ]
    assert lines[6] == "  and 2 more"


def test_skipping_every_row_is_still_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no row can be used"):
        read(write(tmp_path / "train.jsonl", {"a": 1}), on_bad_row="skip")


def test_one_source_has_one_format(tmp_path: Path) -> None:
    source = write(tmp_path / "train.jsonl", CHAT, PAIR)
    with pytest.raises(DataError, match="looks like prompt_completion; one source has one format"):
        read(source)
    rows = read(source, on_bad_row="skip")
    assert (len(rows.examples), len(rows.bad)) == (1, 1)


def test_a_named_format_wins_over_the_detected_one(tmp_path: Path) -> None:
    source = write(tmp_path / "train.jsonl", {**PAIR, "text": "whole"})
    assert read(source).examples[0].text is None
    assert read(source, format="text").examples[0].text == "whole"
    with pytest.raises(DataError, match="not in the format alpaca, which needs instruction"):
        read(source, format="alpaca")


def test_json_arrays_are_read_and_json_lines_in_json_are_explained(tmp_path: Path) -> None:
    path = tmp_path / "train.json"
    path.write_text(json.dumps([PAIR, PAIR]))
    assert [example.id for example in read(str(path)).examples] == ["train.json:1", "train.json:2"]
    path.write_text(json.dumps(PAIR) + "\n" + json.dumps(PAIR))
    with pytest.raises(DataError, match=r"train.json:2: broken JSON.*call the file .jsonl"):
        read(str(path))
    path.write_text('{"data": []}')
    with pytest.raises(DataError, match="expected an array of objects, found an object"):
        read(str(path))
    path.write_text("[]")
    with pytest.raises(DataError, match="holds no rows"):
        read(str(path))


def test_csv_is_read_with_quotes_and_line_breaks(tmp_path: Path) -> None:
    path = tmp_path / "train.csv"
    long = "x" * 200_000
    path.write_text(f'prompt,completion\n"a\nb","c, ""d"""\n{long},e\n', encoding="utf-8-sig")
    first, second = read(str(path)).examples
    assert (first.messages[0].content, first.messages[1].content) == ("a\nb", 'c, "d"')
    assert (first.id, second.id) == ("train.csv:2", "train.csv:4")
    assert len(second.messages[0].content) == 200_000


def test_csv_rows_of_another_width_and_open_quotes_are_told(tmp_path: Path) -> None:
    path = tmp_path / "train.csv"
    path.write_text("prompt,completion\na,b\nc\nd,e,f\n")
    assert [row.where for row in read(str(path), on_bad_row="skip").bad] == [
        f"{path}:3",
        f"{path}:4",
    ]
    path.write_text('prompt,completion\na,b\n"c')
    with pytest.raises(DataError, match=r"train.csv:3: broken CSV"):
        read(str(path))
    path.write_text("prompt,completion\n")
    with pytest.raises(DataError, match="holds no rows"):
        read(str(path))


def test_parquet_and_saved_datasets_give_the_same_rows(tmp_path: Path) -> None:
    table = datasets.Dataset.from_list([CHAT, {"messages": [USER, {**ANSWER, "weight": 0}]}])
    table.to_parquet(str(tmp_path / "train.parquet"))
    table.save_to_disk(str(tmp_path / "saved"))
    datasets.DatasetDict({"train": table}).save_to_disk(str(tmp_path / "dict"))
    turns = [example.messages for example in read(str(tmp_path / "train.parquet")).examples]
    assert turns[0] == EXPECTED
    assert turns[1][1].weight == 0
    for name in ("saved", "dict"):
        found = read(str(tmp_path / name)).examples
        assert [example.messages for example in found] == turns
        assert found[0].id == f"{name}:1"


def test_a_saved_dataset_without_train_names_its_splits(tmp_path: Path) -> None:
    table = datasets.Dataset.from_list([PAIR])
    datasets.DatasetDict({"test": table}).save_to_disk(str(tmp_path / "dict"))
    with pytest.raises(DataError, match=r"no split `train` \(it has test\)"):
        read(str(tmp_path / "dict"))
    assert len(read(str(tmp_path / "dict" / "test")).examples) == 1


def test_damaged_parquet_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "train.parquet"
    path.write_bytes(b"PAR1 nonsense")
    with pytest.raises(DataError, match="not a readable Parquet file"):
        read(str(path))


def test_globs_and_lists_are_read_in_order_with_unique_names(tmp_path: Path) -> None:
    for name in ("b", "a"):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "part.jsonl", PAIR)
    write(tmp_path / "c.jsonl", PAIR)
    source = (str(tmp_path / "c.jsonl"), str(tmp_path / "*" / "part.jsonl"))
    assert [example.id for example in read(source).examples] == [
        "c.jsonl:1",
        f"{tmp_path}/a/part.jsonl:1",
        f"{tmp_path}/b/part.jsonl:1",
    ]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("missing.jsonl", "missing.jsonl: no such file; the working directory is"),
        ("./missing", "no such file"),
        ("/missing/data", "no such file"),
        ("two words", "no such file"),
        ("missing*.jsonl", "no file matches"),
        ("s3://bucket/train.jsonl", "URLs are not read"),
        ((), "list of data sources is empty"),
        ("notes.txt", r"cannot tell what is in a '.txt' file; allowed: .jsonl"),
        ("empty.jsonl", r"empty.jsonl is empty \(0 bytes\)"),
        ("blank.jsonl", "holds no rows"),
        ("folder", "not one that datasets.save_to_disk wrote"),
        ("no-such-org/no-such-data", "hub dataset cannot be loaded"),
    ],
)
def test_a_source_that_cannot_be_read_is_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str | tuple[str, ...], expected: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("notes.txt").write_text("x")
    Path("empty.jsonl").touch()
    Path("blank.jsonl").write_text("\n \n")
    Path("folder").mkdir()
    with pytest.raises(DataError, match=expected):
        read(source)


def test_a_file_on_disk_wins_over_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("org").mkdir()
    datasets.Dataset.from_list([PAIR]).save_to_disk("org/data")
    assert len(read("org/data").examples) == 1


def test_a_file_that_may_not_be_read_is_explained(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may read everything")
    path = Path(write(tmp_path / "train.jsonl", PAIR))
    path.chmod(0)
    with pytest.raises(DataError, match="cannot be read"):
        read(str(path))


def test_the_fingerprint_is_of_the_contents_not_of_the_name(tmp_path: Path) -> None:
    first = write(tmp_path / "a.jsonl", PAIR)
    same = write(tmp_path / "b.jsonl", PAIR)
    other = write(tmp_path / "c.jsonl", {**PAIR, "completion": "5"})
    assert read(first).fingerprint == sources.fingerprint(same)
    assert sources.fingerprint(first) != sources.fingerprint(other)
    assert sources.fingerprint((first, other)) != sources.fingerprint((other, first))


def test_a_stream_is_lazy(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    os.mkfifo(path)  # Not a regular file, so it must be refused rather than waited for.
    with pytest.raises(DataError):
        next(stream(str(path)))
    source = write(tmp_path / "rows.jsonl", PAIR, "broken", PAIR)
    items = stream(source)
    assert isinstance(next(items), Example)
    assert isinstance(next(items), BadRow)
    items.close()  # type: ignore[attr-defined]
