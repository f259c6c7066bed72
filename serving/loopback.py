"""Whether others than this machine can reach a server, and what that asks of it."""

import ipaddress
import socket
from collections.abc import Callable, Iterable
from pathlib import Path

from cluster.errors import ConfigError


def _resolved(host: str) -> list[str]:
    return [str(address[0]) for *_, address in socket.getaddrinfo(host, None)]


def require_safe_bind(
    host: str, *, has_keys: bool, resolve: Callable[[str], Iterable[str]] = _resolved
) -> None:
    """Raises ConfigError for a server without keys that others than this machine can reach.

    resolve: the addresses of a host's name, OSError where it has none.
    """
    if has_keys or is_loopback(host, resolve=resolve):
        return
    raise ConfigError(
        f"http.host is {host!r}, which others can reach, but there is no key and no keys_file: "
        "nobody could use the server. Make a key (`loray keys create FILE NAME`), or listen on "
        "127.0.0.1"
    )


def require_never_keys(marks: Iterable[Path]) -> None:
    """Raises ConfigError for a server without keys that once had some: its registry is lost.

    marks: files any of which says that there was one.
    """
    found = [str(mark) for mark in marks if mark.exists()]
    if found:
        raise ConfigError(
            f"the registry knows no key, but there was one ({', '.join(found)}): it was lost, or "
            "another is named. Make a new key (`loray keys create FILE NAME`), or set database= to "
            "the old one; to serve this machine without keys, remove what is named here"
        )


def is_loopback(host: str, *, resolve: Callable[[str], Iterable[str]] = _resolved) -> bool:
    """Whether a host, by its address or name, is this machine to itself alone."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        pass
    if not host:  # every address of the machine
        return False
    try:
        addresses = [ipaddress.ip_address(address) for address in resolve(host)]
    except (OSError, ValueError):  # UnicodeError, of names that cannot be, is a ValueError
        return False
    return bool(addresses) and all(address.is_loopback for address in addresses)
