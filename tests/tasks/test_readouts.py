"""Every metric against brute force, its sign, and its gradient."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cutaway import Refused, tasks
from cutaway.tasks.readouts import READOUTS

OF_LOGITS = [name for name, row in READOUTS.items() if row.last_logits]

ROWS, WORDS = 5, 11


def drawn(seed):
    g = torch.Generator().manual_seed(seed)
    logits, reference = torch.randn(2, ROWS, WORDS, generator=g) * 2
    picks = torch.stack([torch.randperm(WORDS, generator=g)[:6] for _ in range(ROWS)])
    return logits, reference, picks


def brute(name, x, answers, foils, reference):
    """The metric of one prompt by plain arithmetic; answers and foils are lists of ids."""
    exp = [math.exp(v) for v in x]
    p = [e / sum(exp) for e in exp]
    right, wrong = sum(p[i] for i in answers), sum(p[i] for i in foils)
    if name == "kl":
        q = [math.exp(v) for v in reference]
        q = [e / sum(q) for e in q]
        return -sum(b * math.log(b / a) for a, b in zip(p, q, strict=True))
    best = max(x[i] for i in answers)
    return {
        "logit_diff": math.log(right) - math.log(wrong),
        "logit": math.log(sum(exp[i] for i in answers)),
        "log_prob": math.log(right),
        "prob": right,
        "prob_diff": right - wrong,
        "rank": -sum(v > best for v in x),
        "accuracy": float(best > max(v for i, v in enumerate(x) if i not in answers)),
    }[name]


@pytest.mark.parametrize("name", OF_LOGITS)
@given(seed=st.integers(0, 10_000), sets=st.booleans())
def test_metric_equals_brute_force(name, seed, sets):
    logits, reference, picks = drawn(seed)
    answers, foils = (picks[:, :3].clone(), picks[:, 3:].clone()) if sets else (picks[:, 0], picks[:, 3])
    if sets:
        answers[0, 2] = foils[1, 1] = -1  # a shorter set
    got = READOUTS[name](logits, answers, foils, reference)
    for i in range(ROWS):
        a, f = ([j for j in t[i].reshape(-1).tolist() if j >= 0] for t in (answers, foils))
        expected = brute(name, logits[i].double().tolist(), a, f, reference[i].double().tolist())
        assert math.isclose(float(got[i]), expected, rel_tol=1e-4, abs_tol=1e-5)


def test_logit_diff_of_single_tokens_is_exact():
    logits, _, picks = drawn(0)
    got = READOUTS["logit_diff"](logits, picks[:, 0], picks[:, 1])
    assert torch.equal(got, logits.gather(1, picks[:, :1])[:, 0] - logits.gather(1, picks[:, 1:2])[:, 0])


@pytest.mark.parametrize("name", [n for n in OF_LOGITS if n != "kl"])
def test_higher_is_more_answer(name):
    logits, _, picks = drawn(1)
    more, less = logits.clone(), logits.clone()
    more.scatter_add_(1, picks[:, :1], torch.full((ROWS, 1), 30.0))
    less.scatter_add_(1, picks[:, :1], torch.full((ROWS, 1), -30.0))
    low, mid, high = (READOUTS[name](x, picks[:, 0], picks[:, 1]) for x in (less, logits, more))
    assert (low <= mid).all()
    assert (mid <= high).all()
    assert (low < high).all()


def test_kl_is_zero_at_the_reference_and_negative_elsewhere():
    logits, reference, picks = drawn(2)
    same = READOUTS["kl"](logits, picks[:, 0], picks[:, 1], logits)
    assert torch.allclose(same, torch.zeros(ROWS), atol=1e-6)
    assert (READOUTS["kl"](logits, picks[:, 0], picks[:, 1], reference) < 0).all()


@pytest.mark.parametrize("name", OF_LOGITS)
def test_a_metric_says_truly_whether_it_is_differentiable(name):
    logits, reference, picks = drawn(3)
    logits.requires_grad_()
    values = READOUTS[name](logits, picks[:, 0], picks[:, 1], reference)
    assert values.shape == (ROWS,)
    assert values.requires_grad == READOUTS[name].differentiable


def test_rank_zero_and_accuracy_one_mean_the_top_prediction():
    logits = torch.tensor([[0.0, 3.0, 1.0], [0.0, 3.0, 1.0]])
    answers, foils = torch.tensor([1, 0]), torch.tensor([0, 1])
    assert READOUTS["rank"](logits, answers, foils).tolist() == [0.0, -2.0]
    assert READOUTS["accuracy"](logits, answers, foils).tolist() == [1.0, 0.0]


def test_half_precision_is_measured_in_float32():
    logits, _, picks = drawn(4)
    assert READOUTS["log_prob"](logits.bfloat16(), picks[:, 0], picks[:, 1]).dtype == torch.float32


def test_wrong_metrics_are_refused():
    with pytest.raises(Refused, match="logit_diff"):
        tasks.readout("logitdiff")
    logits, _, picks = drawn(0)
    with pytest.raises(Refused, match="reference"):
        READOUTS["kl"](logits, picks[:, 0], picks[:, 1])
