"""A row imports only from rows below it, and rooms in one row do not know each other."""

import ast

import pytest

from tests.meta.tree import PACKAGE, ROW, imports, room_of, sources

ROOT_ROW = 8.5  # the package root offers every row below the shells, so only shells may use it


def violations(path: str, tree: ast.Module) -> list[str]:
    here = room_of(path)
    assert here is not None
    found = []
    for module, line in imports(tree, path):
        first, _, rest = module.partition(".")
        there = rest.split(".")[0]
        if first != "cutaway" or there == here:
            continue
        if ROW.get(there, ROOT_ROW) >= ROW[here]:
            found.append(f"{path}:{line} ({here}) imports {module}")
    return found


def test_every_folder_is_a_room_of_the_plan():
    folders = {p.name for p in PACKAGE.iterdir() if (p / "__init__.py").exists()}
    assert folders <= set(ROW)


def test_imports_import_only_from_below():
    wrong = [v for path, tree in sources().items() if room_of(path) for v in violations(path, tree)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("cutaway/core/x.py", "from cutaway.models import tokens"),
        ("cutaway/core/x.py", "def f():\n    import cutaway.views.draw.figure"),
        ("cutaway/tasks/x.py", "from ..zoo import miniworld"),
        ("cutaway/lenses/x.py", "import cutaway as ca"),
        ("cutaway/lenses/x.py", "from cutaway import load"),
        ("cutaway/lenses/deep/x.py", "from cutaway import patching"),
        ("cutaway/views/x.py", "from importlib import import_module\nimport_module('cutaway.models.model')"),
    ],
)
def test_the_check_sees_every_way_of_importing(path, source):
    assert violations(path, ast.parse(source))


def test_the_check_lets_the_right_direction_pass():
    assert not violations("cutaway/lenses/x.py", ast.parse("from cutaway.models import tokens\nfrom . import other"))
    assert not violations("cutaway/cli/x.py", ast.parse("import cutaway as ca\nfrom cutaway import load, lenses"))
