"""`cutaway compat`: notebooks of other tools, run unchanged."""

from __future__ import annotations

import contextlib
import re
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import App, Parameter

from cutaway.cli.shell import Reply, stages
from cutaway.core.refuse import Keyword, Refused

if TYPE_CHECKING:
    from rich.console import Console

_ABSENT = re.compile(r"ModuleNotFoundError: No module named '([\w.]+)'")

app = App(name="compat", help="Run notebooks of TransformerLens, SAELens, circuit-tracer and circuitsvis unchanged.")


@app.command
def run(
    notebook: Annotated[Path, Parameter(help="the .ipynb file; it is not written")],
    /,
    *,
    model: Annotated[
        list[str] | None, Parameter(help="NAME=FOLDER: what a name in the notebook means; may be repeated", negative=())
    ] = None,
) -> Reply:
    """Run the code cells of a notebook, its output on stderr, and say what it used and what was refused.

    A notebook is a program: run those that you trust. The exit code is 1 if a cell failed.
    """
    from cutaway import compat
    from cutaway.compat.notebook import Cell, run_cells

    models, cells, file = dict(map(_named, model or [])), list[Cell](), notebook.resolve()
    with contextlib.ExitStack() as stack:
        step, aliases = stack.enter_context(stages()), stack.enter_context(compat.imports(models))
        stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        if file.is_file():
            stack.enter_context(contextlib.chdir(file.parent))  # where Jupyter runs it, too
            sys.path.insert(0, str(file.parent))
        for cell in run_cells(file, {"__name__": "__main__"}):
            step(f"cell {cell.number}: {cell.state}")
            cells.append(cell)
    count = Counter(cell.state for cell in cells)
    words = ", ".join(f"{count[state]} {state}" for state in ("ran", "failed", "skipped"))

    def show(console: Console) -> None:
        for cell in cells:
            if cell.why:
                console.print(f"cell {cell.number} {cell.state}: {cell.why}", style="dim", markup=False, soft_wrap=True)
        console.print(str(aliases), markup=False, soft_wrap=True)
        if missing := sorted({m[1].split(".")[0] for cell in cells if (m := _ABSENT.search(cell.why))}):
            console.print(f"The notebook needs packages that are not installed: pip install {' '.join(missing)}")
        console.print(f"{len(cells)} cells: {words}", style="bold")

    refused = [refusal.as_dict() for refusal in aliases.refused.values()]
    data = {"cells": [asdict(cell) for cell in cells], "used": dict(aliases.used), "refused": refused}
    return Reply(data, show, code=int(bool(count["failed"])))


def _named(text: str) -> tuple[str, str]:
    name, equals, folder = text.partition("=")
    if not (name and equals and folder):
        raise Refused(Keyword("model", text), "it says no name and what it means", "give NAME=FOLDER")
    return name, str(Path(folder).resolve()) if Path(folder).exists() else folder
