"""Which hosts others can reach, and that these need keys."""

import pytest

from cluster.errors import ConfigError
from serving.loopback import require_safe_bind

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
    require_safe_bind(host, has_keys=False, resolve=look_up)


@pytest.mark.parametrize(
    "host",
    ["0.0.0.0", "", "10.0.0.1", "::", "example.com", "half", "none", "linked", "unknown", "[]"],
)
def test_what_others_can_reach_needs_keys(host: str) -> None:
    with pytest.raises(ConfigError, match="loray keys create"):
        require_safe_bind(host, has_keys=False, resolve=look_up)
    require_safe_bind(host, has_keys=True, resolve=look_up)


def test_names_are_looked_up_by_the_system() -> None:
    require_safe_bind("localhost", has_keys=False)
    for host in ("x" * 64, "a\x00b"):  # no names at all, so nobody is asked
        with pytest.raises(ConfigError, match="loray keys create"):
            require_safe_bind(host, has_keys=False)
