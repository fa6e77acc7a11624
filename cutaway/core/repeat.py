"""Commands that repeat a call, as a line for the shell and a line of Python, or the reason why there is none.

The arguments of a method remember how they were made (`Made`): the flags of the command line, and an expression of
Python. An object made by hand, or changed since, has no command, as a wrong one would silently give other numbers.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

NO_COMMAND, NO_PYTHON = "no command: ", "no line of Python: "
Look = Callable[[Any], Mapping[str, Any]]


@dataclass(frozen=True)
class Made:
    """Recipe by which an object can be made again.

    Attributes:
        python: expression of Python that makes it.
        flags: flags of the command line that mean it, by name; "" is the object itself.
        no_flags: the reason, if no flags mean it.
        no_python: the reason, if no expression makes it.
        needs: subjects that the expression uses, each with the expression that made it.
        look: returns the present state of the object, by aspect.
        seen: that state when the object was made.
        sources: recipes of what it was made from and a method may not take itself, by subject.
    """

    python: str = ""
    flags: Mapping[str, Any] = field(default_factory=dict)
    no_flags: str = ""
    no_python: str = ""
    needs: Mapping[str, str] = field(default_factory=dict)
    look: Look | None = None
    seen: Mapping[str, Any] = field(default_factory=dict)
    sources: Mapping[str, Made] = field(default_factory=dict)

    def of(self, thing: Any, look: Look) -> Made:
        """Return the recipe tied to an object in its present state."""
        return replace(self, look=look, seen=look(thing))

    def then(self, step: str, no_flags: str = "", **flags: Any) -> Made:
        """Add a step in Python, such as `.take(4)`, with the flags that mean the same or the reason why none do."""
        return replace(
            self, python=f"{self.python}{step}", flags={**self.flags, **flags}, no_flags=self.no_flags or no_flags
        )


def made(name: str, thing: Any) -> Made:
    """Return the recipe of a subject called `name`, or the reasons why its present state has none."""
    known: Made | None = getattr(thing, "made", None)
    if known is None:
        why = f"the {name} was made by hand in Python"
        return Made(no_flags=why, no_python=why)
    now = known.look(thing) if known.look is not None else {}
    other = [aspect for aspect, value in now.items() if value != known.seen.get(aspect)]
    if other:
        why = f"the {name} was changed in Python after it was made ({', '.join(other)})"
        return Made(no_flags=why, no_python=why)
    return known


def together(subjects: Mapping[str, Any]) -> dict[str, Made]:
    """Return the recipes of the subjects of one call and of what they were made from, checked against each other."""
    own = {n: made(n, s) for n, s in subjects.items()}
    found = {n: source for how in own.values() for n, source in how.sources.items() if n not in own} | own
    for n, how in found.items():
        for need, then in how.needs.items():
            if need in found and found[need].python != then and not found[need].no_python:
                why = f"the {n} was made for another {need}"
                found[n] = Made(no_flags=why, no_python=why)
    return found


def command(name: str, subjects: Mapping[str, Made], options: Mapping[str, Any], defaults: Mapping[str, Any]) -> str:
    """Return the command line of a method with these subjects and options, or "no command: …" and why."""
    out = ["cutaway", *name.split(".")]
    for subject, how in subjects.items():
        for flag, value in how.flags.items():
            out += words("-".join(filter(None, (subject, flag))), value)
    why = [how.no_flags for how in subjects.values() if how.no_flags]
    for option, value in options.items():
        if value is None and defaults[option] is not None:
            why.append(f"no flag says {option}=None")
        elif value != defaults[option]:
            out += words(option, ",".join(map(str, value)) if isinstance(value, tuple) else value)
    return NO_COMMAND + "; ".join(why) if why else shlex.join(out)


def python(name: str, taken: Iterable[str], subjects: Mapping[str, Made], options: Mapping[str, Any]) -> str:
    """Return a line of Python that makes the subjects and calls the method on those `taken`, or why there is none."""
    why = [how.no_python for how in subjects.values() if how.no_python]
    given = ", ".join([*taken, *(f"{n}={v!r}" for n, v in options.items())])
    if why:
        return f"{NO_PYTHON}{'; '.join(why)}; with what you have: ca.{name}({given})"
    lines = [f"{subject} = {how.python}" for subject, how in subjects.items()]
    needs = [m for m in ("torch",) if any(f"{m}." in how.python for how in subjects.values())]
    return "; ".join([f"import {', '.join([*needs, 'cutaway as ca'])}", *lines, f"result = ca.{name}({given})"])


def words(flag: str, value: Any) -> list[str]:
    """Return a flag with its value as words of a command line; no words if the value is None."""
    name = "--" + flag.replace("_", "-")
    match value:
        case None:
            return []
        case bool():
            return [name if value else f"--no-{name[2:]}"]
        case list() | tuple():
            return [w for v in value for w in words(flag, v)]
    text = str(value)
    return [f"{name}={text}"] if text.startswith("-") else [name, text]


def called(function: str, *arguments: str, **options: Any) -> str:
    """Write a call as an expression of Python, without options that are None."""
    given = [f"{n}={v!r}" for n, v in options.items() if v is not None]
    return f"{function}({', '.join([*arguments, *given])})"
