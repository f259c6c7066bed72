"""Pages: walking through them gives each row exactly once."""

from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.registry import database
from cluster.registry.database import Database
from cluster.registry.tables import File
from serving import pages
from serving.pages import Order
from serving.problems import ApiError

NUM_ROWS = 23


def row(number: int, project: str = "mine") -> File:
    return File(
        id=f"file-{project}-{number}", project=project, key_id=None, filename="a", purpose="batch",
        bytes=1, sha256="0" * 64, path="files/a", created_at=float(number // 5), expires_at=None,
        deleted_at=1.0 if number % 7 == 3 else None, status="processed", status_details=None,
        examples=None,
    )  # fmt: skip


@pytest.fixture(scope="module")
def opened(module_registry_url: str) -> Iterator[Database]:
    opened = database.open_(module_registry_url)
    with opened.write() as session:
        for number in range(NUM_ROWS):
            session.add_all([row(number), row(number, "theirs")])
            session.flush()
    yield opened
    opened.close()


def read(
    opened: Database, *, after: str | None = None, limit: int = 10, order: Order = "desc"
) -> pages.Page[File]:
    with opened.read() as session:
        return pages.page(
            session, File, within=[File.project == "mine"], where=[File.deleted_at.is_(None)],
            after=after, limit=limit, order=order,
        )  # fmt: skip


def there(order: Order) -> list[str]:
    ids = [f"file-mine-{number}" for number in range(NUM_ROWS) if number % 7 != 3]
    return ids if order == "asc" else ids[::-1]


@given(
    limits=st.lists(st.integers(1, 30), min_size=NUM_ROWS),
    order=st.sampled_from(Order.__args__),
)
def test_walking_with_any_limits_gives_each_row_once(
    opened: Database, limits: list[int], order: Order
) -> None:
    found: list[str] = []
    for limit in limits:
        page = read(opened, after=found[-1] if found else None, limit=limit, order=order)
        assert len(page.rows) <= limit
        assert page.rows  # or `has_more` was wrong
        found += [one.id for one in page.rows]
        assert page.has_more == (len(found) < len(there(order)))
        if not page.has_more:
            break
    assert found == there(order)


def test_a_page_that_ends_with_the_list_says_that_there_is_no_more() -> None:
    # The client asks again as long as has_more is true.
    body = pages.listed([{"id": "a"}, {"id": "b"}], has_more=False)
    assert (body["object"], body["first_id"], body["last_id"]) == ("list", "a", "b")
    assert body["has_more"] is False
    empty = pages.listed([], has_more=False)
    assert (empty["data"], empty["first_id"], empty["last_id"]) == ([], None, None)


def test_a_row_that_was_deleted_after_it_was_listed_still_marks_its_place(opened: Database) -> None:
    deleted = "file-mine-10"
    assert deleted not in there("asc")
    page = read(opened, after=deleted, limit=2, order="asc")
    assert [one.id for one in page.rows] == ["file-mine-11", "file-mine-12"]


@pytest.mark.parametrize("after", ["", "file-theirs-3", "file-mine-99", "a\0b", "' OR 1=1 --", "ü"])
def test_an_after_that_is_not_in_the_list_is_a_400(opened: Database, after: str) -> None:
    with pytest.raises(ApiError) as caught:
        read(opened, after=after)
    assert (caught.value.status, caught.value.param) == (400, "after")
