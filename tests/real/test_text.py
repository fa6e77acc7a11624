"""Text as a real model has it: answers after marks, one beginning, subjects behind long letters, greedy tokens."""

from __future__ import annotations

import pytest
import torch

import cutaway as ca
from cutaway.models import Ablate, Knockout, Scale
from cutaway.tasks import Pair, Task

MARKS = [
    ('The word "cat" means a small animal and the word "dog"', "means", "is"),
    ("The word “cat” means a small animal and the word “dog”", "means", "is"),
    ("It was the worst of times, said the workers'", "union", "party"),
    ("There was only one problem -", "the", "a"),
    ("The film — a classic —", "is", "was"),
    ("well-", "known", "being"),
    ("My favourite programming languages are C++ and C#", "and", "but"),
    ("the tag #", "love", "the"),
    ('She opened the door and said "', "Hello", "The"),
    ("He said 'yes'", "and", "but"),
    ("This is **very**", "important", "good"),
    ("This is **", "very", "not"),
    ("Use the `print`", "function", "command"),
    ("The answer (", "a", "b"),
    ("He and/", "or", "and"),
    ("Wait...", "what", "the"),
    ("The ingredients are:", "water", "salt"),
    ("std::", "vector", "string"),
    ("Visit www.example.", "com", "org"),
    ("I don'", "t", "s"),
    ("In 1984", "the", "he"),
    ("He said", '"', "the"),
    ("The function f(x", ")", ","),
]


def test_an_answer_after_a_mark_is_the_form_that_the_model_has(model):
    measured = 0
    for prompt, answer, foil in MARKS:
        p = model.run_last(prompt)[0].softmax(-1)
        texts = [model.tokenizer(t, add_special_tokens=False)["input_ids"] for t in (answer, f" {answer}")]
        try:
            bound = Task("mark", (Pair(prompt, prompt, answer, foil),)).bind(model)
        except ca.Refused:
            continue
        measured += 1
        assert float(p[bound.answers[0]]) >= 0.5 * max(float(p[ids[0]]) for ids in texts if len(ids) == 1), prompt
    assert measured >= len(MARKS) - 3  # a form that merges with its mark, or of several tokens, is refused


def test_a_prompt_has_one_beginning_of_text(model):
    begins, plain = model.tokenizer.bos_token, model.tokens("The capital of France is", bos=True)
    assert model.tokens(f"{begins}The capital of France is").ids.tolist() == plain.ids.tolist()
    assert plain.ids[0].tolist().count(model.tokenizer.bos_token_id) == 1


@pytest.mark.parametrize("before", ["İstanbul", "ŞİŞLİ, İZMİR", "ﬁne ẞ", "𝕀𝕤𝕥"])
def test_a_subject_is_where_it_stands(model, before):
    texts = (f"{before} aside, the capital of {c} is" for c in ("France", "Japan"))
    bound = Task("subject", (Pair(*texts, "Paris", "Tokyo", "France"),)).bind(model)
    assert bound.span("subject").equal(bound.changed)


def test_generation_is_greedy_with_every_cache(model):
    prompt, layers = "The capital of France is Paris. The capital of Japan is", range(model.shape.n_layers)
    for edits in (
        [],
        [Scale("scores.3", 1.0)],
        [Ablate(f"v.{i}@2") for i in layers],
        [Knockout(f"pattern.{i}", queries=(-1,), keys=(2,)) for i in layers],
    ):
        ids = model.tokens(prompt).ids[0].tolist()
        new = model.generate(prompt, 6, edits)[0]
        assert model.generate(prompt, 6, edits, cache_implementation="static") == [new]
        if not edits or isinstance(edits[0], Scale):
            for _ in range(6):
                ids.append(int(model.run_last(torch.tensor([ids])).argmax()))
            assert model.tokenizer.decode(ids, skip_special_tokens=True) == prompt + new
