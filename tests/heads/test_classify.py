"""Types of heads, against their definitions written out and heads planted by hand."""

from __future__ import annotations

import json
from copy import deepcopy
from functools import cache, partial
from itertools import product

import pytest
import torch

import cutaway as ca
from cutaway.cli import app
from cutaway.core.refuse import Refused
from cutaway.heads import TYPES, HeadTypes, card, classify, confirm, pattern_sums
from cutaway.models.edits.library import Replace
from cutaway.models.model import Model
from cutaway.models.tokens import batch
from cutaway.tasks import Repeats
from tests.conformance import subjects

NAMES = [row.name for row in TYPES]
ROWS = (  # three lengths; tokens follow themselves, too
    [0, 9, 8, 7, 9, 8, 8, 5, 9, 5, 8, 7, 6],
    [0, 5, 6, 5],
    [0, 7, 9, 9, 4, 7],
)
MARKS = {4, 6, 7, 8, 9}  # the tokens # % & ' ( are punctuation, $ is none


def keys(name: str, ids: list[int], q: int) -> list[int]:
    """The keys that a query's head of a type looks at, by the definition."""
    return {
        "previous token": [q - 1],
        "current token": [q],
        "first token": [0],
        "duplicate token": [k for k in range(q) if ids[k] == ids[q]],
        "induction": [k for k in range(1, q) if ids[k - 1] == ids[q]],
        "prefix matching": [k for k in range(1, q) if ids[k - 1] == ids[q]],
        "anti-induction": [k for k in range(1, q) if ids[k - 1] == ids[q]],
        "delimiter": [k for k in range(q) if ids[k] in MARKS],
        "local window": [k for k in range(q - 5, q) if q >= 10],
    }[name]


def by_hand(model: Model, name: str) -> tuple[torch.Tensor, ...]:
    """Score, weighted share and effect on tokens [layer head], in float64, one sequence, query and key at a time."""
    found, w = [], model.weights
    u = (w.unembed.T * model.hf.model.norm.weight).double()  # an RMS norm: nothing is centred
    for ids in ROWS:
        pairs = [(q, k) for q in range(1, len(ids)) for k in keys(name, ids, q)]
        if not pairs:
            continue
        acts = model.capture(torch.tensor([ids]), ["pattern", "v", "z"])
        a, z = (
            acts["pattern"][:, 0].double(),
            acts["z"][:, 0].double(),
        )  # [layer head q k], [layer position head d_head]
        size = acts["v"][:, 0].double().norm(dim=-1).repeat_interleave(2, -1).mT  # [layer head position]
        heavy = a * size[:, :, None] / (a * size[:, :, None]).sum(-1, keepdim=True)
        effects = torch.einsum("lphd,lhdm,tm->lhpt", z, w.o[:].double(), u)
        effects = (effects - effects.mean(-1, keepdim=True)) / effects.std(-1, correction=0, keepdim=True)
        n = len({q for q, _ in pairs})
        raised = sum(effects[:, :, q, ids[k]] for q, k in pairs) / len(pairs)
        found.append((sum(a[:, :, q, k] for q, k in pairs) / n, sum(heavy[:, :, q, k] for q, k in pairs) / n, raised))
    return tuple(torch.stack(x).mean(0).detach() for x in zip(*found, strict=True))


@pytest.mark.parametrize("side", ["left", "right"])
def test_scores_are_those_of_the_definition_whatever_the_padding(side, monkeypatch):
    model, tokens = subjects.random_llama(), Model.tokens
    expected = {name: by_hand(model, name) for name in NAMES}
    monkeypatch.setattr(ca.tasks.Prompts, "bind", lambda self, model: tokens(model, batch(self.ids, side=side)))
    got = classify(model, ca.tasks.as_prompts([*ROWS]))
    assert got.labels["type"] == NAMES
    for t, name in enumerate(NAMES):
        for mine, true in zip((got.score[t], got.weighted[t], got.raises[t]), expected[name], strict=True):
            torch.testing.assert_close(mine.double(), true, rtol=1e-4, atol=1e-5)
    assert got.record["sequences"] == dict.fromkeys(NAMES, 3) | {"local window": 1}


