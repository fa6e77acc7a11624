"""Faithfulness, completeness and minimality: masks by hand, the benchmark's areas, controls and refusals."""

import pytest
import torch

import cutaway as ca
from cutaway.circuits.circuit import Circuit, exchanged, first, mask_of, matched, without_dead_ends
from cutaway.circuits.components import belongs
from cutaway.circuits.faithfulness import AREAS, SHARES, areas
from cutaway.core.node import parse_edge
from cutaway.core.refuse import Refused
from cutaway.models.edits.edge_mask import MaskedForward, places_written, removed_by, written
from cutaway.models.edits.wiring import wiring
from tests.circuits.doctored import plain, task


def ranking(m, seed=0):
    edges = wiring(m).edges
    return Circuit("by chance", edges, torch.randn(len(edges), generator=torch.Generator().manual_seed(seed)))


def by_hand(m, t, masks, direction="noise"):
    """The metric of every prompt under masks, from masked runs alone."""
    w, bound = wiring(m), t.bind(m)
    run, other = (bound.clean, bound.corrupt) if direction == "noise" else (bound.corrupt, bound.clean)
    acts = m.capture(other, places_written(w))
    alternative = written(m, {str(a): acts[str(a)] for a in places_written(w)})
    out = []
    for mask in masks:
        kept = mask.float() if direction == "noise" else 1 - mask.float()
        with MaskedForward(m, w, removed_by(w, kept[None]), alternative).attached():
            out.append(bound.metric(m.run_last(run)))
    return torch.stack(out)


@pytest.mark.parametrize("direction", ["noise", "denoise"])
@pytest.mark.parametrize("name", ["llama_gqa", "gemma2"])
def test_the_curve_is_made_of_masked_runs(name, direction):
    m = plain(name)
    t, c, w = task(m), ranking(m), wiring(m)
    got = ca.circuits.faithfulness(m, t, c, direction=direction, samples=2)
    counts = [int(k * len(w.edges)) for k in SHARES]
    order = [first(w, c.score, n, signed) for signed in (True, False) for n in counts]
    pruned = [without_dead_ends(w, mask) for mask in order] if direction == "noise" and name == "gemma2" else order
    values = by_hand(m, t, [torch.ones_like(w.heard), torch.zeros_like(w.heard), *pruned], direction)
    want = (values[2:] - values[1]).mean(1) / (values[0] - values[1]).mean()
    torch.testing.assert_close(torch.cat([got.faithfulness, got.absolute]), want, atol=1e-5, rtol=1e-4)
    assert float(got.faithfulness[-1]) == pytest.approx(1, abs=1e-5)
    assert not (got.interval[:-1, 1] < got.faithfulness[:-1]).any()
    torch.testing.assert_close(got.areas, areas(got.faithfulness, got.absolute), atol=1e-5, rtol=1e-4)
    assert got.edges.tolist() == sorted(got.edges.tolist())
    assert got.null.shape == (10, 2)
    assert got.areas_interval.shape == (4, 2)
    bound = t.bind(m)
    assert float(got.whole) == pytest.approx(float(m.measure(bound.clean, bound.measure).mean()), abs=1e-5)


def test_areas_are_those_of_the_benchmark():
    """Of a ranking that finds nothing: the leaderboard's 0.25 and 0.75; and as its code sums them."""
    nothing = torch.tensor([0.0] * 9 + [1.0])
    cpr, cmd, log_cpr, log_cmd = areas(nothing, nothing).tolist()
    assert (cpr, cmd) == (pytest.approx(0.25), pytest.approx(0.749))
    assert log_cpr + log_cmd == pytest.approx(1)
    curve = torch.rand(10, generator=torch.Generator().manual_seed(0)) * 2
    steps = list(zip(SHARES, SHARES[1:], curve.tolist(), curve[1:].tolist(), strict=False))
    assert float(areas(curve, curve)[0]) == pytest.approx(sum((b - a) * (x + y) / 2 for a, b, x, y in steps))
    off = sum((b - a) * (abs(1 - x) + abs(1 - y)) / 2 for a, b, x, y in steps)
    assert float(areas(curve, curve)[1]) == pytest.approx(off)
    assert len(AREAS) == 4


def test_exchanged_answers_are_read_in_the_same_runs():
    m = plain()
    t, w = task(m), wiring(m)
    got = ca.circuits.faithfulness(m, t, ranking(m), samples=1)
    bound = t.bind(m)
    shuffled = got.shuffled[-1] * float(got.whole - got.empty)
    values = [m.run_last(x).log_softmax(-1) for x in (bound.clean, bound.corrupt)]
    assert abs(float(shuffled)) < abs(float(got.whole - got.empty))
    moves = [[float(v[i, bound.answers[j]] - v[i, bound.foils[j]]) for v in values] for i in range(6) for j in range(6)]
    assert min(a - b for a, b in moves) < float(shuffled) < max(a - b for a, b in moves)
    assert len(w.edges) == got.edges[-1] + int(w.heard.sum() - without_dead_ends(w, w.heard).sum())


