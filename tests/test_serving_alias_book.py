"""What aliases stand for and stood for, in a registry of each kind."""

import asyncio
import math
import threading
from collections.abc import Mapping

import pytest
from sqlalchemy import update

from cluster.errors import ConfigError
from cluster.registry import database
from cluster.registry.database import Database
from cluster.registry.tables import Model
from serving.alias_book import AliasBook
from serving.aliases import Aliases
from serving.problems import ApiError
from serving.rollout import Count, Evaluation, Guard, Rollout, Target

FIXED = ("base", "v6", "v7", "v8", "v9")


class Clock:
    """Time that passes when it is told to."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def book(registry: Database, clock: Clock) -> AliasBook:
    return AliasBook(registry, clock=clock)


def put(
    book: AliasBook,
    name: str = "bot",
    guard: Guard | None = None,
    project: str = "red",
    these: Mapping[str, float] | None = None,
    **weights: float,
) -> Rollout:
    rows = {**(these or {}), **weights}
    targets = [Target(model=model, weight=weight) for model, weight in rows.items()]
    return book.put(project, name, targets, guard, by="key", fixed=FIXED)


def back(book: AliasBook, revision: int | None = None) -> Rollout | None:
    return book.rollback("red", "bot", by="key", reason="bad", fixed=FIXED, revision=revision)


def weights(one: Rollout | None) -> dict[str, float]:
    assert one is not None
    return {target.model: target.weight for target in one.targets}


def test_an_alias_is_kept_with_its_history(book: AliasBook) -> None:
    guard = Guard(error_rate=0.1, min_requests=7)
    first = put(book, v7=1)
    second = put(book, guard=guard, v7=90, v8=10)
    assert (first.revision, second.revision) == (1, 2)
    assert book.get("red", "bot") == second == book.all()[0]
    assert second.guard == guard
    changes = book.changes("red", "bot")
    assert [(c.revision, c.reason, c.by) for c in changes] == [(2, "set", "key"), (1, "set", "key")]


def test_going_back_again_goes_back_further_and_never_forth(book: AliasBook) -> None:
    put(book, v6=1)
    put(book, v7=1)
    put(book, v8=1)
    assert weights(back(book)) == {"v7": 1}
    assert weights(back(book)) == {"v6": 1}
    with pytest.raises(ApiError) as raised:
        back(book)
    assert raised.value.status == 409
    put(book, v9=1)
    assert weights(back(book)) == {"v6": 1}
    assert [c.restored for c in book.changes("red", "bot")] == [1, None, 1, 2, None, None, None]


def test_going_back_passes_over_what_is_served_no_more(book: AliasBook) -> None:
    put(book, v6=1)
    put(book, v7=1)
    put(book, v8=1)
    done = book.rollback("red", "bot", by="key", reason="bad", fixed=("v6", "v8"))
    assert weights(done) == {"v6": 1}


def test_a_removed_alias_is_not_where_its_namesake_goes_back_to(book: AliasBook) -> None:
    put(book, v6=1)
    put(book, v7=1)
    book.remove("red", "bot", by="key")
    with pytest.raises(ApiError) as raised:
        book.get("red", "bot")
    assert raised.value.status == 404
    assert put(book, v8=1).revision == 4
    with pytest.raises(ApiError, match="nothing before"):
        back(book)


def test_of_many_who_go_back_at_once_one_does(book: AliasBook) -> None:
    put(book, v6=1)
    put(book, v7=1)
    done: list[Rollout | None] = []
    threads = [threading.Thread(target=lambda: done.append(back(book, 2))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(done) == 8
    assert [weights(one) for one in done if one is not None] == [{"v6": 1}]
    assert len(book.changes("red", "bot")) == 3


def test_many_who_set_a_new_alias_at_once_are_each_done_or_told_of_the_others(
    book: AliasBook,
) -> None:
    done: list[int] = []
    refused: list[ApiError] = []

    def set_() -> None:
        try:
            done.append(put(book, v7=1).revision)
        except ApiError as error:
            refused.append(error)

    threads = [threading.Thread(target=set_) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(done) + len(refused) == 8
    assert {error.code for error in refused} <= {"conflict"}
    assert sorted(done) == list(range(1, len(done) + 1))
    assert book.get("red", "bot").revision == len(done) == len(book.changes("red", "bot"))


def test_projects_have_names_of_their_own(book: AliasBook) -> None:
    put(book, v7=1)
    put(book, project="blue", v8=1)
    assert weights(book.get("red", "bot")) == {"v7": 1}
    assert [one.project for one in book.list_("blue")] == ["blue"]
    for act in (
        lambda: book.get("green", "bot"),
        lambda: book.remove("green", "bot", by="key"),
        lambda: book.rollback("green", "bot", by="key", reason="", fixed=FIXED),
    ):
        with pytest.raises(ApiError) as raised:
            act()
        assert raised.value.status == 404


@pytest.mark.parametrize("name", ["v7", "base", "ft:base:loray:x:12345678", "ft:"])
def test_an_alias_takes_no_models_name(book: AliasBook, name: str) -> None:
    with pytest.raises((ApiError, ConfigError)) as raised:
        put(book, name, v8=1)
    assert raised.value.status in (400, 409)


@pytest.mark.parametrize("name", ["", "a b", "../x", "x" * 129, "a//b", "a\0"])
def test_odd_names_are_refused(book: AliasBook, name: str) -> None:
    with pytest.raises(ConfigError, match="alias is"):
        put(book, name, v8=1)


def test_a_model_takes_no_aliass_name_and_does_not_go_under_one(book: AliasBook) -> None:
    put(book, v7=1)
    book.require_free("other")
    with pytest.raises(ApiError) as raised:
        book.require_free("bot")
    assert raised.value.status == 409
    book.require_unused("v8", project=None)
    book.require_unused("v7", project="blue")
    for project in ("red", None):
        with pytest.raises(ApiError) as raised:
            book.require_unused("v7", project=project)
        assert raised.value.status == 409


def test_versions_are_models_that_the_project_has(book: AliasBook, registry: Database) -> None:
    with registry.write() as session:
        for project in ("red", "blue"):
            session.add(
                Model(
                    name=f"ft:{project}", project=project, job_id=None, base="base", step=None,
                    path="/nowhere", created_at=1.0, deleted_at=None,
                )
            )  # fmt: skip
    put(book, these={"ft:red": 1, "v7": 1})
    for unknown in ("ft:blue", "v99", "a\0"):
        with pytest.raises(ApiError) as raised:
            put(book, these={unknown: 1, "v7": 1})
        assert (raised.value.status, raised.value.code) == (404, "model_not_found")
    with pytest.raises(ApiError, match="is an alias") as raised:
        put(book, "other", bot=1)
    assert raised.value.status == 400
    with registry.write() as session:
        session.execute(update(Model).values(deleted_at=2.0))
    put(book, v8=1)
    with pytest.raises(ApiError, match="nothing before"):
        back(book)


def test_counts_of_all_replicas_of_the_last_minute_are_added_up(
    book: AliasBook, clock: Clock
) -> None:
    one = put(book, v7=1, v8=1)
    count = Count(requests=3, errors=1, seconds=0.5)
    for replica in ("a", "b"):
        for span in (900, 990, 1000):
            book.add(replica, {("red", "bot", 1, "v7", span): count})
    book.add("a", {("red", "bot", 1, "v7", 1000): count, ("red", "bot", 2, "v8", 1000): count})
    assert book.last_minute(one) == {"v7": Count(requests=15, errors=5, seconds=2.5)}
    clock.now += 60
    assert book.last_minute(one) == {}
    clock.now += 86400
    book.forget()
    clock.now = 1000.0
    assert book.last_minute(one) == {}


QUALITY = Guard(evaluation=Evaluation(metric="quality", better="higher", max_fall=0.02))


def told(book: AliasBook, model: str, value: float, metric: str = "quality") -> Rollout:
    return book.score("red", "bot", model, metric, value, by="key", fixed=FIXED)


def test_a_version_whose_score_falls_is_left_and_the_history_says_why(book: AliasBook) -> None:
    put(book, guard=QUALITY, v7=1)
    assert told(book, "v7", 0.91).revision == 1
    put(book, guard=QUALITY, v7=90, v8=10)
    put(book, guard=QUALITY, v7=50, v8=50)
    assert told(book, "v8", 0.89).revision == 3  # just as much as is allowed
    done = told(book, "v8", 0.85)
    assert (weights(done), done.revision, done.guard) == ({"v7": 1}, 4, QUALITY)
    assert done == book.get("red", "bot")
    newest = book.changes("red", "bot")[0]
    assert (newest.by, newest.restored) == ("loray", 1)
    assert newest.reason == (
        "quality of v8 is 0.85, 0.06 worse than the 0.91 of v7; the guard allows 0.02"
    )
    for _ in range(2):  # the same again
        assert told(book, "v8", 0.85) == done
    assert len(book.changes("red", "bot")) == 4
    assert book.scores(done) == {"v7": 0.91, "v8": 0.85}


def test_a_version_is_also_left_when_the_one_before_it_turns_out_better(book: AliasBook) -> None:
    put(book, guard=QUALITY, v7=1)
    put(book, guard=QUALITY, v8=1)
    assert told(book, "v8", 0.5).revision == 2  # nothing to hold it against
    assert weights(told(book, "v7", 0.9)) == {"v7": 1}


def test_a_version_that_is_known_to_be_worse_does_not_begin(book: AliasBook) -> None:
    put(book, v7=1)
    put(book, guard=QUALITY, v6=1)
    told(book, "v6", 0.9)
    told(book, "v8", 0.1)  # before it answers anybody
    with pytest.raises(ApiError, match=r"quality of v8 is 0\.1") as raised:
        put(book, guard=QUALITY, v6=1, v8=1)
    assert (raised.value.status, raised.value.code) == (409, "evaluation_failed")
    assert book.get("red", "bot").revision == 2
    assert len(book.changes("red", "bot")) == 2
    told(book, "v8", 0.9)
    assert put(book, guard=QUALITY, v6=1, v8=1).revision == 3
    told(book, "v8", 0.1)
    assert put(book, v6=1, v8=1).revision == 5  # nobody guards that
    assert put(book, v6=1).revision == 6


def test_after_going_back_to_a_state_without_a_guard_a_version_can_be_told_of_again(
    book: AliasBook,
) -> None:
    put(book, v7=1)
    put(book, guard=QUALITY, v7=1, v8=1)
    told(book, "v7", 0.9)
    assert told(book, "v8", 0.1).guard is None
    with pytest.raises(ApiError, match=r"quality of v8 is 0\.1"):
        put(book, guard=QUALITY, v7=1, v8=1)
    told(book, "v8", 0.9)
    assert put(book, guard=QUALITY, v7=1, v8=1).revision == 4


def test_several_versions_are_left_at_once_where_each_is_worse(book: AliasBook) -> None:
    put(book, guard=QUALITY, v6=1)
    put(book, guard=QUALITY, v7=1)
    put(book, guard=QUALITY, v8=1)
    told(book, "v8", 0.1)
    assert told(book, "v6", 0.9).revision == 3  # v7, between them, was not told of
    assert weights(told(book, "v7", 0.5)) == {"v6": 1}
    reasons = [change.reason for change in book.changes("red", "bot", limit=2)]
    assert [reason.split(",")[0] for reason in reasons] == [
        "quality of v7 is 0.5", "quality of v8 is 0.1",
    ]  # fmt: skip


def test_a_state_that_is_served_no_more_is_passed_over_for_a_score(book: AliasBook) -> None:
    put(book, v6=1)
    put(book, v7=1)
    put(book, guard=QUALITY, v8=1)

    def told_(model: str, value: float) -> Rollout:
        served = ("v6", "v8")
        return book.score("red", "bot", model, "quality", value, by="key", fixed=served)

    told_("v8", 0.1)
    assert weights(told_("v6", 0.9)) == {"v6": 1}


def test_only_one_direction_is_worse(book: AliasBook) -> None:
    loss = Guard(evaluation=Evaluation(metric="loss", better="lower", max_fall=0.1))
    put(book, guard=loss, v7=1)
    put(book, guard=loss, v7=1, v8=1)
    told(book, "v7", 1.0, "loss")
    assert told(book, "v8", 0.2, "loss").revision == 2
    assert weights(told(book, "v8", 1.2, "loss")) == {"v7": 1}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_no_number_is_refused(book: AliasBook, value: float) -> None:
    one = put(book, guard=QUALITY, v7=1)
    with pytest.raises(ConfigError, match="finite"):
        told(book, "v7", value)
    assert book.scores(one) == {}


def test_scores_are_of_metrics_models_and_aliases_that_there_are(book: AliasBook) -> None:
    with pytest.raises(ApiError) as raised:
        told(book, "v7", 0.5)
    assert raised.value.status == 404
    put(book, v7=1)
    with pytest.raises(ApiError, match="no guard of it names one") as raised:
        told(book, "v7", 0.5)
    assert (raised.value.status, raised.value.param) == (400, "metric")
    one = put(book, guard=QUALITY, v7=1)
    for metric in ("Quality", "", "a\0", "x" * 1000):
        with pytest.raises(ApiError, match="its guards name quality") as raised:
            told(book, "v7", 0.5, metric)
        assert raised.value.status == 400
    for model in ("v99", "a\0", ""):
        with pytest.raises(ApiError) as raised:
            told(book, model, 0.5)
        assert (raised.value.status, raised.value.code) == (404, "model_not_found")
    with pytest.raises(ApiError, match="is an alias") as raised:
        told(book, "bot", 0.5)
    assert (raised.value.status, raised.value.param) == (400, "model")
    with pytest.raises(ApiError) as raised:
        book.score("blue", "bot", "v7", "quality", 0.5, by="key", fixed=FIXED)
    assert raised.value.status == 404
    assert book.scores(one) == {}


def test_a_namesake_of_a_removed_alias_starts_without_scores(book: AliasBook) -> None:
    put(book, guard=QUALITY, v7=1)
    told(book, "v7", 0.9)
    told(book, "v8", 0.1)
    book.remove("red", "bot", by="key")
    put(book, guard=QUALITY, v7=1)
    one = put(book, guard=QUALITY, v7=1, v8=1)
    assert book.scores(one) == {}


def test_what_was_told_outlives_the_process(registry_url: str) -> None:
    for is_first in (True, False):
        opened = database.open_(registry_url)
        book = AliasBook(opened, clock=Clock())
        if is_first:
            put(book, guard=QUALITY, v7=1)
            put(book, guard=QUALITY, v7=1, v8=1)
            told(book, "v7", 0.9)
        else:
            assert book.get("red", "bot").guard == QUALITY
            assert weights(told(book, "v8", 0.5)) == {"v7": 1}
        opened.close()


def test_of_many_who_tell_of_a_fall_at_once_one_goes_back(book: AliasBook) -> None:
    put(book, guard=QUALITY, v6=1)
    put(book, guard=QUALITY, v7=1)
    put(book, guard=QUALITY, v8=1)
    told(book, "v7", 0.9)
    done: list[Rollout] = []
    threads = [
        threading.Thread(target=lambda: done.append(told(book, "v8", 0.1))) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [weights(one) for one in done] == [{"v7": 1}] * 8
    assert [change.revision for change in book.changes("red", "bot")] == [4, 3, 2, 1]


async def _two(book: AliasBook, clock: Clock) -> tuple[Aliases, Aliases]:
    both = [
        Aliases(book=book, fixed=lambda: FIXED, clock=clock, replica=name) for name in ("a", "b")
    ]
    for one in both:
        await one.step()
    return both[0], both[1]


def test_two_replicas_agree_on_everybody(book: AliasBook, clock: Clock) -> None:
    async def check() -> None:
        first, second = await _two(book, clock)
        await first.put("red", "bot", [Target(model="v7", weight=1)], None, by="key")
        assert first.find("red", "bot") is not None  # at once
        assert second.find("red", "bot") is None
        await second.step()
        await first.put(
            "red", "bot", [Target(model="v7", weight=3), Target(model="v8", weight=1)], None, by="k"
        )
        await second.step()
        here, there = first.find("red", "bot"), second.find("red", "bot")
        assert here is not None
        assert there is not None
        users = [f"user-{number}" for number in range(2000)]
        assert [here.choose(user) for user in users] == [there.choose(user) for user in users]

    asyncio.run(check())


def test_a_new_alias_is_found_before_a_replica_reads_the_next_time(
    book: AliasBook, clock: Clock
) -> None:
    async def check() -> None:
        first, second = await _two(book, clock)
        await first.put("red", "bot", [Target(model="v7", weight=1)], None, by="key")
        assert second.find("red", "bot") is None
        assert await second.find_new("blue", "bot") is None
        assert await second.find_new("red", "a\0") is None
        assert weights(await second.find_new("red", "bot")) == {"v7": 1}
        assert weights(second.find("red", "bot")) == {"v7": 1}

    asyncio.run(check())


def test_one_of_two_replicas_goes_back_once_for_what_both_have_seen(
    book: AliasBook, clock: Clock
) -> None:
    async def check() -> None:
        put(book, v7=1)
        put(book, guard=Guard(error_rate=0.1, min_requests=20), v7=1, v8=1)
        both = await _two(book, clock)
        for aliases in both:
            one = aliases.find("red", "bot")
            assert one is not None
            for number in range(12):  # each alone has seen too few
                aliases.count(one, "v7", seconds=0.1, is_fault=False)
                aliases.count(one, "v8", seconds=0.1, is_fault=number % 2 == 0)
        await asyncio.gather(*(aliases.step() for aliases in both))
        await asyncio.gather(*(aliases.step() for aliases in both))
        await asyncio.gather(*(aliases.step() for aliases in both))
        changes = book.changes("red", "bot")
        assert [change.revision for change in changes] == [3, 2, 1]
        assert changes[0].by == "loray"
        assert changes[0].reason.startswith("12 of 24 requests to v8 failed")
        for aliases in both:
            assert weights(aliases.find("red", "bot")) == {"v7": 1}

    asyncio.run(check())


def test_an_alias_that_cannot_go_back_stays(book: AliasBook, clock: Clock) -> None:
    async def check() -> None:
        one = put(book, guard=Guard(error_rate=0.1, min_requests=1), v7=1)
        first, _ = await _two(book, clock)
        first.count(one, "v7", seconds=0.1, is_fault=True)
        for _ in range(3):
            await first.step()
        assert weights(first.find("red", "bot")) == {"v7": 1}
        assert len(book.changes("red", "bot")) == 1

    asyncio.run(check())
