"""Copy suppression: a head built to do it is explained whole, and the edit is that of hooks on plain transformers."""

from __future__ import annotations

import math

import pytest
import torch

import cutaway as ca
from cutaway.core.refuse import Refused
from cutaway.heads import copy_suppression
from cutaway.interventions.ablation_values import without_sinks
from tests.conformance import subjects

TEXTS = ["Mary went to the store with John", "the store gave John a book", "John gave Mary the book at the store",
         "Mary gave the store a book with John"]  # fmt: skip


def written(sign: float) -> ca.Model:
    """A model whose head 1.2 writes each token's unembedding, with a sign, where it attends; layer 0 does nothing."""
    model = subjects.random_llama()
    g, hf = torch.Generator().manual_seed(0), model.hf
    with torch.no_grad():
        rows = torch.nn.functional.normalize(torch.randn(len(hf.lm_head.weight), 8, generator=g), dim=-1)
        for matrix in (hf.model.embed_tokens.weight, hf.lm_head.weight):
            matrix.zero_()
            matrix[:, :8] = 3 * rows
            matrix[model.tokenizer.bos_token_id] = 0  # it is no key
        for layer in hf.model.layers:
            layer.mlp.down_proj.weight.zero_()
            layer.self_attn.o_proj.weight.zero_()
        second = hf.model.layers[1].self_attn
        second.v_proj.weight[8:] = torch.eye(8, 32)  # of heads 2 and 3
        second.o_proj.weight[:8, 16:24] = sign * torch.eye(8)
    return model


@pytest.mark.parametrize(("sign", "way"), [(-1.0, "suppresses"), (1.0, "copies")])
def test_a_head_built_to_do_it_is_explained_whole(sign, way):
    got = copy_suppression(written(sign), ca.tasks.as_prompts(TEXTS), heads=("1.1", "1.2"), top=1.0, samples=3)
    i = got.labels["way"].index(way)
    assert float(got.effect[0]) == pytest.approx(0, abs=1e-6), "a head that writes nothing"
    assert float(got.effect[1]) > 0.01
    assert float(got.explained[i, 1]) == pytest.approx(1, abs=1e-4)
    assert float(got.explained[1 - i, 1]) == pytest.approx(0, abs=1e-4), "nothing has the other sign"
    assert float(got.null[i, 1].max()) < 0.7
    assert float(got.written[1 - i, 1]) == 0 < float(got.written[i, 1])
    few = copy_suppression(written(sign), ca.tasks.as_prompts(TEXTS), heads=("1.2",), top=0.05, samples=1)
    assert float(few.explained[i, 0]) < 0.9, "one key of each query is not all"
    if way == "suppresses":
        assert copy_suppression(written(sign), ca.tasks.as_prompts(TEXTS), most=1, samples=1).labels["head"] == ["1.2"]


@torch.no_grad()
def by_hand(model: ca.Model, layer: int, head: int, top: float) -> tuple[torch.Tensor, torch.Tensor]:
    """KL of every second text with the head at the mean of the others, and with suppression alone, by loops."""
    hf, d = model.hf, 8
    tokens = ca.tasks.as_prompts(TEXTS).bind(model)
    rows = [tokens.ids[i][tokens.mask[i]] for i in range(len(tokens))]
    where = [without_sinks(model, tokens)[i][tokens.mask[i]] for i in range(len(tokens))]
    out = hf.model.layers[layer].self_attn.o_proj.weight[:, head * d : (head + 1) * d]
    whole, kept = [], []
    for ids, asked in zip(rows, where, strict=True):
        seen = model.capture(ids[None], [f"{s}.{layer}" for s in ("resid_pre", "pattern", "v")])
        stream, pattern, v = (
            seen[f"resid_pre.{layer}"][0],
            seen[f"pattern.{layer}"][0, head],
            seen[f"v.{layer}"][0, :, head // 2],
        )
        logits = hf.lm_head(hf.model.norm(stream))
        full, some = torch.zeros_like(stream), torch.zeros_like(stream)
        for q in range(len(ids)):
            keys = [k for k in range(q + 1) if asked[k]]
            said = logits[q, ids[keys]].sort(descending=True).values
            least = said[math.ceil(top * len(keys)) - 1] if keys else 0.0
            for k in range(q + 1):
                source = pattern[q, k] * (out @ v[k])
                full[q] += source
                u = hf.lm_head.weight[ids[k]] * hf.model.norm.weight
                u = u / u.norm()
                if asked[k] and logits[q, ids[k]] >= least:
                    some[q] += min(float(source @ u), 0.0) * u
        whole.append(full)
        kept.append(some)
    means = [torch.cat([x[w] for x, w in zip(made[::2], where[::2], strict=True)]).mean(0)
             for made in (whole, [a - b for a, b in zip(whole, kept, strict=True)])]  # fmt: skip
    found = []
    for mean, made in zip(means, ([torch.zeros_like(x) for x in kept], kept), strict=True):
        row = []
        for ids, w, full, part in [*zip(rows, where, whole, made, strict=True)][1::2]:
            step = torch.where(w[:, None], part + mean - full, 0)
            clean = hf(ids[None]).logits[0].log_softmax(-1)
            hook = hf.model.layers[layer].self_attn.o_proj.register_forward_hook(lambda m, i, o, step=step: o + step)
            said = hf(ids[None]).logits[0].log_softmax(-1)
            hook.remove()
            row.append((clean.exp() * (clean - said)).sum(-1).mean())
        found.append(torch.stack(row))
    return found[0], found[1]


def test_the_edit_is_that_of_hooks_on_the_plain_model():
    model = subjects.random_llama(spread=2.0)
    got = copy_suppression(model, ca.tasks.as_prompts(TEXTS), heads=("1.3", "0.1"), top=0.3, samples=2)
    for i, (layer, head) in enumerate([(1, 3), (0, 1)]):
        at = got.labels["head"].index(f"{layer}.{head}")
        whole, left = by_hand(model, layer, head, 0.3)
        assert float(got.effect[at]) == pytest.approx(float(whole.mean()), rel=1e-3)
        assert float(got.explained[0, at]) == pytest.approx(1 - float(left.mean() / whole.mean()), abs=1e-3), i


def test_refusals():
    model = subjects.random_llama()
    with pytest.raises(Refused, match="share of keys"):
        copy_suppression(model, ca.tasks.as_prompts(TEXTS), top=0.0)
    with pytest.raises(Refused, match="one token each"):
        copy_suppression(model, ca.tasks.as_prompts([[3], [4]]))
