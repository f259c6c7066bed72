"""API keys: what opens, what does not, and what is never shown."""

import os
import stat
from pathlib import Path

import pytest

from cluster.errors import ConfigError
from serving.keys import Keys, create, remove, require_safe_bind
from serving.problems import ApiError


def header(key: str) -> str:
    return f"Bearer {key}"


def test_a_key_opens_what_it_was_made_for_and_is_stored_nowhere(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    plain = create(path, "ada", models=("a", "b"))
    boss = create(path, "boss", roles=("admin",), models=None)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    secret = plain.rsplit("-", 1)[-1]
    assert secret not in path.read_text()
    keys = Keys.load(path)
    key = keys.check(header(plain))
    assert (key.name, key.may_use("a"), key.may_use("c")) == ("ada", True, False)
    assert secret not in repr(key)
    key.require_model("b")
    with pytest.raises(ApiError, match="does not exist") as hidden:
        key.require_model("c")
    assert hidden.value.status == 404
    with pytest.raises(ApiError, match="role admin") as forbidden:
        key.require_role("admin")
    assert forbidden.value.status == 403
    admin = keys.check(header(boss))
    admin.require_role("admin")
    admin.require_model("anything")


@pytest.mark.parametrize("change", ["", "x", "sk-loray-", "sk-loray-1-2", "é" * 20, "\x00", "a b"])
def test_what_is_no_key_opens_nothing(tmp_path: Path, change: str) -> None:
    path = tmp_path / "keys.yaml"
    plain = create(path, "ada", models=None)
    keys = Keys.load(path)
    for given in (
        None,
        change,
        header(change),
        plain,
        f"Basic {plain}",
        header(plain + change or ""),
    ):
        if given == header(plain):
            continue
        with pytest.raises(ApiError) as raised:
            keys.check(given)
        assert raised.value.status == 401


def test_a_changed_file_counts_within_a_second_and_a_broken_one_does_not(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    first = create(path, "first", models=None)
    now = [0.0]
    keys = Keys.load(path, clock=lambda: now[0])
    second = create(path, "second", models=None)
    now[0] = 2.0
    keys.check(header(second))
    good = path.read_text()
    path.write_text("keys: [{broken")
    now[0] = 4.0
    keys.check(header(first))
    path.write_text(good)
    remove(path, first.split("-")[2])
    now[0] = 6.0
    with pytest.raises(ApiError):
        keys.check(header(first))
    keys.check(header(second))


def test_a_file_that_others_can_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    create(path, "ada", models=None)
    os.chmod(path, 0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        Keys.load(path)
    with pytest.raises(ConfigError, match="no such file"):
        Keys.load(tmp_path / "nowhere.yaml")


def test_a_key_that_is_not_there_cannot_be_removed(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    create(path, "ada", models=None)
    with pytest.raises(ConfigError, match="ada"):
        remove(path, "00000000")


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.0.1", "localhost", "::1"])
def test_the_loopback_needs_no_keys(host: str) -> None:
    require_safe_bind(host, None)


@pytest.mark.parametrize("host", ["0.0.0.0", "", "10.0.0.1", "::", "example.com"])
def test_what_others_can_reach_needs_keys(host: str) -> None:
    with pytest.raises(ConfigError, match="keys_file"):
        require_safe_bind(host, None)
    require_safe_bind(host, "keys.yaml")
