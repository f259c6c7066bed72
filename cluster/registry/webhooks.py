"""Events that others are to be told of: written in the transaction in which they happen."""

import json
import secrets
from collections.abc import Sequence

from sqlalchemy.orm import Session

from cluster.registry.tables import Delivery


def enqueue(
    session: Session, *, project: str, type: str, data_id: str, now: float, urls: Sequence[str]
) -> None:
    """Have an event be delivered to each of `urls`, if the caller's transaction is kept.

    type: such as `fine_tuning.job.succeeded`. data_id: of what it happened to. Each destination
    gets an event of its own, whose id is the same in every try.
    """
    for url in urls:
        id_ = f"evt_{secrets.token_hex(12)}"
        event = {
            "id": id_,
            "object": "event",
            "type": type,
            "created_at": int(now),
            "data": {"id": data_id},
        }
        session.add(
            Delivery(
                id=id_,
                project=project,
                url=url,
                body=json.dumps(event, separators=(",", ":")),
                created_at=now,
                due_at=now,
                tries=0,
            )
        )