def test_memory_for_masks_may_be_short_and_a_window_narrow(monkeypatch):
    """Queries in parts give the same sums; keys outside a layer's window are in no null."""
    model = subjects.random_llama()
    whole = classify(model, Repeats(4, 12), samples=3)
    monkeypatch.setattr(pattern_sums, "_MASKS", 20000)
    parts = classify(model, Repeats(4, 12), samples=3)
    for name, x in whole.tensors().items():
        torch.testing.assert_close(parts.tensors()[name], x, rtol=1e-4, atol=1e-5, equal_nan=True)
    at = torch.arange(25)
    back = at[:, None] - at[None]
    near = ((back >= 0) & (back < 6)).float()
    alike = near / near.sum(-1, keepdim=True)  # looks at all keys of a window of 6 alike
    model.hf.config.sliding_window = 6
    with model.edited(Replace("pattern.1", alike.expand(4, 4, -1, -1))):
        got = classify(model, Repeats(4, 12), samples=3)
    local = NAMES.index("local window")
    assert got.score[local, 1].tolist() == pytest.approx([5 / 6] * 4)
    torch.testing.assert_close(got.null[local, 1], torch.full_like(got.null[local, 1], 5 / 6))  # 5 of the 6 there are
    assert float(got.null[local, 0].mean()) < 0.5
    mine = alike[1:, 1:]
    expected = float((mine * back[1:, 1:]).sum() / mine.sum())
    assert got.distance[1].tolist() == pytest.approx([expected] * 4)
    share = 1 / (at[1:] + 1).double()
    expected = float((back[1:, 1:].tril() * share[:, None]).sum() / (at[1:] * share).sum())
    assert got.record["tokens back of uniform attention"] == pytest.approx(expected, rel=1e-5)


def planted(ids: torch.Tensor, name: str) -> torch.Tensor:
    """The pattern [batch q k] that looks at one key of the type, or else at the token itself."""
    out = torch.zeros(*ids.shape, ids.shape[1])
    for b, row in enumerate(ids.tolist()):
        for q in range(len(row)):
            looks = keys(name, row, q) if q else []
            out[b, q, looks[0] if looks else q] = 1
    return out


