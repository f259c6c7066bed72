"""Who of several processes does a thing that only one may do, by a row of the registry."""

from sqlalchemy import select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from cluster.errors import superseded
from cluster.registry.database import Database
from cluster.registry.tables import Lease


def take(database: Database, name: str, *, holder: str, now: float, for_s: float) -> int | None:
    """Take or keep a lease; its token, or None where another holds it.

    The token grows with each new holder. The holders' clocks must agree to well within `for_s`.
    """
    try:
        with database.write() as session:
            row = session.scalar(select(Lease).where(Lease.name == name).with_for_update())
            if row is None:
                session.add(Lease(name=name, holder=holder, token=1, expires_at=now + for_s))
                return 1
            if row.holder != holder:
                if row.expires_at > now:
                    return None
                row.holder, row.token = holder, row.token + 1
            row.expires_at = now + for_s
            return row.token
    except IntegrityError:  # two made the row at once
        return None


def require(session: Session, name: str, token: int) -> None:
    """Hold the lease until this transaction ends. Raises FencedError for an older token."""
    row = session.scalar(select(Lease).where(Lease.name == name).with_for_update())
    if row is None or row.token != token:
        raise superseded(f"lease {name}: nothing was written")


def give_back(database: Database, name: str, token: int) -> None:
    """Let another take it at once."""
    with database.write() as session:
        row = session.scalar(select(Lease).where(Lease.name == name).with_for_update())
        if row is not None and row.token == token:
            row.expires_at = 0.0
