"""The page of one head, against its definition written out in float64 and heads planted by hand."""

from __future__ import annotations

import json
from copy import deepcopy

import pytest
import torch

import cutaway as ca
from cutaway.cli import app
from cutaway.core.refuse import Refused
from cutaway.heads import card, classify, confirm, looks
from cutaway.models.edits.library import Replace
from cutaway.models.model import Model
from cutaway.models.tokens import batch
from cutaway.tasks import Repeats
from tests.conformance import subjects
from tests.heads.test_classify import ROWS, keys, planted

NAMES = [row.name for row in looks.KEYS]
LEAST = [0, 1, 2, 4, 8]  # of the buckets 0, 1, 2–3, 4–7, 8–15


def head_of(model: Model, ids: list[int], layer: int, head: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The pattern [q k] and the values [position d_head] of a head of the random Llama, in float64."""
    acts = model.capture(torch.tensor([ids]), ["pattern", "v"])
    return acts["pattern"][layer, 0, head].double(), acts["v"][layer, 0, :, head // 2].double()


@pytest.mark.parametrize("side", ["left", "right"])
def test_looks_are_those_of_the_definition_whatever_the_padding(side, monkeypatch):
    model, tokens = subjects.random_llama(), Model.tokens
    every, value, mass = list[tuple[float, list[str]]](), dict[int, torch.Tensor](), dict[int, float]()
    far = []
    for ids in ROWS:
        a, v = head_of(model, ids, 1, 2)
        far.append(torch.zeros(5).double())
        for q in range(1, len(ids)):
            k = max(range(1, q + 1), key=lambda k, q=q: float(a[q, k]))
            fits = [name for name in NAMES if k in keys(name, ids, q)] or ["none of these"]
            every.append((float(a[q, k]), fits))
            for j in range(1, q + 1):
                far[-1][max(i for i, least in enumerate(LEAST) if least <= q - j)] += a[q, j] / (len(ids) - 1)
                value[ids[j]] = value.get(ids[j], 0) + a[q, j] * v[j]
                mass[ids[j]] = mass.get(ids[j], 0) + float(a[q, j])
    every.sort(key=lambda one: one[0])
    monkeypatch.setattr(ca.tasks.Prompts, "bind", lambda self, model: tokens(model, batch(self.ids, side=side)))
    got = card(model, ca.tasks.as_prompts([*ROWS, ROWS[0]]), head="1.2", examples=1)
    types = classify(model, ca.tasks.as_prompts([*ROWS, ROWS[0]])).select(layer=1, head=2)
    for mine, theirs in ((got.score, types.score), (got.null, types.null), (got.raises, types.raises)):
        assert torch.equal(mine, theirs[:, 0, 0]), "the same bits"
    parts = [[one for i, one in enumerate(every) if i * 10 // len(every) == d] for d in range(10)]
    expected = [sum(s for s, _ in part) / len(part) for part in parts]
    assert got.strength.tolist() == pytest.approx(expected, abs=1e-6)
    for d, part in enumerate(parts):
        share = [sum(name in fits for _, fits in part) / len(part) for name in got.labels["keys"]]
        assert got.matched[d].tolist() == pytest.approx(share)
    torch.testing.assert_close(got.distance.double(), torch.stack(far).mean(0), rtol=1e-5, atol=1e-6)
    hardest = [max(s for s, _ in part) for part in reversed(parts)]
    assert got.attention.tolist() == pytest.approx(hardest, abs=1e-6)
    assert got.record["sequences"] == 3, "a sequence that is there twice counts once"
    a, q = max(((head_of(model, ids, 1, 2)[0], q) for ids in ROWS for q in range(1, len(ids))),
               key=lambda look: float(look[0][look[1], 1:].max()))  # fmt: skip
    assert got.pattern.shape[0] == q + 1 < looks.WINDOW
    torch.testing.assert_close(got.pattern.double(), a[: q + 1, : q + 1], rtol=1e-5, atol=1e-6)
    sources = sorted((i for i in mass if i > 1), key=lambda i: -mass[i])  # the first ids are special
    check_pairs(model, got, sources, torch.stack([value[i] / mass[i] for i in sources]))


def check_pairs(model: Model, got: ca.heads.HeadCard, sources: list[int], values: torch.Tensor) -> None:
    """The strongest of all pairs of source and target, from the whole tables."""
    w, layer = model.weights, model.hf.model.layers[1]
    e = w.embed[torch.tensor(sources)].double()
    e = e / (e.square().mean(-1, keepdim=True) + layer.input_layernorm.variance_epsilon).sqrt()
    bare = (e * layer.input_layernorm.weight.double()) @ layer.self_attn.v_proj.weight.double()[8:].T
    u = (w.unembed.T * model.hf.model.norm.weight).double()
    for field, axis, x in (("writes", "pair", values), ("bare", "bare_pair", bare)):
        whole = x @ layer.self_attn.o_proj.weight.double()[:, 16:24].T @ u.T
        whole = (whole - whole.mean(-1, keepdim=True)) / whole.std(-1, correction=0, keepdim=True)
        k = len(getattr(got, field)) // 2
        best = torch.cat([whole.amax(-1).sort(descending=True).values[:k], whole.amin(-1).sort().values[:k]])
        torch.testing.assert_close(getattr(got, field).double(), best, rtol=1e-4, atol=1e-4)
        i = int(whole.amax(-1).argmax())
        words = model.text.token_texts([sources[i], int(whole[i].argmax())])
        assert got.labels[axis][0] == " → ".join(words)
        same = whole[torch.arange(len(sources)), sources].mean().detach()
        assert float(got.same[int(field == "bare")]) == pytest.approx(float(same), rel=1e-4, abs=1e-4)


def test_a_planted_head_is_told_in_every_decile_but_not_by_keys_drawn_at_random():
    model, evidence = subjects.random_llama(), Repeats(6, 8)
    ids = evidence.bind(model).ids[:1]  # the first block of every sequence is the second, token by token
    with model.edited(Replace("pattern.1.2", planted(ids, "duplicate token"))):
        got = card(model, evidence, head="1.2", samples=40)
    own, doubled = (got.labels["keys"].index(n) for n in ("current token", "duplicate token"))
    assert torch.equal(got.matched[:, own] + got.matched[:, doubled], torch.ones(10)), (
        "the first block has no duplicate"
    )
    assert float(got.matched[:, doubled].mean()) == pytest.approx(0.5, abs=0.05)
    assert float(got.matched_null[:, doubled].mean()) == pytest.approx(1 / 2 / 13, rel=0.3)  # one of 9 to 17 keys
    assert got.strength.tolist() == [1.0] * 10
    assert got.distance.tolist() == pytest.approx([0.5, 0, 0, 0, 0.5, 0])
    back = torch.arange(1, 17)
    assert float(got.distance_null[0].mean()) == pytest.approx(float((1 / back).mean()), rel=0.3)
    assert "duplicate token" in got.named()
    rows = [i for i, name in enumerate(got.labels["place"]) if name in ("key", "query")]
    words = [[context[i] for i in rows] for context in got.labels["looks"]]
    assert all(key == query for key, query in words), "the key is the same token as the query"
    assert all("⟦" in name and "⟨" in name for name in got.labels["example"])


def test_a_head_that_copies_writes_what_it_reads_beyond_turned_values():
    model = deepcopy(subjects.random_llama())
    attention = model.hf.model.layers[0].self_attn
    with torch.no_grad():
        model.hf.lm_head.weight.copy_(model.hf.model.embed_tokens.weight)
        attention.o_proj.weight[:, :8] = attention.v_proj.weight[:8].T
    got = card(Model(model.hf, model.tokenizer, "copying"), Repeats(4, 16), head="0.0", samples=20)
    assert got.pattern.shape[0] <= looks.WINDOW < 33, "no more than the end of a longer sequence"
    for circuit in range(2):
        assert float(got.same_interval[circuit, 0]) > float(got.same_null[circuit].max()), "no other token is copied"
    up = len(got.bare) // 2
    copied = [a == b for a, b in (name.split(" → ") for name in got.labels["bare_pair"][:up])]
    assert sum(copied) >= 2, "chance gives one in 50 runs"


def test_fewer_queries_than_deciles_leave_some_empty_and_say_so():
    got = card(subjects.random_llama(), ca.tasks.as_prompts([ROWS[0][:5]]), head="1.2", samples=2)
    empty = got.strength.isnan()
    assert int(empty.sum()) == 6
    names = [name for name, none in zip(got.labels["decile"], empty.tolist(), strict=True) if none]
    assert {got.reasons.get(name) for name in names} == {"4 queries fill 4 of 10 deciles"}
    assert {*names} == {*got.labels["decile"]} & {*got.reasons}


def test_what_its_removal_does_is_that_of_confirm_and_stands_out_where_no_head_stands_in_for_it():
    model = subjects.miniworld()
    texts = Repeats(8, 10).bind(model).ids.tolist()
    got = card(model, ca.tasks.as_prompts([*texts, texts[0]]), head="1.2", samples=4)
    whole = confirm(model, Repeats(8, 10), heads="1.2", samples=4)
    for name in ("effect", "interval", "null"):
        mine = getattr(got, name if name == "effect" else f"effect_{name}")
        assert torch.equal(mine, getattr(whole, name)[:, 0]), "a sequence that is there twice counts once"
    again = got.labels["span"].index("said before")
    assert float(got.effect_interval[again, 0]) > float(got.effect_null[again].max()) + 2, (
        "nats: it alone looks one back"
    )
    assert abs(float(got.effect[1 - again])) < 0.5, "nothing can be known elsewhere"
    short = card(model, ca.tasks.as_prompts([[0, 5], [0, 7]]), head="1.2", samples=2)
    assert short.effect.isnan().all()
    assert short.reasons["said before"] == short.reasons["elsewhere"] == "no sequence has such tokens"


@pytest.mark.parametrize(
    ("head", "why"), [("", "about one head"), ("1.*", "4 heads"), ("1", "layer.head"), ("1.9", "1.9"), ("x", "x")]
)
def test_what_is_not_one_head_is_refused(head, why):
    with pytest.raises(Refused, match=why):
        card(subjects.random_llama(), Repeats(2, 4), head=head)


def test_the_command_shows_the_page(capsys):
    assert app.main(["heads", "card", "--model", "miniworld", "--head", "1.0", "--repeats", "4"]) == 0
    shown = capsys.readouterr().out
    for word in ("score", "effect", "matched", "strength", "looks", "distance", "writes", "head 1.0"):
        assert word in shown
    assert app.main(["heads", "card", "--model", "miniworld", "--head", "1.0", "--repeats", "4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["record"]["sequences"] == 4
