"""Certificates: every subset of a small complement, two heads that cancel, and circuits that earn nothing."""

from itertools import product

import pytest
import torch

import cutaway as ca
from cutaway.circuits.circuit import Circuit
from cutaway.core.refuse import Refused
from cutaway.models.edits.wiring import wiring
from tests.circuits.doctored import cancelling, plain, task
from tests.circuits.test_evaluation import by_hand

PAIR = ("z.0.0", "z.0.1")


def all_but(m, *writers):
    return Circuit("all but", tuple(e for e in wiring(m).edges if str(e.source) not in writers))


def test_two_heads_that_cancel_pass_c_and_fail_b():
    """Faithfulness sees nothing amiss: cut together, the two are worth nothing."""
    m = cancelling()
    t, c = task(m), all_but(m, *PAIR)
    faithful = ca.circuits.faithfulness(m, t, c, samples=1)
    assert float(faithful.faithfulness[0]) == pytest.approx(1, abs=1e-4)
    got = ca.circuits.certify(m, t, c, steps=2, samples=1)
    assert got.level == "C"
    assert float(got.deviation[0]) < 1e-4
    assert float(got.deviation[2]) > 0.15
    assert float(got.deviation[4]) > 0.5
    assert ca.circuits.certify(m, t, all_but(m, "z.0.0"), steps=0, draws=1, samples=1).level == "none"


def test_the_search_finds_the_worst_of_all_subsets():
    m, parts = plain(), ("z.0.1", "z.1.0", "z.1.3", "z.2.2")
    t, w, c = task(m), wiring(m), all_but(plain(), "z.0.1", "z.1.0", "z.1.3", "z.2.2")
    rows = [w.writers.index(u) for p in parts for u in w.writers if str(u) == p]
    masks = []
    for cut in product([False, True], repeat=4):
        masks.append(w.heard.clone())
        masks[-1][[r for r, on in zip(rows, cut, strict=True) if on]] = False
    values = by_hand(m, t, [w.heard, torch.zeros_like(w.heard), *masks]).mean(1)
    off = (values[2:] - values[0]).abs() / (values[0] - values[1]).abs()
    got = ca.circuits.certify(m, t, c, draws=1, steps=8, samples=1)
    assert float(got.deviation[4]) == pytest.approx(float(off.max()), abs=1e-5)
    assert float(got.deviation[0]) == pytest.approx(float(off[-1]), abs=1e-5)
    cut = {str(w.writers[u]) for u in w.pairs[got.weakest][:, 0].unique().tolist()}
    assert cut == {
        p for p, on in zip(parts, list(product([False, True], repeat=4))[int(off.argmax())], strict=True) if on
    }


def test_levels_follow_from_each_other_and_from_the_search():
    m = plain()
    t, c = task(m), all_but(m, "z.2.2", "z.0.0")
    loose = ca.circuits.certify(m, t, c, tolerance=100.0, steps=2, samples=1)
    assert loose.level == "A"
    assert ca.circuits.certify(m, t, c, tolerance=100.0, steps=0, samples=1).level == "B and C"
    assert ca.circuits.certify(m, t, c, tolerance=0.0, steps=0, samples=1).level == "none"
    assert (loose.deviation[4] >= loose.deviation[:4] - 1e-6).all()
    assert (loose.interval[4, 1] >= loose.interval[:4, 1] - 1e-6).all()
    edges = ca.circuits.certify(m, t, c, unit="edges", steps=1, draws=1, samples=1)
    assert edges.parts == int((~c.scores(wiring(m)).isfinite()).sum())


def test_circuits_without_a_complement_are_refused():
    m = plain()
    with pytest.raises(Refused, match="every edge"):
        ca.circuits.certify(m, task(m), Circuit("all", wiring(m).edges))


@pytest.mark.parametrize("tolerance", [0.1, 0.2])
def test_random_circuits_and_exchanged_answers_earn_no_level(tolerance):
    """Of 40 random circuits at half of all edges."""
    m = plain()
    w = wiring(m)
    half = Circuit("half", tuple(w.edges[::2]))
    got = ca.circuits.certify(m, task(m), half, tolerance=tolerance, draws=2, steps=0, samples=40)
    assert len(got.null_levels) == 40
    assert sum(level != "none" for level in got.null_levels) <= 2
    assert got.shuffled_level == "none"
