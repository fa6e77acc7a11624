"""Methods that search for a circuit: against loops of masked runs, compiled programs, and what they refuse."""

from __future__ import annotations

import pytest
import torch

import cutaway as ca
from cutaway.circuits.edge_pruning import EdgeGates
from cutaway.circuits.hard_concrete import draw, openness
from cutaway.circuits.subnetwork_probing import WriterGates
from cutaway.circuits.uniform_gradient_sampling import UniformGates
from cutaway.core.refuse import Refused
from cutaway.interventions.edge_truth import identifiable
from cutaway.models.edits.edge_mask import MaskedForward, places_written, removed_by, written
from cutaway.models.edits.wiring import wiring
from cutaway.zoo.compiled.truth import structural
from tests.circuits.doctored import plain, task


def one_after_the_other(m, t, threshold):
    """The losses and the circuit of a loop of masked runs, an edge at a time, from the last reader and writer on."""
    w, bound = wiring(m), t.bind(m)
    acts = m.capture(bound.corrupt, places_written(w))
    alternative = written(m, {str(a): acts[str(a)] for a in places_written(w)})

    def value(circuit):
        with MaskedForward(m, w, removed_by(w, circuit[None]), alternative).attached():
            return bound.metric(m.run_last(bound.clean)).mean()

    circuit, lost = w.heard.clone(), torch.zeros(len(w.pairs))
    now = value(circuit)
    for e in sorted(range(len(w.pairs)), key=lambda e: w.pairs[e].flip(0).tolist(), reverse=True):
        cut = circuit.clone()
        cut[tuple(w.pairs[e])] = False
        lost[e] = now - (after := value(cut))
        if lost[e] < threshold:
            circuit, now = cut, after
    return lost, circuit


@pytest.mark.parametrize(("name", "threshold"), [("llama_gqa", 0.01), ("gemma2", 0.02)])
def test_acdc_is_a_loop_of_masked_runs(name, threshold):
    m, t = plain(name), task(plain(name), 2)
    lost, circuit = one_after_the_other(m, t, threshold)
    found = ca.circuits.acdc(m, t, threshold=threshold, audit=0, samples=1)
    assert torch.equal(ca.circuits.open(found).mask(wiring(m)), circuit)
    assert 5 < int(circuit.sum()) == int(found.kept.sum()) < len(lost) / 2
    torch.testing.assert_close(found.score, lost, atol=1e-4, rtol=1e-4)
    assert torch.equal(found.kept, found.score >= threshold)


def test_acdc_finds_the_identifiable_edges_of_a_program_and_says_what_depends_on_what():
    m = ca.load("compiled/histogram")
    t = ca.tasks.load("histogram", m, n=16)
    found = ca.circuits.acdc(m, t, threshold=0.5, audit=200, samples=1)
    assert torch.equal(found.kept, identifiable(m, t, wiring(m)))
    assert ((found.frequency == 1) | (found.frequency == 0)).all()
    assert float(found.record["metric of the circuit"]) == pytest.approx(float(found.clean.mean()), rel=1e-3)
    assert not ca.circuits.acdc(m, t, threshold=100.0, audit=0, samples=1).kept.any()


@pytest.mark.parametrize(
    ("name", "extra"), [("edge_pruning", 3), ("subnetwork_probing", 4), ("uniform_gradient_sampling", 0)]
)
def test_trained_masks_find_the_circuit_of_a_program(name, extra):
    """All that is identifiable, and so many edges more: the target's, or those between the same components."""
    m = ca.load("compiled/histogram")
    t = ca.tasks.load("histogram", m, n=16)
    truth, options = identifiable(m, t, wiring(m)), {"target": 0.9} if name == "edge_pruning" else {}
    found = getattr(ca.circuits, name)(m, t, steps=80, audit=0, samples=1, **options)
    assert found.kept[truth].all()
    assert int(found.kept.sum()) == int(truth.sum()) + extra
    worth = found.record["metric on the prompts measured"]
    assert worth["circuit"] == pytest.approx(worth["model"], rel=1e-3)
    assert worth["all edges cut"] < 0
    assert found.interval.isnan().all()
    assert float(found.null[truth].min()) < float(found.score[truth].min())


def mean_gradient(gates, loss, parameter, draws):
    """The mean of the gradients of a loss of drawn masks."""
    chance, total = torch.Generator().manual_seed(0), torch.zeros_like(parameter)
    for _ in range(draws):
        total += torch.autograd.grad(loss(gates.drawn(chance)), parameter)[0]
    return total / draws


