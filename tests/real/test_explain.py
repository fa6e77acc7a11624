"""The main job at both efforts: what first-order estimates choose leads to the same claims as measuring every cell."""

from __future__ import annotations

import pytest

import cutaway as ca
from cutaway.suites.explanation import Explanation
from tests.real.written import measure

CLAIMS = "claims of explain"
ASKED = {"capital": "The capital of France is", "IOI": "Then, Adam and Lisa went to the market. Lisa gave a ring to"}


def claimed(found: Explanation) -> dict[str, bool]:
    """What each claim is about, and whether interval and control support it."""
    return {c.about: c.supported for c in found.claims}


def strongest(found: Explanation) -> str:
    """The head that brings back most, exactly measured."""
    row = found.results["heads"].top(1)[0]
    return f"{row['layer']}.{row['head']}"


@pytest.mark.parametrize("name", ["smollm2"], indirect=True)
@pytest.mark.parametrize("what", list(ASKED))
def test_both_efforts_claim_the_same(model, results, what):
    normal, thorough = (ca.explain(model, ASKED[what], effort=effort) for effort in ("normal", "thorough"))
    for effort, found in (("normal", normal), ("thorough", thorough)):
        together, said = found.results["together"], claimed(found)
        shares = [-x / together.gap for x in (together.effect, together.interval.flip(0), together.null)]
        row = {"claimed": sum(said.values()), "of": len(said), "heads": len(together.labels["component"])}
        counts = {key: {"value": float(n)} for key, n in row.items()}
        results.row(CLAIMS, f"{what}, {effort}", found.siblings + 1, **counts, recovered=measure(*shares))
    assert claimed(normal) == claimed(thorough)
    assert strongest(normal) == strongest(thorough)
