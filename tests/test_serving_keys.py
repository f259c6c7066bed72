"""A keys file: which are taken, which are not, and what is never shown."""

import logging
import os
from pathlib import Path

import pytest
import yaml
from keys_file import add_key, change_first, remove_key

from cluster.errors import ConfigError
from serving.keys import Key, Keys


def id_of(key: str) -> str:
    return key.split("-", 3)[2]


def secret_of(key: str) -> str:
    return key.split("-", 3)[3]


def is_known(keys: Keys, key: str) -> bool:
    return keys.get(id_of(key)) is not None


def test_a_key_is_read_with_what_it_opens(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    plain = add_key(path, "ada", models=["a", "b"])
    boss = add_key(path, "boss", roles=["admin"])
    keys = Keys(path)
    ada, other = keys.get(id_of(plain)), keys.get(id_of(boss))
    assert isinstance(ada, Key)
    assert (ada.name, ada.roles, ada.models) == ("ada", ("inference",), ("a", "b"))
    assert isinstance(other, Key)
    assert (other.roles, other.models) == (("admin",), None)
    assert keys.get("00000000") is None


def test_a_changed_file_counts_within_a_second_and_a_broken_one_does_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "keys.yaml"
    first = add_key(path, "first")
    now = [0.0]
    keys = Keys(path, clock=lambda: now[0])
    second = add_key(path, "second")
    now[0] = 0.9  # the file is looked at once a second at most
    assert not is_known(keys, second)
    now[0] = 1.0
    assert is_known(keys, second)
    good = path.read_text()
    path.write_text("keys: [{broken")
    for now[0] in (4.0, 6.0, 8.0):
        assert is_known(keys, first)
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    path.write_text(good)
    remove_key(path, first)
    now[0] = 10.0
    assert not is_known(keys, first)
    assert is_known(keys, second)


def test_a_file_that_was_opened_to_others_counts_again_once_it_is_closed(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    first = add_key(path, "first")
    now = [0.0]
    keys = Keys(path, clock=lambda: now[0])
    remove_key(path, first)
    path.chmod(0o644)
    now[0] = 2.0
    assert is_known(keys, first)
    path.chmod(0o600)
    now[0] = 4.0
    assert not is_known(keys, first)


BROKEN = [
    "",
    "[]",
    "keys: 3",
    "keys: [3]",
    "keys: [{broken",
    "keys: [{id: 0a0a0a0a}]",
    "keys: []\nkeys: []",
    "keys: []\nrows: []",
    "? [a]\n: b",
    "keys: " + "[" * 3000,
    "\x00",
]


@pytest.mark.parametrize("text", BROKEN, ids=range(len(BROKEN)))
def test_a_broken_file_is_refused_at_first_and_passed_over_later(tmp_path: Path, text: str) -> None:
    path = tmp_path / "keys.yaml"
    key = add_key(path, "ada")
    now = [0.0]
    keys = Keys(path, clock=lambda: now[0])
    path.write_text(text)
    now[0] = 2.0
    assert is_known(keys, key)
    with pytest.raises(ConfigError, match=r"keys\.yaml"):
        Keys(path)


def test_a_file_that_is_gone_keeps_the_last_keys(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    key = add_key(path, "ada")
    now = [0.0]
    keys = Keys(path, clock=lambda: now[0])
    path.unlink()
    now[0] = 2.0
    assert is_known(keys, key)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hash": "é" * 64}, "64 hex digits"),
        ({"hash": "0" * 63}, "64 hex digits"),
        ({"hash": "A" * 64}, "64 hex digits"),
        ({"id": "../../etc"}, "8 hex digits"),
        ({"id": "0a-0a0a0"}, "8 hex digits"),
        ({"name": " "}, "1 to 128 characters"),
        ({"name": "x" * 129}, "1 to 128 characters"),
        ({"name": "a\nb"}, "1 to 128 characters"),
        ({"roles": []}, "no roles"),
        ({"roles": ["root"]}, "roles"),
        ({"models": []}, "no models"),
        ({"secret": "x"}, "unknown key 'secret'"),
        ({"created": "today"}, "created"),
    ],
)
def test_a_row_that_cannot_be_is_refused_by_what_is_wrong(
    tmp_path: Path, fields: dict[str, object], message: str
) -> None:
    path = tmp_path / "keys.yaml"
    add_key(path, "ada")
    change_first(path, **fields)
    with pytest.raises(ConfigError, match=message):
        Keys(path)


def test_one_id_cannot_stand_for_two_keys(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    add_key(path, "ada")
    change_first(path, id=id_of(add_key(path, "bob")))
    with pytest.raises(ConfigError, match="stands twice"):
        Keys(path)


@pytest.mark.parametrize("where", ["hash", "id", "name", "row", "models"])
def test_a_key_that_was_pasted_into_the_file_is_not_shown(
    tmp_path: Path, where: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "keys.yaml"
    key = add_key(path, "ada")
    now = [0.0]
    keys = Keys(path, clock=lambda: now[0])
    if where == "row":
        path.write_text(yaml.safe_dump({"keys": [key]}))
    else:
        change_first(path, **{where: key, "roles": []})
    now[0] = 2.0
    assert is_known(keys, key)
    with pytest.raises(ConfigError) as refused:
        Keys(path)
    assert "kept_the_old_keys" in caplog.text
    for text in (caplog.text, str(refused.value)):
        assert secret_of(key)[:12] not in text


@pytest.mark.parametrize("mode", [0o604, 0o644, 0o620, 0o601, 0o660])
def test_a_file_that_others_can_read_or_change_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "keys.yaml"
    add_key(path, "ada")
    path.chmod(mode)
    with pytest.raises(ConfigError, match="chmod 600"):
        Keys(path)


def test_a_group_may_read_the_file(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    key = add_key(path, "ada")
    path.chmod(0o640)
    assert is_known(Keys(path), key)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="loray keys create"):
        Keys(tmp_path / "nowhere.yaml")
    with pytest.raises(ConfigError, match="plain file"):
        Keys(tmp_path)
    os.mkfifo(tmp_path / "pipe", 0o600)
    with pytest.raises(ConfigError, match="plain file"):
        Keys(tmp_path / "pipe")
