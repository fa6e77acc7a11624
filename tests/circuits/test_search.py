"""Methods that search for a circuit: against loops of masked runs, compiled programs, and what they refuse."""

from __future__ import annotations

import pytest
import torch

import cutaway as ca
from cutaway.core.refuse import Refused
from cutaway.interventions.edge_truth import identifiable
from cutaway.models.edits.edge_mask import MaskedForward, places_written, removed_by, written
from cutaway.models.edits.wiring import wiring
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


def test_refusals():
    m = plain()
    with pytest.raises(Refused, match="nobody hears"):
        ca.circuits.acdc(m, task(m), threshold=0.0)
