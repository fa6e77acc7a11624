"""Successor heads: a planted head is found and removed as by a hook, shares are those of plain matrix products."""

from __future__ import annotations

import math

import pytest
import torch

from cutaway.core.refuse import Refused
from cutaway.heads import successor
from cutaway.heads.ordinals import ORDERS, orders
from cutaway.interventions.components import LAYERS
from tests.conformance import subjects

LETTERS = ORDERS["letters"][0].split()


def test_a_head_that_turns_letters_into_the_next_is_found():
    model = subjects.random_llama()
    hf, angle = model.hf, 2 * math.pi / len(LETTERS)
    turn = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    with torch.no_grad():
        for i, letter in enumerate(LETTERS):
            at = torch.tensor([math.cos(i * angle), math.sin(i * angle)])
            for matrix in (hf.model.embed_tokens.weight, hf.lm_head.weight):
                matrix[model.tokenizer.convert_tokens_to_ids(letter)] = torch.cat([at, torch.zeros(30)])
        hf.model.layers[0].mlp.down_proj.weight.zero_()
        second = hf.model.layers[1].self_attn
        second.v_proj.weight[8:] = torch.eye(8, 32)  # of heads 2 and 3
        second.o_proj.weight[:2, 16:18], second.o_proj.weight[:2, 24:26] = turn, torch.eye(2)
    got = successor(model, samples=4)
    assert got.record["words"] == {"numbers": 9, "letters": 26}
    assert got.named() == ["1.2"]
    assert (float(got.score[1, 1, 2]), float(got.copies[1, 1, 2])) == (1.0, 0.0)
    assert (float(got.score[1, 1, 3]), float(got.copies[1, 1, 3])) == (0.0, 1.0)
    assert float(got.null[1, 1, 2].max()) < 0.3
    own = torch.stack([without(model, [2]) - without(model, [])]).mean()
    assert float(got.change) == pytest.approx(float(own), rel=1e-4)
    assert float(got.change) < -0.1
    assert got.change_null.isfinite().all()
    assert got.record["random sets"] == LAYERS


@torch.no_grad()
def without(model, heads) -> torch.Tensor:
    """The next word's logit over the mean of its order's others, after three words, with heads of layer 1 at their
    mean: a hook on what the output projection reads.
    """
    rows, right, others = [], [], []
    for order in orders(model):
        for i in range(len(order.ids)):
            chain = [i]
            while len(chain) < 4 and order.follows[chain[-1]] >= 0:
                chain.append(order.follows[chain[-1]])
            if len(chain) == 4:
                ids = [order.ids[k] for k in chain]
                rows.append([model.tokenizer.bos_token_id, *ids[:3]])
                right.append(ids[3])
                others.append([k for k in order.ids if k != ids[3]])

    def hook(_, args):
        z = args[0].unflatten(-1, (4, 8)).clone()
        for h in heads:
            z[:, 1:, h] = z[:, 1:, h].mean((0, 1))
        return (z.flatten(-2),)

    handle = model.hf.model.layers[1].self_attn.o_proj.register_forward_pre_hook(hook)
    logits = model.hf(torch.tensor(rows)).logits[:, -1]
    handle.remove()
    return torch.stack([x[r] - x[o].mean() for x, r, o in zip(logits, right, others, strict=True)])


def test_shares_are_those_of_plain_products():
    model = subjects.random_llama(1)
    hf, ids = model.hf, model.tokenizer.convert_tokens_to_ids(LETTERS)
    wide = {n: p.detach().double() for n, p in hf.named_parameters()}

    def normed(x, weight):
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight

    x, own = wide["model.embed_tokens.weight"][ids], torch.zeros(2, 4)
    inner = normed(x, wide["model.layers.0.post_attention_layernorm.weight"])
    up, gate, down = (wide[f"model.layers.0.mlp.{n}_proj.weight"] for n in ("up", "gate", "down"))
    after = x + (torch.nn.functional.silu(inner @ gate.T) * (inner @ up.T)) @ down.T
    for layer in range(2):
        v, o = (wide[f"model.layers.{layer}.self_attn.{n}_proj.weight"] for n in ("v", "o"))
        read = normed(after if layer else x, wide[f"model.layers.{layer}.input_layernorm.weight"])
        for h in range(4):
            kv = slice(8 * (h // 2), 8 * (h // 2) + 8)
            out = read @ v[kv].T @ o[:, 8 * h : 8 * h + 8].T
            logits = (out * wide["model.norm.weight"]) @ wide["lm_head.weight"][ids].T
            own[layer, h] = (logits.argmax(-1)[:-1] == torch.arange(1, 26)).float().mean()
    got = successor(model, samples=2)
    torch.testing.assert_close(got.score[1], own.float())
    assert float(own.max()) > 0
    assert got.reasons["change"] == "no head is claimed"


def test_orders_are_words_of_one_token_that_follow_each_other():
    known = {order.name: order for order in orders(subjects.miniworld())}
    days = known["days"]
    assert [days.words[days.follows[i]] for i, w in enumerate(days.words) if w == "Sunday"] == ["Monday"]
    for order in known.values():
        every = ORDERS[order.name][0].split()
        for word, follows in zip(order.words, order.follows, strict=True):
            assert follows < 0 or order.words[follows] == (every * 2)[every.index(word) + 1]
    with pytest.raises(Refused, match="no order has"):
        orders(subjects.family("llama"))
    with pytest.raises(Refused, match="share of words"):
        successor(subjects.random_llama(), least=1.0)
