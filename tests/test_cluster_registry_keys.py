"""Keys in the registry: made, listed, revoked, rotated; and what is never shown."""

import threading
from typing import Any

import pytest
from sqlalchemy import text

from cluster.errors import ConfigError
from cluster.registry import keys
from cluster.registry.database import Database
from cluster.registry.keys import Rights

NOW = 1_800_000_000.0


def id_of(key: str) -> str:
    return key.split("-", 3)[2]


def secret_of(key: str) -> str:
    return key.split("-", 3)[3]


def test_a_key_is_kept_with_its_rights_and_without_its_secret(registry: Database) -> None:
    rights = Rights(
        name="ada", project="team-a", scopes=("tune", "infer", "tune"), models=("m", "ft:a/b::1"),
        requests_per_minute=60, tokens_per_day=10**12, concurrent_jobs=2,
    )  # fmt: skip
    key = keys.create(registry, rights, now=NOW)
    assert key.startswith("sk-loray-")
    assert (len(id_of(key)), len(secret_of(key))) == (8, 43)
    (row,) = keys.list_(registry)
    assert (row.id, row.name, row.project) == (id_of(key), "ada", "team-a")
    assert (row.scopes, row.models) == (["infer", "tune"], ["ft:a/b::1", "m"])
    assert (row.requests_per_minute, row.tokens_per_day, row.concurrent_jobs) == (60, 10**12, 2)
    assert (row.created_at, row.revoked_at, row.rotated_from) == (NOW, None, None)
    assert row.hash == keys.hash_of(secret_of(key))
    with registry.read() as session:
        assert secret_of(key) not in str(session.execute(text("SELECT * FROM keys")).all())


def test_a_plain_key_may_ask_all_models_without_limits(registry: Database) -> None:
    keys.create(registry, Rights(name="ada"), now=NOW)
    (row,) = keys.list_(registry)
    assert (row.project, row.scopes, row.models) == ("default", ["infer"], None)
    assert (row.requests_per_minute, row.tokens_per_day, row.concurrent_jobs) == (None,) * 3


def test_keys_are_listed_the_oldest_first_and_revoked_ones_stay(registry: Database) -> None:
    made = [
        keys.create(registry, Rights(name=name), now=NOW + place)
        for place, name in enumerate("abc")
    ]
    keys.revoke(registry, id_of(made[1]), now=NOW + 9)
    rows = keys.list_(registry)
    assert [(row.name, row.revoked_at) for row in rows] == [
        ("a", None), ("b", NOW + 9), ("c", None),
    ]  # fmt: skip
    assert set(keys.known(registry, now=NOW + 9).keys) == {id_of(made[0]), id_of(made[2])}


def test_a_key_that_is_revoked_twice_ended_the_first_time(registry: Database) -> None:
    key = keys.create(registry, Rights(name="ada"), now=NOW)
    keys.revoke(registry, id_of(key), now=NOW + 1)
    assert keys.revoke(registry, id_of(key), now=NOW + 2).revoked_at == NOW + 1


def test_it_is_known_for_ever_that_there_was_a_key(registry: Database) -> None:
    assert not keys.known(registry, now=NOW).was_any
    key = keys.create(registry, Rights(name="ada"), now=NOW)
    keys.revoke(registry, id_of(key), now=NOW)
    known = keys.known(registry, now=NOW)
    assert (known.keys, known.was_any) == ({}, True)


def test_a_rotated_key_has_the_rights_of_the_old_one_which_ends_at_once(
    registry: Database,
) -> None:
    rights = Rights(name="ada", project="p", scopes=("tune",), models=("m",), concurrent_jobs=3)
    old = keys.create(registry, rights, now=NOW)
    new = keys.rotate(registry, id_of(old), now=NOW + 5)
    assert id_of(new) != id_of(old)
    assert secret_of(new) != secret_of(old)
    first, second = keys.list_(registry)
    for field in ("name", "project", "scopes", "models", "concurrent_jobs"):
        assert getattr(first, field) == getattr(second, field)
    assert (first.revoked_at, second.rotated_from) == (NOW + 5, id_of(old))
    assert set(keys.known(registry, now=NOW + 5).keys) == {id_of(new)}


