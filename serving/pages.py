"""Lists that are read page by page, each row once: `after` is the id of the last row that was read.

A row's place is its `number`, not its time: two rows of the same second have different places, and
rows that come or go between two pages move no other row.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Generic, Literal, TypeAlias, TypeVar

from fastapi import Query
from sqlalchemy import ColumnElement, select
from sqlalchemy.orm import Mapped, Session

from cluster.registry.tables import File, Job, JobCheckpoint, JobEvent
from serving import problems

Row = TypeVar("Row", File, Job, JobEvent, JobCheckpoint)
Order = Literal["asc", "desc"]
After: TypeAlias = Annotated[
    str | None,
    Query(max_length=64, description="The id of the last object of the page before this one."),
]
"""A route's parameter `after`."""
_ID = re.compile(r"[A-Za-z0-9_:.-]+")  # PostgreSQL takes no NUL


@dataclass(frozen=True, kw_only=True, slots=True)
class Page(Generic[Row]):
    """Rows that follow each other, and whether more follow them."""

    rows: Sequence[Row]
    has_more: bool


def page(
    session: Session,
    table: type[Row],
    *,
    within: Sequence[ColumnElement[bool]],
    where: Sequence[ColumnElement[bool]] = (),
    after: str | None = None,
    limit: int,
    order: Order = "desc",
) -> Page[Row]:
    """Up to `limit` rows, by default the newest first.

    within: what the caller may know of, his project's or a job's rows; `after` can be any of them,
    also one that `where` leaves out, since it may have been deleted after it was listed.
    Raises ApiError (400) for an `after` that is none of them.
    """
    number: Mapped[int] = table.number
    conditions = [*within, *where]
    if after is not None:
        named = select(number).where(table.id == after, *within)
        start = session.scalar(named) if _ID.fullmatch(after) else None
        if start is None:
            raise problems.invalid("after", "there is no object of this id in the list")
        conditions.append(number > start if order == "asc" else number < start)
    statement = select(table).where(*conditions).limit(limit + 1)
    statement = statement.order_by(number.asc() if order == "asc" else number.desc())
    rows = session.scalars(statement).all()
    return Page(rows=rows[:limit], has_more=len(rows) > limit)


def listed(objects: Sequence[Any], *, has_more: bool) -> dict[str, Any]:
    """The body of a page, of objects with an `id`."""
    return {
        "object": "list",
        "data": objects,
        "first_id": objects[0]["id"] if objects else None,
        "last_id": objects[-1]["id"] if objects else None,
        "has_more": has_more,
    }
