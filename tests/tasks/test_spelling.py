"""Answers after marks: the form that the model has, and one rule for every place that spells an answer."""

import math

import pytest
import torch

from cutaway import Refused
from cutaway.core.record import counting
from cutaway.models.spacing import forms
from cutaway.tasks import Pair, Task
from cutaway.tasks.answers import next_tokens
from cutaway.tasks.sentence import from_sentence
from cutaway.tasks.spelling import _log_probabilities, settled, spelled


@pytest.mark.parametrize(
    ("prompt", "answer", "usual"),
    [
        ('the word "dog"', "means", " means"),
        ('she said "', "Hello", "Hello"),
        ("the “dog”", "is", " is"),
        ("she said “", "Hello", "Hello"),
        ("il a dit «", "Oui", "Oui"),
        ("the workers'", "union", " union"),
        ("she said '", "Hello", "Hello"),
        ("one problem -", "the", " the"),
        ("well-", "known", "known"),
        ("a classic —", "is", " is"),
        ("C++ and C#", "and", " and"),
        ("the tag #", "love", "love"),
        ("this is **very**", "good", " good"),
        ("this is **", "very", "very"),
        ("the `print`", "is", " is"),
        ("and/", "or", "or"),
        ("the answer (", "a", "a"),
        ("the answer (a)", "is", " is"),
        ("it costs $", "5", "5"),
        ("wait...", "what", " what"),
        ("the answer is:", "yes", " yes"),
        ("to the year 17", "42", "42"),
        ("he said", '"', ' "'),
        ("the house", ",", ","),
        ("首都は", "東京", "東京"),
    ],
)
def test_after_a_mark_there_are_two_forms_and_the_usual_one_is_first(prompt, answer, usual):
    first, second = forms(prompt, answer)
    assert first == usual
    assert {first, second} == {answer, f" {answer}"}
    assert forms(prompt, answer, joined=True) == forms(prompt + " ", answer) == (answer,)
    assert forms(prompt, " " + answer) == (" " + answer,)


def test_between_words_there_is_one_form():
    for prompt, answer, form in (
        ("gave it to", "Mary", " Mary"),
        ("cafe\u0301", "is", " is"),
        ("the year", "42", " 42"),
    ):
        assert forms(prompt, answer) == (form,)


def saying(model, monkeypatch, likely):
    """The model with other last logits: those tokens have these probabilities, all others share the rest."""

    def run_last(prompts, edits=()):
        rest = (1 - sum(likely.values())) / (model.shape.d_vocab - len(likely))
        p = torch.full((len(prompts), model.shape.d_vocab), rest)
        for text, value in likely.items():
            ids = next_tokens(model, ["the dog ("], [text])[0]
            assert ids is not None
            p[:, ids[0]] = value
        return p.log()

    monkeypatch.setattr(model, "run_last", run_last)
    return model


PAIR = Pair('the "A"', 'the "B"', "A", "B", answers=("A", "C"), foils=("B",))


@pytest.mark.parametrize(
    ("likely", "form"), [({" A": 0.3, "A": 0.01}, " A"), ({" A": 0.01, "A": 0.3}, "A"), ({" A": 0.2, "A": 0.3}, " A")]
)
def test_the_likelier_form_is_taken_and_the_foil_follows(gpt2, monkeypatch, likely, form):
    m = saying(gpt2, monkeypatch, likely)
    new, other = settled(m, [PAIR])[0], form.replace("A", "B")
    if form == " A":
        assert new == PAIR  # the usual form: nothing changes
    else:
        assert new == Pair('the "A"', 'the "B"', "A", "B", None, "", ("A", "C"), ("B",), True)
    assert new.follows(new.answer) == form
    assert spelled(m, PAIR.clean, ["A", "B"]) == [form, other]
    with counting() as spent:
        bound = Task("t", (PAIR,)).bind(m)
    assert [bound.answers.tolist(), bound.foils.tolist()] == next_tokens(m, [PAIR.clean] * 2, [form, other])
    assert f"it is {form!r} (p {likely[form]:.2g})" in spent.events[0]
    assert "so in 1 of 1 prompts" in spent.events[0]


def test_a_form_of_several_tokens_is_as_likely_as_all_of_them(gpt2, monkeypatch):
    ids = next_tokens(gpt2, ["the ("], ["AB"])[0]
    assert len(ids) == 2
    m = saying(gpt2, monkeypatch, {" A": 0.01, "A": 0.5, "B": 0.02})
    scores = _log_probabilities(m, {4: PAIR.clean}, {4: (next_tokens(m, ["the ("], [" A"])[0], ids)})
    assert [round(math.exp(s), 4) for s in scores[4]] == [0.01, 0.01]  # 0.5 × 0.02


def test_logits_that_are_no_numbers_decide_nothing(gpt2, monkeypatch):
    monkeypatch.setattr(gpt2, "run_last", lambda prompts, edits=(): torch.full((len(prompts), 9), float("nan")))
    with pytest.raises(Refused, match="no numbers"):
        settled(gpt2, [PAIR])


def test_text_that_decides_asks_no_model(gpt2):
    pairs = [Pair("the dog", "the cat", "A", "B"), Pair('the "A"', 'the "B"', " A", "B")]
    with counting() as spent:
        first, second = settled(gpt2, pairs)
    assert (spent.forwards, spent.events) == (0, [])
    assert first is pairs[0]
    assert second.follows(second.foil) == " B"  # as the answer is written


def test_a_sentence_says_how_its_target_was_spelled(gpt2, monkeypatch):
    m = saying(gpt2, monkeypatch, {" A": 0.01, "A": 0.3})
    task = from_sentence(m, 'the "A"', "A", "B", corrupt='the "B"')
    assert (task.pairs[0].answer, task.pairs[0].foil, task.pairs[0].joined) == ("A", "B", True)
    assert task.made is None or "joined=True" in str(task.made)
