"""Retrieval heads of a real model: random tokens, and sentences with a question, hidden in passages.

Nothing is tuned. The heads that are removed were chosen on other prompts than those that measure.
"""

from __future__ import annotations

import pytest

import cutaway as ca
from cutaway.heads import RetrievalHeads
from tests.real import sets
from tests.real.written import measure

RETRIEVAL = "retrieval heads"
N, LENGTH = 20, 64


@pytest.mark.parametrize("name", ["smollm2"], indirect=True)
@pytest.mark.parametrize("kind", ["random tokens", "sentences"])
def test_heads_that_find_needles_in_passages(model, results, kind):
    texts = ca.tasks.as_prompts([row["text"] for row in sets.rows("passages")])
    asked = ca.tasks.read_needles(asked=sets.FOLDER / "needles.jsonl").asked if kind == "sentences" else ()
    got = ca.heads.retrieval(model, ca.tasks.Needles(N, LENGTH, 8, texts, asked), samples=4)
    write(results, kind, got)
    heads, effect, null = got.named(), got.effect_interval[0], got.effect_null[0]
    if kind == "random tokens":
        assert {"17.3", "17.4", "17.5", "18.6"} == set(heads[:4])
        assert float(got.overlap[0]) > float(got.overlap_null[0].max()), "they match prefixes"
        assert float(effect[1, 0]) > float(null[1].max()) + 1, "four of them carry the needle"
    else:
        assert heads[0] == "22.4"
        assert "23.0" in heads, "the name mover"
        assert "24.4" in heads, "the negative name mover"
        assert float(got.overlap[0]) < 0.5, "most heads that find a sentence match no prefixes"
        assert float(effect[1, 0]) < float(null[1].max()), "four of them can be missed"
    assert float(effect[2, 0]) > float(null[2].max()), "sixteen cannot"


def write(results, kind: str, got: RetrievalHeads) -> None:
    """The claimed heads of the largest scores, what the first ones do together, and which of them look back."""
    said = got.answered
    spread = {"value": float(said.mean()), "range": [float(said.min()), float(said.max())]}
    results.row(RETRIEVAL, f"{kind}: answered", N, score=spread)
    for head in got.named()[:5]:
        at = tuple(map(int, head.split(".")))
        results.row(RETRIEVAL, f"{kind}: {head}, of {len(got.named())} claimed", N,
                    score=measure(got.score[at], got.interval[at], got.null[at]),
                    attended=measure(got.attended[at], got.attended_interval[at], got.attended_null[at]))  # fmt: skip
    for k, size in enumerate(got.labels["size"]):
        loss = {name: measure(got.effect[s, k], got.effect_interval[s, k], got.effect_null[s, k])
                for s, name in enumerate(("loss", "loss around"))}  # fmt: skip
        results.row(RETRIEVAL, f"{kind}: first {size} removed", N // 2, **loss)
    for t, name in enumerate(got.labels["type"]):
        ends = [float(end) for end in (got.overlap_null[t].min(), got.overlap_null[t].max())]
        shared = {"value": float(got.overlap[t]), "control": ends}
        results.row(RETRIEVAL, f"{kind}: claimed heads of {name}", len(got.named()), score=shared)
