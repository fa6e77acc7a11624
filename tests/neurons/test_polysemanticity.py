"""Counts of different contexts: matrices whose number is known, the plain computation, and neurons planted by hand."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

import cutaway as ca
from cutaway.core.refuse import Refused
from cutaway.neurons import polysemanticity
from cutaway.neurons.polysemanticity import effective
from tests.conformance import subjects
from tests.neurons.test_triggers import planted, rows


def test_equal_groups_that_have_nothing_in_common_count_once_each():
    for groups in (1, 3, 12):
        gram = torch.block_diag(*[torch.ones(12 // groups, 12 // groups)] * groups)
        assert float(effective(gram)) == pytest.approx(groups)
    unequal = torch.block_diag(torch.ones(9, 9), torch.ones(3, 3))
    assert float(effective(unequal)) == pytest.approx(float(np.exp(-0.75 * np.log(0.75) - 0.25 * np.log(0.25))))


def test_scores_are_those_of_the_definition():
    model, texts = subjects.family("llama_gqa"), rows(8, 12)
    got = polysemanticity(model, ca.tasks.as_prompts(texts), neurons="1.3", contexts=6, samples=2)
    read, acts, half = [], [], []
    for i, ids in enumerate(texts):
        seen = model.capture(torch.tensor([ids]), ["mlp_in.1", "mlp_post.1"])
        read.append(seen["mlp_in.1"][0, 1:-1].double().numpy())
        acts.append(seen["mlp_post.1"][0, 1:-1, 3].double().numpy())
        half += [i % 2] * (len(ids) - 2)
    x, c, half = np.concatenate(read), np.concatenate(acts), np.array(half)
    x = x - x.mean(0)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    pairs = np.sort((x @ x.T)[np.triu_indices(len(x), 1)])
    assert got.record["cut"]["1"] == pytest.approx(pairs[int(0.95 * len(pairs))], abs=1e-4)
    for h in (0, 1):
        mine = np.flatnonzero(half == h)
        top = mine[np.argsort(-c[mine], kind="stable")[:6]]

        def number(which: np.ndarray) -> float:
            p = np.linalg.eigvalsh(x[which] @ x[which].T / len(which)).clip(1e-30)
            return float(np.exp(-(p * np.log(p)).sum()))

        assert float(got.score[0, h, 0]) == pytest.approx(number(top), rel=1e-4)
        left_out = np.array([number(np.delete(top, i)) for i in range(6)])
        reach = 2.5706 * np.sqrt(5 / 6 * ((left_out - left_out.mean()) ** 2).sum())
        low, high = got.interval[0, h, 0].tolist()
        assert low == pytest.approx(max(1, number(top) - reach), rel=1e-3)
        assert high == pytest.approx(min(6, number(top) + reach), rel=1e-3)


def test_a_neuron_of_one_token_and_one_of_two_are_told_apart():
    model = planted()  # neuron 7 of the first layer reads one token
    mlp, embed = model.hf.model.layers[0].mlp, model.hf.model.embed_tokens.weight
    with torch.no_grad():  # neuron 8 reads two
        two = sum(embed[i] / embed[i].norm() for i in map(model.text.token_id, ("Mary", "park")))
        mlp.gate_proj.weight[8] = mlp.up_proj.weight[8] = 50 * two
    names = ("Anna", "Tom", "Lucy", "Paul", "Emma", "John", "Peter", "Anna", "Lucy")
    texts = [f"Then {a} went near Mary to the park and {b} went to the store" for a, b in pairwise(names)]
    prompts = ca.tasks.as_prompts(texts)
    one = polysemanticity(model, prompts, neurons="0.7", contexts=4)
    both = polysemanticity(model, prompts, neurons="0.8", contexts=8)
    torch.testing.assert_close(one.score, torch.ones_like(one.score), rtol=1e-4, atol=0)
    assert one.clusters.tolist() == [[1.0], [1.0]]
    assert 1.8 < float(both.score[0, 0, 0]) <= 2
    assert float(both.score[1, 0, 0]) == pytest.approx(2)
    assert both.clusters.tolist() == [[2.0], [2.0]]
    assert float(one.null[0].mean()) > 1.05, "random directions fire at more than one thing"
    said = {tuple(sorted({c[c.index("⟦") :] for c in group})) for group in both.groups("0.8", "held out")}
    assert said == {("⟦ Mary⟧",), ("⟦ park⟧",)}


def test_one_text_has_nothing_held_out_and_short_ones_are_refused():
    got = polysemanticity(subjects.family("llama"), ca.tasks.as_prompts(rows(1, 12)), top=1, samples=2)
    assert got.score[:, 1].isnan().all()
    assert "held out" in got.reasons["score"]
    with pytest.raises(Refused, match="between others"):
        polysemanticity(subjects.family("llama"), ca.tasks.as_prompts([[5, 6]]), neurons="0.1")
