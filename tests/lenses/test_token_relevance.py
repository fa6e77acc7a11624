"""AttnLRP: the rules written out by hand, and deletion curves against plain runs."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import cutaway as ca
from cutaway.core.refuse import Refused
from cutaway.models.edits.library import Replace
from tests.conformance import subjects


def norm(module, x):
    """An RMS norm whose divisor is a constant."""
    return x / (x.detach().pow(2).mean(-1, keepdim=True) + module.variance_epsilon).sqrt() * module.weight


def product(f, a, b):
    """Half of a product through each of its factors."""
    return (f(a, b.detach()) + f(a.detach(), b)) / 2


def written_out(hf, x):
    """The last logits of a Llama from what enters its first block, in which gradient × input is relevance."""
    cos, sin = hf.model.rotary_emb(x, torch.arange(x.shape[1])[None])
    config, n = hf.config, x.shape[1]
    width = config.head_dim or config.hidden_size // config.num_attention_heads
    mask = torch.full((n, n), -torch.inf, dtype=x.dtype).triu(1)
    for block in hf.model.layers:
        h, a = norm(block.input_layernorm, x), block.self_attn
        q, k, v = (p(h).unflatten(-1, (-1, width)).transpose(1, 2) for p in (a.q_proj, a.k_proj, a.v_proj))
        q, k = apply_rotary_pos_emb(q, k, cos, sin)
        k, v = (t.repeat_interleave(config.num_attention_heads // config.num_key_value_heads, 1) for t in (k, v))
        scores = product(lambda a, b: a @ b.transpose(-1, -2), q, k) / width**0.5 + mask
        z = product(torch.matmul, scores.softmax(-1), v)
        x = x + a.o_proj(z.transpose(1, 2).flatten(2))
        h, m = norm(block.post_attention_layernorm, x), block.mlp
        g = m.gate_proj(h)
        x = x + m.down_proj(product(torch.mul, g * (torch.nn.functional.silu(g) / g).detach(), m.up_proj(h)))
    return hf.lm_head(norm(hf.model.norm, x))[:, -1]


def test_it_is_gradient_times_input_of_the_rules_written_out():
    model, task = subjects.family("llama_gqa"), subjects.numbered_task(True)
    got = ca.lenses.token_relevance(model, task, steps=2, samples=1)
    hf = copy.deepcopy(model.hf).double()
    for i, pair in enumerate(task.pairs):
        ids = torch.tensor([[int(w[1:]) for w in pair.clean.split()]])
        x = hf.model.embed_tokens(ids).detach().requires_grad_()
        logits = written_out(hf, x)
        torch.testing.assert_close(logits, hf(ids).logits[:, -1])
        margin = logits[0, int(pair.answer[1:])] - logits[0, int(pair.foil[1:])]
        (slope,) = torch.autograd.grad(margin, x)
        relevance, margin = (slope * x).sum(-1)[0].detach(), margin.detach()
        n = ids.shape[1]
        torch.testing.assert_close(got.relevance[i, -n:].double(), relevance, atol=1e-5, rtol=1e-4)
        assert got.relevance[i, :-n].isnan().all()
        assert float(got.total[i]) == pytest.approx(float(margin), abs=1e-5)
        assert float(got.residual[i]) == pytest.approx(float(margin - relevance.sum()), abs=1e-5)


@pytest.mark.parametrize("remove", ["zero", "mean"])
def test_curves_are_those_of_plain_edits(remove):
    model, task = subjects.family("gpt2"), subjects.numbered_task()
    got = ca.lenses.token_relevance(model, task, remove=remove, steps=3, samples=3)
    entry = model.capture([p.clean for p in task.pairs], "resid_pre.0", logits=False)["resid_pre.0"]
    stand = torch.zeros_like(entry[0, 0]) if remove == "zero" else entry.flatten(0, 1).mean(0)
    ids = torch.tensor([[int(w[1:]) for w in (p.answer, p.foil)] for p in task.pairs])
    words = torch.tensor([[int(w[1:]) for w in p.clean.split()] for p in task.pairs])
    embedded = model.hf.transformer.wte(words).detach().requires_grad_()
    logits = model.hf(inputs_embeds=embedded).logits[:, -1]
    (slope,) = torch.autograd.grad((logits.gather(1, ids[:, :1]) - logits.gather(1, ids[:, 1:])).sum(), embedded)
    for s, score in enumerate((got.relevance, (slope * entry).sum(-1))):  # AttnLRP, gradient × input
        order, wanted = score.argsort(1, descending=True), []
        for n in (0, 2, 4):  # of six tokens
            changed = entry.clone()
            for i, row in enumerate(order):
                changed[i, row[:n]] = stand
            logits = model.run_last([p.clean for p in task.pairs], edits=[Replace("resid_pre.0", changed)])
            wanted.append((logits.gather(1, ids[:, :1]) - logits.gather(1, ids[:, 1:]))[:, 0])
        each = torch.stack(wanted)
        assert got.curve[s].tolist() == pytest.approx(each.mean(1).tolist(), abs=1e-5)
        assert float(got.area[s]) == pytest.approx(float(each.mean()), abs=1e-5)
    assert got.curve[:, 0].tolist() == pytest.approx([float(got.total.mean())] * 3, abs=1e-5)
    assert float(got.gain[0]) == pytest.approx(float(got.null[0].mean() - got.area[0]), abs=1e-5)
    assert float(got.ahead) == pytest.approx(float(got.area[1] - got.area[0]), abs=1e-5)
    assert got.labels["step"] == ["0 %", "33.3 %", "66.7 %"]


def test_it_finds_the_names_that_decide():
    model = subjects.miniworld()
    got = ca.lenses.token_relevance(model, ca.tasks.load("ioi", model, 8), steps=5, samples=4)
    assert float(got.gain_interval[0, 0]) > 0
    assert float(got.area[0]) < float(got.null.min())


def test_refusals():
    model = subjects.family("mixtral")
    with pytest.raises(Refused, match="activation function is not at a named place"):
        ca.lenses.token_relevance(model, subjects.numbered_task())
    with pytest.raises(Refused, match="a point between"):
        ca.lenses.token_relevance(subjects.family("gpt2"), subjects.numbered_task(), steps=1)