def test_uniform_gradients_are_those_of_the_expected_loss_over_all_masks():
    """Of a loss in which three edges interact, summed over the eight masks with their probabilities."""
    gates, weights = UniformGates(3, 0.0), torch.tensor([1.0, -2.0, 0.5])

    def loss(mask):
        return (mask * weights).sum() + 3 * mask[0] * mask[1] - mask[1] * mask[2]

    masks = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 3)
    theta = gates.logits.sigmoid()
    odds = (masks * theta + (1 - masks) * (1 - theta)).prod(1)
    want = torch.autograd.grad((odds * torch.stack([loss(m) for m in masks])).sum(), gates.logits)[0]
    got = mean_gradient(gates, loss, gates.logits, 4_000)
    torch.testing.assert_close(got, want, atol=0.06, rtol=0.0)


def test_hard_concrete_gates_are_open_as_often_as_they_say_and_pay_a_climbing_price():
    log_alpha = torch.tensor([-3.0, 0.0, 1.0, 3.0])
    drawn = torch.stack([draw(log_alpha, chance) for chance in [torch.Generator().manual_seed(0)] for _ in range(4000)])
    torch.testing.assert_close((drawn > 0).float().mean(0), openness(log_alpha), atol=0.03, rtol=0.0)
    assert (drawn == 0).any()
    assert (drawn == 1).any()
    gates = EdgeGates(wiring(plain()), 0.5)
    (up,) = torch.autograd.grad(gates.price(1.0), gates.multipliers)
    assert float(up[0]) < 0, "too few are closed, so that the price of an open gate rises"
    assert float(up[1]) == pytest.approx(float(up[0]) ** 2)


def test_one_seed_is_one_mask():
    m, t = plain(), task(plain(), 4)
    one, again, other = (ca.circuits.edge_pruning(m, t, steps=3, audit=0, seed=s) for s in (0, 0, 1))
    assert torch.equal(one.score, again.score)
    assert not torch.equal(one.score, other.score)


def test_a_gate_is_of_all_edges_of_a_writer_and_closes_where_it_costs_too_much():
    m, t = plain(), task(plain(), 4)
    w = wiring(m)
    mask = WriterGates(w, 1.0).drawn(torch.Generator().manual_seed(0))
    rows = [mask[w.pairs[:, 0] == u] for u in range(len(w.writers))]
    assert all(len(r.unique()) <= 1 for r in rows)
    assert rows[0].eq(1).all()
    found = ca.circuits.subnetwork_probing(m, t, penalty=1e4, rate=1.0, steps=30, audit=0)
    assert found.score.shape == (len(w.pairs),)
    assert [found.labels["edge"][i] for i in found.kept.nonzero()[:, 0]] == ["embed→logits"]


def test_the_truth_of_a_program_in_the_table_of_scores():
    m = ca.load("compiled/shift")
    t, w = ca.tasks.load("shift", m, n=8), wiring(m)
    by_kind = {kind: ca.circuits.truth(m, t, kind=kind) for kind in ("structural", "functional", "identifiable")}
    for kind, want in (("structural", structural(m, w)[w.heard]), ("identifiable", identifiable(m, t, w))):
        found = by_kind[kind]
        assert torch.equal(found.kept, want)
        assert torch.equal(found.score, want.float())
        assert found.null.sum(0).tolist() == [float(want.sum())] * 4
        assert found.reasons["score"]
        assert found.record["cost"]["forwards"] <= by_kind["functional"].record["cost"]["forwards"]
    carried = ca.circuits.faithfulness(m, t, ca.circuits.open(by_kind["structural"]), samples=1)
    assert float(carried.faithfulness[0]) == pytest.approx(1, abs=1e-3)
    for kind, found in by_kind.items():
        row = ca.methods()["circuits.truth"]
        most, _ = row.bound(row.sizes((m, t), {"kind": kind, "how": "corrupt"}, found))
        assert most / 5 <= found.record["cost"]["forwards"] <= most


def test_refusals():
    m = plain()
    with pytest.raises(Refused, match="it was not compiled"):
        ca.circuits.truth(m, task(m))
    with pytest.raises(Refused, match="nobody hears"):
        ca.circuits.acdc(m, task(m), threshold=0.0)
    with pytest.raises(Refused, match="not all"):
        ca.circuits.edge_pruning(m, task(m), target=1.0)
    with pytest.raises(Refused, match="nothing would be trained"):
        ca.circuits.uniform_gradient_sampling(m, task(m), steps=0)
