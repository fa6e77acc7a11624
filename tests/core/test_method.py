"""The method table: narrow options, checked calls, honest costs, and a command that reproduces the call."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from jaxtyping import Float
from torch import Tensor

import cutaway as ca
from cutaway.core.address import Address
from cutaway.core.method import METHODS, Method, _listed, _misfit, evaluate, method
from cutaway.core.record import count
from cutaway.core.refuse import Refused
from cutaway.core.repeat import Made, command, words
from cutaway.core.result import Result
from cutaway.core.subject import SUBJECTS, alternatives


@dataclass(frozen=True, kw_only=True)
class Counted(Result, kind="counted_of_tests"):
    value: Float[Tensor, "layer"]


@dataclass
class Thing:
    """A subject with a name and the options it was made with."""

    name: str
    options: dict[str, Any]

    @property
    def made(self) -> Made | None:
        return Made(f"Thing({self.name!r})", {"": self.name, **self.options}) if self.name else None

    def identity(self) -> dict[str, Any]:
        return {"name": self.name, "options": self.options}

    def sizes(self) -> dict[str, int]:
        return {"layers": 2}


@pytest.fixture
def row():
    def sample(
        model: Thing,
        task: Thing,
        /,
        *,
        direction: Literal["denoise", "noise"] = "denoise",
        n_top: int = 3,
        exact: bool = False,
        out: Path | None = None,
    ) -> Counted:
        """Count layers, for tests.

        Args:
            direction: which run is patched
                into which.
            n_top: how many to keep.
        """  # fmt: skip
        count(forwards=2 * n_top)
        return Counted(value=torch.ones(2), record={"seed": 9})

    sample.__module__ = "cutaway.tests.sample"
    method(
        answers="How many?",
        paper="none",
        cost="max(layers, 2) * n_top * F + B / 2",
        control="none",
        rung="observational",
    )(sample)
    yield METHODS["tests.sample"]
    del METHODS["tests.sample"]


MODEL, TASK = Thing("tiny", {}), Thing("ioi", {"n": 4, "no_abc": True})


def test_the_row_is_derived_from_the_signature(row: Method):
    assert (row.name, row.room, row.subjects) == ("tests.sample", "tests", ("model", "task"))
    assert row.results == (Counted,)
    assert row.result is Counted
    assert [(o.name, o.type, o.choices, o.optional, o.default) for o in row.options] == [
        ("direction", str, ("denoise", "noise"), False, "denoise"),
        ("n_top", int, (), False, 3),
        ("exact", bool, (), False, False),
        ("out", Path, (), True, None),
    ]
    assert row.options[0].help == "which run is patched into which."
    assert row.options[2].help == ""


def test_a_method_may_choose_between_result_classes():
    def either(model: Thing, /) -> Counted | Result:
        return Counted(value=torch.ones(1))

    method(answers="?", paper="none", cost="F", control="none", rung="observational")(either)
    assert METHODS.pop("core.either").results == (Counted, Result)


def test_an_argument_takes_the_first_subject_of_each_further_type():
    ca.methods()
    dictionary = SUBJECTS["dictionary"].type
    assert SUBJECTS["second"].type is dictionary
    assert alternatives("second", (dictionary,)) == ("second",)
    assert alternatives("task", (SUBJECTS["task"].type, dictionary)) == ("task", "dictionary")
    with pytest.raises(TypeError, match=r"'task' takes .*Thing"):
        alternatives("task", (SUBJECTS["task"].type, Thing))


def test_the_record_is_complete(row: Method):
    record = row.function(MODEL, TASK, n_top=5).record
    assert record["method"] == "tests.sample"
    assert record["options"] == {"direction": "denoise", "n_top": 5, "exact": False, "out": None}
    assert record["cost"]["forwards"] == 10
    assert record["subjects"]["task"]["name"] == "ioi"
    assert record["seed"] == 9
    assert {"versions", "machine", "paper", "answers", "control"} <= set(record)


def test_the_command_and_the_python_line_repeat_the_call(row: Method):
    record = row.function(MODEL, TASK, n_top=5, exact=True, out=Path("a b")).record
    where = Path("a b").absolute()
    assert record["command"] == (
        f"cutaway tests sample --model tiny --task ioi --task-n 4 --task-no-abc --n-top 5 --exact --out '{where}'"
    )
    assert record["python"] == (
        "import cutaway as ca; model = Thing('tiny'); task = Thing('ioi'); result = ca.tests.sample(model, task, "
        f"direction='denoise', n_top=5, exact=True, out='{where}')"
    )


def test_without_a_way_to_make_the_subjects_there_is_no_command(row: Method):
    record = row.function(Thing("", {}), TASK).record
    assert record["command"] == "no command: the model was made by hand in Python"
    assert record["python"].startswith("no line of Python: the model was made by hand in Python; with what you have: ")


@pytest.mark.parametrize(
    ("value", "said"),
    [("a b", ["--x-y", "a b"]), ("-5 is", ["--x-y=-5 is"]), ("", ["--x-y", ""]), (-1, ["--x-y=-1"]), (None, []),
     (True, ["--x-y"]), (False, ["--no-x-y"]), (["a", "-b"], ["--x-y", "a", "--x-y=-b"]), (0.5, ["--x-y", "0.5"])],
)  # fmt: skip
def test_a_value_as_words_of_a_command_line(value, said):
    assert words("x_y", value) == said


def test_unknown_options_and_choices_are_refused(row: Method):
    with pytest.raises(Refused, match="near: n_top"):
        row.function(MODEL, TASK, ntop=5)
    with pytest.raises(Refused, match="not a choice"):
        row.function(MODEL, TASK, direction="sideways")


def test_cost_is_an_upper_bound_in_forwards_and_backwards(row: Method):
    assert row.bound({"layers": 2, "n_top": 5}) == (10, 0.5)
    assert row.bound({"layers": 12, "n_top": 5}) == (60, 0.5)


@pytest.mark.parametrize(
    "expression", ["heads * F", "layers ** 2", "__import__('os')", "layers if F else 1", "-layers"]
)
def test_cost_expressions_are_arithmetic_only(expression):
    with pytest.raises(ValueError, match="cost expression"):
        evaluate(expression, {"layers": 2, "F": 1, "B": 0})


def test_cost_arithmetic():
    assert evaluate("(1 + layers) * 3 - 4 // 3 + 1 / 2", {"layers": 2}) == 8.5
    assert evaluate("min(cells or 9, 7) + max(1, cells)", {"cells": 0}) == 8
    assert evaluate("(P if by == 'last' else 2 * F) * 3", {"by": "last", "P": 0.5, "F": 1}) == 1.5


@pytest.mark.parametrize("hint", [list[int], dict, int | str, Tensor, int | str | None])
def test_options_outside_the_vocabulary_are_errors(hint):
    def bad(model: Thing, /, *, option=None) -> Counted: ...

    bad.__annotations__["option"] = hint
    with pytest.raises(TypeError, match="vocabulary"):
        method(answers="?", paper="none", cost="F", control="none", rung="observational")(bad)


def test_an_option_needs_a_default():
    def bad(model: Thing, /, *, option: int) -> Counted: ...

    with pytest.raises(TypeError, match="default"):
        method(answers="?", paper="none", cost="F", control="none", rung="observational")(bad)


def test_lists_come_as_lists_as_a_text_with_commas_or_as_one_value():
    row = ca.methods()["patching.ablate"]
    given = {"layers": "0, 3,0"}, {"layers": [0, 3]}, {"layers": (0, 3)}
    assert [_listed(row, g)["layers"] for g in given] == [(0, 3)] * 3
    assert _listed(row, {"layers": 2, "samples": 1}) == {"layers": (2,), "samples": 1}
    layers = next(o for o in row.options if o.name == "layers")
    assert [_misfit(layers, v) is None for v in ((), (3,), ("first",), None)] == [True, True, False, False]
    assert command("patching.ablate", {}, {"layers": (0, 3)}, {"layers": ()}) == "cutaway patching ablate --layers 0,3"


def test_lists_of_numbers_take_whole_ones_and_texts():
    row = ca.methods()["directions.propagate"]
    given = {"sizes": "0.5, 2,1e-3"}, {"sizes": [0.5, 2, 1e-3]}, {"sizes": (0.5, 2.0, 0.001)}
    assert [_listed(row, g)["sizes"] for g in given] == [(0.5, 2.0, 0.001)] * 3
    assert all(type(v) is float for g in given for v in _listed(row, g)["sizes"])
    sizes = next(o for o in row.options if o.name == "sizes")
    assert [_misfit(sizes, v) is None for v in ((0.5,), ("much",), (True,), (float("inf"),))] == [True, *[False] * 3]
    asked = command("directions.propagate", {}, {"sizes": (0.5, 2.0)}, {"sizes": ()})
    assert asked == "cutaway directions propagate --sizes 0.5,2.0"


def test_lists_of_addresses_take_addresses_and_patterns_and_come_as_texts():
    row = ca.methods()["patching.activation"]
    given = {"site": "z.5, resid_pre.1@-1"}, {"site": [Address("z", 5), "resid_pre.1@-1"]}
    assert [_listed(row, g)["site"] for g in given] == [("z.5", "resid_pre.1@-1")] * 2
    assert _listed(row, {"site": Address("z", 5)}) == {"site": ("z.5",)}
    site = next(o for o in row.options if o.name == "site")
    assert (site.type, site.several, site.default) == (Address, True, ("resid_pre",))
    assert [_misfit(site, v) is None for v in (("z",), (), (3,))] == [True, False, False]
