"""Past Gemma 3's sliding window of 512 tokens: reading, editing, patching, cutting and generating equal plain hooks."""

from __future__ import annotations

import pytest
import torch

import cutaway as ca
from cutaway.models import Ablate, Knockout
from cutaway.tasks import Pair, Task
from tests.real import plain, sets
from tests.real.test_hooks import same

pytestmark = pytest.mark.parametrize("name", ["gemma3"], indirect=True)
SLIDING, FULL = 4, 5


@pytest.fixture(scope="module")
def long(model) -> Task:
    """One pair of some 560 tokens, whose second word and last subject differ, with the window between the two."""
    assert model.hf.config.layer_types[SLIDING] == "sliding_attention"
    assert model.hf.config.layer_types[FULL] == "full_attention"
    lines = [*sets.rows("fact_country"), *sets.spread("fact_language", 8)]
    middle = " ".join(f"{p.clean} {p.answer}." for p in map(sets.pair, lines))
    clean, corrupt = (f"In {c} we read: {middle} The capital of {c} is" for c in ("France", "Japan"))
    task = Task("long", (Pair(clean, corrupt, "Paris", "Tokyo"),))
    assert 530 < len(model.tokenizer(clean)["input_ids"]) < 640
    return task


@pytest.fixture(scope="module")
def ids(model, long) -> tuple[list[int], list[int]]:
    clean, corrupt = sets.ids(model.tokenizer, [long.pairs[0].clean, long.pairs[0].corrupt])
    return clean, corrupt


@pytest.fixture(scope="module")
def logits(model, ids) -> torch.Tensor:
    return plain.last(model.hf, ids[0])


@pytest.mark.parametrize("side", ["left", "right"])
def test_beside_a_short_prompt(model, long, ids, logits, side):
    """Padding moves the window with its prompt."""
    tokens = model.tokens([long.pairs[0].clean, "The capital of Italy is"], side=side)
    acts = model.capture(tokens, [f"z.{SLIDING}", "resid_post.17"], logits=False)
    _, found = plain.read(model.hf, ids[0], [("z", SLIDING), ("resid_post", 17)])
    for (site, layer), want in found.items():
        same(acts[f"{site}.{layer}"][0][tokens.mask[0]], want, float(want.abs().max()))
    scale = float(logits.abs().max())
    same(model.run_last(tokens)[0], logits, scale)
    edited = model.run_last(tokens, Ablate(f"z.{FULL}.1@1"))
    change = {("z", FULL): plain.put(model.hf, "z", 0.0, 1, at=[1])}
    same(edited[0], plain.last(model.hf, ids[0], change), scale)


def test_patching(model, long, ids, logits):
    scale = float(logits.abs().max())
    answer, foil = (sets.next_id(model.tokenizer, long.pairs[0].clean, f" {w}") for w in ("Paris", "Tokyo"))
    for layer in (SLIDING, FULL):
        found = ca.patching.activation(model, long, site=f"z.{layer}", direction="noise", samples=1)
        _, given = plain.read(model.hf, ids[1], [("z", layer)])
        for h in (0, 3):
            change = {("z", layer): plain.put(model.hf, "z", given["z", layer][:, h], h)}
            x = plain.last(model.hf, ids[0], change)
            effect = (x[answer] - x[foil]) - (logits[answer] - logits[foil])
            assert abs(float(found.effect[0, h] - effect)) <= 1e-4 * scale


def test_cut_edges(model, long, ids, logits):
    """Into the window everywhere; out of it in the layers that see so far."""
    end, scale = len(ids[0]) - 1, float(logits.abs().max())
    for layers, key in ((range(18), end - 400), ((5, 11, 17), 2)):
        got = model.run_last(long.pairs[0].clean, [Knockout(f"pattern.{i}", (-1,), (key,)) for i in layers])
        same(got[0], plain.last(model.hf, ids[0], cuts={i: [(end, key)] for i in layers}), scale)


def test_generation_goes_past_the_window(model, ids):
    """From 508 tokens on, with the cache, under an edit of every token: the window begins to move on the way."""
    begin = ids[0][:508]
    for edits, changes in (((), {}), (Ablate("z.9.2"), {("z", 9): plain.put(model.hf, "z", 0.0, 2)})):
        want = plain.continued(model.hf, begin, 8, changes)
        assert len(begin) + len(want) > 512
        text = model.tokenizer.decode(want, skip_special_tokens=True)
        assert model.generate(torch.tensor([begin]), 8, edits) == [text]


def test_two_answers_of_several_tokens(model, long):
    """Both stand behind the prompt, and each sees of it what it would see alone: the second no shorter a window."""
    told = long.pairs[0]
    task = Task("long", (Pair(told.clean, told.corrupt, "Buenos Aires, Argentina", "New Delhi, India"),))
    bound = task.bind(model)
    assert min(bound.clean.tails[0]) > 2
    got = model.measure(bound.clean, bound.measure)
    want = []
    for text in (f" {task.pairs[0].answer}", f" {task.pairs[0].foil}"):
        before, whole = sets.ids(model.tokenizer, [told.clean, told.clean + text])
        with torch.no_grad():
            said = model.hf(torch.tensor([whole])).logits[0].double().log_softmax(-1)
        want.append(sum(float(said[i - 1, whole[i]]) for i in range(len(before), len(whole))))
    assert float(got) == pytest.approx(want[0] - want[1], abs=2e-3)