def test_a_key_that_was_rotated_with_grace_goes_on_until_it_is_over(registry: Database) -> None:
    old = keys.create(registry, Rights(name="ada"), now=NOW)
    new = keys.rotate(registry, id_of(old), now=NOW, grace_s=60)
    assert set(keys.known(registry, now=NOW + 59).keys) == {id_of(old), id_of(new)}
    assert set(keys.known(registry, now=NOW + 60).keys) == {id_of(new)}
    keys.revoke(registry, id_of(old), now=NOW + 10)
    assert set(keys.known(registry, now=NOW + 10).keys) == {id_of(new)}


def test_a_key_is_rotated_once(registry: Database) -> None:
    old = keys.create(registry, Rights(name="ada"), now=NOW)
    outcomes: list[str] = []

    def rotate() -> None:
        try:
            outcomes.append(keys.rotate(registry, id_of(old), now=NOW, grace_s=60))
        except ConfigError as error:
            outcomes.append(str(error))

    threads = [threading.Thread(target=rotate) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(outcome.startswith("sk-loray-") for outcome in outcomes) == 1
    assert sum("has been revoked or rotated" in outcome for outcome in outcomes) == 3
    assert len(keys.list_(registry)) == 2


@pytest.mark.parametrize("grace_s", [-1, 1e9, float("nan")])
def test_a_grace_that_cannot_be_changes_nothing(registry: Database, grace_s: float) -> None:
    key = keys.create(registry, Rights(name="ada"), now=NOW)
    with pytest.raises(ConfigError, match="grace"):
        keys.rotate(registry, id_of(key), now=NOW, grace_s=grace_s)
    assert len(keys.list_(registry)) == 1


@pytest.mark.parametrize("id", ["00000000", "", "x" * 10_000, "' OR 1=1", "é", "\x00"])
def test_an_id_that_is_not_there_is_refused_with_those_that_are(
    registry: Database, id: str
) -> None:
    key = keys.create(registry, Rights(name="ada"), now=NOW)
    for change in (keys.revoke, keys.rotate):
        with pytest.raises(ConfigError, match=rf"{id_of(key)} \(ada\)"):
            change(registry, id, now=NOW)


def test_a_key_that_is_given_as_an_id_is_not_shown(registry: Database) -> None:
    key = keys.create(registry, Rights(name="ada"), now=NOW)
    for change in (keys.revoke, keys.rotate):
        with pytest.raises(ConfigError) as raised:
            change(registry, key, now=NOW)
        assert secret_of(key)[:12] not in str(raised.value)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"name": ""}, "1 to 128 characters"),
        ({"name": " "}, "1 to 128 characters"),
        ({"name": "x" * 129}, "1 to 128 characters"),
        ({"name": "two\nlines"}, "1 to 128 characters"),
        ({"project": ""}, "1 to 64 letters"),
        ({"project": "../x"}, "1 to 64 letters"),
        ({"project": "x" * 65}, "1 to 64 letters"),
        ({"scopes": ()}, "infer, tune, admin"),
        ({"scopes": ("root",)}, "infer, tune, admin"),
        ({"models": ()}, "1 to 1000"),
        ({"models": ("",)}, "1 to 512 characters"),
        ({"models": ("x" * 513,)}, "1 to 512 characters"),
        ({"requests_per_minute": 0}, "requests_per_minute is 0"),
        ({"tokens_per_day": -1}, "tokens_per_day is -1"),
        ({"concurrent_jobs": 1 << 40}, "concurrent_jobs"),
        ({"name": "sk-loray-0a0a0a0a-secretsecret\n"}, "sk-loray-\\.\\.\\."),
    ],
)
def test_rights_that_cannot_be_are_refused_by_what_is_allowed(
    fields: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words) as raised:
        Rights(**{"name": "ada", **fields})
    assert "secretsecret" not in str(raised.value)
