"""A result in the terminal: the question, its picture, its largest entries, what else it says, how to repeat it."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from cutaway.core.result import Result
from cutaway.views.spec import RANKED, fields, pictures
from cutaway.views.summary import summary
from cutaway.views.terminal import table, terminal

_PANELS = 2  # more heat maps would push everything else out of sight


def draw(console: Console, result: Result, field: str | None = None, entries: int = 8) -> None:
    """Draw a field of a result (the first if None), rank its entries, say what else it found and how to repeat it."""
    record, shown = result.record, field or fields(result)[0]
    console.print(
        Text(str(record.get("method", result.kind)), "bold").append(f"  {record.get('answers', '')}", "not bold")
    )
    found = pictures(result, shown)
    many = len(found) > _PANELS and len({p.unit for p in found}) == 1
    console.print(terminal(result, shown, **({"panels": 1} if many else {})))
    if many:
        console.print(Text("the panel of the largest value; all of them: --out FILE.html or FILE.png", "dim"))
    if found[0].kind not in (*RANKED, "number"):
        console.print(table(result, shown, n=entries))
    for line in summary(result, shown):
        console.print(Text(line))
    rest = [n for n in fields(result) if n != shown]
    if rest:
        console.print(Text(f"also in it (cutaway open FILE --field NAME): {', '.join(rest)}", "dim"))
    if "cost" in record:
        cost = record["cost"]
        spent = f"{cost['forwards']:.1f} forwards, {cost['backwards']:.1f} backwards, {cost['seconds']:.2f} s"
        control = str(record.get("control", "none")).replace("_", " ")
        console.print(Text(f"cost: {spent}; control: {control}", "dim"))
    if "command" in record:
        console.print(Text("again: ", "dim").append(record["command"], "not dim bold"), soft_wrap=True)
