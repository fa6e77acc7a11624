"""A result in the terminal: what it answers, its picture, its largest entries, and the line that repeats it."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from cutaway.core.result import Result
from cutaway.views.spec import fields, pictures
from cutaway.views.terminal import table, terminal


def draw(console: Console, result: Result, entries: int = 8) -> None:
    """Draw the first field of a result, rank its entries, and say how to repeat it."""
    record, first = result.record, fields(result)[0]
    console.print(
        Text(str(record.get("method", result.kind)), "bold").append(f"  {record.get('answers', '')}", "not bold")
    )
    console.print(terminal(result, first))
    if pictures(result, first)[0].kind not in ("bars", "number"):  # bars are a ranking already
        console.print(table(result, first, n=entries))
    rest = [n for n in fields(result) if n != first]
    if rest:
        console.print(Text(f"also in it: {', '.join(rest)}", "dim"))
    if "cost" in record:
        cost = record["cost"]
        spent = f"{cost['forwards']:.1f} forwards, {cost['backwards']:.1f} backwards, {cost['seconds']:.2f} s"
        console.print(Text(f"cost: {spent}; control: {record.get('control', 'none')}", "dim"))
    if "command" in record:
        console.print(Text("again: ", "dim").append(record["command"], "not dim bold"), soft_wrap=True)
