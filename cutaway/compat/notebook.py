"""Notebooks run without a server: the code cells, one after the other, by IPython's shell or by Python itself."""

from __future__ import annotations

import ast
import re
import sys
import time
from code import InteractiveInterpreter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from cutaway.core.files import read_json
from cutaway.core.refuse import Refused

_SYSTEM = re.compile(r"\s*(!|%(pip|conda|sx|system)\b)")
_MAGIC = re.compile(r"\s*(%|\?|[\w.]+\?+\s*$)")
_MEASURES = re.compile(r"\A\s*%%(time|timeit|capture)\b")


@dataclass(frozen=True)
class Cell:
    """The outcome of a code cell: "ran", "failed" or "skipped", and why; `number` counts all cells of the notebook."""

    number: int
    state: str
    seconds: float = 0.0
    why: str = ""


def code_cells(path: str | Path) -> dict[int, str]:
    """Return the source of each code cell, by its place among all cells.

    Raises:
        Refused: no notebook of format 4.
    """
    data = read_json(path)
    if not isinstance(data, dict) or data.get("nbformat") != 4 or not isinstance(data.get("cells"), list):
        raise Refused(f"file {str(path)!r}", "it is no notebook of format 4", "save it as .ipynb with Jupyter")
    sources = {i: "".join(c.get("source", "")) for i, c in enumerate(data["cells"]) if c.get("cell_type") == "code"}
    return {i: text for i, text in sources.items() if text.strip()}


def run_cells(path: str | Path, namespace: dict[str, Any]) -> Iterator[Cell]:
    """Run the cells of a notebook in a namespace, and yield the outcome of each; one that fails stops no other.

    Lines that call the system or install packages are left out, magics where IPython is not installed, and cells of
    other languages or for Google's Colab alone.
    """
    execute, magics = (_ipython, True) if find_spec("IPython") else (_python, False)
    run = execute(namespace)
    for number, source in code_cells(path).items():
        text, left = without_lines(_MEASURES.sub("#", source, count=1), magics)
        if text.lstrip().startswith("%%"):
            yield Cell(number, "skipped", why=f"no Python: {text.split()[0]}")
            continue
        start = time.perf_counter()
        error = run(text)
        state, why = "ran", f"left out: {'; '.join(left)}" if left else ""
        if error is not None:
            colab = isinstance(error, ModuleNotFoundError) and str(error.name).startswith("google")
            state, why = ("skipped", "for Colab") if colab else ("failed", f"{type(error).__name__}: {error}")
        yield Cell(number, state, time.perf_counter() - start, why)


def without_lines(source: str, magics: bool) -> tuple[str, list[str]]:
    """Return a cell with `pass` for calls of the system, and for magics unless they are known; and those lines."""
    out, left, going_on = list[str](), list[str](), False
    for line in source.splitlines():
        bad = _SYSTEM.match(line) or (not magics and not line.startswith("%%") and _MAGIC.match(line))
        left += [line.strip()] if bad and not going_on else []
        out.append("" if going_on else f"{line[: len(line) - len(line.lstrip())]}pass" if bad else line)
        going_on = bool(bad or going_on) and line.rstrip().endswith("\\")
    return "\n".join(out), left


def _ipython(namespace: dict[str, Any]) -> Callable[[str], BaseException | None]:
    from IPython.core.interactiveshell import InteractiveShell  # type: ignore[import-not-found]

    InteractiveShell.clear_instance()
    shell = InteractiveShell.instance(user_ns=namespace)
    return lambda source: (done := shell.run_cell(source)).error_before_exec or done.error_in_exec


def _python(namespace: dict[str, Any]) -> Callable[[str], BaseException | None]:
    namespace.setdefault("display", print)
    return _Python(namespace).run


class _Python(InteractiveInterpreter):
    """Python's own interpreter, whose error is kept."""

    error: BaseException | None

    def run(self, source: str) -> BaseException | None:
        """Run a cell, show the value of its last line, and return its error."""
        self.error = None
        try:
            tree = ast.parse(source)
        except SyntaxError as error:
            return error
        last = [tree.body.pop()] if tree.body and isinstance(tree.body[-1], ast.Expr) else []
        self.runcode(compile(tree, "<cell>", "exec"))
        if self.error is None:
            self.runcode(compile(ast.Interactive(last), "<cell>", "single"))
        return self.error

    def showtraceback(self) -> None:
        self.error = sys.exception() if hasattr(sys, "exception") else sys.exc_info()[1]