def test_planted_heads_get_their_whole_score_and_beat_the_shuffled_keys():
    model, evidence = subjects.random_llama(), Repeats(6, 8)
    ids = evidence.bind(model).ids
    rows = [row for row in TYPES if row.name != "delimiter"]  # of which there are several or none, as chance has it
    places = [f"pattern.{i // 4}.{i % 4}" for i in range(len(rows))]
    with model.edited(*(Replace(at, planted(ids, row.name)) for at, row in zip(places, rows, strict=True))):
        got = classify(model, evidence, samples=40)
    back = torch.arange(1, ids.shape[1]).double()
    for i, row in enumerate(rows):
        at, t = (i // 4, i % 4), NAMES.index(row.name)
        assert got.score[(t, *at)] == 1
        chance = got.null[(t, *at)]
        if row.name != "local window":
            assert chance.max() < 0.6
            second = row.name in ("duplicate token", "prefix matching", "induction", "anti-induction")
            queries = back[-8:] if second else back  # those of the second block
            expected = 1 / (queries + 1)  # one key of all that a query may look at
            assert float(chance.mean()) == pytest.approx(float(expected.mean()), rel=0.15)
        low, high = got.raises_interval[(t, *at)].tolist()
        if row.writes == 1:
            assert bool(got.claimed[(t, *at)]) <= (low > 0)
        elif row.writes == -1:
            assert bool(got.claimed[(t, *at)]) <= (high < 0)
        else:
            assert f"{i // 4}.{i % 4}" in got.named(row.name)


@cache
def truth() -> HeadTypes:
    """Types of the bundled model's heads."""
    return classify(subjects.miniworld(), Repeats(), samples=19)


def test_the_bundled_model_has_previous_token_and_induction_heads_beyond_the_null():
    got = truth()
    found = {name: got.named(name) for name in NAMES}
    assert found["previous token"]
    assert found["induction"]
    for name in ("previous token", "induction"):
        for layer, head in (map(int, at.split(".")) for at in found[name]):
            t = NAMES.index(name)
            assert float(got.interval[t, layer, head, 0]) > float(got.null[t].max())
            assert float(got.score[t, layer, head]) > 0.5
    first = {name: min(int(at.split(".")[0]) for at in found[name]) for name in ("previous token", "induction")}
    assert first["previous token"] < first["induction"], "an induction head reads what a previous-token head wrote"
    assert not set(found["previous token"]) & set(found["induction"])
    t = NAMES.index("induction")
    for at in found["induction"]:
        raised = got.select(layer=int(at.split(".")[0]), head=int(at.split(".")[1]), type="induction")
        parts = raised.tensors()
        assert float(parts["raises_interval"][..., 0]) > float(parts["raises_null"].max())
    assert not set(found["induction"]) & set(got.named("anti-induction"))


def test_an_induction_head_whose_output_is_negated_is_anti_induction():
    model, evidence = subjects.miniworld(), Repeats(8, 10)
    at = classify(model, evidence).named("induction")[0]
    layer, head = map(int, at.split("."))
    hf, d = deepcopy(model.hf), model.shape.d_head
    with torch.no_grad():
        hf.model.layers[layer].self_attn.o_proj.weight[:, head * d : (head + 1) * d] *= -1
    got = classify(Model(hf, model.tokenizer, "negated"), evidence)
    assert at in got.named("anti-induction")
    assert at not in got.named("induction")


def test_induction_heads_of_the_bundled_model_are_needed_to_go_on_with_a_list():
    model = subjects.miniworld()
    task = ca.tasks.load("induction", model, 6, seed=1, split="train")
    chosen = ",".join(truth().named("induction"))
    effect = ca.patching.group(model, task, heads=chosen, direction="noise", samples=19)
    assert float(effect.effect) < float(effect.null.min()), "beyond all 19 random sets: p ≤ 0.05"


def test_a_model_that_nobody_trained_has_no_head_of_any_type():
    got = classify(subjects.random_llama(spread=1.0), Repeats(16, 16))
    assert not got.claimed.any()


def test_copying_is_the_share_of_positive_eigenvalues_of_the_whole_circuit():
    model = subjects.random_llama()
    got, w = classify(model, Repeats(2, 4)), model.weights.folded()
    for layer, head in ((0, 1), (1, 3)):
        whole = w.embed.double() @ w.ov(layer, head).matrix.double() @ w.unembed.double()
        values = torch.linalg.eigvals(whole.detach())
        assert float(got.copying[layer, head]) == pytest.approx(float(values.real.sum() / values.abs().sum()), abs=1e-4)
    assert ((got.copying_null - got.copying[..., None]).abs() > 1e-3).all(), "heads of one group share their values"
    without = classify(model, Repeats(2, 4), eigenvalues=False)
    assert without.copying.isnan().all()
    assert without.reasons["copying"] == "they were not asked for"
    assert torch.equal(without.claimed, got.claimed)
    with torch.no_grad():  # the first head writes what it reads: W_V = W_Oᵀ, before a tied unembedding
        hf = model.hf
        hf.lm_head.weight.copy_(hf.model.embed_tokens.weight)
        layer = hf.model.layers[0].self_attn
        layer.o_proj.weight[:, :8] = layer.v_proj.weight[:8].T
    assert float(classify(model, Repeats(2, 4)).copying[0, 0]) == pytest.approx(1, abs=1e-4)


def test_one_sequence_claims_nothing_and_types_without_evidence_say_so():
    got = classify(subjects.random_llama(), ca.tasks.as_prompts([0, 5, 6, 7, 8]))
    assert not got.claimed.any()
    assert got.reasons["score"] == "one prompt"
    assert got.reasons["duplicate token"] == got.reasons["induction"] == "no sequence has such keys"
    assert got.score[NAMES.index("duplicate token")].isnan().all()
    assert got.record["sequences"]["previous token"] == 1


def test_some_types_have_the_numbers_that_they_have_among_all():
    model, prompts = subjects.random_llama(), Repeats(3, 5)
    every = classify(model, prompts, eigenvalues=False)
    for names in (("prefix matching", "previous token"), ("induction",)):
        some = classify(model, prompts, types=names, eigenvalues=False)
        assert some.labels["type"] == list(names)
        same = ["score", "interval", "null", "claimed", "weighted"] + ["raises", "raises_null"] * ("induction" in names)
        for field, name in product(same, names):
            one, other = (getattr(r.select(type=name), field) for r in (some, every))
            torch.testing.assert_close(one, other)
    unwritten = classify(model, prompts, types=("previous token",), eigenvalues=False)
    assert unwritten.raises.isnan().all()
    assert "what heads write" in unwritten.reasons["raises"]


def test_what_cannot_be_asked_is_refused():
    with pytest.raises(Refused, match="did you mean induction"):
        classify(subjects.random_llama(), Repeats(3, 5), types=("inducton",))
    model = subjects.random_llama()
    with pytest.raises(Refused, match="two tokens"):
        classify(model, ca.tasks.as_prompts([5]))
    for least in (1.0, -0.1):
        with pytest.raises(Refused, match="share of attention"):
            classify(model, Repeats(2, 4), least=least)
    for ask, name in ((confirm, "confirm"), (partial(card, head="0.0"), "card")):
        with pytest.raises(Refused, match=rf"^{name}\(least=1.0"):
            ask(model, Repeats(2, 4), least=1.0)
    for wrong in ((0, 4), (4, 1)):
        with pytest.raises(Refused, match="two tokens to tell apart"):
            Repeats(*wrong)
    with pytest.raises(Refused, match="are not special"):
        classify(model, Repeats(2, 1000))
    with pytest.raises(Refused, match="no such entry"):
        classify(model, Repeats(2, 4)).named("inductive")


def test_repeats_are_drawn_by_their_seed_and_leave_out_special_tokens():
    model = subjects.random_llama()
    ids = Repeats(8, 12, 3).bind(model).ids
    assert ids.shape == (8, 25)
    assert (ids[:, 0] == model.tokenizer.bos_token_id).all()
    assert torch.equal(ids[:, 1:13], ids[:, 13:])
    assert (ids[:, 1:] > 1).all()
    assert all(len(set(row)) == 12 for row in ids[:, 1:13].tolist())
    assert torch.equal(ids, Repeats(8, 12, 3).bind(model).ids)
    assert not torch.equal(ids, Repeats(8, 12, 4).bind(model).ids)


def test_the_command_needs_no_text_and_takes_one(capsys):
    line = "heads classify --model miniworld --samples 1 --json"
    assert app.main(line.split()) == 0
    record = json.loads(capsys.readouterr().out)["record"]
    assert record["subjects"]["repeats"] == {"name": "random tokens said twice", "prompts": 32, "length": 24, "seed": 0}
    flags = "--repeats 32 --repeats-length 24 --repeats-seed 0"
    assert record["command"] == f"cutaway heads classify --model miniworld {flags} --samples 1"
    assert app.main([*line.split(), "--prompts", "Mary and John and Mary and"]) == 0
    assert json.loads(capsys.readouterr().out)["record"]["subjects"]["prompts"]["prompts"] == 1
    assert app.main([*line.split(), "--prompts", "Mary and", "--repeats", "4"]) == 2
    assert "give one of them" in capsys.readouterr().err
