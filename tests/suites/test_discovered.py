"""A circuit found on some prompts and judged on others: its size, its numbers and its picture."""

from __future__ import annotations

import re
from functools import cache

import pytest
import torch

import cutaway as ca
from cutaway.circuits.circuit import Circuit, first
from cutaway.circuits.evaluation import Evaluation
from cutaway.core.node import parse_edge
from cutaway.suites.discovered import SIZES, WANTED, Discovered, component_graph, discover
from tests.conformance import subjects

SHORT = (0.01, 0.03, 0.05)


@cache
def halves() -> tuple[ca.Task, ca.Task]:
    one, other = ca.tasks.load("ioi", subjects.miniworld(), n=16, seed=3).split(0.5)
    return one, other


@cache
def found() -> Discovered:
    return discover(subjects.miniworld(), *halves(), sizes=SHORT, audit=0, steps=0, samples=2)


def test_the_smallest_size_that_carries_enough_where_it_was_scored_is_judged_elsewhere():
    m, d, (one, other) = subjects.miniworld(), found(), halves()
    scores = ca.circuits.eap_ig(m, one, audit=0, samples=1).score
    x = Evaluation.of(m, one, "corrupt", "noise", "all", 0)
    masks = [first(x.wiring, scores, round(k * len(scores))) for k in SHORT]
    whole, empty, *kept = x.values([*x.whole_and_empty(), *masks])[..., 0].mean(1).tolist()
    carried = [(v - empty) / (whole - empty) for v in kept]
    chosen = next(i for i, share in enumerate(carried) if share >= WANTED)
    assert chosen > 0, "a smaller one carries less"
    inside = masks[chosen][x.wiring.pairs[:, 0], x.wiring.pairs[:, 1]]
    assert {str(e) for e in d.circuit.edges} <= {str(x.wiring.edges[i]) for i in inside.nonzero()[:, 0].tolist()}
    y = Evaluation.of(m, other, "corrupt", "noise", "all", 0)
    values = y.values([*y.whole_and_empty(), masks[chosen]])[..., 0].mean(1)  # dead ends carry nothing
    assert float(d.carried.faithfulness[0]) == pytest.approx(
        float((values[2] - values[1]) / (values[0] - values[1])), abs=1e-4
    )
    assert float(d.carried.faithfulness[0]) > 0.85 > 0.5 > float(d.carried.null[0].max())
    assert d.size < max(SIZES)
    assert (d.certificate.level, d.certificate.shuffled_level) == ("B and C", "none"), "without a search there is no A"


def test_the_picture_has_the_sum_of_scores_between_each_two_components():
    m, d = subjects.miniworld(), found()
    score = dict(zip(d.scores.labels["edge"], d.scores.score.tolist(), strict=True))
    heads = {re.sub("→[qkv]_in", "→z", str(e)).replace("mlp_in", "mlp_out") for e in d.circuit.edges}
    assert set(d.graph.edge_names()) == heads
    assert float(d.graph.weight.sum()) == pytest.approx(sum(score[str(e)] for e in d.circuit.edges), abs=1e-4)
    grouped, w = subjects.random_llama(), ca.circuits.random(subjects.random_llama())
    shared = component_graph(grouped, w, Circuit("keys", (parse_edge("embed→k_in.1.0"),)))
    assert shared.edge_names() == ["embed→z.1.0", "embed→z.1.1"], "the heads that share these keys"
    torch.testing.assert_close(shared.weight, w.score[w.labels["edge"].index("embed→k_in.1.0")].repeat(2))
    assert m.shape.n_kv_heads == m.shape.n_heads
