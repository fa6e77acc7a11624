"""The method table: one row per method, from which command line, forms, docs and the conformance suite derive.

    @method(answers="Which heads carry the answer?", paper="Wang et al. 2023, arXiv:2211.00593",
            cost="prompts * (2 + layers * heads) * F", control="random_source", rung="interventional")
    def activation(model: Model, task: Task, /, *, sites: str = "z", ...) -> Effects: ...

The decorated function runs unchanged; what it returns (a result, something else that saves itself, or a tuple of these)
leaves with a complete record. `rung` says how strong a claim the numbers support, and so which verbs generated text may
use (`core.rung`). `cost` is an upper bound, an arithmetic expression over sizes of the model, the task, the options and
the result (`cells`: entries of its main field), in units of F (one prompt forward), B (one prompt backward) and P (one
position of a forward; all of them where keys and values cannot be reused, or the metric reads more than the last one).
"""

from __future__ import annotations

import ast
import functools
import inspect
import math
import operator
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, Protocol, Union, get_args, get_origin, get_type_hints

import torch

from cutaway.core import repeat as again
from cutaway.core.address import Address, Pattern
from cutaway.core.finite import finite
from cutaway.core.outcome import kinds, recorded
from cutaway.core.record import counting, machine, versions
from cutaway.core.refuse import Call, Refused, nearest
from cutaway.core.result import COMMON, Result
from cutaway.core.rung import Rung
from cutaway.core.subject import SUBJECTS, alternatives

METHODS: dict[str, Method] = {}
_SIMPLE = (int, float, bool, str, Path)
_LISTED: dict[Any, type] = {
    str: str,
    int: int,
    float: float,
    Pattern: Address,
}  # what a list may hold, and the type it is called
_LEAST = {"samples": 1}  # no result without its control; all other whole numbers start at 0


class Identified(Protocol):
    """The protocol of a method's positional arguments: an identity for the record and sizes for the cost.

    `made` says how it can be made again; without it the record has no command.
    """

    made: again.Made | None

    def identity(self) -> dict[str, Any]: ...
    def sizes(self) -> dict[str, int]: ...


@dataclass(frozen=True)
class Option:
    """A keyword option of a method, in the narrow vocabulary that every shell can show.

    Attributes:
        name: name of the keyword.
        type: type of a value, or of each entry of a list; `Address` stands for addresses and patterns, as texts.
        choices: the values allowed; empty if any value of the type is.
        optional: True if None is allowed.
        default: the default value.
        help: the meaning, from the function's docstring.
        several: True if the option takes a list, which shells write as one text with commas.
    """

    name: str
    type: type
    choices: tuple[str, ...]
    optional: bool
    default: Any
    help: str
    several: bool = False


