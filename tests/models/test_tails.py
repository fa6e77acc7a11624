"""Continuations of a prompt beside each other: every number is that of a run of each alone, in every family."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from cutaway.core.refuse import Refused
from cutaway.models.edits.library import Scale
from cutaway.models.model import Model
from cutaway.models.tokens import Side, Tokens, continued, uncontinued
from tests.conformance import subjects
from tests.models.tiny import V, build

TAILS = [[[5, 6, 7], [8, 9]], [[3], [11, 12, 13]]]


def far(name: str, attention: str | None = None) -> Model:
    """A tiny random model of a family, its weights so large that a token hidden or shown changes much."""
    model = Model(build(name, attention=attention), subjects.word_tokenizer(V), f"far-{name}")
    with torch.no_grad():
        for p in model.hf.parameters():
            p.mul_(4.0 if p.ndim > 1 else 1.0)
            p.requires_grad_(False)
    return model


def prompts(model: Model, side: Side = "right") -> tuple[Tokens, Tokens]:
    """Prompts of two lengths, alone and with two continuations each."""
    plain = model.tokens(["w1 w2 w3 w4", "w15 w16 w17"], side=side)
    return plain, continued(plain, TAILS)


@pytest.mark.parametrize(
    ("name", "side", "attention"),
    [("gpt2", "left", "eager"), ("llama_gqa", "right", "sdpa"), ("gptj", "right", None), ("falcon_7b", "right", None),
     ("opt", "right", None), ("mistral_window", "right", "sdpa"), ("gemma3", "left", "eager"),
     ("cohere2", "right", None), ("glm4", "right", None), ("qwen3_moe", "right", None)],
)  # fmt: skip
def test_each_continuation_is_as_if_it_stood_there_alone(name, side, attention):
    model = far(name, attention)
    plain, both = prompts(model, side)
    logits = model.capture(both, "logits")["logits"]
    for i, tails in enumerate(TAILS):
        ids, start = plain.ids[i][plain.mask[i]].tolist(), int(both.column(0)[i])
        at = start + len(ids)
        alone = model.run(torch.tensor(ids))[0]
        assert torch.allclose(logits[i, start:at], alone, atol=1e-4 * float(alone.abs().max()))
        for tail in tails:
            alone = model.run(torch.tensor(ids + tail))[0, len(ids) :]
            assert torch.allclose(logits[i, at : at + len(tail)], alone, atol=1e-4 * float(alone.abs().max()))
            at += len(tail)
        assert not bool(both.mask[i, at:].any())


@pytest.mark.parametrize("name", ["llama_gqa", "gptj"])
def test_patterns_show_that_none_attends_to_another(name):
    model = far(name)
    _, both = prompts(model)
    pattern = model.capture(both, "pattern.1")["pattern.1"]
    assert both.tail_of.tolist() == [[0] * 4 + [1, 1, 1, 2, 2], [0] * 3 + [1, 2, 2, 2, 0, 0]]
    assert bool((pattern[0, :, 7:9, 4:7] == 0).all())
    assert bool((pattern[0, :, 8, [0, 3, 7, 8]] > 0).all())
    assert bool((pattern[1, :, 4:7, 3] == 0).all())


def test_positions_are_those_of_the_prompt():
    model = subjects.family("gpt2")
    plain, both = prompts(model)
    assert both.lengths.tolist() == plain.lengths.tolist() == [4, 3]
    assert both.last.tolist() == [3, 2]
    assert both.position_ids.tolist() == [[0, 1, 2, 3, 4, 5, 6, 4, 5], [0, 1, 2, 3, 3, 4, 5, 6, 6]]
    assert both.labels(1) == ["w15", "w16", "w17"]
    whole = model.capture(both, "logits")["logits"]
    assert_close(model.run_last(both), whole[[0, 1], [3, 2]], rtol=0, atol=5e-7)
    at_last = model.capture(both, "resid_post.1", Scale("resid_pre.1@-1", 2.0))["resid_post.1"]
    untouched = model.capture(both, "resid_post.1")["resid_post.1"]
    assert not torch.equal(at_last[0, 3], untouched[0, 3])
    assert torch.equal(at_last[0, :3], untouched[0, :3])
    result = model.capture(both, "resid_post.1").result("resid_post.1", 1)
    assert (result.labels["position"], len(result.activation)) == (["w15", "w16", "w17"], 3)
    alone = uncontinued(both)
    assert torch.equal(alone.ids, plain.ids)
    assert alone.tails == ()
    one = both.row(1)
    assert (one.tails, one.lengths.tolist()) == (((1, 3),), [3])
    assert list(both.by_length()) == [(3, 1, 3), (4, 3, 2)]


@pytest.mark.parametrize(("name", "says"), [("bloom", "counts positions itself"), ("mamba", "carry a state")])
def test_models_that_cannot_are_refused(name, says):
    model = subjects.family(name)
    with pytest.raises(Refused, match=says):
        model.run(prompts(model)[1])
