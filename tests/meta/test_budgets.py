"""Each room has a budget of code lines; whoever raises one says why in docs/decisions."""

import ast
from collections import Counter

from tests.meta.tree import ROOT, room_of, sources

#: lines of code (no blanks, comments or docstrings) that a room may have; see docs/decisions/11-budgets.md
BUDGETS = {
    "": 145,
    "core": 2_450,
    "views": 1_825,
    "models": 9_350,
    "tasks": 3_050,
    "streams": 1_450,
    "zoo": 3_150,
    "training": 650,
    "interventions": 1_950,
    "lenses": 2_300,
    "heads": 3_200,
    "weights": 1_050,
    "neurons": 2_000,
    "geometry": 1_000,
    "patching": 2_015,
    "dictionaries": 9_300,
    "directions": 3_140,
    "graphs": 3_545,
    "circuits": 3_600,
    "editing": 1_600,
    "features": 4_240,
    "suites": 1_630,
    "compat": 4_185,
    "cli": 2_990,
    "studio": 2_620,
}


def code_lines(text: str, tree: ast.Module | None = None) -> int:
    """Return the number of lines that are neither blank, nor a comment, nor of a docstring."""
    lines = {n for n, line in enumerate(text.splitlines(), 1) if line.strip() and not line.lstrip().startswith("#")}
    for node in ast.walk(tree or ast.parse(text)):
        documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        if documented and ast.get_docstring(node, clean=False) is not None:
            lines -= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    return len(lines)


def test_rooms_keep_to_their_budgets():
    found = Counter()
    for path, tree in sources().items():
        found[room_of(path) or ""] += code_lines((ROOT / path).read_text("utf-8"), tree)
    missing = set(found) - set(BUDGETS)
    assert not missing, f"write a budget for {missing} here and the reason in docs/decisions/11-budgets.md"
    wrong = [f"{room or 'root'}: {n} > {BUDGETS[room]}" for room, n in found.items() if n > BUDGETS[room]]
    assert not wrong, f"{wrong}: cut, or raise the budget with a page in docs/decisions"


def test_code_lines_leave_out_blanks_comments_and_docstrings():
    assert (
        code_lines('"""Text\nof a module."""\n\n# comment\nx = 1\n\n\ndef f():\n    """Text."""\n    return x\n') == 3
    )
    assert code_lines('x = """two\nlines"""\n') == 2
