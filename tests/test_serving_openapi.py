"""Whatever /openapi.json allows, and what it does not, is answered as the contract says."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from server import Running, serving
from test_training_adapter import make_adapter

OPERATIONS = 23
"""That the API has; more is good news for this number."""


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Iterator[Running]:
    directory = tmp_path_factory.mktemp("openapi")
    first = make_adapter(directory / "first", tiny_base, seed=1)
    tuning = {"storage": str(directory / "runs")}
    adapters = [{"name": "first", "path": str(first)}]
    with serving(directory, tiny_base, adapters=adapters, tuning=tuning) as server:
        yield server


@pytest.mark.parametrize("mode", list(GenerationMode))
def test_every_operation_answers_in_shape(running: Running, mode: GenerationMode) -> None:
    schema: Any = schemathesis.openapi.from_url(f"{running.url}/openapi.json")
    operations = [found.ok() for found in schema.get_all_operations()]
    assert len(operations) >= OPERATIONS
    for operation in operations:
        if mode is GenerationMode.NEGATIVE and not operation.body:
            continue  # any text is a path's parameter
        statuses = exercise(operation.as_strategy(generation_mode=mode))
        print(operation.label, sorted(statuses))
    assert running.replica.service.is_healthy()


def exercise(cases: Any) -> set[int]:
    """The statuses of requests of one operation, each of which is answered in shape."""
    statuses: set[int] = set()

    @settings(
        max_examples=40, deadline=None, database=None, derandomize=True,
        phases=[Phase.generate], suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(case=cases, is_known=st.booleans())
    def check(case: Any, is_known: bool) -> None:
        if isinstance(case.body, dict) and "model" in case.body and is_known:
            case.body["model"] = "first"  # some that get as far as the engine
            case.body["max_tokens"] = 4
        response = case.call(timeout=60)
        statuses.add(response.status_code)
        assert response.status_code < 500, response.text
        assert response.headers["x-request-id"]
        if response.status_code >= 400 and case.method != "HEAD":
            assert set(response.json()["error"]) == {"message", "type", "param", "code"}

    check()
    return statuses
