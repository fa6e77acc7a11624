"""Pages of single heads of a real model, over passages that chose nothing: what they look at, and what they write."""

from __future__ import annotations

import pytest

import cutaway as ca
from tests.real import sets
from tests.real.written import measure

PAGES = "pages of single heads"
SMOLLM2 = pytest.mark.parametrize("name", ["smollm2"], indirect=True)
#: heads that were found in random tokens, and what they look at there
FOUND = {"23.2": "prefix matching", "16.0": "previous token", "14.3": "duplicate token"}


@SMOLLM2
@pytest.mark.parametrize("head", FOUND)
def test_the_hardest_looks_on_text_are_those_foreseen_more_than_the_weakest(model, results, head):
    texts, kind = ca.tasks.as_prompts([row["text"] for row in sets.rows("passages")]), FOUND[head]
    got = ca.heads.card(model, texts, head=head, samples=20)
    k = got.labels["keys"].index(kind)
    for decile in (1, 5, 10):
        at = (decile - 1, k)
        fits = measure(got.matched[at], got.matched_interval[at], got.matched_null[at])
        strength = measure(got.strength[decile - 1], got.strength_interval[decile - 1])
        results.row(PAGES, f"{head}: decile {decile} of {kind}", len(texts), fits=fits, attention=strength)
    for circuit, name in enumerate(got.labels["circuit"]):
        same = measure(got.same[circuit], got.same_interval[circuit], got.same_null[circuit])
        results.row(PAGES, f"{head}: writes what it reads, {name}", len(texts), copies=same)
    rises = {
        span: measure(got.effect[i], got.effect_interval[i], got.effect_null[i])
        for i, span in enumerate(got.labels["span"])
    }
    results.row(PAGES, f"{head}: removed", len(texts), **rises)
    assert float(got.matched_interval[9, k, 0]) > float(got.matched_null[9, k].max())
    assert float(got.matched[9, k]) > float(got.matched[0, k])
    if head == "23.2":
        read, bare = range(2)
        assert float(got.same_interval[read, 0]) > max(2, float(got.same_null[read].max()))
        assert float(got.same_interval[bare, 1]) < 0.5, "embeddings as such hide that it copies"


@SMOLLM2
def test_the_head_that_reads_capitals_writes_what_belongs_to_the_country(model, results):
    prompts = ca.tasks.as_prompts([row["prompt"] for row in sets.rows("fact_capital")])
    got = ca.heads.card(model, prompts, head="23.4", samples=20)
    for field, axis, name in (("writes", "pair", "as read"), ("bare", "bare_pair", "bare")):
        strength, null = getattr(got, field), getattr(got, f"{field}_null")
        for i in (0, 1, 2, 3):
            pair = {"value": float(strength[i]), "control": [float(null[i].min()), float(null[i].max())]}
            results.row(PAGES, f"23.4, {name}, pair {i + 1}:{got.labels[axis][i]}", len(prompts), copies=pair)
    up = len(got.writes) // 2
    assert bool((got.writes[:up] > got.writes_null[:up].amax(-1)).all()), "beyond what turned values promote"
    assert bool((got.bare[:up] <= got.bare_null[:up].amax(-1)).all()), "bare embeddings say nothing of it"
    assert " Norway →  Norwegian" in got.labels["pair"][:up]
    assert "previous token" in got.named(), "what it attends to stands in front of the query in these prompts"


@SMOLLM2
def test_its_tree_holds_what_the_page_shows(model, tmp_path):
    texts = ca.tasks.as_prompts([row["text"] for row in sets.rows("passages")])
    page = ca.heads.card(model, texts, head="23.2", contexts=len(texts), samples=1)
    tree = ca.heads.write_headvis(model, texts, tmp_path / "tree", heads=["23.*"], intervals=4, shown=2)
    samples = tree.samples(23, 2)
    key = page.labels["place"].index("key")
    assert sorted(s.strength for s in samples) == pytest.approx(sorted(page.looks[:, key].tolist()), abs=6e-5)
    metrics = tree.metrics().select(metric="induction_score", layer=23).value[0, 0]
    assert int(metrics.argmax()) == 2, "no head of the layer matches prefixes as it does"
