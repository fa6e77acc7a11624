"""Every refusal in the code names what was refused, why, and what to do instead."""

import ast

import pytest

from tests.meta.tree import calls, sources


def incomplete(tree: ast.AST, path: str) -> list[str]:
    """Refusals with other than three parts, or with a part that is empty as written."""
    found = []
    for name, call in calls(tree):
        if name.split(".")[-1] != "Refused":
            continue
        parts = [*call.args, *(k.value for k in call.keywords)]
        starred = any(isinstance(p, ast.Starred) for p in parts)
        empty = any(isinstance(p, ast.Constant) and not str(p.value or "").strip() for p in parts)
        if (len(parts) != 3 and not starred) or empty:
            found.append(f"{path}:{call.lineno} {ast.unparse(call)[:80]}")
    return found


def test_every_refusal_has_three_parts():
    wrong = [w for path, tree in sources().items() for w in incomplete(tree, path)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "source", ["raise Refused('a', 'b')", "raise Refused('a', '', 'c')", "Refused('a', ' ', why='x')"]
)
def test_the_check_sees(source):
    assert incomplete(ast.parse(source), "x.py")


def test_no_bare_except_swallows_a_refusal():
    wrong = [f"{path}:{n.lineno}" for path, tree in sources().items() for n in ast.walk(tree)
             if isinstance(n, ast.ExceptHandler) and n.type is None]  # fmt: skip
    assert not wrong, wrong
