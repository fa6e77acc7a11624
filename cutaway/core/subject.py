"""Subjects: the kinds of thing that a method may be about; commands, forms and the conformance suite derive from them.

    register(Subject("task", Task, (Flag("task", str, REQUIRED, "name, file or sentence"),), open_task, example_task))

A method names its subjects by its positional arguments: `def activation(model: Model, task: Task, /, …)`. An argument
may take other subjects in place of its own: `task: Task | Prompts`. A room that brings a subject of its own registers
it beside the methods that take it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

from cutaway.core.refuse import Keyword, Refused, nearest

#: the default of a flag that has none and must be given
REQUIRED: Any = ...


@dataclass(frozen=True)
class Flag:
    """A flag of a subject, offered by every command that takes the subject.

    Attributes:
        name: name of the flag.
        type: type of its value.
        default: default value, or `REQUIRED`.
        help: the meaning, for `--help`.
    """

    name: str
    type: Any
    default: Any
    help: str


@dataclass(frozen=True)
class Subject:
    """A kind of thing that methods take as a positional argument; one row of the table of subjects.

    Attributes:
        name: the name of the positional argument in a method.
        type: class of the things that a method is given.
        flags: what a command line must say to mean one thing; the first bears the subject's name.
        open: opens the thing that the flags mean, given the values of the flags and the subjects opened before it.
        example: builds a small thing that suits the subjects opened before it, for the conformance suite.
        split: separates a batch of prompts into things of one prompt each; None if it is not a batch.
        join: makes one batch of several; None if it is not a batch.
        needs: subjects that it is opened from; a command asks for them even if the method does not take them.
        accept: makes one of what a caller has in hand, such as a text; returns None if it cannot.
        advice: how one is made in Python, for refusals.
    """

    name: str
    type: type
    flags: tuple[Flag, ...]
    open: Callable[[Mapping[str, Any], Mapping[str, Any]], Any]
    example: Callable[[Mapping[str, Any]], Any]
    split: Callable[[Any], list[Any]] | None = None
    join: Callable[[Sequence[Any]], Any] | None = None
    needs: tuple[str, ...] = ()
    accept: Callable[[Any], Any | None] | None = None
    advice: str = ""


SUBJECTS: dict[str, Subject] = {}


def register(row: Subject) -> Subject:
    """Enter a subject in the table.

    Raises:
        Refused: another subject has this name or offers one of these flags.
    """
    taken = {f.name: s.name for s in SUBJECTS.values() for f in s.flags} | {name: name for name in SUBJECTS}
    for name in (row.name, *(f.name for f in row.flags)):
        if name in taken:
            raise Refused(f"subject {row.name!r}", f"the subject {taken[name]!r} has {name!r} already", "rename it")
    SUBJECTS[row.name] = row
    return row


def subject(name: str) -> Subject:
    """Return the row called `name`.

    Raises:
        Refused: no subject has that name.
    """
    if name not in SUBJECTS:
        near = nearest(name, SUBJECTS)
        why = "no subject has that name" + (f"; near: {near}" if near else "")
        raise Refused(f"subject {name!r}", why, f"use one of {', '.join(SUBJECTS)}, or register your own")
    return SUBJECTS[name]


def alternatives(name: str, kinds: Sequence[Any]) -> tuple[str, ...]:
    """Return the subjects that an argument called `name` takes, itself first, given the types in its annotation.

    Another type than its own means the first subject of that type.

    Raises:
        TypeError: no subject is of such a type.
    """
    found = [name]
    for kind in kinds[1:]:
        other = next((row.name for row in SUBJECTS.values() if row.type is kind), None)
        if other is None:
            raise TypeError(f"argument {name!r} takes {kind}, which is the type of no subject")
        found.append(other)
    return tuple(found)


def choose(names: Sequence[str], given: dict[str, Any]) -> str:
    """Return the subject that the flags name, of those that an argument takes; removes the others' flags from `given`.

    Where they name none, it is the one of which no flag must be given.

    Raises:
        Refused: the flags name none of them, or more than one.
    """
    if len(names) == 1:
        return names[0]
    flags = {n: subject(n).flags for n in names}
    said = {n: [f for f in own if given.get(f.name) not in (f.default, None)] for n, own in flags.items()}
    ready = [n for n in names if all(f.default is not REQUIRED for f in flags[n])]
    named = [n for n in names if said[n]] or ready
    if len(named) != 1:
        why = "both are given" if named else "neither is given"
        either = [w for n in names for w in (" or ", Keyword(n))][1:]
        raise Refused(tuple(either), why, "give one of them")
    (name,) = named
    if missing := [f.name for f in flags[name] if f.default is REQUIRED and f not in said[name]]:
        need = Keyword(missing[0])
        raise Refused(Keyword(said[name][0].name), ("it says nothing without ", need), ("give ", need, " too"))
    for flag in (f for n in names if n != name for f in flags[n]):
        given.pop(flag.name, None)
    return name


def with_needs(names: Sequence[str]) -> list[str]:
    """Return the subjects in the order in which they are opened: what they need comes first."""
    needed = [need for name in names for need in subject(name).needs]
    return list(dict.fromkeys([*(with_needs(needed) if needed else ()), *names]))


def open_subjects(
    names: Sequence[str], given: dict[str, Any], kept: MutableMapping[Any, Any] | None = None
) -> list[Any]:
    """Open the subjects of a method, in order, from all flags together; removes their flags from `given`.

    Args:
        kept: subjects opened before, by what was said up to them; what is there is not opened again.
    """
    opened: dict[str, Any] = {}
    said: tuple[Any, ...] = ()
    kept = {} if kept is None else kept
    for name in with_needs(names):
        row = subject(name)
        flags = {f.name: given.pop(f.name, f.default) for f in row.flags}
        said = (*said, name, *flags.values())
        if said not in kept:
            kept[said] = row.open(flags, opened)
        opened[name] = kept[said]
    return [opened[name] for name in names]


def examples(names: Sequence[str], given: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Build an example of every subject named, each to suit those before it; those `given` stay as they are."""
    built = dict(given or {})
    for name in with_needs(names):
        if name not in built:
            built[name] = subject(name).example(built)
    return {name: built[name] for name in names}
