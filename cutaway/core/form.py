"""Forms: what a call of a method must say, as every shell asks for it; one entry for each flag of a subject and option.

    form(row)                      the entries: a command has a flag, a page a field and a tool a property for each
    schema(row)                    the same as JSON Schema
    subjects, options = opened(row, values)      a call from such values

Values are JSON: texts, numbers, yes or no, and lists. What is left out has its default.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from cutaway.core.method import Method, Option
from cutaway.core.refuse import Keyword, Refused, nearest
from cutaway.core.subject import REQUIRED, Flag, choose, open_subjects, subject, with_needs

_TYPES: dict[type, str] = {bool: "boolean", int: "integer", float: "number"}  # all others are written as text
_PYTHON: dict[str, tuple[type, ...]] = {"boolean": (bool,), "integer": (int,), "number": (int, float), "string": (str,)}


@dataclass(frozen=True)
class Entry:
    """An entry of a form.

    Attributes:
        name: the flag or option.
        type: the JSON type of its value, or of each part of a list: string, integer, number or boolean.
        default: the default value; None if it has none.
        required: True if it must be given.
        nullable: True if it may be null.
        choices: the values allowed; empty if any of the type is.
        several: True if it takes a list.
        help: the meaning.
        subject: the subject that it belongs to; empty for an option of the method itself.
        instead: the subjects that may be given in place of its own.
    """

    name: str
    type: str
    default: Any
    required: bool
    nullable: bool
    choices: tuple[str, ...]
    several: bool
    help: str
    subject: str = ""
    instead: tuple[str, ...] = ()

    def schema(self) -> dict[str, Any]:
        """Return the entry as a property of a JSON Schema."""
        one: dict[str, Any] = {"type": self.type} | ({"enum": list(self.choices)} if self.choices else {})
        whole = {"type": "array", "items": one} if self.several else one
        if self.nullable:
            whole = {"anyOf": [whole, {"type": "null"}]}
        return whole | {"description": self.help} | ({} if self.required else {"default": self.default})


def form(row: Method) -> list[Entry]:
    """Return the entries of a method's form: the flags of its subjects, then its options."""
    takes = row.takes()
    others = {n: tuple(m for m in names if m != n) for names in takes for n in names}
    order = with_needs([n for names in takes for n in names])
    flags = [_of_flag(f, name, others.get(name, ())) for name in order for f in subject(name).flags]
    return [*flags, *map(_of_option, row.options)]


def schema(row: Method) -> dict[str, Any]:
    """Return a method's form as JSON Schema."""
    entries = form(row)
    return {
        "type": "object",
        "properties": {e.name: e.schema() for e in entries},
        "required": [e.name for e in entries if e.required],
        "additionalProperties": False,
    }


def opened(
    row: Method, values: Mapping[str, Any], kept: MutableMapping[Any, Any] | None = None
) -> tuple[list[Any], dict[str, Any]]:
    """Return the subjects and the options of a call from the values of its form.

    Args:
        kept: subjects opened before; one that the same flags mean is not opened again, and new ones are added.

    Raises:
        Refused: an unknown entry, a value of another type, or a subject that cannot be opened.
    """
    given = checked(row, values)
    return open_subjects([choose(names, given) for names in row.takes()], given, kept), given


def checked(row: Method, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of a form as flags and options take them.

    Raises:
        Refused: an unknown entry, one that is missing, or a value of another type.
    """
    entries = {e.name: e for e in form(row)}
    for name, value in values.items():
        if name not in entries:
            near = nearest(name, entries)
            why = f"{row.name} has no such entry" + (f"; near: {near}" if near else "")
            raise Refused(Keyword(name), why, f"it has {', '.join(entries)}")
        if not _fits(entries[name], value):
            raise Refused(Keyword(name, value), f"it must be {_said(entries[name])}", entries[name].help or "leave it")
    missing = next((e for e in entries.values() if e.required and e.name not in values), None)
    if missing is not None:
        raise Refused(Keyword(missing.name), "it is missing", missing.help)
    paths = {f.name for n in with_needs([n for t in row.takes() for n in t]) for f in subject(n).flags if _is_path(f)}
    return {n: Path(v) if n in paths and v is not None else v for n, v in values.items()}


def _of_flag(flag: Flag, name: str, instead: tuple[str, ...]) -> Entry:
    parts = get_args(flag.type) or (flag.type,)
    kind = next(p for p in parts if p is not type(None))
    required = flag.default is REQUIRED and not instead
    default = None if flag.default is REQUIRED else flag.default
    nullable = type(None) in parts or (flag.default is REQUIRED and bool(instead))
    return Entry(
        flag.name, _TYPES.get(kind, "string"), default, required, nullable, (), False, flag.help, name, instead
    )


def _of_option(option: Option) -> Entry:
    default = list(option.default) if isinstance(option.default, tuple) else option.default
    default = [str(v) for v in default] if option.several and option.type not in _TYPES and default else default
    kind = _TYPES.get(option.type, "string")
    return Entry(option.name, kind, default, False, option.optional, option.choices, option.several, option.help)


def _is_path(flag: Flag) -> bool:
    return Path in (get_args(flag.type) or (flag.type,))


def _fits(entry: Entry, value: Any) -> bool:
    if value is None:
        return entry.nullable
    if entry.several and isinstance(value, list):
        return all(_is(entry, v) for v in value)
    return (entry.several and isinstance(value, str)) or _is(entry, value)


def _is(entry: Entry, value: Any) -> bool:
    kinds = _PYTHON[entry.type]
    return isinstance(value, kinds) and (not isinstance(value, bool) or bool in kinds)


def _said(entry: Entry) -> str:
    word = {"boolean": "true or false", "integer": "a whole number", "number": "a number", "string": "a text"}
    return f"a list, each {word[entry.type]}" if entry.several else word[entry.type]


__all__ = ["Entry", "checked", "form", "opened", "schema"]
