"""Answers held against the stock client's own models: which are lenient, and this is not."""

import json
from typing import Any

from pydantic import BaseModel, TypeAdapter


def exact(kind: Any, raw: Any, *, null: str = "", absent: str = "") -> Any:
    """What was answered, in a model of the client's, whose types it has to the letter.

    null: the fields that are null, and no others, such as `error choices.logprobs`. absent: those
    that the client knows and the answer does not have. An item of a list stands as its list.
    """
    found = TypeAdapter(kind).validate_json(json.dumps(raw), strict=True)
    nulls, gone = set[str](), set[str]()
    _walk(found, raw, "", nulls, gone)
    assert nulls == set(null.split()), nulls
    assert gone == set(absent.split()), gone
    return found


def _walk(found: Any, raw: Any, path: str, nulls: set[str], gone: set[str]) -> None:
    if raw is None:
        nulls.add(path)
    elif isinstance(found, BaseModel):
        for name, field in type(found).model_fields.items():
            place = f"{path}.{name}" if path else name
            key = field.alias or name
            if key not in raw:
                gone.add(place)
            else:
                _walk(getattr(found, name), raw[key], place, nulls, gone)
    elif isinstance(found, list):
        for one, its in zip(found, raw, strict=True):
            _walk(one, its, path, nulls, gone)
