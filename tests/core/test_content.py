"""A key tells any two values apart, and knows the same one again."""

import threading
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from cutaway.core.content import content
from cutaway.core.refuse import Refused


@dataclass(frozen=True)
class Held:
    name: str
    value: Any = field(repr=False)


def _big(at: int) -> torch.Tensor:
    x = torch.zeros(3000)
    x[at] = 1
    return x


def _function(value: float, shift: float = 0.0) -> Any:
    return lambda x, y=shift: x * value + y


def _loop(*items: Any) -> list[Any]:
    made = list(items)
    return [*made, made]


SAME = [
    lambda: Held("a", ({"x": [_big(7)]}, {3, 1, 2}, None)),
    lambda: {"b": 1, "a": torch.arange(6).view(2, 3).T[:1]},
    lambda: _function(2.0),
    lambda: _loop(1, "a", _function),
]
APART = [
    (("ab", "c"), ("a", "bc")),
    (("a\x00", "b"), ("a", "\x00b")),
    (1, True),
    (0.0, -0.0),
    ([1], (1,)),
    (Held("a", [_big(1)]), Held("a", [_big(2000)])),
    (Held("a", {"x": (_big(1), 2)}), Held("a", {"x": (_big(1), 3)})),
    (torch.zeros(2, 3), torch.zeros(3, 2)),
    (torch.zeros(2), torch.zeros(2, dtype=torch.int32)),
    (_function(2.0), _function(3.0)),
    (_function(2.0, 0.0), _function(2.0, 1.0)),
    (lambda x: x + 1, lambda x: x - 1),
    (lambda x: x + LEFT, lambda x: x + RIGHT),
    (_loop(1), _loop(2)),
]
LEFT, RIGHT = torch.zeros(2), torch.ones(2)


@pytest.mark.parametrize("make", SAME)
def test_the_same_value_made_again_has_the_same_key(make):
    assert content(make()) == content(make())


@pytest.mark.parametrize(("a", "b"), APART)
def test_values_that_differ_anywhere_have_other_keys(a, b):
    assert content(a) != content(b)


def test_what_cannot_be_read_is_refused():
    with pytest.raises(Refused, match="nothing tells it apart"):
        content({"a": [threading.Lock()]})
