"""A result in the terminal: its largest entries, what they are compared with, and how to repeat it."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cutaway.core.result import Result


def draw(console: Console, result: Result, rows: int = 12) -> None:
    """Draw the main field of a result and the line that repeats it."""
    record, entries = result.record, result.top(rows)
    table = Table(
        title=escape(f"{record.get('method', result.kind)}: {record.get('answers', '')}"), title_justify="left"
    )
    for name in entries[0]:
        table.add_column(name + (f" ({result.units[name]})" if name in result.units else ""))
    for entry in entries:
        table.add_row(*(escape(_cell(v)) for v in entry.values()))
    console.print(table)
    if "command" in record:
        console.print(f"again: [bold]{escape(record['command'])}[/]", soft_wrap=True)


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, list):
        shown = ", ".join(_cell(v) for v in value[:2])
        return f"[{shown}]" if len(value) <= 2 else f"{len(value)} values"
    return str(value)
