"""The demo's data: the shipped files are the generator's, and the two sets share nothing."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import ConfigError
from training import examples
from training.tickets import HELD_OUT, SYSTEM, TRAIN, main, rows

SHIPPED = Path(__file__).resolve().parent.parent / "training" / "recipes"
FIELDS = ["name", "product", "issue", "order"]


def shipped(name: str) -> list[dict[str, Any]]:
    """`message`, `ticket` (parsed) and `line` of each row of a shipped file."""
    out: list[dict[str, Any]] = []
    for line in (SHIPPED / f"tickets_{name}.jsonl").read_text(encoding="utf-8").splitlines():
        system, user, assistant = json.loads(line)["messages"]
        assert (system["role"], system["content"]) == ("system", SYSTEM)
        answer = assistant["content"]
        out.append({"message": user["content"], "ticket": json.loads(answer), "line": answer})
    return out


def wordings(row: dict[str, Any]) -> set[str]:
    """The clauses of a message with name, product and order number blanked out."""
    text = row["message"]
    for field in ("product", "order", "name"):
        text = text.replace(str(row["ticket"][field]), f"<{field}>")
    text = re.sub(r"[^\w<>' ]", "|", text.lower())
    return {part.strip() for part in text.split("|") if part.strip(" <>") not in ("", *FIELDS)}


def test_shipped_files_are_byte_for_byte_the_generators(tmp_path: Path) -> None:
    main([str(tmp_path)])
    for name in ("tickets_train.jsonl", "tickets_test.jsonl", "tickets_validation.jsonl"):
        assert (tmp_path / name).read_bytes() == (SHIPPED / name).read_bytes()


def test_sets_share_no_name_product_or_wording() -> None:
    train, test = shipped("train"), shipped("test")
    for field in ("name", "product"):
        assert not {r["ticket"][field] for r in train} & {r["ticket"][field] for r in test}
    words = [{word for r in s for word in r["ticket"]["product"].split()} for s in (train, test)]
    assert not words[0] & words[1]
    sentences = [set[str]().union(*map(wordings, rows)) for rows in (train, test)]
    assert len(sentences[0]) > 200
    assert sentences[0] & sentences[1] <= {"hi", "hello"}


def test_banks_share_nothing_at_all() -> None:
    for part in ("names", "brands", "openings", "closings", "orders", "fillers"):
        one, two = getattr(TRAIN, part), getattr(HELD_OUT, part)
        one, two = (set(p.split()) if isinstance(p, str) else set(p) for p in (one, two))
        assert not one & two
    for issue, texts in TRAIN.problems.items():
        assert not set(texts) & set(HELD_OUT.problems[issue])
        assert len(texts) >= 25


@pytest.mark.parametrize("name", ["train", "test"])
def test_every_answer_is_one_line_that_follows_from_the_message(name: str) -> None:
    for row in shipped(name):
        ticket = row["ticket"]
        assert list(ticket) == FIELDS
        assert row["line"] == json.dumps(ticket)
        assert ticket["issue"] in TRAIN.problems
        for field in ("name", "product", "order"):
            assert row["message"].count(str(ticket[field])) == 1
        assert not re.search(r"[{}]|  ", row["message"])


def test_rows_are_a_function_of_the_seed() -> None:
    assert rows(TRAIN, 20, seed=3) == rows(TRAIN, 20, seed=3)
    assert rows(TRAIN, 20, seed=3) != rows(TRAIN, 20, seed=4)


def test_issues_are_balanced() -> None:
    for name, num_each in (("train", 96), ("test", 10)):
        issues = [row["ticket"]["issue"] for row in shipped(name)]
        assert all(abs(issues.count(issue) - num_each) <= 8 for issue in TRAIN.problems)


def test_shipped_files_are_read_as_training_data() -> None:
    found = examples.read(str(SHIPPED / "tickets_*.jsonl"))
    assert len(found.examples) == sum(map(len, map(shipped, ("train", "test", "validation"))))


def test_validation_rows_are_none_of_the_training_rows() -> None:
    messages = [{row["message"] for row in shipped(name)} for name in ("train", "validation")]
    assert len(messages[1]) == 16
    assert not messages[0] & messages[1]


def test_directory_has_to_be_named() -> None:
    with pytest.raises(ConfigError, match="the directory to write to"):
        main([])
