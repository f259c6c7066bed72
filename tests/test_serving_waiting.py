"""The fair queue: nothing lost, nobody starved, every bound kept."""

import pickle
import tracemalloc
from collections import Counter, defaultdict, deque
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from serving.waiting import Full, Waiting

KEYS, MODELS = st.sampled_from("abc"), st.sampled_from("xyz")
COSTS = st.integers(0, 100)
FLOWS = st.lists(st.tuples(KEYS, MODELS, COSTS))


class Item:
    """Equal to no other."""


def make(*, items: int = 2000, key: int = 2000, model: int = 2000) -> Waiting[Any]:
    return Waiting(max_items=items, max_per_key=key, max_per_model=model, clock=lambda: 0.0)


def drain(queue: Waiting[Any]) -> list[Any]:
    found: list[Any] = []
    while (item := queue.take()) is not None:
        found.append(item)
    return found


@given(FLOWS)
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


@pytest.mark.parametrize("cost", [0, 1, 50])
def test_a_late_request_is_served_within_two_takes_of_a_flood(cost: int) -> None:
    queue = make()
    for number in range(1000):
        queue.put(number, key="flood", model="m", cost=cost)
    for _ in range(100):
        queue.take()
    queue.put("late", key="quiet", model="m", cost=cost)
    assert "late" in [queue.take(), queue.take()]


def test_a_key_that_floods_a_hundred_models_gets_one_keys_share() -> None:
    queue = make()
    for number in range(1000):
        queue.put(number, key="flood", model=str(number % 100), cost=10)
    queue.take()
    queue.put("late", key="quiet", model="m", cost=10)
    assert "late" in [queue.take(), queue.take()]


def test_one_model_cannot_starve_another_of_the_same_key() -> None:
    queue = make()
    for number in range(1000):
        queue.put(number, key="k", model="busy", cost=10)
    for _ in range(100):
        queue.take()
    queue.put("late", key="k", model="quiet", cost=10)
    assert "late" in [queue.take(), queue.take()]


@given(st.lists(COSTS, min_size=40, max_size=40), st.lists(COSTS, min_size=40, max_size=40))
def test_shares_of_keys_that_both_wait_differ_by_one_item_of_each_at_most(
    small: list[int], large: list[int]
) -> None:
    costs = {"small": small, "large": large}
    queue = make()
    for key, each in costs.items():
        for number, cost in enumerate(each):
            queue.put((key, cost), key=key, model=f"{key} {number % 3}", cost=cost)
    got: Counter[str] = Counter()
    taken: Counter[str] = Counter()
    while all(taken[key] < len(each) for key, each in costs.items()):
        item = queue.take()
        assert item is not None
        key, cost = item
        got[key] += cost
        taken[key] += 1
        assert abs(got["small"] - got["large"]) <= max(small) + max(large)


def test_who_has_got_much_and_went_away_comes_back_behind_who_waits() -> None:
    queue = make()
    queue.put("big", key="greedy", model="m", cost=1000)
    for number in range(20):
        queue.put(number, key="modest", model="m", cost=100)
    assert queue.take() == "big"
    queue.put("again", key="greedy", model="m", cost=1000)
    assert drain(queue).index("again") == 10


def test_a_key_that_comes_back_gets_no_credit_for_its_absence() -> None:
    queue = make()
    for number in range(100):
        queue.put(number, key="steady", model="m", cost=10)
    for _ in range(50):
        queue.take()
    for number in range(100, 110):
        queue.put(number, key="returned", model="m", cost=10)
    first = drain(queue)[:10]
    assert sum(item >= 100 for item in first) == 5


def test_what_is_removed_costs_its_key_nothing() -> None:
    queue = make()
    first, second = Item(), Item()
    for number in range(9):
        queue.put(number, key="other", model="m", cost=1)
    queue.put(first, key="k", model="m", cost=1_000_000)
    queue.remove(first)
    queue.put(second, key="k", model="m", cost=1)
    assert second in [queue.take(), queue.take()]


@pytest.mark.parametrize("bound", ["items", "key", "model"])
def test_a_full_queue_says_so_and_when_to_come_again(bound: str) -> None:
    queue = make(**{bound: 3})
    for number in range(3):
        queue.put(number, key="k", model="m", cost=1)
    with pytest.raises(Full, match="is full: 3 requests wait") as full:
        queue.put(4, key="k", model="m", cost=1)
    assert full.value.retry_after_s >= 1
    assert full.value.is_everybodys == (bound == "items")
    copy = pickle.loads(pickle.dumps(full.value))
    assert (str(copy), copy.is_everybodys) == (str(full.value), full.value.is_everybodys)
    assert len(queue) == 3
    queue.take()
    queue.put(5, key="k", model="m", cost=1)


def test_a_key_at_its_bound_leaves_room_for_others() -> None:
    queue = make(key=2)
    for number in range(2):
        queue.put(number, key="k", model="m", cost=1)
    with pytest.raises(Full, match="of this key"):
        queue.put(2, key="k", model="other", cost=1)
    queue.put(3, key="other", model="m", cost=1)


