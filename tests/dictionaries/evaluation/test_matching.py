"""Recovery of true features against brute force and on dictionaries whose answer is known."""

from itertools import permutations

import pytest
import torch

from cutaway.core.refuse import Refused
from cutaway.core.stats import generator
from cutaway.dictionaries import SparseCode
from cutaway.dictionaries.evaluation.controls import random_dictionary
from cutaway.dictionaries.evaluation.evidence import Evidence, encode_evidence
from cutaway.dictionaries.evaluation.geometry import cosines
from cutaway.dictionaries.evaluation.matching import counts, matched, mcc, mmcs, rates, recovery, uniqueness
from tests.dictionaries.evaluation import made


def rows(n: int, seed: int, d: int = 4) -> torch.Tensor:
    return torch.randn(n, d, generator=generator(seed))


def test_mcc_is_the_best_of_all_matchings():
    a, b = rows(4, 0), rows(6, 1)
    near = cosines(a, b).abs()
    best = max(sum(float(near[i, j]) for i, j in enumerate(order)) for order in permutations(range(6), 4))
    assert mcc(a, b) == pytest.approx(best / 4, abs=1e-5)
    assert mcc(b, a) == pytest.approx(best / 4, abs=1e-5)
    i, j, value = matched(a, -a.flip(0))
    assert torch.equal(j, 3 - i)
    assert value.tolist() == pytest.approx([1.0] * 4, abs=1e-5)


def test_mmcs_is_gamed_by_duplicates_and_uniqueness_says_so():
    truth = torch.eye(4)
    assert mmcs(truth, truth) == 1
    many = torch.cat([truth, truth, truth + 0.01])
    assert mmcs(truth, many) == pytest.approx(1)
    assert uniqueness(truth, many) == pytest.approx(4 / 12)
    assert uniqueness(truth, truth) == 1
    near = torch.stack([torch.stack([torch.dot(t, m).abs() / t.norm() / m.norm() for m in rows(3, 2)]) for t in truth])
    assert mmcs(truth, rows(3, 2)) == pytest.approx(float(near.max(1).values.mean()), abs=1e-5)


def test_imports_of_zeros_match_nothing():
    truth = torch.eye(3)
    assert mmcs(truth, torch.zeros(2, 3)) == 0
    assert mcc(truth, torch.zeros(2, 3)) == 0


def test_counts_and_f1_are_those_of_dense_codes():
    g = generator(3)
    f = torch.randn(60, 7, generator=g) * (torch.rand(60, 7, generator=g) < 0.4)
    t = torch.rand(60, 5, generator=g) * (torch.rand(60, 5, generator=g) < 0.3)
    f[:, 6] = 0
    match = torch.tensor([0, 1, 2, 3, 4, 0, 1])
    group = torch.arange(60) // 20
    hits, fires, true = counts(SparseCode.from_dense(f), SparseCode.from_dense(t), match, group)
    for k in range(3):
        on, there = f[group == k] != 0, t[group == k][:, match] != 0
        assert torch.equal(hits[k], (on & there).sum(0).float())
        assert torch.equal(fires[k], on.sum(0).float())
        assert torch.equal(true[k], there.sum(0).float())
    from sklearn.metrics import precision_recall_fscore_support

    precision, recall, f1 = rates(hits.sum(0), fires.sum(0), true.sum(0))
    for i in range(7):
        want = precision_recall_fscore_support(t[:, match[i]] != 0, f[:, i] != 0, average="binary", zero_division=0)
        assert [float(precision[i]), float(recall[i]), float(f1[i])] == pytest.approx(list(want[:3]), abs=1e-6)


def test_the_true_dictionary_recovers_everything_and_a_random_one_does_not():
    truth = made.truth()
    e = made.evidence(truth)
    d = made.oracle(truth)
    null = [encode_evidence(random_dictionary(d, e, 4.0, seed=i), e) for i in range(2)]
    got = recovery(encode_evidence(d, e), truth.directions, null=null)
    assert got["MMCS"].value == pytest.approx(1, abs=1e-4)
    assert got["MCC"].value == pytest.approx(1, abs=1e-4)
    assert got["uniqueness"].value == 1
    assert got["F1"].value > 0.7
    i = got.row("F1")
    assert got.interval[i, 0] <= got.score[i] <= got.interval[i, 1]
    assert got.null[i].max() < 0.4
    assert max(got["MCC"].null) < 0.7
    assert got.reasons["uniqueness"]


def test_refusals():
    truth = made.truth()
    d = made.oracle(truth)
    plain = Evidence({made.SITE: made.evidence(truth, 100).of(made.SITE)})
    with pytest.raises(Refused, match="no true code"):
        recovery(encode_evidence(d, plain), truth.directions)
    with pytest.raises(Refused, match="width 5"):
        recovery(encode_evidence(d, made.evidence(truth, 100)), torch.eye(5))