def test_a_set_has_one_size_and_unlike_curves_are_not_compared():
    m = plain()
    t = task(m)
    got = ca.circuits.faithfulness(m, t, "z.0.0, z.1.2, mlp_out.*", samples=1)
    assert len(got.faithfulness) == 2
    assert got.areas is None
    assert got.compare(ca.circuits.faithfulness(m, t, "z.0.0, z.1.2, mlp_out.*", samples=1))["faithfulness"]
    with pytest.raises(Refused, match="direction noise and direction denoise"):
        got.compare(ca.circuits.faithfulness(m, t, "z.0.0", direction="denoise", samples=1))
    second = ca.circuits.faithfulness(m, t, "z.0.0", half="second", samples=1)
    assert "measured on 3 others" in second.record["measured"]
    with pytest.raises(Refused, match="no such component"):
        ca.circuits.faithfulness(m, t, "z.7.0", samples=1)


@pytest.mark.parametrize("how", ["zero", "mean", "resample"])
def test_other_alternatives_serve(how):
    m = plain()
    got = ca.circuits.faithfulness(m, task(m), ranking(m), how=how, samples=1)
    assert float(got.faithfulness[-1]) == pytest.approx(1, abs=1e-4)
    assert float(got.whole) != pytest.approx(float(got.empty), abs=1e-3)


def test_random_circuits_are_alike_and_dead_ends_go():
    m = plain()
    w = wiring(m)
    own = mask_of(w, torch.arange(0, len(w.edges), 7))
    other = matched(w, own, 3)
    place = [a.place for a in w.writers], [a.place for a in w.readers]

    def counts(mask):
        found = {}
        for u, v in mask.nonzero().tolist():
            found[place[0][u], place[1][v]] = found.get((place[0][u], place[1][v]), 0) + 1
        return found

    assert counts(own) == counts(other)
    assert not torch.equal(own, other)
    assert exchanged(w, 0).sort().values.tolist() == list(range(len(w.edges)))
    names = ["embed→q_in.1.0", "z.1.0→logits", "z.0.1→mlp_in.1", "embed→mlp_in.2"]
    kept = without_dead_ends(w, Circuit("", tuple(map(parse_edge, names))).mask(w))
    left = {str(w.writers[u]) + "→" + str(w.readers[v]) for u, v in kept.nonzero().tolist()}
    assert left == {"embed→q_in.1.0", "z.1.0→logits"}


def test_completeness_is_two_masked_runs_a_subset():
    m = plain()
    t, w, of = task(m), wiring(m), belongs(wiring(m))
    got = ca.circuits.completeness(m, t, "z.0.0, z.1.2, mlp_out.1", draws=4, samples=2)
    whole = ca.circuits.completeness(m, t, Circuit("all", w.edges), draws=2, samples=1)
    torch.testing.assert_close(whole.gap, torch.zeros(3), atol=1e-6, rtol=0)
    faithful = ca.circuits.faithfulness(m, t, "z.0.0, z.1.2, mlp_out.1", samples=1)
    assert float(got.gap[0]) == pytest.approx(1 - float(faithful.faithfulness[0]), abs=1e-5)
    row = w.writers.index(next(u for u in w.writers if str(u) == "z.1.2"))
    assert of[row].nonzero().numel() == 3
    assert got.null.shape == (5, 2)
    torch.testing.assert_close(got.gap, got.model - got.circuit, atol=1e-5, rtol=1e-4)


def test_minimality_is_the_circuit_without_each_and_without_two():
    m = plain()
    t, w = task(m), wiring(m)
    nodes = ["z.0.0", "z.1.2", "mlp_out.1"]
    got = ca.circuits.minimality(m, t, ", ".join(nodes), samples=2)
    own = Circuit("", nodes=tuple(nodes)).mask(w)
    left = [Circuit("", nodes=tuple(n for n in nodes if n not in gone)).mask(w) & own for gone in
            [[], *[[n] for n in nodes], ["z.0.0", "mlp_out.1"]]]  # fmt: skip
    values = by_hand(m, t, [torch.ones_like(w.heard), torch.zeros_like(w.heard), *left])
    share = (values - values[1]).mean(1) / (values[0] - values[1]).mean()
    torch.testing.assert_close(got.effect, share[2] - share[3:6], atol=1e-5, rtol=1e-4)
    at = got.labels["pair"].index("z.0.0, mlp_out.1")
    assert float(got.pair[at]) == pytest.approx(float(share[2] - share[6]), abs=1e-5)
    assert float(got.excess[at]) == pytest.approx(float(got.pair[at] - got.effect[0] - got.effect[2]), abs=1e-5)
    with pytest.raises(Refused, match="no component"):
        ca.circuits.minimality(m, t, "embed->logits")
    with pytest.raises(Refused, match="ranks all edges"):
        ca.circuits.minimality(m, t, ranking(m))
