"""The package as syntax trees, for the tests of the code about itself."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "cutaway"

#: the house plan: a row imports only from rows below it; rooms in one row do not know each other
ROWS: tuple[tuple[str, ...], ...] = (
    ("core",),
    ("views",),
    ("models", "training"),
    ("tasks", "streams", "zoo"),
    ("interventions",),
    (
        "lenses",
        "heads",
        "weights",
        "neurons",
        "geometry",
        "patching",
        "dictionaries",
        "directions",
        "dynamics",
        "vision",
    ),
    ("features",),
    ("circuits", "graphs", "editing"),
    ("suites",),
    ("compat", "studio"),
    ("cli",),
)
ROW = {room: n for n, rooms in enumerate(ROWS) for room in rooms}


@cache
def sources() -> dict[str, ast.Module]:
    """Every module of the package by its path below the root."""
    found = sorted(PACKAGE.rglob("*.py"))
    return {p.relative_to(ROOT).as_posix(): ast.parse(p.read_text(encoding="utf-8"), str(p)) for p in found}


def room_of(path: str) -> str | None:
    """The room that a file is in; None for the package root itself."""
    parts = path.split("/")
    return parts[1] if len(parts) > 2 else None


def rows(first: int, last: int) -> dict[str, ast.Module]:
    """The modules of rows `first` to `last`."""
    return {p: t for p, t in sources().items() if (r := room_of(p)) is not None and first <= ROW[r] <= last}


def imports(tree: ast.Module, path: str) -> Iterator[tuple[str, int]]:
    """Every module that a file imports, wherever the import stands, with its line."""
    package = path.removesuffix("/__init__.py").removesuffix(".py").split("/")
    package = package if path.endswith("/__init__.py") else package[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            if module != "cutaway":  # the root itself is not what `from cutaway import room` means
                yield module, node.lineno
            yield from ((f"{module}.{alias.name}", node.lineno) for alias in node.names)
        elif isinstance(node, ast.Call) and _name(node.func).split(".")[-1] == "import_module":
            yield from ((str(a.value), node.lineno) for a in node.args[:1] if isinstance(a, ast.Constant))


def calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    """Every call by the dotted name of what is called."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield _name(node.func), node


def _name(node: ast.AST) -> str:
    match node:
        case ast.Name(id=name):
            return name
        case ast.Attribute(value=value, attr=attr):
            return f"{_name(value)}.{attr}"
    return ""
