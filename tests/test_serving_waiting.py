"""The fair queue: nothing lost, nobody starved, every bound kept."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.waiting import Full, Waiting


def make(*, items: int = 1000, key: int = 1000, model: int = 1000) -> Waiting[int]:
    return Waiting(max_items=items, max_per_key=key, max_per_model=model, clock=lambda: 0.0)


def drain(queue: Waiting[int]) -> list[int]:
    found: list[int] = []
    while (item := queue.take()) is not None:
        found.append(item)
    return found


@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("xy"), st.integers(1, 100))))
def test_everything_comes_out_once_and_each_flow_in_its_order(
    rows: list[tuple[str, str, int]],
) -> None:
    queue = make()
    for number, (key, model, cost) in enumerate(rows):
        queue.put(number, key=key, model=model, cost=cost)
    found = drain(queue)
    assert sorted(found) == list(range(len(rows)))
    assert len(queue) == 0
    for flow in {row[:2] for row in rows}:
        own = [number for number in found if rows[number][:2] == flow]
        assert own == sorted(own)


def test_a_late_request_does_not_wait_behind_a_flood() -> None:
    queue = make()
    for number in range(900):
        queue.put(number, key="flood", model="m", cost=50)
    for _ in range(100):
        queue.take()
    queue.put(1000, key="quiet", model="m", cost=50)
    assert 1000 in [queue.take(), queue.take()]


def test_two_flows_share_by_cost() -> None:
    queue = make()
    for number in range(300):
        queue.put(number, key="small", model="m", cost=10)
        queue.put(1000 + number, key="large", model="m", cost=30)
    first = [queue.take() for _ in range(200)]
    large = sum(item is not None and item >= 1000 for item in first)
    assert abs(30 * large - 10 * (200 - large)) <= 40


def test_one_model_cannot_starve_another_of_the_same_key() -> None:
    queue = make()
    for number in range(100):
        queue.put(number, key="k", model="busy", cost=10)
    queue.put(500, key="k", model="quiet", cost=10)
    assert 500 in [queue.take(), queue.take()]


@pytest.mark.parametrize("bound", ["items", "key", "model"])
def test_a_full_queue_says_so_and_when_to_come_again(bound: str) -> None:
    queue = make(**{bound: 3})
    for number in range(3):
        queue.put(number, key="k", model="m", cost=1)
    with pytest.raises(Full, match="is full: 3 requests wait") as full:
        queue.put(4, key="k", model="m", cost=1)
    assert full.value.retry_after_s >= 1
    queue.take()
    queue.put(5, key="k", model="m", cost=1)


def test_what_does_not_fit_is_passed_over_but_not_for_ever() -> None:
    queue = make()
    queue.put(-1, key="k", model="large", cost=1)
    for number in range(500):
        queue.put(number, key="k", model="small", cost=1)
    taken = 0
    while queue.take(lambda item: item >= 0) is not None:
        taken += 1
    assert 60 <= taken <= 70
    assert queue.take() == -1
    assert queue.take() is not None


def test_expired_and_removed_items_are_gone() -> None:
    now = [0.0]
    queue: Waiting[str] = Waiting(max_items=9, max_per_key=9, max_per_model=9, clock=lambda: now[0])
    queue.put("soon", key="k", model="m", cost=1, deadline=5.0)
    queue.put("late", key="k", model="m", cost=1, deadline=50.0)
    queue.put("never", key="k", model="m", cost=1)
    gone = "gone"
    queue.put(gone, key="k", model="m", cost=1)
    assert queue.remove(gone)
    assert not queue.remove(gone)
    now[0] = 5.0
    assert queue.expired() == ["soon"]
    assert queue.expired() == []
    assert len(queue) == 2
    assert [queue.take(), queue.take(), queue.take()] == ["late", "never", None]
