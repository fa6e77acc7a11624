"""How a call is done again: a command for the shell and a line of Python, or the words that say why there is none.

Whatever a method is called on remembers how it was made (`Made`): by flags of the command line, and by an expression of
Python. What was made by hand, or changed since, has no command: a wrong one would give other numbers without a word.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

NO_COMMAND, NO_PYTHON = "no command: ", "no line of Python: "
Look = Callable[[Any], Mapping[str, Any]]


@dataclass(frozen=True)
class Made:
    """How something was made: flags by name ("" is the thing itself), an expression of Python, or why not.

    `needs` names the subjects that the expression uses, each with the expression that it was then. `look` says, aspect
    by aspect, what it is like; `seen` is what it was like when it was made.
    """

    python: str = ""
    flags: Mapping[str, Any] = field(default_factory=dict)
    no_flags: str = ""
    no_python: str = ""
    needs: Mapping[str, str] = field(default_factory=dict)
    look: Look | None = None
    seen: Mapping[str, Any] = field(default_factory=dict)

    def of(self, thing: Any, look: Look) -> Made:
        """The same, tied to a thing as it is now."""
        return replace(self, look=look, seen=look(thing))

    def then(self, step: str, no_flags: str = "", **flags: Any) -> Made:
        """After one more step in Python, such as `.take(4)`, with flags that say the same or why none does."""
        return replace(
            self, python=f"{self.python}{step}", flags={**self.flags, **flags}, no_flags=self.no_flags or no_flags
        )


def made(name: str, thing: Any) -> Made:
    """How a subject called `name` can be made again, as it is now."""
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
    """How the subjects of one call can be made again, side by side."""
    found = {n: made(n, s) for n, s in subjects.items()}
    for n, how in found.items():
        for need, then in how.needs.items():
            if need in found and found[need].python != then and not found[need].no_python:
                why = f"the {n} was made for another {need}"
                found[n] = Made(no_flags=why, no_python=why)
    return found


def command(name: str, subjects: Mapping[str, Made], options: Mapping[str, Any], defaults: Mapping[str, Any]) -> str:
    """The command line of a method with these subjects and options, or "no command: …" and why."""
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


def python(name: str, subjects: Mapping[str, Made], options: Mapping[str, Any]) -> str:
    """One line of Python that makes the subjects and calls the method, or "no line of Python: …" and why."""
    why = [how.no_python for how in subjects.values() if how.no_python]
    given = ", ".join([*subjects, *(f"{n}={v!r}" for n, v in options.items())])
    if why:
        return f"{NO_PYTHON}{'; '.join(why)}; with what you have: ca.{name}({given})"
    lines = [f"{subject} = {how.python}" for subject, how in subjects.items()]
    needs = [m for m in ("torch",) if any(f"{m}." in how.python for how in subjects.values())]
    return "; ".join([f"import {', '.join([*needs, 'cutaway as ca'])}", *lines, f"result = ca.{name}({given})"])


def words(flag: str, value: Any) -> list[str]:
    """One flag with its value as words of a command line; none where the value is None."""
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
    """A call as an expression of Python; options that are None are left out."""
    given = [f"{n}={v!r}" for n, v in options.items() if v is not None]
    return f"{function}({', '.join([*arguments, *given])})"
