"""API keys: what opens, what does not, and what is never shown."""

import logging
import os
import stat
from pathlib import Path

import pytest
import yaml

from cluster.errors import ConfigError
from serving.keys import Keys, create, list_, remove, require_safe_bind
from serving.problems import ApiError


def header(key: str) -> str:
    return f"Bearer {key}"


def secret_of(key: str) -> str:
    return key.split("-", 3)[3]


def rewrite(path: Path, **fields: object) -> None:
    """Change fields of the first key of a file."""
    tree = yaml.safe_load(path.read_text())
    tree["keys"][0].update(fields)
    path.write_text(yaml.safe_dump(tree))


def test_a_key_opens_what_it_was_made_for_and_is_stored_nowhere(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    plain = create(path, "ada", models=("a", "b"))
    boss = create(path, "boss", roles=("admin",), models=None)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    secret = secret_of(plain)
    assert (len(plain.split("-")[2]), len(secret)) == (8, 43)
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


@pytest.mark.parametrize(
    "change",
    ["", "x", "sk-loray-", "sk-loray-1-2", "é" * 20, "\x00", "a b", "\udc80", "-", "x" * 100_000],
)
def test_what_is_no_key_opens_nothing(tmp_path: Path, change: str) -> None:
    path = tmp_path / "keys.yaml"
    plain = create(path, "ada", models=None)
    keys = Keys.load(path)
    bare = plain.removeprefix("sk-loray-")
    for given in (
        None,
        change,
        header(change),
        plain,
        f"Basic {plain}",
        header(bare),
        header(plain[:-1]),
        header(f"sk-loray-{bare[:8]}-{change}"),
        header(f"sk-loray-00000000-{secret_of(plain)}"),
        header(f"{plain}{change}x"),
    ):
        with pytest.raises(ApiError) as raised:
            keys.check(given)
        assert (raised.value.status, raised.value.code) == (401, "invalid_api_key")
        assert secret_of(plain)[:-1] not in str(raised.value)


def test_the_key_of_one_does_not_open_as_another(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    first, second = (create(path, name, models=None) for name in ("first", "second"))
    keys = Keys.load(path)
    assert keys.check(f"bearer {second}").name == "second"
    with pytest.raises(ApiError):
        keys.check(header(f"{first[:17]}-{secret_of(second)}"))


def test_keys_are_listed_and_removed_by_their_ids(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    plain = create(path, "ada", models=None)
    create(path, "bob", models=("m",), roles=("inference", "admin"))
    ada, bob = list_(path)
    assert (ada.id, ada.name, ada.models) == (plain.split("-")[2], "ada", None)
    assert (bob.name, bob.models, bob.roles) == ("bob", ("m",), ("inference", "admin"))
    remove(path, ada.id)
    assert list_(path) == (bob,)
    remove(path, bob.id)
    assert list_(path) == ()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_changed_file_counts_within_a_second_and_a_broken_one_does_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "keys.yaml"
    first = create(path, "first", models=None)
    now = [0.0]
    keys = Keys.load(path, clock=lambda: now[0])
    second = create(path, "second", models=None)
    now[0] = 0.9  # the file is looked at once a second at most
    with pytest.raises(ApiError):
        keys.check(header(second))
    now[0] = 1.0
    keys.check(header(second))
    good = path.read_text()
    path.write_text("keys: [{broken")
    for now[0] in (4.0, 6.0, 8.0):
        keys.check(header(first))
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    path.write_text(good)
    remove(path, first.split("-")[2])
    now[0] = 10.0
    with pytest.raises(ApiError):
        keys.check(header(first))
    keys.check(header(second))


def test_a_file_that_was_opened_to_others_counts_again_once_it_is_closed(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    first = create(path, "first", models=None)
    now = [0.0]
    keys = Keys.load(path, clock=lambda: now[0])
    remove(path, first.split("-")[2])
    path.chmod(0o644)
    now[0] = 2.0
    keys.check(header(first))
    path.chmod(0o600)
    now[0] = 4.0
    with pytest.raises(ApiError):
        keys.check(header(first))


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
    plain = create(path, "ada", models=None)
    now = [0.0]
    keys = Keys.load(path, clock=lambda: now[0])
    path.write_text(text)
    now[0] = 2.0
    assert keys.check(header(plain)).name == "ada"
    with pytest.raises(ConfigError, match=r"keys\.yaml"):
        Keys.load(path)
    with pytest.raises(ConfigError, match=r"keys\.yaml"):
        create(path, "bob", models=None)
    assert path.read_text() == text


def test_a_file_that_is_gone_keeps_the_last_keys(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    plain = create(path, "ada", models=None)
    now = [0.0]
    keys = Keys.load(path, clock=lambda: now[0])
    path.unlink()
    now[0] = 2.0
    keys.check(header(plain))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hash": "é" * 64}, "64 hex digits"),
        ({"hash": "0" * 63}, "64 hex digits"),
        ({"hash": "A" * 64}, "64 hex digits"),
        ({"id": "../../etc"}, "8 hex digits"),
        ({"id": "0a-0a0a0"}, "8 hex digits"),
        ({"name": " "}, "1 to 128 characters"),
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
    create(path, "ada", models=None)
    rewrite(path, **fields)
    with pytest.raises(ConfigError, match=message):
        Keys.load(path)


def test_one_id_cannot_stand_for_two_keys(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    create(path, "ada", models=None)
    create(path, "bob", models=None)
    rewrite(path, id=list_(path)[1].id)
    with pytest.raises(ConfigError, match="stands twice"):
        Keys.load(path)


@pytest.mark.parametrize("where", ["hash", "id", "name", "row", "models"])
def test_a_key_that_was_pasted_into_the_file_is_not_shown(
    tmp_path: Path, where: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "keys.yaml"
    plain = create(path, "ada", models=None)
    now = [0.0]
    keys = Keys.load(path, clock=lambda: now[0])
    if where == "row":
        path.write_text(yaml.safe_dump({"keys": [plain]}))
    else:
        rewrite(path, **{where: plain, "roles": []})
    now[0] = 2.0
    keys.check(header(plain))
    with pytest.raises(ConfigError) as refused:
        Keys.load(path)
    with pytest.raises(ConfigError) as unknown:
        remove(tmp_path / "keys.yaml", plain)
    assert "kept_the_old_keys" in caplog.text
    for text in (caplog.text, str(refused.value), str(unknown.value)):
        assert secret_of(plain)[:12] not in text


@pytest.mark.parametrize("mode", [0o604, 0o644, 0o620, 0o601, 0o660])
def test_a_file_that_others_can_read_or_change_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "keys.yaml"
    create(path, "ada", models=None)
    path.chmod(mode)
    with pytest.raises(ConfigError, match="chmod 600"):
        Keys.load(path)
    with pytest.raises(ConfigError, match="chmod 600"):
        create(path, "bob", models=None)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="loray keys add"):
        Keys.load(tmp_path / "nowhere.yaml")
    with pytest.raises(ConfigError, match="plain file"):
        Keys.load(tmp_path)
    os.mkfifo(tmp_path / "pipe", 0o600)
    with pytest.raises(ConfigError, match="plain file"):
        Keys.load(tmp_path / "pipe")


def test_a_group_may_read_the_file_and_still_may_when_it_has_changed(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    create(path, "ada", models=None)
    path.chmod(0o640)
    create(path, "bob", models=None)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert len(list_(path)) == 2


def test_the_file_is_nobody_elses_at_any_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modes: list[int] = []
    rename = os.replace

    def watched(source: Path, target: Path) -> None:
        modes.append(stat.S_IMODE(os.stat(source).st_mode))
        rename(source, target)

    monkeypatch.setattr(os, "replace", watched)
    umask = os.umask(0o022)
    try:
        create(tmp_path / "keys.yaml", "ada", models=None)
        assert os.umask(0o022) == 0o022
    finally:
        os.umask(umask)
    assert modes == [0o600]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_a_file_that_root_changes_stays_its_owners(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    create(path, "ada", models=None)
    os.chown(path, 1234, 1235)
    create(path, "bob", models=None)
    assert (path.stat().st_uid, path.stat().st_gid) == (1234, 1235)


def test_a_key_that_is_not_there_cannot_be_removed(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    create(path, "ada", models=None)
    with pytest.raises(ConfigError, match="ada"):
        remove(path, "00000000")


@pytest.mark.parametrize("name", ["", " ", "x" * 129, "two\nlines"])
def test_a_name_that_cannot_be_makes_no_key_and_no_file(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="1 to 128 characters"):
        create(tmp_path / "keys.yaml", name, models=None)
    assert not (tmp_path / "keys.yaml").exists()


NAMES = {
    "localhost": ["127.0.0.1", "::1"],
    "here": ["127.0.1.1"],
    "127.1": ["127.0.0.1"],
    "half": ["127.0.0.1", "10.0.0.1"],
    "example.com": ["192.0.2.7"],
    "none": [],
    "linked": ["fe80::1%eth0"],
}


def look_up(host: str) -> list[str]:
    if host not in NAMES:
        raise OSError("no such name")
    return NAMES[host]


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "127.8.0.1", "localhost", "::1", "[::1]", "here", "127.1"]
)
def test_the_loopback_needs_no_keys(host: str) -> None:
    require_safe_bind(host, None, resolve=look_up)


@pytest.mark.parametrize(
    "host",
    ["0.0.0.0", "", "10.0.0.1", "::", "example.com", "half", "none", "linked", "unknown", "[]"],
)
def test_what_others_can_reach_needs_keys(host: str) -> None:
    with pytest.raises(ConfigError, match="keys_file"):
        require_safe_bind(host, None, resolve=look_up)
    require_safe_bind(host, "keys.yaml", resolve=look_up)


def test_names_are_looked_up_by_the_system() -> None:
    require_safe_bind("localhost", None)
    for host in ("x" * 64, "a\x00b"):  # no names at all, so nobody is asked
        with pytest.raises(ConfigError, match="keys_file"):
            require_safe_bind(host, None)