@dataclass(frozen=True)
class Method:
    """A row of the method table.

    Attributes:
        name: `room.function`.
        function: the decorated function.
        answers: the question it answers.
        paper: where the method is described.
        cost: upper bound as an arithmetic expression in F (forwards), P (positions) and B (backwards) per prompt.
        control: the control that its effects are compared with.
        rung: strength of the claims that its numbers support.
        subjects: names of its positional arguments.
        options: its keyword options.
        results: the classes of its outcomes: of the one that its options decide, or of several together.
        kinds: the types that each positional argument takes, its own subject's first.
    """

    name: str
    function: Callable[..., Any]
    answers: str
    paper: str
    cost: str
    control: str
    rung: Rung
    subjects: tuple[str, ...]
    options: tuple[Option, ...]
    results: tuple[type, ...]
    kinds: tuple[tuple[Any, ...], ...] = ()
    fills: tuple[str, ...] | None = None  # optional fields of its result that it can fill; None is all

    def fields(self, result: type[Result]) -> list[str]:
        """Return the fields that the method can fill of a result of this class."""
        own = [f for f in fields(result) if f.name not in COMMON]
        known = {n + end for n in self.fills or () for end in ("", "_interval", "_null")}
        return [f.name for f in own if f.default is not None or self.fills is None or f.name in known]

    @property
    def result(self) -> type:
        """The class of its outcome; the first one where there are several."""
        return self.results[0]

    @property
    def room(self) -> str:
        """The folder the method lives in."""
        return self.name.split(".")[0]

    def takes(self) -> list[tuple[str, ...]]:
        """Return the subjects that each positional argument takes, its own first."""
        return [alternatives(n, kinds) for n, kinds in zip(self.subjects, self.kinds, strict=True)]

    def bound(self, sizes: Mapping[str, Any], position: float = 1.0) -> tuple[float, float]:
        """Return the declared upper bound of forwards and backwards for these sizes and options.

        Args:
            sizes: what `sizes` returns.
            position: the share of a forward that one position costs.
        """
        units = {"F": 1.0, "P": position, "B": 0.0}, {"F": 0.0, "P": 0.0, "B": 1.0}
        forwards, backwards = (evaluate(self.cost, {**sizes, **unit}) for unit in units)
        return forwards, backwards

    def sizes(
        self, subjects: Sequence[Any], options: Mapping[str, Any], result: Result | None = None
    ) -> dict[str, Any]:
        """Return what the declared cost is an expression of, for a call and, once it is there, its result."""
        given = {o.name: options.get(o.name, o.default) for o in self.options}
        sizes = {n: ",".join(map(str, v)) if isinstance(v, list | tuple) else v for n, v in given.items()}
        for thing in subjects:
            sizes |= thing.sizes()
        return sizes if result is None else sizes | result.sizes() | {"cells": getattr(result, result.main).numel()}

    def asked(self, args: tuple[Any, ...], given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the subjects of a call by name, and its options as the function takes them.

        Raises:
            Refused: a subject or an option that the method does not take.
        """
        about, listed = _subjects(self, args), _listed(self, given)
        _check_options(self, listed)
        return about, listed

    def repeated(self, subjects: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, str]:
        """Return the call as a command for the shell and as one line of Python, or in words why there is none."""
        how = again.together(subjects)
        given = {n: str(v.absolute()) if isinstance(v, Path) else v for n, v in options.items()}
        defaults = {o.name: o.default for o in self.options}
        return {
            "python": again.python(self.name, subjects, how, given),
            "command": again.command(self.name, how, given, defaults),
        }


def method(
    *, answers: str, paper: str, cost: str, control: str, rung: Rung, fills: tuple[str, ...] | None = None
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Enter a function in the method table; its module gives the name (`room.function`).

    A method whose result has optional fields names in `fills` those that it can fill (without their intervals and
    nulls), so that its card lists no others.
    """

    def enter(function: Callable[..., Any]) -> Callable[..., Any]:
        hints = get_type_hints(function)
        parameters = inspect.signature(function).parameters.values()
        name = f"{function.__module__.split('.')[1]}.{function.__name__}"
        subjects = tuple(p.name for p in parameters if p.kind is p.POSITIONAL_ONLY)
        doc = _argument_docs(function)
        options = tuple(_option(p, hints[p.name], doc) for p in parameters if p.kind is p.KEYWORD_ONLY)

        @functools.wraps(function)
        def run(*args: Any, **given: Any) -> Any:
            about, given = row.asked(args, given)
            dtype = next((d for a in about.values() if isinstance(d := getattr(a, "dtype", None), torch.dtype)), None)
            with finite(name, dtype), counting() as spent:
                outcome = function(*about.values(), **given)
            values = {o.name: given.get(o.name, o.default) for o in options}
            return recorded(outcome, lambda own: _record(row, about, values, spent, own))

        results, taken = kinds(hints["return"]), tuple(_parts(hints[s]) for s in subjects)
        row = Method(name, run, answers, paper, cost, control, rung, subjects, options, results, taken, fills)
        METHODS[name] = row
        run.row = row  # type: ignore[attr-defined]
        return run

    return enter


def evaluate(expression: str, names: Mapping[str, Any]) -> float:
    """Evaluate an arithmetic expression over names: + − * / //, max(), min(), `a or b` for a number that may be 0, and
    `a if name == 'text' else b`.
    """
    operators = {
        ast.Add: operator.add,
        ast.Sub: operator.sub,
        ast.Mult: operator.mul,
        ast.Div: operator.truediv,
        ast.FloorDiv: operator.floordiv,
    }

    def value(node: ast.AST) -> Any:
        match node:
            case ast.Constant(value=int() | float() | str() as constant):
                return constant
            case ast.Name(id=name) if name in names:
                return names[name]
            case ast.BinOp(left=left, op=op, right=right) if type(op) in operators:
                return operators[type(op)](value(left), value(right))
            case ast.Call(func=ast.Name(id="max" | "min" as name), args=args):
                return {"max": max, "min": min}[name](value(a) for a in args)
            case ast.BoolOp(op=ast.Or(), values=[first, second]):
                return value(first) or value(second)
            case ast.IfExp(test=ast.Compare(left=left, ops=[ast.Eq()], comparators=[right]), body=yes, orelse=no):
                return value(yes if value(left) == value(right) else no)
        raise ValueError(
            f"cost expression {expression!r}: {ast.unparse(node)!r} is not a size (known: {sorted(names)})"
        )

    return float(value(ast.parse(expression, mode="eval").body))


def _check_options(row: Method, given: Mapping[str, Any]) -> None:
    known = [o.name for o in row.options]
    for name, value in given.items():
        if name not in known:
            near = nearest(name, known)
            raise Refused(
                Call(row.name, {name: ...}),
                "it has no such option" + (f"; near: {near}" if near else ""),
                f"its options are {', '.join(known)}",
            )
        option, asked = next(o for o in row.options if o.name == name), Call(row.name, {name: value})
        if option.choices and not option.several and value not in option.choices:
            raise Refused(asked, "that is not a choice", f"choose one of {', '.join(option.choices)}")
        if (form := _misfit(option, value)) is not None:
            raise Refused(asked, f"it must be {form}", f"the default is {option.default!r}")


def parse_list(text: str) -> tuple[str, ...]:
    """Split a comma string into its parts, each once, in order."""
    return tuple(dict.fromkeys(part for word in text.split(",") if (part := word.strip())))


def _listed(row: Method, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options with every list as a tuple: of a list, of a comma string, or of one value alone."""
    lists = {o.name: o for o in row.options if o.several}
    out = dict(given)
    for name in lists.keys() & given.keys():
        value = given[name]
        if value is None:
            continue
        parts = parse_list(value) if isinstance(value, str) else value
        parts = tuple(parts) if isinstance(parts, list | tuple) else (parts,)
        parts = [str(p) if isinstance(p, Address) else p for p in parts]
        out[name] = tuple(_number(lists[name].type, p) for p in parts)
    return out


def _number(kind: type, value: Any) -> Any:
    """Return an entry of a list of numbers as one of its type; what is none stays, to be refused."""
    if kind is int:
        return int(value) if isinstance(value, str) and value.isdecimal() else value
    if kind is not float or not isinstance(value, int | str) or isinstance(value, bool):
        return value
    try:
        return float(value)
    except ValueError:
        return value


def _misfit(option: Option, value: Any) -> str | None:
    """Describe what a value ought to be, if it is not."""
    if value is None and option.optional:
        return None
    if option.several:
        if not isinstance(value, tuple):
            return "a list, or a text with commas"
        if option.default and not value:
            return "a list, or a text with commas, of at least one"
        one = replace(option, several=False, type=str if option.type is Address else option.type)
        form = next((f for v in value if (f := _misfit(one, v)) is not None), None)
        return None if form is None else f"a list, or a text with commas, each {form}"
    kinds: tuple[type, ...] = {float: (int, float), Path: (str, Path)}.get(option.type, (option.type,))
    given: Any = value
    if not isinstance(given, kinds) or (isinstance(given, bool) and option.type is not bool):
        return {int: "a whole number", float: "a number", bool: "True or False"}.get(option.type, "a text")
    number: Any = value
    if option.type is float and not math.isfinite(number):
        return "a finite number"
    least = _LEAST.get(option.name, 0)
    if option.type is int and not least <= number < 1 << 63:
        return f"at least {least}" if number < least else "smaller than 2**63"
    return None


def _parts(hint: Any) -> tuple[Any, ...]:
    """Return the types of a union, or the one type that it is."""
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _subjects(row: Method, args: tuple[Any, ...]) -> dict[str, Any]:
    """Return the positional arguments by the names of the subjects that they are.

    What a subject accepts in its place, such as a text for prompts, is made one of it.

    Raises:
        Refused: one of them is not what the method takes there, or there are too few or too many.
    """
    takes = row.takes()
    found = [_as_subject(*one) for one in zip(takes, row.kinds, args, strict=False)]
    if len(args) == len(takes) and None not in found:
        return dict(one for one in found if one is not None)
    given = ", ".join(type(a).__name__ for a in args)
    names = ", ".join(" or ".join(getattr(k, "__name__", str(k)) for k in kinds) for kinds in row.kinds)
    wrong = [n for n, one in zip(row.subjects, found, strict=False) if one is None and n in SUBJECTS]
    advice = [f"; {n} = {SUBJECTS[n].advice}" for n in wrong if SUBJECTS[n].advice]
    call = f"call {row.name}({', '.join(row.subjects)}, …)"
    raise Refused(f"{row.name}({given})", f"it takes {names}", call + "".join(advice))


def _as_subject(names: Sequence[str], kinds: Sequence[Any], thing: Any) -> tuple[str, Any] | None:
    """Return the subject that a positional argument is, by its name; None if it is none that may stand there."""
    for name, kind in zip(names, kinds, strict=True):
        if not isinstance(kind, type) or isinstance(thing, kind):
            return name, thing
    for name in names:
        accept = SUBJECTS[name].accept if name in SUBJECTS else None
        if accept is not None and (found := accept(thing)) is not None:
            return name, found
    return None


def _record(
    row: Method, subjects: Mapping[str, Any], options: dict[str, Any], spent: Any, own: Mapping[str, Any]
) -> dict[str, Any]:
    repeated = row.repeated(subjects, options)
    return {
        "method": row.name,
        "answers": row.answers,
        "paper": row.paper,
        "control": row.control,
        "rung": row.rung,
        "subjects": {n: s.identity() for n, s in subjects.items()},
        "options": {n: _plain(v) for n, v in options.items()},
        "cost": {
            "declared": row.cost,
            "forwards": spent.forwards,
            "backwards": spent.backwards,
            "seconds": round(spent.seconds, 4),
        },
        **({"notes": spent.events} if spent.events else {}),
        **repeated,
        "versions": versions(),
        "machine": machine(),
        **own,
    }


def _plain(value: Any) -> Any:
    """Return an option's value as JSON has it."""
    return str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value


def _option(p: inspect.Parameter, hint: Any, doc: Mapping[str, str]) -> Option:
    parts = [a for a in get_args(hint) if a is not type(None)] if type(None) in get_args(hint) else [hint]
    kind, choices, several = parts[0], (), False
    listed = get_args(kind)[0] if get_origin(kind) is tuple and get_args(kind)[1:] == (...,) else None
    if listed in _LISTED:
        kind, several = _LISTED[listed], True
    if get_origin(kind) is Literal:
        kind, choices = str, tuple(get_args(kind))
    if len(parts) > 1 or not (several or kind in _SIMPLE):
        raise TypeError(
            f"option {p.name!r}: {hint} is outside the vocabulary {[s.__name__ for s in _SIMPLE]}, Literal and tuples "
            f"(…, ...) of str, int, float or Pattern"
        )
    if p.default is p.empty:
        raise TypeError(f"option {p.name!r} needs a default")
    return Option(p.name, kind, choices, type(None) in get_args(hint), p.default, doc.get(p.name, ""), several)


def _argument_docs(function: Callable[..., Any]) -> dict[str, str]:
    """`name: text` lines of the docstring's Args section."""
    lines, out, inside, last = (inspect.getdoc(function) or "").splitlines(), {}, False, ""
    for line in lines:
        if not line.startswith(" ") and line.strip():
            inside = line.strip() == "Args:"
        elif inside and line.startswith("    ") and not line.startswith("        ") and ":" in line:
            last, text = line.strip().split(":", 1)
            out[last] = text.strip()
        elif inside and last and line.strip():
            out[last] += " " + line.strip()
    return out


__all__ = ["METHODS", "Identified", "Method", "Option", "evaluate", "method", "parse_list"]
