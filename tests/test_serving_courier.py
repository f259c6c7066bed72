"""Events on their way, to a real server, checked by the stock client."""

import base64
import json
import logging
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import openai
import pytest
from openai.types.webhooks import FineTuningJobSucceededWebhookEvent
from server import until
from sqlalchemy import select

from cluster.registry import database, webhooks
from cluster.registry.database import Database
from cluster.registry.tables import Delivery
from serving.courier import WAITS_S, Courier
from serving.webhook import Webhook

SECRET = "whsec_" + base64.b64encode(b"a secret of thirty-two bytes....").decode()


@dataclass
class Receiver:
    """A server that keeps what it gets."""

    url: str
    got: list[tuple[bytes, dict[str, str]]] = field(default_factory=list)
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    before: Callable[[], object] = lambda: None


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            found.got.append((body, dict(self.headers.items())))
            found.before()
            self.send_response(found.status)
            for name, value in found.headers.items():
                self.send_header(name, value)
            self.end_headers()

        do_GET = do_POST

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = False
    found = Receiver(f"http://127.0.0.1:{server.server_port}/hook")
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield found
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Database]:
    found = database.open_(database.sqlite_url(tmp_path / "registry.db"))
    yield found
    found.close()


class Clock:
    """Time that passes when it is told to."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def hook(tmp_path: Path, receiver: Receiver) -> Webhook:
    (tmp_path / "secret").write_text(f"{SECRET}\n")
    return Webhook(url=receiver.url, secret_file=str(tmp_path / "secret"))


def enqueue(opened: Database, *urls: str, project: str = "red") -> None:
    with opened.write() as session:
        webhooks.enqueue(
            session,
            project=project,
            type="fine_tuning.job.succeeded",
            data_id="ftjob-7",
            now=1000.0,
            urls=urls,
        )


def rows(opened: Database) -> list[Delivery]:
    with opened.read() as session:
        return [*session.scalars(select(Delivery).order_by(Delivery.number))]


def step(courier: Courier) -> None:
    """Make the tries that are due, and wait for their ends."""
    courier.step()
    for thread in [*courier._busy.values()]:
        thread.join(30)
        assert not thread.is_alive()


def test_the_stock_client_unwraps_what_is_delivered(
    opened: Database, hook: Webhook, receiver: Receiver
) -> None:
    enqueue(opened, hook.url)
    courier = Courier(database=opened, hooks=[hook])
    stop = threading.Event()
    thread = threading.Thread(target=courier.run, args=(stop,))
    thread.start()
    until(lambda: rows(opened)[0].done_at is not None)
    stop.set()
    thread.join()
    [(body, headers)] = receiver.got
    client = openai.OpenAI(api_key="none", webhook_secret=SECRET)
    event: Any = client.webhooks.unwrap(body, headers)
    assert isinstance(event, FineTuningJobSucceededWebhookEvent)
    assert (event.data.id, event.object, event.created_at) == ("ftjob-7", "event", 1000)
    assert event.id == headers["webhook-id"] == rows(opened)[0].id
    assert rows(opened)[0].outcome == "status 200"
    with pytest.raises(openai.InvalidWebhookSignatureError):
        client.webhooks.unwrap(body.replace(b"ftjob-7", b"ftjob-8"), headers)
    assert "Authorization" not in headers


def test_a_delivery_is_tried_again_later_and_later_and_then_given_up(
    opened: Database, hook: Webhook, receiver: Receiver
) -> None:
    enqueue(opened, hook.url)
    receiver.status = 500
    clock = Clock()
    courier = Courier(database=opened, hooks=[hook], clock=clock)
    for number, wait in enumerate((*WAITS_S, 0), start=1):
        step(courier)
        assert len(receiver.got) == number
        step(courier)  # it is not due
        assert len(receiver.got) == number
        clock.now += wait
    assert clock.now - 1000 < 86400
    clock.now += 1e6
    step(courier)
    assert len(receiver.got) == 8
    [row] = rows(opened)
    assert row.outcome == "status 500; given up after 8 tries"
    assert len({headers["webhook-id"] for _, headers in receiver.got}) == 1
    assert len({body for body, _ in receiver.got}) == 1
    assert len({headers["webhook-signature"] for _, headers in receiver.got}) == 8  # of its time


def test_what_a_dead_courier_had_begun_is_sent_again_under_the_same_id(
    opened: Database, hook: Webhook, receiver: Receiver
) -> None:
    enqueue(opened, hook.url)
    clock = Clock()
    dead = Courier(database=opened, hooks=[hook], clock=clock)
    assert dead._claim() is not None  # and it dies here, or right after the receiver's answer
    courier = Courier(database=opened, hooks=[hook], clock=clock)
    step(courier)
    assert receiver.got == []
    clock.now += WAITS_S[0]
    step(courier)
    assert [headers["webhook-id"] for _, headers in receiver.got] == [rows(opened)[0].id]
    assert rows(opened)[0].done_at == clock.now
    enqueue(opened, hook.url)
    with opened.write() as session:  # it died in the last try
        session.scalars(select(Delivery).where(Delivery.done_at.is_(None))).one().tries = 8
    step(courier)
    assert rows(opened)[1].outcome == "given up after 8 tries"
    assert len(receiver.got) == 1


def test_two_couriers_make_one_try(opened: Database, hook: Webhook, receiver: Receiver) -> None:
    for _ in range(5):
        enqueue(opened, hook.url)
    couriers = [Courier(database=opened, hooks=[hook]) for _ in range(3)]
    stop = threading.Event()
    threads = [threading.Thread(target=courier.run, args=(stop,)) for courier in couriers]
    for thread in threads:
        thread.start()
    until(lambda: all(row.done_at for row in rows(opened)))
    stop.set()
    for thread in threads:
        thread.join()
    assert sorted(h["webhook-id"] for _, h in receiver.got) == sorted(r.id for r in rows(opened))


def test_a_redirect_is_not_followed(opened: Database, hook: Webhook, receiver: Receiver) -> None:
    enqueue(opened, hook.url)
    receiver.status, receiver.headers = 302, {"location": f"{hook.url}/elsewhere"}
    step(Courier(database=opened, hooks=[hook]))
    assert len(receiver.got) == 1
    assert (rows(opened)[0].outcome, rows(opened)[0].done_at) == ("status 302", None)


def test_a_slow_destination_keeps_no_other_waiting(
    opened: Database, hook: Webhook, receiver: Receiver
) -> None:
    other = Webhook(url=f"{hook.url}2", secret_file=hook.secret_file)
    may_go = threading.Event()
    receiver.before = lambda: receiver.got[-1][1]["webhook-id"] == slow and may_go.wait(30)
    enqueue(opened, hook.url, hook.url, other.url)
    slow = rows(opened)[0].id
    courier = Courier(database=opened, hooks=[hook, other])
    courier.step()
    until(lambda: rows(opened)[2].done_at is not None)
    courier.step()
    assert [row.done_at is None for row in rows(opened)] == [True, True, False]
    assert rows(opened)[1].tries == 0  # one at a time
    may_go.set()

    def is_over() -> bool:
        courier.step()
        return all(row.done_at for row in rows(opened))

    until(is_over)


def test_only_destinations_of_the_serving_file_are_asked(
    opened: Database, hook: Webhook, receiver: Receiver
) -> None:
    enqueue(opened, f"{hook.url}/other")
    enqueue(opened, hook.url, project="blue")
    red = Webhook(url=hook.url, secret_file=hook.secret_file, projects=("red",))
    step(Courier(database=opened, hooks=[red]))
    assert receiver.got == []
    assert all("not in the serving file" in (row.outcome or "") for row in rows(opened))


def test_a_destination_that_is_away_and_a_secret_that_is_gone_count_as_tries(
    opened: Database, hook: Webhook, tmp_path: Path
) -> None:
    away = Webhook(url="http://127.0.0.1:9/", secret_file=hook.secret_file)
    gone = Webhook(url=hook.url, secret_file=str(tmp_path / "nothing"))
    enqueue(opened, away.url, gone.url)
    step(Courier(database=opened, hooks=[away, gone]))
    first, second = rows(opened)
    assert (first.outcome, first.tries) == ("ConnectionError", 1)
    assert "cannot be read" in (second.outcome or "")


def test_bodies_and_secrets_are_not_logged(
    opened: Database, hook: Webhook, receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    receiver.status = 500
    enqueue(opened, hook.url)
    step(Courier(database=opened, hooks=[hook]))
    words = [
        SECRET,
        SECRET.removeprefix("whsec_"),
        "ftjob-7",
        receiver.got[0][1].get("webhook-signature", "?"),
    ]
    ours = [record for record in caplog.records if record.name.startswith(("serving", "cluster"))]
    assert len(ours) == 1
    assert not any(word in caplog.text for word in words)


def test_an_event_is_kept_with_the_transaction_it_is_of(opened: Database) -> None:
    def fail() -> None:
        with opened.write() as session:
            webhooks.enqueue(
                session,
                project="red",
                type="fine_tuning.job.failed",
                data_id="ftjob-8",
                now=5.5,
                urls=["https://a.example/", "https://b.example/"],
            )
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert rows(opened) == []
    enqueue(opened, "https://a.example/", "https://b.example/")
    first, second = rows(opened)
    assert first.id != second.id
    assert json.loads(first.body)["id"] == first.id
