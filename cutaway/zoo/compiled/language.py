"""A language of sequence operations: RASP (Weiss, Goldberg & Yahav 2021) as expressions that `compiler` compiles.

A program is one expression, the value that the model says next. It is built of `tokens` and `indices` by maps within a
position and by selections between positions. All of it is causal: a position selects among itself and those before it.

    previous = select(indices, indices, lambda key, query: key == query - 1)
    shift = previous.take(tokens)

The value None stands for no value: it is what a selection of nothing takes, and what any map of None is. Beside RASP's
predicates, a selection may rank what it selects (`select(…, rank)`), as attention can and RASP-L's `max` does (Zhou et
al. 2023). A number, the mean of a selection or its width, lies in one dimension and can only be mapped.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

Value = Hashable
Rank = Callable[[Any, Any], "bool | int | None"]


@dataclass(frozen=True, eq=False)
class Variable:
    """A value at every position, out of finitely many.

    Attributes:
        values: the values that it may have, in their order.
    """

    values: tuple[Value, ...]

    @property
    def inputs(self) -> tuple[Variable, ...]:
        """The variables that it is computed from."""
        return ()


class Input(Variable):
    """The token at each position, or its index, from 1 (the beginning of the text has 0 and neither)."""


@dataclass(frozen=True, eq=False)
class Mapped(Variable):
    """A function of one variable or of two at the same position: what an MLP computes."""

    of: tuple[Variable, ...]
    function: Callable[..., Value]

    @property
    def inputs(self) -> tuple[Variable, ...]:
        return self.of


@dataclass(frozen=True, eq=False)
class Selection:
    """The earlier positions (and the own one) that each position attends to.

    Attributes:
        keys: the variable by which a position is selected; None if it does not matter.
        queries: the variable by which a position selects; None if all select alike.
        rank: rank of a key for a query, from 1: the highest is attended to. None, False and 0 select nothing.
    """

    keys: Variable | None
    queries: Variable | None
    rank: Rank

    @property
    def inputs(self) -> tuple[Variable, ...]:
        """The variables that it reads."""
        return tuple(v for v in (self.queries, self.keys) if v is not None)

    def take(self, values: Variable, default: Value = None) -> Taken:
        """Return the value at the selected position, or `default` where nothing is selected.

        Where several positions are selected, they must agree.
        """
        known = values.values if default is None or default in values.values else (*values.values, default)
        return Taken(known, self, values, default)

    def mean(self, numbers: Mapping[Value, int], of: Variable, most: int) -> Number:
        """Return the mean of a number of each selected position; 0 where nothing is selected.

        Args:
            numbers: the number of each value; 0 for a value that is not named.
            of: the variable whose values have these numbers.
            most: the largest number of positions that may be selected.
        """
        sums, means = {0}, {Fraction(0)}
        terms = {numbers.get(v, 0) for v in of.values}
        for n in range(1, most + 1):
            sums = {s + t for s in sums for t in terms}
            means |= {Fraction(s, n) for s in sums}
        return Number(tuple(sorted(means)), self, of, dict(numbers))

    def width(self, most: int) -> Number:
        """Return the number of selected positions, at most `most`."""
        return Number(tuple(range(most + 1)), self)


@dataclass(frozen=True, eq=False)
class Taken(Variable):
    """The value at a selected position: what the OV circuit of a head copies."""

    selection: Selection
    of: Variable
    default: Value

    @property
    def inputs(self) -> tuple[Variable, ...]:
        return (*self.selection.inputs, self.of)


@dataclass(frozen=True, eq=False)
class Number(Variable):
    """A number that a head computes: the mean of `numbers` over a selection, or without `of` the selection's width.

    A width w lies in its dimension as 1/(1 + w), the weight that the beginning of the text keeps.
    """

    selection: Selection
    of: Variable | None = None
    numbers: Mapping[Value, int] = field(default_factory=dict)

    @property
    def inputs(self) -> tuple[Variable, ...]:
        return (*self.selection.inputs, *((self.of,) if self.of is not None else ()))

    @property
    def coded(self) -> list[float]:
        """The number that stands for each of its values."""
        return [float(v if self.of is not None else 1 / (1 + v)) for v in self.values]  # type: ignore[arg-type, operator]


def tokens(words: Sequence[str]) -> Input:
    """Return the variable of the token at each position."""
    return Input(tuple(words))


def indices(most: int) -> Input:
    """Return the variable of each position's index, 1 to `most`."""
    return Input(tuple(range(1, most + 1)))


def mapped(function: Callable[..., Value], *of: Variable) -> Mapped:
    """Return a function of one variable, or of two of which none is a number."""
    return Mapped(_distinct(_results(function, of)), of, function)


def select(keys: Variable | None, queries: Variable | None, rank: Rank) -> Selection:
    """Return the selection by a predicate (key, query) → bool, or by a rank, of which each query selects the best."""
    return Selection(keys, queries, rank)


def everything() -> Selection:
    """Return the selection of all positions up to the own one."""
    return Selection(None, None, lambda key, query: True)


def schedule(*wanted: Variable) -> list[Variable]:
    """Return the variables that some are computed from, and these, each after its own inputs."""
    order: dict[Variable, None] = {}

    def visit(v: Variable) -> None:
        for i in v.inputs:
            visit(i)
        order.setdefault(v)

    for v in wanted:
        visit(v)
    return list(order)


def _results(function: Callable[..., Value], of: Sequence[Variable]) -> Iterable[Value]:
    if len(of) == 1:
        return [function(x) for x in of[0].values]
    return [function(x, y) for x in of[0].values for y in of[1].values]


def _distinct(values: Iterable[Value]) -> tuple[Value, ...]:
    return tuple(v for v in dict.fromkeys(values) if v is not None)
