"""Where the service may send events: the operator's list, and how what is sent is signed."""

import base64
import hashlib
import hmac
import ipaddress
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from cluster.errors import ConfigError

EventType = Literal[
    "fine_tuning.job.succeeded", "fine_tuning.job.failed", "fine_tuning.job.cancelled"
]
_PREFIX = "whsec_"
_MAX_URL_CHARS = 1024
_MAX_SECRET_FILE_BYTES = 4096
_SECRET_BYTES = range(24, 65)
"""Standard Webhooks, "Signature scheme"."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Webhook:
    """A destination of events."""

    url: str
    """https://...; http:// to an address of this machine's loopback alone."""
    secret_file: str
    """File with the secret `whsec_...` that signs what is sent here."""
    projects: tuple[str, ...] | None = None
    """Whose events are sent here; null: those of all projects."""
    events: tuple[EventType, ...] | None = None
    """Which of them; null: all."""

    def __post_init__(self) -> None:
        why = _fault(self.url)
        if why is not None:  # the URL is not shown whole: there may be a token in it
            raise ConfigError(
                f"webhooks: url {_origin(self.url)!r} {why}; allowed: https://HOST/PATH, or "
                "http://127.0.0.1:PORT/PATH"
            )
        if not self.secret_file.strip():
            raise ConfigError("webhooks: secret_file is empty; name a file with a secret whsec_...")

    def takes(self, project: str, type: str) -> bool:
        """Whether an event of a project is sent here."""
        is_of_project = self.projects is None or project in self.projects
        return is_of_project and (self.events is None or type in self.events)

    def secret(self) -> bytes:
        """What signs. Raises ConfigError for a file that holds no secret."""
        where = f"webhooks: secret_file {self.secret_file}"
        try:
            with Path(self.secret_file).open("rb") as file:
                text = file.read(_MAX_SECRET_FILE_BYTES).decode().strip()
        except (OSError, ValueError) as error:
            raise ConfigError(f"{where} cannot be read ({type(error).__name__})") from None
        try:
            secret = base64.b64decode(text.removeprefix(_PREFIX), validate=True)
        except ValueError:
            secret = b""
        if not text.startswith(_PREFIX) or len(secret) not in _SECRET_BYTES:
            raise ConfigError(
                f"{where} holds no secret; allowed: {_PREFIX} and {_SECRET_BYTES.start} to "
                f"{_SECRET_BYTES.stop - 1} bytes in base64, as `openssl rand -base64 32` makes them"
            )
        return secret


def destinations(hooks: Sequence[Webhook], *, project: str, type: str) -> list[str]:
    """The URLs that an event is sent to, each once."""
    return list(dict.fromkeys(hook.url for hook in hooks if hook.takes(project, type)))


def signed(id: str, body: str, *, secret: bytes, now: float) -> Mapping[str, str]:
    """The headers that prove who sent a body and when (Standard Webhooks, `v1`)."""
    timestamp = str(int(now))
    content = f"{id}.{timestamp}.{body}".encode()
    signature = base64.b64encode(hmac.new(secret, content, hashlib.sha256).digest()).decode()
    return {
        "webhook-id": id,
        "webhook-timestamp": timestamp,
        "webhook-signature": f"v1,{signature}",
    }


def _fault(url: str) -> str | None:
    """What is wrong with a destination."""
    if len(url) > _MAX_URL_CHARS:
        return f"has {len(url)} characters, more than {_MAX_URL_CHARS}"
    if not url.isascii() or not url.isprintable() or " " in url:
        return "has characters that must be escaped"
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        return "is not a URL"
    if not host:
        return "has no host"
    if parts.username is not None or parts.password is not None or parts.fragment:
        return "has a user, a password or a fragment"
    if parts.scheme == "https":
        return None
    if parts.scheme != "http":
        return "is not of https"
    return None if _is_loopback(host) else "sends what it sends in the clear"


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _origin(url: str) -> str:
    try:
        parts = urlsplit(url)
        return f"{parts.scheme}://{parts.hostname or ''}"[:200]
    except ValueError:
        return url[:20]
