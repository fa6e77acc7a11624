"""What the weights alone say of heads that behaviour found: composition with previous-token heads, and copying.

The heads come from attention on random tokens, the z-scores from weights: neither has seen the other's evidence.
"""

from __future__ import annotations

import pytest
from torch import Tensor

import cutaway as ca
from cutaway.tasks import Repeats
from tests.real.written import measure

COMPOSES = "composition of heads, from weights"
COPIES = "what heads copy, from weights"


@pytest.mark.parametrize("name", ["smollm2"], indirect=True)
def test_induction_heads_read_what_previous_token_heads_write(model, results):
    types = ca.heads.classify(model, Repeats(8, 24), samples=8)
    found = {kind: types.named(kind) for kind in ("previous token", "induction")}
    assert found["previous token"]
    assert found["induction"]
    pairs = ca.weights.composition(model, samples=4)
    z = pairs.select(mode="K")
    first, then = ([z.labels["sender"].index(h) for h in found[kind]] for kind in ("previous token", "induction"))
    inside = z.z[0][first][:, then]
    known = z.z[0][z.z[0].isfinite()]
    n = int(inside.isfinite().sum())
    between = {"value": float(inside.nanmean()), "control": z.backward[0].tolist()}
    results.row(COMPOSES, "K: previous-token head → induction head, mean", n, z=between)
    results.row(COMPOSES, "K: all pairs that can compose, mean", len(known), z={"value": float(known.mean())})
    top = z.top(10, by="z", largest=True)
    for rank, pair in enumerate(top):
        what = f"K, place {rank + 1:02d}: {pair['sender']} → {pair['receiver']}"
        drawn = {"value": pair["z"], "control": [min(pair["null"]), max(pair["null"])]}
        results.row(COMPOSES, what, 1, z=drawn, score={"value": pair["score"]})
    hits = [p["sender"] in found["previous token"] and p["receiver"] in found["induction"] for p in top]
    chance = n / len(known)  # a pair drawn at random among those that can compose
    results.row(COMPOSES, "K, first ten places: previous-token → induction", 10,
                share={"value": sum(hits) / 10, "control": [chance, chance]})  # fmt: skip
    assert hits[0], "the pair that composes most is a previous-token head and an induction head"
    assert sum(hits) >= 4
    assert float(inside.nanmean()) > float(z.backward[0, 1])
    raw = z.top(1, by="score", largest=True)[0]
    results.row(COMPOSES, f"K, first by raw score: {raw['sender']} → {raw['receiver']}", 1,
                z={"value": raw["z"]}, score={"value": raw["score"]})  # fmt: skip


@pytest.mark.parametrize("name", ["smollm2"], indirect=True)
def test_induction_heads_copy_and_so_do_some_previous_token_heads(model, results):
    """A negative finding: copying read from weights does not tell the two kinds apart."""
    own_token = dict[str, Tensor]()
    for kind, heads in (("induction", "17.3,17.4,18.6,18.7"), ("previous token", "16.0,17.8,11.1,10.5")):
        got = ca.weights.circuits(model, heads=heads, samples=20)
        for i, head in enumerate(got.labels["head"]):
            own = measure(got.same[1, i], got.interval[1, i], got.null[1, i])
            eigen = {"value": float(got.copying[i]), "control": [float(f(got.copying_null[i])) for f in (min, max)]}
            results.row(COPIES, f"{kind}: {head}", got.record["sources"], strength=own, copying=eigen)
            if kind == "induction":
                assert float(got.interval[1, i, 0]) > float(got.null[1, i].max()), head
        own_token[kind] = got.same[1]
    assert float(own_token["previous token"].max()) > float(own_token["induction"].min())
