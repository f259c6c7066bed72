"""Every error of the tree."""

import builtins
import pickle

import pytest

from cluster import errors

ALL = [
    kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, errors.LorayError)
]
LEAVES = [kind for kind in ALL if kind is not errors.LorayError]


def test_the_tree_is_flat() -> None:
    assert LEAVES
    assert all(kind.__bases__[0] is errors.LorayError for kind in LEAVES)


@pytest.mark.parametrize("kind", ALL)
def test_error_survives_pickling(kind: type[errors.LorayError]) -> None:
    error = kind("what, where, given, allowed, what to do")
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is kind
    assert str(copy) == str(error)
    assert copy.args == error.args


@pytest.mark.parametrize("kind", LEAVES)
def test_error_is_caught_as_its_standard_kin(kind: type[errors.LorayError]) -> None:
    kin = kind.__bases__[1]
    assert getattr(builtins, kin.__name__) is kin
    with pytest.raises(kin, match="message"):
        raise kind("message")


@pytest.mark.parametrize("kind", ALL)
def test_error_has_a_code_a_status_and_a_docstring(kind: type[errors.LorayError]) -> None:
    assert kind.code.replace("_", "").islower()
    assert 400 <= kind.status < 600
    assert kind.__doc__


def test_codes_are_unique() -> None:
    assert len({kind.code for kind in ALL}) == len(ALL)
