"""Shares of users: sticky, even, and moved as little as can be."""

import math
import random
from collections import Counter
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from cluster.errors import ConfigError
from serving.rollout import Count, Evaluation, Guard, Rollout, Target, breach, check, fallen

USERS = [f"user-{number}" for number in range(10_000)]


def rollout(guard: Guard | None = None, /, **weights: float) -> Rollout:
    targets = tuple(Target(model=model, weight=weight) for model, weight in weights.items())
    return Rollout(project="red", name="bot", revision=1, targets=targets, guard=guard)


def choices(one: Rollout, users: list[str] = USERS) -> list[str]:
    return [one.choose(user) for user in users]


WEIGHTS = st.dictionaries(
    st.sampled_from("abcdef"), st.floats(0, 1000, allow_subnormal=False), min_size=1
).filter(lambda weights: sum(weights.values()) > 0)


@pytest.mark.parametrize(
    "weights", [{"v7": 90, "v8": 10}, {"a": 1, "b": 1, "c": 1}, {"a": 0.5, "b": 98.5, "c": 1}]
)
def test_each_version_gets_its_share_of_ten_thousand_users(weights: dict[str, float]) -> None:
    counts = Counter(choices(rollout(**weights)))
    total = sum(weights.values())
    for model, weight in weights.items():
        share = weight / total
        bound = 4 * math.sqrt(share * (1 - share) * len(USERS))  # one in 16,000 lies outside
        assert abs(counts[model] - share * len(USERS)) < bound


def test_from_90_10_to_80_20_only_those_move_that_must() -> None:
    before, after = choices(rollout(v7=90, v8=10)), choices(rollout(v7=80, v8=20))
    moved = [(a, b) for a, b in zip(before, after, strict=True) if a != b]
    assert set(moved) == {("v7", "v8")}
    assert abs(len(moved) - 1000) < 130
    assert choices(rollout(v7=90, v8=10)) == before  # and going back moves them back


@settings(max_examples=200, deadline=None)
@given(before=WEIGHTS, after=WEIGHTS, user=st.text(max_size=20))
def test_nobody_moves_to_a_version_that_has_not_grown_against_his(
    before: dict[str, float], after: dict[str, float], user: str
) -> None:
    old, new = rollout(**before).choose(user), rollout(**after).choose(user)
    assume(old != new)
    ratio_before = before.get(new, 0.0) / before[old]
    ratio_after = after[new] / after[old] if after.get(old) else math.inf
    assert ratio_after >= ratio_before * (1 - 1e-9)


@settings(max_examples=100, deadline=None)
@given(weights=WEIGHTS, user=st.text(max_size=512), seed=st.integers())
def test_a_users_version_depends_on_ratios_alone(
    weights: dict[str, float], user: str, seed: int
) -> None:
    chosen = rollout(**weights).choose(user)
    assert weights[chosen] > 0
    rows = list(weights.items())
    random.Random(seed).shuffle(rows)
    assert rollout(**dict(rows)).choose(user) == chosen
    assert rollout(**{model: weight * 8 for model, weight in rows}).choose(user) == chosen


def test_a_shadow_and_a_version_without_weight_answer_nobody() -> None:
    targets = (
        Target(model="a", weight=1),
        Target(model="b"),
        Target(model="c", is_shadow=True),
    )
    one = Rollout(project="red", name="bot", revision=1, targets=targets)
    assert set(choices(one, USERS[:500])) == {"a"}
    assert (one.versions, one.shadow) == (("a",), "c")


def test_users_of_different_aliases_are_shared_out_anew() -> None:
    first = rollout(a=50, b=50)
    other = Rollout(project="red", name="other", revision=1, targets=first.targets)
    same = sum(a == b for a, b in zip(choices(first), choices(other), strict=True))
    assert 4700 < same < 5300


