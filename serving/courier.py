"""Delivers events to the operator's webhooks, at least once each.

A try is written down before it is made: whoever dies in the middle of one leaves a delivery that
is due again later, and of two couriers one makes the try. What is sent and where is in the
registry; where it may be sent, and what signs it, in the serving file.

What is not covered: the order. An event that had to be tried twice comes after later ones.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import requests
from sqlalchemy import select, update

from cluster.errors import ConfigError, RegistryError
from cluster.registry.database import Database
from cluster.registry.tables import Delivery
from serving.webhook import Webhook, signed

log = logging.getLogger(__name__)

WAITS_S = (5.0, 30.0, 120.0, 600.0, 3600.0, 4 * 3600.0, 18 * 3600.0)
"""After each try but the last: 8 tries within a day."""
_LAST_S = 60.0
"""After the last try, when it is known that nobody came back from it."""
_LOOK_S = 0.5
_TIMEOUT_S = (5.0, 10.0)
"""To connect, and between two bytes of an answer's head."""
_AT_ONCE = 8
_STOP_S = 5.0


@dataclass(kw_only=True, slots=True, eq=False)
class Courier:
    """The loop. Each destination is asked once at a time, so a slow one keeps no other waiting."""

    database: Database
    hooks: Sequence[Webhook]
    clock: Callable[[], float] = time.time
    session: Callable[[], requests.Session] = requests.Session
    """A client for one try."""
    waits_s: Sequence[float] = WAITS_S
    _busy: dict[str, threading.Thread] = field(default_factory=dict)
    """URL -> who asks it now."""

    def run(self, stop: threading.Event) -> None:
        """Deliver until told to stop."""
        while not stop.is_set():
            try:
                self.step()
            except RegistryError as error:  # it comes back
                log.warning("courier error=%r", str(error)[:500])
            stop.wait(_LOOK_S)
        deadline = time.monotonic() + _STOP_S
        for thread in list(self._busy.values()):
            thread.join(max(0.0, deadline - time.monotonic()))

    def step(self) -> None:
        """Begin the tries that are due. Raises RegistryError."""
        for url, thread in list(self._busy.items()):
            if not thread.is_alive():
                del self._busy[url]
        while len(self._busy) < _AT_ONCE:
            found = self._claim()
            if found is None:
                return
            delivery, hook = found
            thread = threading.Thread(
                target=self._deliver, args=(delivery, hook), name="webhook", daemon=True
            )
            self._busy[delivery.url] = thread
            thread.start()

    def _claim(self) -> tuple[Delivery, Webhook] | None:
        """The next delivery that is due, whose try is written down; those that cannot be made any
        more are closed on the way."""
        while True:
            now = self.clock()
            due = (
                select(Delivery)
                .where(Delivery.done_at.is_(None), Delivery.due_at <= now)
                .where(Delivery.url.not_in(list(self._busy)))
                .order_by(Delivery.due_at, Delivery.number)
                .limit(1)
            )
            with self.database.read() as session:
                seen = session.scalars(due).first()
            if seen is None:
                return None
            hook = next((hook for hook in self.hooks if _allows(hook, seen)), None)
            if hook is None:
                self._close(seen, "not sent: the destination is not in the serving file any more")
            elif seen.tries >= self._max_tries:
                self._close(seen, f"given up after {seen.tries} tries")
            elif self._write_try(seen, now):
                return seen, hook

    @property
    def _max_tries(self) -> int:
        return len(self.waits_s) + 1

    def _write_try(self, seen: Delivery, now: float) -> bool:
        """Whether this try is ours."""
        wait = self.waits_s[seen.tries] if seen.tries < len(self.waits_s) else _LAST_S
        with self.database.write() as session:
            return bool(
                session.execute(
                    update(Delivery)
                    .where(Delivery.id == seen.id, Delivery.tries == seen.tries)
                    .where(Delivery.done_at.is_(None))
                    .values(tries=seen.tries + 1, due_at=now + wait)
                    .returning(Delivery.id)
                ).all()
            )

    def _close(self, seen: Delivery, outcome: str) -> None:
        log.warning("webhook=%s outcome=%r", seen.id, outcome)
        with self.database.write() as session:
            session.execute(
                update(Delivery)
                .where(Delivery.id == seen.id, Delivery.done_at.is_(None))
                .values(done_at=self.clock(), outcome=outcome)
            )

    def _deliver(self, seen: Delivery, hook: Webhook) -> None:
        """One try, and what came of it."""
        number = seen.tries + 1
        is_done, outcome = self._try(seen, hook)
        is_last = number >= self._max_tries
        if is_last and not is_done:
            outcome = f"{outcome}; given up after {number} tries"
        log.info("webhook=%s try=%d outcome=%r", seen.id, number, outcome)
        values: dict[str, object] = {"outcome": outcome}
        if is_done or is_last:
            values["done_at"] = self.clock()
        try:
            with self.database.write() as session:
                session.execute(
                    update(Delivery)
                    .where(Delivery.id == seen.id, Delivery.done_at.is_(None))
                    .values(values)
                )
        except RegistryError as error:  # it is sent again: at least once
            log.warning("webhook=%s error=%r", seen.id, str(error)[:500])

    def _try(self, seen: Delivery, hook: Webhook) -> tuple[bool, str]:
        """Whether it was taken, and what was answered."""
        try:
            headers = signed(seen.id, seen.body, secret=hook.secret(), now=self.clock())
            with (
                self.session() as session,
                session.post(
                    seen.url,
                    data=seen.body.encode(),
                    headers={
                        **headers,
                        "Content-Type": "application/json",
                        "User-Agent": "LoRay",
                    },
                    timeout=_TIMEOUT_S,
                    allow_redirects=False,
                    stream=True,  # the answer's body is not read
                ) as answer,
            ):
                return 200 <= answer.status_code < 300, f"status {answer.status_code}"
        except ConfigError as error:
            return False, str(error)[:200]
        except (requests.RequestException, ValueError) as error:  # its text may hold the URL
            return False, type(error).__name__


def _allows(hook: Webhook, delivery: Delivery) -> bool:
    is_of_project = hook.projects is None or delivery.project in hook.projects
    return hook.url == delivery.url and is_of_project
