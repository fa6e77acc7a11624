"""A result in the terminal: the question, its picture, its largest entries, what else it says, how to repeat it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.text import Text

from cutaway.core.outcome import Outcome
from cutaway.core.result import Result
from cutaway.views.draw.terminal import table, terminal
from cutaway.views.kinds import KINDS
from cutaway.views.spec import fields, pictures
from cutaway.views.summary import summary

_PANELS = 2  # more heat maps would push everything else out of sight


def draw(console: Console, result: Result, field: str | None = None, entries: int = 8) -> None:
    """Draw a field of a result (the first if None), rank its entries, say what else it found and how to repeat it."""
    shown = field or fields(result)[0]
    _asked(console, result.record, result.kind)
    found = pictures(result, shown)
    many = len(found) > _PANELS and len({p.unit for p in found}) == 1
    console.print(terminal(result, shown, **({"panels": 1} if many else {})))
    if many:
        console.print(Text("the panel of the largest value; all of them: --out FILE.html or FILE.png", "dim"))
    if found[0].kind != "number" and not KINDS[found[0].kind].ranked:
        console.print(table(result, shown, n=entries))
    for name in result.page if field is None else ():
        if name in result.tensors():
            console.print(terminal(result, name, panels=1))
    for line in summary(result, shown):
        console.print(Text(line))
    rest = [n for n in fields(result) if n != shown]
    if rest:
        console.print(Text(f"also in it (cutaway open FILE --field NAME): {', '.join(rest)}", "dim"))
    _spent(console, result.record)


def state(console: Console, outcome: Outcome) -> None:
    """State what a method made, such as a rewrite of weights, and how to repeat it."""
    _asked(console, outcome.record, type(outcome).__name__)
    console.print(Text(repr(outcome)), soft_wrap=True)
    _spent(console, outcome.record)


def _asked(console: Console, record: Mapping[str, Any], kind: str) -> None:
    console.print(Text(str(record.get("method", kind)), "bold").append(f"  {record.get('answers', '')}", "not bold"))


def _spent(console: Console, record: Mapping[str, Any]) -> None:
    if "cost" in record:
        cost = record["cost"]
        spent = f"{cost['forwards']:.1f} forwards, {cost['backwards']:.1f} backwards, {cost['seconds']:.2f} s"
        control = str(record.get("control", "none")).replace("_", " ")
        console.print(Text(f"cost: {spent}; control: {control}", "dim"))
    if "command" in record:
        console.print(Text("again: ", "dim").append(record["command"], "not dim bold"), soft_wrap=True)
