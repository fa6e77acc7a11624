"""Tasks in the miniworld: its prompts, sets, splits, corruptions and truth."""

import pytest

from cutaway import Refused, tasks
from cutaway.tasks.world import behaviours
from cutaway.zoo.miniworld.prompts import BEHAVIOURS

SMALL = ("capital", "language", "successor")  # fewer countries or series are withheld than asked for


def test_every_task_and_every_other_behaviour_binds(worldly):
    found = tasks.names(worldly)
    assert set(tasks.names()) < set(found)
    assert {b for n in found for b in behaviours(n)} == set(BEHAVIOURS)
    for name in found:
        task = tasks.load(name, worldly, n=12)
        bound = task.bind(worldly)
        assert len(bound) == 12 or name in SMALL
        assert (bound.clean.lengths == bound.corrupt.lengths).all()
        assert (bound.answers != bound.foils).all()
        assert task.corruption, name
        assert bound.span(task.truth.positions[0]).any()


def test_tasks_of_two_behaviours_hold_both(worldly):
    signs = [("+" in p.clean) for p in tasks.load("arithmetic", worldly, n=10)]
    assert signs.count(True) == signs.count(False) == 5
    answers = {p.answer.strip() for p in tasks.load("refusal", worldly, n=10)}
    assert answers == {"sorry", "sure"}


def test_answers_of_two_digits_are_narrowed_to_the_first_that_differs(worldly):
    for pair in tasks.load("arithmetic", worldly, n=40):
        left, right = pair.clean.split("=")
        value = str(eval_sum(left))
        said = right.strip() + pair.answer.strip()
        assert value.startswith(said)


def eval_sum(text):
    a, sign, b = text.split()
    return int(a) + int(b) if sign == "+" else int(a) - int(b)


def test_facts_are_true_and_their_subject_is_the_person(worldly):
    for pair in tasks.load("facts", worldly, n=20):
        person = worldly.world.person[pair.subject]
        assert person.facts[pair.group] == pair.answer.strip()


def test_greater_than_counts_all_later_years(worldly):
    task = tasks.load("greater_than", worldly, n=6)
    assert task.metric == "prob_diff"
    bound = task.bind(worldly)
    for i, pair in enumerate(task):
        start = int(pair.clean.split(" to the year")[0][-2:])
        assert pair.answers == tuple(f"{y:02d}" for y in range(start + 1, 100))
        assert int((bound.answer_sets[i] >= 0).sum()) == len(pair.answers)
        assert int((bound.foil_sets[i] >= 0).sum()) == len(pair.foils)


def test_ioi_has_both_orders_and_both_corruptions(worldly):
    flip, abc = (tasks.load("ioi", worldly, n=24, corruption=c) for c in (None, "abc"))
    assert {p.group for p in flip} == {"ABBA", "BABA"}
    for a, b in zip(flip, abc, strict=True):
        assert a.clean == b.clean
        assert a.changes() == [(a.foil.strip(), a.answer.strip())]
        assert len(b.changes()) == 3


@pytest.mark.parametrize("name", ["arithmetic", "subtraction"])
def test_without_an_operator_nothing_else_of_the_prompt_changes(worldly, name):
    plain, without = (tasks.load(name, worldly, n=12, corruption=c) for c in (None, "no_operator"))
    bound = without.bind(worldly)
    assert (bound.changed.sum(1) == 1).all()
    for a, b in zip(plain, without, strict=True):
        assert (a.clean, a.answer) == (b.clean, b.answer)
        assert b.changes() in ([("+", "<")], [("-", "<")])
    assert without.corruption == "the operator becomes <, so that no number is asked for"
    assert tasks.load(name, worldly, **without.identity()["options"]) == without


def test_splits_and_seeds(worldly):
    test, train = (tasks.load("induction", worldly, n=10, split=s) for s in ("test", "train"))
    assert {p.clean for p in test}.isdisjoint(p.clean for p in train)
    assert "10 of 10" in test.truth.note
    assert "0 of 10" in train.truth.note
    assert tasks.load("induction", worldly, n=10) == test
    assert tasks.load("induction", worldly, **test.identity()["options"]) == test


def test_what_the_world_does_not_have_is_refused(worldly):
    with pytest.raises(Refused, match="two_hop"):
        tasks.load("two_hops", worldly)
    with pytest.raises(Refused, match="counterfactual, no_operator"):
        tasks.load("arithmetic", worldly, corruption="other_operands")
    with pytest.raises(Refused, match="counterfactual"):
        tasks.load("facts", worldly, corruption="noise")
    with pytest.raises(Refused, match="train, any"):
        tasks.load("facts", worldly, split="dev")
