"""Circuits that are not there are reported as not found, and their twins that are there as found."""

from __future__ import annotations

import pytest
import torch

import cutaway as ca
from cutaway.circuits.faithfulness import LEAST, MOST
from cutaway.core.refuse import Refused
from cutaway.suites.absent_circuits import absent_circuits, cases, judged, meaningless, repeated_blocks
from cutaway.suites.absent_circuits import untrained as random_weights


def test_a_model_without_induction_heads_has_no_induction_circuit():
    found = absent_circuits(["induction", "no induction heads"], n=16, samples=2)
    there, absent = found.verdict
    assert there.startswith("found: ")
    assert absent.startswith("not found: all edges together are worth")
    assert found.level[1] == "none"
    assert float(found.worth[0]) > 5 > abs(float(found.worth[1]))
    assert float(found.interval[0, 0]) > float(found.null[0].max())


@pytest.mark.parametrize("case", ["no meaning: facts", "no training: facts"])
def test_answers_without_meaning_and_random_weights_earn_nothing(case):
    model, task = cases()[case](12, 0)
    curve, certificate = judged(model, task, samples=1)
    assert curve.verdict.startswith("not found: ")
    assert certificate.level == "none"


def test_a_ranking_that_finds_nothing_is_told_from_one_that_does():
    """On answers that the model does give."""
    model = ca.load("compiled/balance", check=False)
    first, second = ca.tasks.load("balance", model, n=32).split(0.5)
    chance = ca.circuits.open(ca.circuits.random(model, seed=1))
    exact = ca.circuits.open(ca.circuits.exact(model, first, samples=1, null_cells=1))
    lost, found = (ca.circuits.faithfulness(model, second, c, samples=2) for c in (chance, exact))
    assert lost.verdict.startswith(f"not found: no circuit of at most {MOST:g} of all edges carries")
    assert found.verdict.startswith("found: ")
    smallest = float(found.verdict.split()[1])
    shares = [float(k) for k in found.labels["share"]]
    low, rival = torch.maximum(found.interval[:, 0], found.absolute_interval[:, 0]), found.null.amax(1)
    assert smallest == next(
        k for k, x, r in zip(shares, low.tolist(), rival.tolist(), strict=True) if x > max(r, LEAST)
    )
    one = ca.circuits.faithfulness(model, second.take(1), exact, samples=1)
    assert one.verdict == "no verdict: one prompt has no interval"


def test_every_prompt_gets_answers_that_are_not_its_own():
    model = ca.load("miniworld")
    years = ca.tasks.load("greater_than", model, n=8)
    for name in ("ioi", "greater_than"):
        task = ca.tasks.load(name, model, n=8)
        dealt = meaningless(task, seed=3)
        assert [p.clean for p in dealt] == [p.clean for p in task]
        assert dealt.pairs == meaningless(task, seed=3).pairs
        assert all((a.answer, a.answers) != (b.answer, b.answers) for a, b in zip(dealt, task, strict=True))
    for pair in meaningless(years, seed=3):
        assert not set(pair.answers) & set(pair.foils)
        assert (len(pair.answers), len(pair.foils)) == (50, 50)


def test_prompts_of_repeated_blocks_differ_in_what_followed_alone():
    task = repeated_blocks(8, seed=2)
    for pair in task:
        clean, corrupt = pair.clean.split(), pair.corrupt.split()
        assert [(a, b) for a, b in zip(clean, corrupt, strict=True) if a != b] == [
            (pair.answer.strip(), pair.foil.strip())
        ]
        assert clean[clean.index(clean[-1]) + 1] == pair.answer.strip()
    assert task.pairs == repeated_blocks(8, seed=2).pairs != repeated_blocks(8, seed=3).pairs


def test_random_weights_are_of_the_seed_and_leave_the_generator_alone():
    model, state = ca.load("miniworld"), torch.get_rng_state()
    one, same, other = (random_weights(model, s).run(["Kate"]) for s in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(Refused, match="none has that name"):
        absent_circuits(["facts of life"])
