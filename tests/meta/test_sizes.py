"""Guide sizes of files, functions, classes and signatures; exceptions are listed here and may only shrink."""

import ast

import cutaway as ca
from tests.meta.tree import ROOT, sources

FILE, FUNCTION, CLASS, METHODS, OPTIONS = 500, 70, 300, 20, 6
CONTROL = {"samples", "null_cells", "seed"}  # options of every control, beside a method's own
#: what is larger, and how large it may be at most; an entry that has become small enough must go
EXCEPTIONS: dict[str, int] = {}


def measured() -> dict[str, tuple[int, int]]:
    """Size and limit of every file, function and class, by a name."""
    found = {}
    for path, tree in sources().items():
        found[path] = (len((ROOT / path).read_text("utf-8").splitlines()), FILE)
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                found[f"{path}::{node.name}"] = ((node.end_lineno or 0) - node.lineno + 1, FUNCTION)
            elif isinstance(node, ast.ClassDef):
                found[f"{path}::{node.name}"] = ((node.end_lineno or 0) - node.lineno + 1, CLASS)
                methods = [n for n in node.body if isinstance(n, ast.FunctionDef) and not n.name.startswith("_")]
                found[f"{path}::{node.name} methods"] = (len(methods), METHODS)
    return found


def test_sizes_keep_to_the_guide():
    wrong = [f"{n}: {size} > {EXCEPTIONS.get(n, limit)}" for n, (size, limit) in measured().items()
             if size > EXCEPTIONS.get(n, limit)]  # fmt: skip
    assert not wrong, "\n".join(wrong)


def test_exceptions_only_shrink():
    sizes = measured()
    for name, allowed in EXCEPTIONS.items():
        assert name in sizes, f"{name} is gone: take it off the list"
        size, limit = sizes[name]
        assert limit < allowed, f"{name} is no exception"
        assert size == allowed, f"{name} is {size} long now: write that in the list"


def test_methods_have_few_options():
    own = {name: [o.name for o in row.options if o.name not in CONTROL] for name, row in ca.methods().items()}
    assert not {name: options for name, options in own.items() if len(options) > OPTIONS}


def test_every_public_function_and_class_says_what_it_is():
    wrong = []
    for path, tree in sources().items():
        if not ast.get_docstring(tree):
            wrong.append(path)
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                first = (ast.get_docstring(node) or "").split("\n\n")[0].strip()
                if not first.endswith((".", "?", ":", "…")):
                    wrong.append(f"{path}::{node.name}: {first!r}")
    assert not wrong, "\n".join(wrong)
