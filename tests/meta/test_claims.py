"""Generated text uses only the words that the rung of its method allows: docs, and the templates of `explain`."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest

import cutaway as ca
from cutaway.core.rung import NAMES, WORDS, Rung, exceeding
from cutaway.suites.explanation import BEHIND
from tests.meta.tree import ROOT, sources

ROWS = ca.methods()


def rung(about: str) -> Rung:
    """The lowest rung of the methods that a claim may read."""
    return min((ROWS[m].rung for m in BEHIND[about][1]), key=NAMES.index) if about in BEHIND else "observational"


def texts(node: ast.AST) -> list[str]:
    """Every string below a node, the constant parts of f-strings included."""
    return [n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str)]


def abouts(node: ast.AST, called: str) -> list[str]:
    """The first arguments of the calls to `called` below a node, where they are strings."""
    calls = [n for n in ast.walk(node) if isinstance(n, ast.Call) and n.args and ast.unparse(n.func) == called]
    return [c.args[0].value for c in calls if isinstance(c.args[0], ast.Constant)]


def templates() -> Iterator[tuple[str, list[str]]]:
    """What a claim or section of a report is about, with every text that it may be made of."""
    for node in ast.walk(sources()["cutaway/suites/claims.py"]):
        if isinstance(node, ast.FunctionDef):
            for about in dict.fromkeys(abouts(node, "Claim")):
                yield about, texts(node)
    for node in ast.walk(sources()["cutaway/cli/explain.py"]):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "Section":
            for about in abouts(node, "said.get"):
                yield about, texts(node)


def test_every_method_has_a_rung():
    assert {r.rung for r in ROWS.values()} <= set(NAMES)
    assert list(WORDS) == list(NAMES)


@pytest.mark.parametrize("name", list(ROWS))
def test_the_card_of_a_method_claims_no_more_than_its_rung(name):
    card = (ROOT / "docs" / "methods" / f"{name}.md").read_text("utf-8")
    assert not exceeding(card, ROWS[name].rung)
    assert f"Rung: {ROWS[name].rung}" in card


def test_the_templates_of_explain_claim_no_more_than_the_rung_of_what_they_read():
    found = list(templates())
    assert {about for about, _ in found} >= set(BEHIND)
    wrong = [(about, w) for about, parts in found if (w := exceeding(" ".join(parts), rung(about)))]
    assert not wrong, wrong


@pytest.mark.parametrize(
    ("text", "allowed"),
    [
        ("The answer is decodable from layer 3 on", "observational"),
        ("Restoring head 9.6 brings the answer back", "interventional"),
        ("The lens shows that head 9.6 carries the answer", "interventional"),
        ("It says Oslo because head 9.6 reads Norway", "counterfactual"),
        ("Head 9.6 is responsible for the answer", "counterfactual"),
    ],
)
def test_words_need_their_rung(text, allowed):
    assert [bool(exceeding(text, r)) for r in NAMES] == [NAMES.index(r) < NAMES.index(allowed) for r in NAMES]