@pytest.mark.parametrize(
    ("targets", "words"),
    [
        ([], "targets are 0"),
        ([Target(model=f"v{n}", weight=1) for n in range(101)], "targets are 101"),
        ([Target(model="a", weight=0)], "no version has a weight"),
        ([Target(model="a", is_shadow=True)], "no version has a weight"),
        ([Target(model="a", weight=-1), Target(model="b", weight=2)], "'a' is -1"),
        ([Target(model="a", weight=math.nan)], "'a' is nan"),
        ([Target(model="a", weight=math.inf)], "'a' is inf"),
        ([Target(model="a", weight=1), Target(model="a", weight=2)], "stands twice"),
        ([Target(model="a", weight=1, is_shadow=True)], "has a weight"),
        (
            [Target(model="a", weight=1)] + [Target(model=m, is_shadow=True) for m in "bc"],
            "several shadows",
        ),
    ],
)
def test_targets_among_which_nobody_can_choose_are_refused(
    targets: list[Target], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        check(targets)


@pytest.mark.parametrize(
    ("rate", "least"), [(-0.1, 50), (1.0, 50), (math.nan, 50), (0.1, 0), (0.1, 2_000_000)]
)
def test_guards_that_say_nothing_are_refused(rate: float, least: int) -> None:
    with pytest.raises(ConfigError, match="guard"):
        Guard(error_rate=rate, min_requests=least)


@pytest.mark.parametrize(
    ("metric", "better", "max_fall", "words"),
    [
        ("", "higher", 0.1, "metric"),
        ("x" * 65, "higher", 0.1, "metric"),
        ("loss", "Lower", 0.1, "better is 'Lower'"),
        ("loss", "lower", -0.1, "max_fall is -0.1"),
        ("loss", "lower", math.nan, "max_fall is nan"),
        ("loss", "lower", math.inf, "max_fall is inf"),
    ],
)
def test_evaluations_that_cannot_be_are_refused(
    metric: str, better: Any, max_fall: float, words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        Evaluation(metric=metric, better=better, max_fall=max_fall)
    with pytest.raises(ConfigError, match="guards nothing"):
        Guard()


def evaluation(max_fall: float = 0.02, better: Any = "higher") -> Evaluation:
    return Evaluation(metric="quality", better=better, max_fall=max_fall)


@pytest.mark.parametrize(
    ("better", "max_fall", "before", "after", "is_fallen"),
    [
        ("higher", 0.02, 0.91, 0.89, False),  # in floats a difference of 0.02000000000000002
        ("higher", 0.02, 0.91, 0.8899, True),
        ("higher", 0.02, 0.91, 0.99, False),
        ("lower", 0.02, 0.91, 0.93, False),
        ("lower", 0.02, 0.91, 0.9301, True),
        ("lower", 0.02, 0.91, 0.1, False),
        ("higher", 0.0, 0.3, 0.1 + 0.1 + 0.1, False),
        ("higher", 0.0, 0.1 + 0.1 + 0.1, 0.3, False),
        ("higher", 0.0, 0.3, 0.2999, True),
        ("higher", 0.5, -1.0, -1.6, True),
        ("higher", 1.0, 1e308, -1e308, True),
        ("lower", 1.0, 1e308, -1e308, False),
    ],
)
def test_a_fall_is_what_is_more_than_allowed_in_the_worse_direction(
    better: Any, max_fall: float, before: float, after: float, is_fallen: bool
) -> None:
    found = evaluation(max_fall, better).fall(before, after)
    assert (found is not None) == is_fallen


def states(*rows: dict[str, float]) -> list[list[Target]]:
    return [[Target(model=m, weight=w) for m, w in row.items()] for row in rows]


def test_a_version_is_held_against_the_one_that_it_follows() -> None:
    scores = {"v6": 0.9, "v7": 0.91, "v8": 0.8}
    ramp = states({"v8": 1}, {"v7": 1, "v8": 1}, {"v7": 90, "v8": 10}, {"v6": 5, "v7": 95})
    found = fallen(evaluation(), ramp, scores)
    assert found is not None
    assert found[0] == 3  # the newest without it
    assert found[1] == (
        "quality of v8 is 0.8, 0.11 worse than the 0.91 of v7; the guard allows 0.02"
    )
    assert fallen(evaluation(0.2), ramp, scores) is None
    assert fallen(evaluation(), ramp, {"v8": 0.8, "v6": 0.9}) is None  # v7 was not told of
    assert fallen(evaluation(), ramp, {"v7": 0.9}) is None
    assert fallen(evaluation(), ramp[:3], scores) is None  # v8 was there from the beginning


def test_one_who_goes_back_to_an_old_version_is_not_sent_forth() -> None:
    scores = {"v7": 0.1, "v8": 0.9}
    assert fallen(evaluation(), states({"v7": 1}, {"v8": 1}, {"v7": 1}), scores) is None


def test_the_worst_of_several_new_versions_goes_and_shadows_are_not_judged() -> None:
    scores = {"v7": 0.9, "v8": 0.91, "v9": 0.1}
    now = states({"v7": 1, "v8": 1, "v9": 1}, {"v7": 1, "v8": 1}, {"v7": 1})
    found = fallen(evaluation(), now, scores)
    assert found is not None
    assert found[0] == 1
    now[0] = [*now[1], Target(model="v9", is_shadow=True)]
    assert fallen(evaluation(), now, scores) is None


def test_a_guard_needs_enough_requests_and_too_many_errors() -> None:
    one = rollout(Guard(error_rate=0.05, min_requests=50), v7=90, v8=10)
    fine = Count(requests=1000, errors=50)
    assert breach(one, {}) is None
    assert breach(one, {"v7": fine, "v8": Count(requests=49, errors=49)}) is None
    assert breach(one, {"v9": Count(requests=100, errors=100)}) is None  # a shadow
    why = breach(one, {"v7": fine, "v8": Count(requests=50, errors=3)})
    assert why is not None
    assert why.startswith("3 of 50 requests to v8 failed")
    assert breach(rollout(v7=1), {"v7": Count(requests=100, errors=100)}) is None