@pytest.mark.parametrize(("every_s", "expected_s"), [(0.001, 1.0), (2.0, 15.0), (100.0, 60.0)])
def test_a_full_queue_tells_of_its_recent_pace(every_s: float, expected_s: float) -> None:
    now = [0.0]
    queue: Waiting[int] = Waiting(
        max_items=10, max_per_key=99, max_per_model=99, clock=lambda: now[0]
    )
    for number in range(10):
        queue.put(number, key="k", model="m", cost=1)
    for number in range(10, 14):
        queue.take()
        now[0] += every_s
        queue.put(number, key="k", model="m", cost=1)
    now[0] -= every_s  # at once after the last take
    with pytest.raises(Full) as full:
        queue.put(99, key="k", model="m", cost=1)
    assert full.value.retry_after_s == pytest.approx(expected_s)
    drain(queue)
    now[0] += 1e6  # a night without requests is no pace
    for number in range(10):
        queue.put(number, key="k", model="m", cost=1)
    with pytest.raises(Full) as full:
        queue.put(99, key="k", model="m", cost=1)
    assert full.value.retry_after_s == 1.0


def test_what_does_not_fit_is_passed_over_but_not_for_ever() -> None:
    queue = make()
    queue.put(-1, key="k", model="large", cost=1)
    for number in range(500):
        queue.put(number, key="k", model="small", cost=1)
    taken = 0
    while queue.take(lambda item: item >= 0) is not None:
        taken += 1
    assert taken == 64
    assert queue.take() == -1
    assert queue.take() is not None


def test_what_does_not_fit_lets_other_keys_by_but_not_for_ever() -> None:
    queue = make()
    queue.put(-1, key="large", model="m", cost=1)
    for number in range(500):
        queue.put(number, key=f"small {number % 7}", model="m", cost=1)
    taken = 0
    while queue.take(lambda item: item >= 0) is not None:
        taken += 1
        queue.put(1000 + taken, key=f"new {taken}", model="m", cost=1)
    assert 64 <= taken <= 64 + 7
    assert queue.take() == -1


def test_what_does_not_fit_is_not_overtaken_by_its_own_flow() -> None:
    queue = make()
    queue.put("large", key="k", model="m", cost=1)
    queue.put("small", key="k", model="m", cost=1)
    assert queue.take(lambda item: item == "small") is None
    assert drain(queue) == ["large", "small"]


def test_no_more_than_64_are_asked_whether_they_fit() -> None:
    queue = make()
    asked: list[int] = []
    for number in range(500):
        queue.put(number, key=str(number), model="m", cost=1)
    assert queue.take(lambda item: bool(asked.append(item))) is None
    assert asked == list(range(64))


def test_a_key_whose_models_do_not_fit_keeps_no_other_from_being_asked() -> None:
    queue = make()
    for number in range(100):
        queue.put(number, key="large", model=str(number), cost=1)
    queue.put(-1, key="small", model="m", cost=1)
    assert queue.take(lambda item: item < 0) == -1


def test_a_question_that_fails_loses_nothing() -> None:
    queue = make()
    for name in ("a", "b"):
        queue.put(name, key=name, model="m", cost=1)

    def accept(item: str) -> bool:
        if item == "b":
            raise ZeroDivisionError
        return False

    with pytest.raises(ZeroDivisionError):
        queue.take(accept)
    assert drain(queue) == ["a", "b"]


def test_what_is_put_back_goes_first_beyond_all_bounds_and_is_paid_for() -> None:
    queue = make(items=3)
    for number in range(3):
        queue.put(number, key="k", model="m", cost=10)
    first = queue.take()
    queue.put(3, key="other", model="m", cost=10)
    queue.put_back(first, key="k", model="m")
    assert len(queue) == 4
    assert queue.by_model() == {"m": 4}
    with pytest.raises(Full):
        queue.put(4, key="k", model="m", cost=10)
    assert queue.take() is first
    assert drain(queue) == [3, 1, 2]  # k had its turn, and one only


def test_what_is_put_back_keeps_its_deadline() -> None:
    now = [0.0]
    queue: Waiting[str] = Waiting(max_items=9, max_per_key=9, max_per_model=9, clock=lambda: now[0])
    queue.put("a", key="k", model="m", cost=1, deadline=5.0)
    assert queue.take() == "a"
    queue.put_back("a", key="k", model="m", deadline=5.0)
    assert queue.expired() == []
    now[0] = 5.0
    assert queue.expired() == ["a"]
    assert len(queue) == 0


def test_of_those_put_back_the_latest_goes_first() -> None:
    queue = make()
    queue.put("waits", key="k", model="m", cost=1)
    for name in ("newer", "older"):
        queue.put_back(name, key="k", model="m")
    assert drain(queue) == ["older", "newer", "waits"]


def test_who_comes_when_one_catches_up_gets_no_credit() -> None:
    queue = make()
    queue.put(-1, key="large", model="m", cost=1)
    for number in range(50):
        queue.put(number, key="steady", model="m", cost=10)
    for _ in range(20):
        queue.take(lambda item: item >= 0)
    assert queue.take() == -1
    for number in range(100, 120):
        queue.put(number, key="new", model="m", cost=10)
    assert sum(item >= 100 for item in drain(queue)[:10]) in (5, 6)


