"""Every global name that a function reads is defined in its module: ruff's F821 takes the axes of shapes for names."""

import builtins
import dis
from collections.abc import Iterator
from pathlib import Path
from types import CodeType

import pytest

from tests.meta.tree import ROOT

FILES = sorted(
    p for folder in ("cutaway", "tests", "bench", "tools", "examples") for p in (ROOT / folder).rglob("*.py")
)
OF_A_MODULE = {"__file__", "__name__", "__path__", "__doc__", "__annotations__"}


def undefined(text: str) -> set[str]:
    """Return the names that the compiled text reads as globals and neither defines, imports nor finds built in."""
    module = compile(text, "text", "exec")
    found = [(code is module, i.opname, i.argval) for code in _codes(module) for i in dis.get_instructions(code)]
    defined = {name for top, op, name in found if op == "STORE_GLOBAL" or (top and op == "STORE_NAME")}
    return {name for _, op, name in found if op == "LOAD_GLOBAL"} - defined - set(dir(builtins)) - OF_A_MODULE


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def test_every_name_is_defined():
    wrong = {str(Path(p).relative_to(ROOT)): names for p in FILES if (names := undefined(p.read_text("utf-8")))}
    assert not wrong


@pytest.mark.parametrize(
    "text", ["def f():\n    return Missing(1)\n", "import a\n\n\nclass B:\n    def f(self):\n        return c\n"]
)
def test_the_check_sees(text):
    assert undefined(text)


@pytest.mark.parametrize(
    "text", ["import a\n\n\ndef f():\n    return a, len\n", "def f() -> 'Missing':\n    x = 1\n    return lambda: x\n"]
)
def test_the_check_lets_pass(text):
    assert not undefined(text)
