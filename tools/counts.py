"""Counts that say how well the house carries its breadth: `python -m tools.counts [FOLDER …]`, one column per folder.

A folder holds a checkout of the project. Only what the source text says is counted; nothing of it is imported.
"""

from __future__ import annotations

import ast
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[1]
_SHORT = 6  # lines
Function = ast.FunctionDef | ast.AsyncFunctionDef


def counts(root: Path) -> dict[str, int]:
    """Return the counts of one checkout by what they count."""
    texts = {p.relative_to(root): p.read_text("utf-8") for p in sorted((root / "cutaway").rglob("*.py"))}
    trees = {p: ast.parse(t) for p, t in texts.items()}
    nodes = [n for tree in trees.values() for n in ast.walk(tree)]
    classes = {n.name: [_name(b) for b in n.bases] for n in nodes if isinstance(n, ast.ClassDef)}
    functions = [n for n in nodes if isinstance(n, Function)]
    used = Counter(re.findall(r"\b_\w+\b", "\n".join(texts.values())))
    once = [f for f in functions if re.match(r"_[a-z]", f.name) and used[f.name] == 2]
    documented = [n for n in nodes if isinstance(n, ast.Module | ast.ClassDef | Function)]
    words = [ast.get_docstring(n) or "" for n in documented]
    lazy = {p: sum(map(_imports, _functions(tree))) for p, tree in trees.items()}
    return {
        "files": len(texts),
        "lines": sum(t.count("\n") for t in texts.values()),
        "result classes": sum(_descends(name, "Result", classes) for name in classes),
        "functions": len(functions),
        "private functions used once": len(once),
        f"of these, at most {_SHORT} lines": sum(_length(f) <= _SHORT for f in once),
        "# fmt: skip": sum(t.count("# fmt: skip") for t in texts.values()),
        "lazy imports of the house": sum(lazy.values()),
        "of these, in the command line": sum(n for p, n in lazy.items() if "cli" in p.parts),
        "docstrings that begin with What, Whether, How, Who or One": sum(map(_begins_badly, words)),
    }


def _name(base: ast.expr) -> str:
    return ast.unparse(base).split("[")[0].split(".")[-1]


def _descends(name: str, ancestor: str, classes: dict[str, list[str]]) -> bool:
    bases = [b for b in classes.get(name, []) if b != name]
    return ancestor in bases or any(_descends(b, ancestor, classes) for b in bases)


def _functions(tree: ast.Module) -> Iterator[Function]:
    """Yield the outermost functions and methods."""
    for node in ast.walk(tree):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, Function) and isinstance(node, ast.Module | ast.ClassDef):
                yield child


def _imports(function: Function) -> int:
    modules = (n.module or "" for n in ast.walk(function) if isinstance(n, ast.ImportFrom))
    plain = (a.name for n in ast.walk(function) if isinstance(n, ast.Import) for a in n.names)
    return sum(name.split(".")[0] == "cutaway" for name in (*modules, *plain))


def _length(function: Function) -> int:
    return (function.end_lineno or 0) - function.lineno + 1


def _begins_badly(text: str) -> bool:
    return re.match(r"(What|Whether|How|Who|One)\b", text) is not None


def main() -> None:
    """Print one column of counts per folder; this checkout if none is named."""
    found = [counts(Path(folder)) for folder in sys.argv[1:] or [_ROOT]]
    for what in found[-1]:
        sys.stdout.write(f"{what:<58}" + "".join(f"{c[what]:>8}" for c in found) + "\n")


if __name__ == "__main__":
    main()
