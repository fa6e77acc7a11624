"""The rules of the miniworld, as a reader would apply them."""

from __future__ import annotations

import pytest

from cutaway.zoo.miniworld.rules import follows


@pytest.mark.parametrize(
    ("sentence", "word"),
    [
        ("When Mary and John went to the store, John gave a drink to", "mary"),
        ("When John and Mary went to the store, John gave a drink to", "mary"),
        ("23 + 45 =", "6"),
        ("23 + 45 = 6", "8"),
        ("82 - 17 =", "6"),
        ("After Sunday comes", "monday"),
        ("After seven comes", "eight"),
    ],
)
def test_a_rule_names_the_next_word(sentence, word):
    found = follows(sentence)
    assert found is not None
    assert found[0] == word


@pytest.mark.parametrize(
    "sentence",
    [
        "When Mary and John went to the store, Anna gave a drink to",  # nobody is named twice
        "When Mary and John went to the store, John",  # nobody receives yet
        "23 + 45 = 68",  # complete
        "12 - 30 =",  # no negative numbers in this world
        "After z comes",  # the last letter
        "The capital of France is",  # a fact, not a rule
    ],
)
def test_no_rule_is_made_up(sentence):
    assert follows(sentence) is None


def test_the_rules_agree_with_the_worlds_own_prompts():
    from cutaway.zoo.miniworld import World

    world = World.load()
    checked = 0
    for behaviour in ("ioi", "addition", "subtraction", "successor"):
        for prompt in world.prompts(behaviour, 60, 3, "any"):
            found = follows(prompt.clean)
            if found is not None:
                checked += 1
                assert prompt.answer.strip().lower().startswith(found[0]), prompt
    assert checked > 150
