"""Reports on dictionaries: where the file has no recipe, the control is trained by one like the dictionary."""

from dataclasses import replace

import pytest
import torch

from cutaway.dictionaries.gates import GATES, AbsTopK, BatchTopK, Gated, GroupMax, JumpRelu, MatchingPursuit, Relu, TopK
from cutaway.suites.dictionary_report import recipe_like
from tests.dictionaries.common import A, dictionary

FROZEN = [
    (TopK(3), 3),
    (BatchTopK(3), 3),
    (AbsTopK(3), 3),
    (GroupMax(5), 5),
    (MatchingPursuit(0.1, 4), 4),
    (Relu(), None),
    (JumpRelu(torch.ones(10)), 2),
    (Gated(torch.zeros(10), torch.zeros(10), torch.zeros(10)), None),
]


def test_every_gate_is_tried():
    assert {type(gate).__name__ for gate, _ in FROZEN} == set(GATES)


@pytest.mark.parametrize(("gate", "k"), FROZEN, ids=lambda x: type(x).__name__)
def test_a_recipe_like_a_dictionary_keeps_its_blocks_and_its_number_of_active_latents(gate, k):
    d = dictionary([(10, [A], [A])], {A: 5}, "pursuit" if isinstance(gate, MatchingPursuit) else "relu")
    recipe = recipe_like(replace(d, gates=(gate,)), 2.2)
    assert recipe.blocks == d.blocks
    assert getattr(recipe.gating, "k", None) == k