def test_expired_and_removed_items_are_gone() -> None:
    now = [0.0]
    queue: Waiting[str] = Waiting(max_items=9, max_per_key=9, max_per_model=9, clock=lambda: now[0])
    queue.put("late", key="k", model="m", cost=1, deadline=50.0)
    queue.put("soon", key="k", model="m", cost=1, deadline=5.0)
    queue.put("sooner", key="k", model="n", cost=1, deadline=4.0)
    queue.put("never", key="k", model="m", cost=1)
    gone = "gone"
    queue.put(gone, key="k", model="m", cost=1)
    assert queue.by_model() == {"m": 4, "n": 1}
    assert queue.remove(gone)
    assert not queue.remove(gone)
    now[0] = 5.0
    assert queue.expired() == ["sooner", "soon"]
    assert queue.expired() == []
    assert len(queue) == 2
    assert queue.by_model() == {"m": 2}
    assert [queue.take(), queue.take(), queue.take()] == ["late", "never", None]
    assert queue.by_model() == {}


def test_what_came_and_went_leaves_nothing_behind() -> None:
    queue = make()
    queue.put("stays", key="stays", model="m", cost=1)

    def churn() -> int:
        for _ in range(2000):
            item = Item()
            queue.put(item, key="k", model="m", cost=1, deadline=9.0)
            queue.remove(item)
        return tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        before = churn()
        assert churn() - before < 2**14
    finally:
        tracemalloc.stop()


class Life(RuleBasedStateMachine):
    """The queue beside a slow and simple account of what must be in it."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.queue: Waiting[Item] = Waiting(
            max_items=12, max_per_key=6, max_per_model=8, clock=lambda: self.now
        )
        self.flows: dict[tuple[str, str], deque[Item]] = defaultdict(deque)
        self.back: list[tuple[Item, str, str]] = []
        self.taken: list[tuple[Item, str, str]] = []
        self.deadlines: dict[Item, float] = {}

    def inside(self) -> list[tuple[Item, str, str]]:
        queued = [(item, *flow) for flow, items in self.flows.items() for item in items]
        return [*queued, *self.back]

    def gone(self, item: Item) -> None:
        self.back = [row for row in self.back if row[0] is not item]
        for items in self.flows.values():
            if item in items:
                items.remove(item)

    @rule(key=KEYS, model=MODELS, cost=COSTS, within=st.none() | st.integers(1, 9))
    def put(self, key: str, model: str, cost: int, within: int | None) -> None:
        item = Item()
        inside = self.inside()
        is_full = (
            len(inside) >= 12
            or sum(row[1] == key for row in inside) >= 6
            or sum(row[2] == model for row in inside) >= 8
        )
        deadline = None if within is None else self.now + within
        if is_full:
            with pytest.raises(Full) as full:
                self.queue.put(item, key=key, model=model, cost=cost, deadline=deadline)
            assert 1 <= full.value.retry_after_s <= 60
            return
        self.queue.put(item, key=key, model=model, cost=cost, deadline=deadline)
        self.flows[key, model].append(item)
        if deadline is not None:
            self.deadlines[item] = deadline

    @rule(refused=st.frozensets(st.tuples(KEYS, MODELS)))
    def take(self, refused: frozenset[tuple[str, str]]) -> None:
        known = {item: (key, model) for item, key, model in self.inside()}
        item = self.queue.take(lambda item: known[item] not in refused)
        if item is None:
            assert not known or refused
            return
        flow = known[item]
        assert flow not in refused
        if item not in [row[0] for row in self.back]:
            assert self.flows[flow][0] is item
        self.gone(item)
        self.taken.append((item, *flow))
        self.deadlines.pop(item, None)

    @precondition(lambda self: self.taken)
    @rule()
    def put_back(self) -> None:
        item, key, model = self.taken.pop()
        self.queue.put_back(item, key=key, model=model)
        self.back.append((item, key, model))

    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        rows = [*self.inside(), *self.taken]
        if rows:
            item = data.draw(st.sampled_from(rows))[0]
            assert self.queue.remove(item) == (item in [row[0] for row in self.inside()])
            self.gone(item)
            self.deadlines.pop(item, None)

    @rule(seconds=st.integers(0, 5))
    def wait(self, seconds: int) -> None:
        self.now += seconds
        over = {item for item, deadline in self.deadlines.items() if deadline <= self.now}
        assert set(self.queue.expired()) == over
        for item in over:
            self.gone(item)
            del self.deadlines[item]

    @invariant()
    def counts_agree(self) -> None:
        inside = self.inside()
        assert len(self.queue) == len(inside)
        assert self.queue.by_model() == Counter(model for _, _, model in inside)

    def teardown(self) -> None:
        left = drain(self.queue)
        assert sorted(map(id, left)) == sorted(id(item) for item, _, _ in self.inside())


class TestLife(Life.TestCase):
    """Whatever is done in whatever order, nothing is lost, doubled or out of its flow's order."""

    settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
