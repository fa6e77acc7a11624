"""Import cycles, lazy imports and those for types alone included: none beyond a list that may only shrink."""

import ast
from pathlib import Path

import pytest

from tests.meta.tree import ROOT, imports, sources

BENCH = {p.relative_to(ROOT).as_posix(): ast.parse(p.read_text("utf-8")) for p in sorted((ROOT / "bench").glob("*.py"))}

#: cycles that are left, by their first module, and the number of their modules; the list may only shrink
KNOWN: dict[str, int] = {}


def edges(trees: dict[str, ast.Module]) -> dict[str, set[str]]:
    """The modules that each module names in an import, by dotted name.

    A package that an import only passes through is not among them: `from a.b import c` names `a.b.c` where that is a
    module, and `a.b` otherwise.
    """
    known = {Path(p).with_suffix("").as_posix().removesuffix("/__init__").replace("/", "."): (p, t)
             for p, t in trees.items()}  # fmt: skip
    found: dict[str, set[str]] = {}
    for module, (path, tree) in known.items():
        named = {name for name, _ in imports(tree, path)}
        there = {n if n in known else n.rpartition(".")[0] for n in named} & set(known)
        passed = {n.rpartition(".")[0] for n in named if n in known}  # `from a.b import c` also reports a.b itself
        asked = {n.rpartition(".")[0] for n in named if n not in known}
        found[module] = {n for n in there if n not in passed or n in asked} - {module}
    return found


def cycles(graph: dict[str, set[str]]) -> list[list[str]]:
    """The sets of modules that reach each other."""
    reach = {m: _reached(graph, m) for m in graph}
    groups = {frozenset([m, *(n for n in reach[m] if m in reach[n])]) for m in graph if m in reach[m]}
    return sorted(sorted(g) for g in groups)


def _reached(graph: dict[str, set[str]], start: str) -> set[str]:
    seen: set[str] = set()
    left = [start]
    while left:
        for n in graph[left.pop()] - seen:
            seen.add(n)
            left.append(n)
    return seen


def test_the_package_has_no_further_import_cycle():
    found = cycles(edges(sources()))
    assert {c[0]: len(c) for c in found} == KNOWN, found


def test_the_bench_has_no_import_cycle():
    assert cycles(edges(BENCH)) == []


@pytest.mark.parametrize(
    "back",
    ["from p.a import f", "def g():\n    from p.a import f", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n"
     "    from p import a", "from importlib import import_module\nimport_module('p.a')"],
)  # fmt: skip
def test_the_check_sees_every_way_back(back):
    trees = {"p/__init__.py": ast.parse(""), "p/a.py": ast.parse("from p import b"), "p/b.py": ast.parse(back)}
    assert cycles(edges(trees)) == [["p.a", "p.b"]]
