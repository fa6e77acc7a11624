"""The corpus: nothing held out is written, blocks begin with a text, and the stream can be taken up again."""

from __future__ import annotations

import json
from random import Random

import pytest

from cutaway.zoo.miniworld.corpus import WEIGHTS, Corpus, document
from cutaway.zoo.miniworld.facts import RELATIONS
from cutaway.zoo.miniworld.tokenizer import BOS_ID


def test_blocks_have_one_length_and_begin_with_a_text(world, tokenizer):
    corpus = Corpus(world, tokenizer, length=96, seed=1)
    blocks = [corpus.block() for _ in range(50)]
    assert all(len(b) == 96 and b[0] == BOS_ID for b in blocks)


def test_same_seed_same_stream(world, tokenizer):
    one, two, other = (Corpus(world, tokenizer, 64, seed) for seed in (1, 1, 2))
    first = [one.block() for _ in range(5)]
    assert first == [two.block() for _ in range(5)]
    assert first != [other.block() for _ in range(5)]


def test_the_stream_is_taken_up_where_it_was_left(world, tokenizer):
    corpus = Corpus(world, tokenizer, 64, seed=4)
    for _ in range(7):
        corpus.block()
    state = json.loads(json.dumps(corpus.state()))
    expected = [corpus.block() for _ in range(7)]
    again = Corpus(world, tokenizer, 64, seed=99)
    again.restore(state)
    assert [again.block() for _ in range(7)] == expected


@pytest.mark.parametrize("kind", [k for k in WEIGHTS if k != "random_tokens"])
def test_documents_fit_a_block(world, tokenizer, kind):
    rng = Random(5)
    lengths = [len(tokenizer.encode(document(world, rng, kind)).ids) for _ in range(100)]
    assert sum(n <= 96 for n in lengths) >= 90


def test_held_out_facts_are_never_written(world):
    rng = Random(6)
    text = "\n".join(document(world, rng, "fact") for _ in range(3000))
    for person in world.people:
        for relation, k in person.held_out_template.items():
            assert RELATIONS[relation][k].format(s=person.name) + f" {person.facts[relation]}." not in text


def test_no_text_ties_a_held_out_person_to_a_country(world):
    rng = Random(7)
    countries = {c.name for c in world.countries}
    held_out = {p.name for p in world.people if p.two_hop_held_out}
    for kind in ("fact", "profile", "two_hop", "city_country"):
        for _ in range(500):
            found = {w.strip(".,:") for w in document(world, rng, kind).split()}
            assert not (found & countries and found & held_out)


def test_held_out_sums_are_never_written(world):
    rng = Random(8)
    held_out = {f"{a} + {b} = " for a, b in world.held_out_lists["addition"]}
    for _ in range(600):
        for equation in document(world, rng, "addition").split(". "):
            assert equation.split("= ")[0] + "= " not in held_out
