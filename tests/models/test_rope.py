"""Rotary frequencies that change with the length of a batch: every prompt has the value that it has alone."""

from __future__ import annotations

from functools import cache

import pytest
import torch
import transformers as tf

import cutaway as ca
from cutaway.core.refuse import Refused
from cutaway.models.anatomy import rope
from cutaway.models.edits.edit import Edit
from cutaway.models.edits.library import Ablate, Freeze
from cutaway.models.model import Model
from cutaway.models.sweep.executor import sweep
from cutaway.models.tokens import batch
from cutaway.tasks.pair import Pair
from cutaway.tasks.task import Task
from tests.conformance.subjects import numbered, word_tokenizer
from tests.models.common import gap
from tests.models.tiny import V

SWITCH = 8
ROWS = [[7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29], [5, 17, 42, 8, 99], list(range(30, 39)), [61, 62, 63, 64, 65]]


@cache
def model() -> Model:
    """Phi-3 whose frequencies are others beyond eight tokens."""
    rope_ = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4,
             "long_factor": [3.0, 4.0, 5.0, 6.0], "original_max_position_embeddings": SWITCH}  # fmt: skip
    config = tf.Phi3Config(
        vocab_size=V, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48, pad_token_id=0,
        eos_token_id=None, max_position_embeddings=64, original_max_position_embeddings=SWITCH, rope_parameters=rope_,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(2)
        hf = tf.Phi3ForCausalLM(config).eval().requires_grad_(False)
        for p in hf.parameters():
            if p.ndim > 1:
                p.mul_(8)
    return Model(hf, word_tokenizer(V), "longrope")


@pytest.mark.parametrize("side", ["left", "right"])
def test_prompts_of_both_sides_have_the_values_they_have_alone(side):
    m, t = model(), batch(ROWS, side=side)
    assert rope.apart(m.anatomy, t) == [[0, 2], [1, 3]]
    edits: list[Edit] = [Ablate("z.1.2@-1"), Freeze("mlp_out.0", m.capture(t, "mlp_out.0"))]
    last, whole, acts = m.run_last(t, edits), m.run(t, edits), m.capture(t, ["pattern.1", "resid_post.2"], edits)
    swept = sweep(m, t, [[Ablate("resid_pre.1@2")], [Ablate("pattern.2")]], lambda logits, prompt: logits)
    for i, row in enumerate(ROWS):
        ids, n = torch.tensor([row]), len(row)
        own: list[Edit] = [Ablate("z.1.2@-1"), Freeze("mlp_out.0", m.capture(ids, "mlp_out.0"))]
        at = slice(len(ROWS[0]) - n, None) if side == "left" else slice(0, n)
        alone = m.capture(ids, ["pattern.1", "resid_post.2"], own)
        assert gap(last[i], m.run_last(ids, own)[0]) < 1e-5
        assert gap(whole[i, at], m.run(ids, own)[0]) < 1e-5
        assert gap(acts["resid_post.2"][i, at], alone["resid_post.2"][0]) < 1e-5
        assert gap(acts["pattern.1"][i, :, at, at], alone["pattern.1"][0]) < 1e-5
        assert gap(swept[0, i], m.run_last(ids, Ablate("resid_pre.1@2"))[0]) < 1e-5
        assert gap(swept[1, i], m.run_last(ids, Ablate("pattern.2"))[0]) < 1e-5


def test_methods_on_prompts_of_both_sides():
    """Each prompt's number is that of a task of its own, or the method is refused."""
    m, pairs = model(), []
    for row in ROWS:
        pairs.append(Pair(numbered(*row), numbered(row[0], row[1] + 1, *row[2:]), "w71", "w72"))
    both = ca.lenses.direct_attribution(m, Task("both", tuple(pairs)), samples=1)
    for i, pair in enumerate(pairs):
        own = Task("own", (pair,))
        assert gap(both.total[i], ca.lenses.direct_attribution(m, own, samples=1).total[0]) < 1e-4
    lens = ca.lenses.logit_lens(m, Task("both", tuple(pairs)), samples=1).probability
    alone = [ca.lenses.logit_lens(m, Task("own", (p,)), samples=1).probability for p in pairs]
    assert gap(lens, torch.stack(alone).mean(0)) < 1e-4
    patched = ca.patching.activation(m, Task("both", tuple(pairs[:2])), site="attn_out", samples=1)
    apart = [ca.patching.activation(m, Task("own", (p,)), site="attn_out", samples=1) for p in pairs[:2]]
    torch.testing.assert_close(patched.clean, torch.cat([p.clean for p in apart]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(patched.corrupt, torch.cat([p.corrupt for p in apart]), rtol=1e-4, atol=1e-5)


def test_where_they_must_run_together_they_are_refused():
    m, t = model(), batch(ROWS)
    with pytest.raises(Refused, match="change beyond 8 tokens"), m.edited(Ablate("z.1")):
        m.run_last(t)
    with pytest.raises(Refused, match="change beyond 8 tokens"):
        m.gradients(t, "resid_pre.0", lambda logits: logits[:, 3])


def test_a_continuation_across_the_switch_is_that_of_whole_forwards():
    m, new = model(), 6
    got = m.generate(batch(ROWS, side="left"), new, [Ablate("mlp_out.1@1")])
    for row, said in zip(ROWS, got, strict=True):
        ids = list(row)
        for _ in range(new):
            ids.append(int(m.run_last(torch.tensor([ids]), Ablate("mlp_out.1@1"))[0].argmax()))
        assert said == numbered(*ids[len(row) :]).replace(" ", "")
    several = m.generate(batch(ROWS, side="left"), 2, num_beams=2, num_return_sequences=2)
    assert len(several) == 2 * len(ROWS)


def test_dynamic_frequencies_know_every_longer_length():
    config = tf.LlamaConfig(
        vocab_size=V, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=16, rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
    )  # fmt: skip
    anatomy = Model(tf.LlamaForCausalLM(config).eval()).anatomy
    assert rope.side(anatomy, 3) == rope.side(anatomy, 16) != rope.side(anatomy, 17) != rope.side(anatomy, 18)
