"""Looks at what there is: methods, tasks, sites, a model's self-check, a saved result."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

import cutaway
from cutaway.cli.output import OUT_HELP, check_out, open_result, save_report
from cutaway.cli.shell import Reply, working
from cutaway.cli.subjects import DEFAULT_MODEL, load_model
from cutaway.core.address import example
from cutaway.core.refuse import Refused
from cutaway.core.sites import SITES

if TYPE_CHECKING:
    from rich.console import Console

_WIDE = 120  # characters of a line that show every column of the longest tables


def methods() -> Reply:
    """List what can be asked, with paper, cost, control and rung."""
    rows = [
        {
            "method": r.name,
            "answers": r.answers,
            "paper": r.paper,
            "cost": r.cost,
            "control": r.control,
            "rung": r.rung,
            "results": [c.__name__ for c in r.results],
            "options": [o.name for o in r.options],
        }
        for r in cutaway.methods().values()
    ]
    columns = ["method", "answers", "paper", "control", "rung"]
    return table("Methods", rows, columns, "one of them: cutaway ROOM METHOD --help", least=2)


def tasks(*, model: str | None = None) -> Reply:
    """List the tasks that methods can be run on.

    Args:
        model: also list the behaviours of this model's own world.
    """
    from cutaway.tasks import TASKS, names

    known = names(load_model(model) if model else None)
    rows = [_task(n, TASKS.get(n)) for n in known]
    also = "also: --task pairs.jsonl, or one sentence in quotes"
    return table("Tasks", rows, ["task", "metric", "corruptions", "example"], also)


def sites(*, model: str | None = None) -> Reply:
    """List the places of a forward pass, or those of one model.

    Args:
        model: say what of it can be read and edited, and why not.
    """
    found = load_model(model).sites() if model else {}
    rows = [
        {
            "site": s.name,
            "address": example(s),
            "axes": s.axes,
            "note": s.note,
            **({"here": found[s.name]} if found else {}),
        }
        for s in SITES
    ]
    columns = ["site", "here", "note"] if found else ["site", "axes", "note"]
    return table(
        f"Sites of {model}" if model else "Sites", rows, columns, "an address: z.9.6@-1 (layer, head, position)"
    )


def check(*, model: str = DEFAULT_MODEL) -> Reply:
    """Check that reads and edits of a model keep their identities.

    Args:
        model: zoo name, folder, GGUF file, or Hugging Face id.
    """
    with working(f"checking {model} …"):
        outcomes = cutaway.self_check(load_model(model))
    rows = [asdict(o) for o in outcomes]
    failed = [o.name for o in outcomes if not o.passed]
    last = f"all {len(rows)} identities hold" if not failed else f"failed, their sites disabled: {', '.join(failed)}"
    return table(f"Self-check of {model}", rows, ["name", "passed", "error", *(["why"] if failed else [])], last)


def open_file(
    first: Annotated[Path, Parameter(help="a saved .safetensors result")],
    /,
    *more: Annotated[Path, Parameter(help="further ones, shown after it or on the same page")],
    field: Annotated[str | None, Parameter(help="which field to show; the first if left out")] = None,
    out: Annotated[Path | None, Parameter(help=f"{OUT_HELP}; of several results, a page")] = None,
) -> Reply:
    """Show saved results, or write them as one page."""
    from cutaway.cli.method_commands import reply
    from cutaway.core.files import reading

    check_out(out)
    files = (first, *more)
    if more:
        _check_several(field, out)
    replies, results = [], []
    for file in files:
        with reading(file):
            results.append(open_result(file))
            replies.append(reply(results[-1], None if more else out, field))
    if more and out is not None:
        save_report(results, out)

    def show(console: Console) -> None:
        for file, made in zip(files, replies, strict=True):
            with reading(file):
                made.show(console)
        if more and out is not None:
            console.print(f"saved to {out}", soft_wrap=True, markup=False)

    return Reply([r.data for r in replies] if more else replies[0].data, show)


def _check_several(field: str | None, out: Path | None) -> None:
    """Refuse what only one result can be asked for."""
    if field is not None:
        raise Refused(f"--field {field}", "several results are opened, whose fields differ", "open one at a time")
    if out is not None and out.suffix.lower() != ".html":
        raise Refused(f"--out {out}", "only a page (.html) holds several results", "open one at a time")


def table(
    title: str, rows: list[dict[str, Any]], columns: list[str], last: str = "", *, least: int | None = None
) -> Reply:
    """Return the rows as a reply: all as data, some columns for the eyes, in a narrow terminal the `least` first."""

    def show(console: Console) -> None:
        from rich import box
        from rich.markup import escape
        from rich.table import Table

        drawn = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, title_style="bold", padding=(0, 1))
        shown = columns if console.width >= _WIDE else columns[:least]
        for n, column in enumerate(shown):
            drawn.add_column(column, style="cyan" if n == 0 else "", no_wrap=n == 0)
        for row in rows:
            drawn.add_row(*(escape(_cell(row[c])) for c in shown))
        console.print(drawn)
        if last:
            console.print(escape(last), soft_wrap=True)

    return Reply(rows, show)


def _task(name: str, row: Any) -> dict[str, Any]:
    if row is None:
        return {"task": name, "metric": "", "corruptions": [], "example": "of the model's own world"}
    return {"task": name, "metric": row.metric, "corruptions": list(row.corruptions), "example": row.templates[0].text}


def _cell(value: Any) -> str:
    match value:
        case None:
            return "–"
        case bool():
            return "yes" if value else "NO"
        case float():
            return f"{value:.1e}"
        case list() | tuple():
            return ", ".join(map(str, value))
    return str(value)
