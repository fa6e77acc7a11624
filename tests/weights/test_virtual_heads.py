"""Virtual heads on prompts: the definition token by token, planted heads, a trained pair."""

from __future__ import annotations

import pytest
import torch

import cutaway as ca
from cutaway.core.refuse import Refused
from cutaway.models.edits.library import Replace
from cutaway.models.model import Model
from cutaway.tasks import Repeats
from cutaway.tasks.prompts import as_prompts
from cutaway.weights import virtual_heads
from cutaway.weights.virtual_heads import KEYS
from tests.conformance import subjects

ROWS = [[0, 9, 8, 7, 9, 8, 8, 5], [0, 5, 6, 5, 11]]
FAMILIES = ["llama", "gpt2", "gemma2"]


def model_of(family: str) -> Model:
    return subjects.random_llama() if family == "llama" else subjects.family(family)


def looked_at(name: str, ids: list[int], q: int) -> list[int]:
    """The keys of a kind, by the definition."""
    return {
        "first token": [0],
        "itself": [q],
        **{f"{n} back": [q - n] * (q > n) for n in (1, 2, 3)},
        "further back": list(range(1, q - 3)),
        "same token": [k for k in range(q) if ids[k] == ids[q]],
    }[name]


@torch.no_grad()
def by_hand(model: Model, ids: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Shares [sender receiver] of the heads of layer 0 in those of layer 1, and of all else that is in the stream, as
    a last row; and looks [key sender receiver], by loops over tokens."""
    acts = model.capture(torch.tensor([ids]), ["pattern", "z", "v", "resid_pre.1", "ln1.scale.1"])
    h, group = model.shape.n_heads, model.shape.n_heads // model.shape.n_kv_heads
    norm = model.anatomy.norm(model.anatomy.part(1, "ln1"))
    o, v = model.weights.o, model.weights.v[1]
    written = torch.einsum("phd,hdm->hpm", acts["z.0"][0], o[0])
    if (post := model.anatomy.part(0, "ln1_post")) is not None:
        behind = model.anatomy.norm(post)
        scale = behind.scale(written.sum(0) + model.weights.o_bias[0])
        written = torch.stack([behind.linear(w, scale) for w in written])
    parts = [*written, acts["resid_pre.1"][0] - written.sum(0)]
    shares, looks = torch.zeros(h + 1, h), torch.zeros(len(KEYS), h, h)
    for r in range(h):
        out, pattern = acts["z.1"][0, :, r] @ o[1][r], acts["pattern.1"][0, r]
        for s, part in enumerate(parts):
            values = norm.linear(part, acts["ln1.scale.1"][0]) @ v[r // group] @ o[1][r]
            for q in range(1, len(ids)):
                shares[s, r] += sum(pattern[q, m] * values[m] @ out[q] for m in range(q + 1))
        shares[:, r] /= out[1:].square().sum()
        for k, name in enumerate(KEYS):
            some = [(q, looked_at(name, ids, q)) for q in range(1, len(ids))]
            some = [(q, keys) for q, keys in some if keys]
            for s in range(h):
                first = acts["pattern.0"][0, s]
                each = [sum(pattern[q, m] * first[m, key] for m in range(q + 1) for key in keys) for q, keys in some]
                looks[k, s, r] = sum(each) / max(len(each), 1)
    return shares, looks


@pytest.mark.parametrize("family", FAMILIES)
def test_shares_and_looks_are_those_of_the_definition_and_close(family):
    model, h = model_of(family), model_of(family).shape.n_heads
    hands = [by_hand(model, ids) for ids in ROWS]
    got = virtual_heads(model, as_prompts(ROWS), samples=2)
    shares = torch.stack([s for s, _ in hands]).mean(0)
    torch.testing.assert_close(got.share[:h, h : 2 * h], shares[:-1], rtol=1e-3, atol=1e-4)
    there = torch.tensor([[any(looked_at(n, i, q) for q in range(1, len(i))) for n in KEYS] for i in ROWS])
    looks = torch.stack([x for _, x in hands]).sum(0) / there.sum(0)[:, None, None]
    torch.testing.assert_close(got.looks[:, :h, h : 2 * h], looks, rtol=1e-3, atol=1e-4)
    if not model.weights.v_bias[1].any():
        torch.testing.assert_close(shares.sum(0), torch.ones(h), rtol=1e-3, atol=1e-3)
    assert got.share[:, :h].isnan().all(), "nothing comes before the first layer"
    some = virtual_heads(model, as_prompts(ROWS), senders=("0.1",), receivers=("1.0", "0.2"), samples=2)
    torch.testing.assert_close(some.share[0, 1], got.share[1, h])
    assert some.share[0, 0].isnan()
    assert (got.backward[0] < 0) & (got.backward[1] > 0) & got.null.isfinite().all()


def two_back() -> tuple[Model, torch.Tensor]:
    """A model whose head 1.2 passes on, of the stream, only what 0.1 writes there, and the pattern of both."""
    model, g = subjects.random_llama(spread=1.0), torch.Generator().manual_seed(1)
    first, then = (model.hf.model.layers[i].self_attn for i in (0, 1))
    line = torch.linalg.qr(torch.randn(32, 8, generator=g))[0]
    with torch.no_grad():
        apart = torch.eye(32) - line @ line.T  # all else lies outside of these 8 dimensions
        for module in (model.hf.model.layers[0].mlp.down_proj, first.o_proj):
            module.weight.copy_(apart @ module.weight)
        embed = model.hf.model.embed_tokens.weight
        embed.copy_(embed @ apart)
        first.o_proj.weight[:, 8:16] = line
        then.v_proj.weight[8:] = line.T  # of the heads 2 and 3
    previous = torch.zeros(len(ROWS), 8, 8)
    for q in range(8):
        previous[:, q, max(q - 1, 0)] = 1
    return model, previous


def test_two_previous_token_heads_in_a_row_look_two_back():
    model, previous = two_back()
    ids = [ROWS[0], [0, 4, 5, 6, 7, 12, 13, 14]]
    with model.edited(Replace("pattern.0.1", previous), Replace("pattern.1.2", previous)):
        got = virtual_heads(model, as_prompts(ids), samples=40)
    pair = {"sender": "0.1", "receiver": "1.2"}
    one = got.select(**pair)
    assert float(one.share) == pytest.approx(1, abs=1e-5), "all that it passes on has come through the other"
    others = got.share[[i for i in range(4) if i != 1], 6]
    assert float(others.abs().max()) < 1e-5
    assert float(one.null.abs().max()) < 0.8
    assert float(one.null.mean()) == pytest.approx(0, abs=0.1)
    looks = dict(zip(KEYS, one.looks.flatten().tolist(), strict=True))
    assert looks["2 back"] == 1
    assert looks["1 back"] == looks["itself"] == looks["further back"] == 0
    k = KEYS.index("2 back")
    expected = sum(1 / (q + 1) for q in range(3, 8)) / 5  # one key of all that the receiver may look at
    assert float(one.looks_null[k].mean()) == pytest.approx(expected, rel=0.2)


def test_an_induction_head_behind_a_previous_token_head_looks_at_the_same_token_and_passes_little_on():
    """What a previous-token head writes moves the keys of induction heads; their values copy the bare token."""
    got = virtual_heads(ca.load("induction"), Repeats(16, 20))
    same, sender = KEYS.index("same token"), got.labels["sender"].index("0.1")
    late = slice(4, 8)
    looks = got.looks[same, :4, late]
    assert looks.argmax(0).tolist() == [sender] * 4
    assert float(got.looks_interval[same, sender, late, 0].min()) > float(got.looks_null[same, sender, late].max())
    assert float(looks[sender].max()) > 0.6
    assert float(got.share[sender, late].max()) < 0.25 < 0.7 < float(got.share[:4, late].max())


def test_refusals():
    model, prompts = subjects.random_llama(), as_prompts(ROWS)
    for senders, receivers in ((("0.1",), ("0.2",)), (("1.1",), ("0.2",)), (("1.*",), ("1.*",))):
        with pytest.raises(Refused, match="later layer"):
            virtual_heads(model, prompts, senders=senders, receivers=receivers)
    for wrong in ("0.9", "7.0", "mlp_out.0", "heads"):
        with pytest.raises(Refused):
            virtual_heads(model, prompts, senders=(wrong,))
    with pytest.raises(Refused, match="two tokens"):
        virtual_heads(model, as_prompts([[3], [4]]))
    with pytest.raises(Refused, match="encoder"):
        virtual_heads(subjects.family("bert"), prompts)
