"""Docstrings and comments read like the field's: the worst habits are counted in each room, and may only shrink."""

import ast
import io
import re
import tokenize
from collections import Counter
from functools import cache

import pytest

from tests.meta.tree import ROOT, sources

#: a docstring begins with a noun (class) or an active verb (function); a method's module may begin with its question
START = re.compile(r"(What|Whether|Who|Whose|Where|How|One)\b")
HABITS = re.compile(r"\bone a \b|\bso many\b|\banew\b|\bis no \b|\bwhoever\b|\bnobody\b|\btold\b", re.IGNORECASE)

#: what is left in each room: docstrings with such a beginning, such words, and `# fmt: skip` outside tables of rows
LEFT: dict[str, tuple[int, int, int]] = {}
NONE = (0, 0, 0)


def room(path: str) -> str:
    """The folder of a file below the package."""
    return "/".join(path.split("/")[1:-1]) or "the root"


def docstrings(tree: ast.Module) -> list[str]:
    """Every docstring, without the modules' own that ask a method's question."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = [(n, ast.get_docstring(n)) for n in ast.walk(tree) if isinstance(n, documented)]
    asks = [d for n, d in found if isinstance(n, ast.Module) and d and d.split("\n\n")[0].endswith("?")]
    return [d for _, d in found if d and d not in asks]


def comments(text: str) -> list[tuple[int, str]]:
    """Every comment with its line."""
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return [(t.start[0], t.string) for t in tokens if t.type == tokenize.COMMENT]


def tables(tree: ast.Module) -> set[int]:
    """Return the last lines of the tables of rows: constants of a module or class that hold a collection or words."""
    bodies = [tree.body, *(n.body for n in ast.walk(tree) if isinstance(n, ast.ClassDef))]
    found = [s for body in bodies for s in body if isinstance(s, ast.Assign | ast.AnnAssign) and s.value is not None]
    return {s.end_lineno or 0 for s in found if any(map(_collection, ast.walk(s))) or _words(s.value)}


def _collection(node: ast.AST) -> bool:
    return isinstance(node, ast.Tuple | ast.List | ast.Dict | ast.Set)


def _words(value: ast.AST) -> bool:
    return isinstance(value, ast.Call) and len(value.args) == 1 and isinstance(value.args[0], ast.Constant)


def habits(text: str, tree: ast.Module | None = None) -> tuple[list[str], list[str], list[int]]:
    """Beginnings and words to avoid, and lines of `# fmt: skip` outside tables of rows, in one source text."""
    tree = tree or ast.parse(text)
    docs, notes, rows = docstrings(tree), comments(text), tables(tree)
    starts = [d.split("\n")[0] for d in docs if START.match(d)]
    words = [w for prose in (*docs, *(c for _, c in notes)) for w in HABITS.findall(prose)]
    return starts, words, [line for line, c in notes if "fmt: skip" in c and line not in rows]


@cache
def counted() -> dict[str, tuple[int, int, int]]:
    """The counts of each room that has any."""
    found: dict[str, Counter[int]] = {}
    for path, tree in sources().items():
        lists = habits((ROOT / path).read_text("utf-8"), tree)
        found.setdefault(room(path), Counter()).update({n: len(x) for n, x in enumerate(lists)})
    return {r: (c[0], c[1], c[2]) for r, c in found.items() if any(c.values())}


def test_habits_only_shrink():
    wrong = {r: (now, LEFT.get(r, NONE)) for r, now in counted().items()
             if any(n > most for n, most in zip(now, LEFT.get(r, NONE), strict=True))}  # fmt: skip
    lines = [f"{p}: {x}" for p in sources() if room(p) in wrong
             for part in habits((ROOT / p).read_text("utf-8")) for x in part]  # fmt: skip
    assert not wrong, "\n".join([f"(now, at most): {wrong}", *lines])


def test_rooms_without_habits_are_off_the_list():
    assert set(LEFT) <= set(counted())


@pytest.mark.parametrize(
    "text",
    [
        '"""Words."""\n\n\ndef f():\n    """Whether it is so."""\n',
        '"""One value a prompt."""\n',
        'class A:\n    """How many there are."""\n',
        "x = 1  # one a prompt\n",
        '"""It is no number."""\n',
        "x = f(1, 2)  # fmt: skip\n",
        "def f():\n    x = (1, 2)  # fmt: skip\n",
    ],
)
def test_the_check_sees(text):
    assert any(habits(text))


@pytest.mark.parametrize(
    "text",
    [
        '"""What would patching change?\n\nMore."""\n',
        '"""Ones, and whatever."""\n',
        "ROWS = ((1, 2), (3, 4))  # fmt: skip\n",
        "class A:\n    rows = {1: 2}  # fmt: skip\n",
        "WORDS = words('one two')  # fmt: skip\n",
        'x = "one a prompt"\n',
    ],
)
def test_the_check_lets_pass(text):
    assert not any(habits(text))
