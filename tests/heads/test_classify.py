"""Types of heads, against their definitions written out and heads planted by hand."""

from __future__ import annotations

import json
from functools import cache

import pytest
import torch

import cutaway as ca
from cutaway.cli import app
from cutaway.core.refuse import Refused
from cutaway.heads import TYPES, HeadTypes, classify
from cutaway.models.edits.library import Replace
from cutaway.models.model import Model
from cutaway.models.tokens import batch
from cutaway.tasks import Repeats
from tests.conformance import subjects

NAMES = [row.name for row in TYPES]
ROWS = ([0, 9, 8, 7, 9, 8, 8, 5], [0, 5, 6, 5], [0, 7, 9, 9, 4, 7])  # three lengths; tokens follow themselves, too


def keys(name: str, ids: list[int], q: int) -> list[int]:
    """The keys that a query's head of a type looks at, by the definition."""
    return {
        "previous token": [q - 1],
        "current token": [q],
        "first token": [0],
        "duplicate token": [k for k in range(q) if ids[k] == ids[q]],
        "induction": [k for k in range(1, q) if ids[k - 1] == ids[q]],
    }[name]


def by_hand(model: Model, name: str) -> torch.Tensor:
    """The score of every head [layer head], from patterns captured one sequence at a time."""
    each = []
    for ids in ROWS:
        a = model.capture(torch.tensor([ids]), "pattern")["pattern"][:, 0].double()  # [layer head q k]
        found = [(q, ks) for q in range(1, len(ids)) if (ks := keys(name, ids, q))]
        if found:
            each.append(sum(a[:, :, q, k] for q, ks in found for k in ks) / len(found))
    return sum(each) / len(each)


@pytest.mark.parametrize("side", ["left", "right"])
def test_scores_are_those_of_the_definition_whatever_the_padding(side, monkeypatch):
    model, tokens = subjects.random_llama(), Model.tokens
    expected = {name: by_hand(model, name) for name in NAMES}
    monkeypatch.setattr(ca.tasks.Prompts, "bind", lambda self, model: tokens(model, batch(self.ids, side=side)))
    got = classify(model, ca.tasks.as_prompts([*ROWS]))
    assert got.labels["type"] == NAMES
    for score, name in zip(got.score, NAMES, strict=True):
        torch.testing.assert_close(score.double(), expected[name], rtol=1e-5, atol=1e-6)
    assert got.record["sequences"] == dict.fromkeys(NAMES, 3)


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
    places = [f"pattern.{i // 4}.{i % 4}" for i in range(len(TYPES))]
    with model.edited(*(Replace(at, planted(ids, name)) for at, name in zip(places, NAMES, strict=True))):
        got = classify(model, evidence, samples=40)
    back = torch.arange(1, ids.shape[1]).double()
    for t, row in enumerate(TYPES):
        assert got.score[t, t // 4, t % 4] == 1
        chance = got.null[t, t // 4, t % 4]
        assert chance.max() < 0.6
        queries = back[-8:] if row.name in ("duplicate token", "induction") else back  # those of the second block
        expected = 1 / (queries + 1)  # one key of all that a query may look at
        assert float(chance.mean()) == pytest.approx(float(expected.mean()), rel=0.15)
        if not row.copies:
            assert f"{t // 4}.{t % 4}" in got.named(row.name)
    at = NAMES.index("induction")
    assert bool(got.claimed[at, at // 4, at % 4]) == bool(got.copying[at // 4, at % 4] > 0)


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
    assert min(float(got.copying[tuple(map(int, at.split(".")))]) for at in found["induction"]) > 0


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


def test_what_cannot_be_asked_is_refused():
    model = subjects.random_llama()
    with pytest.raises(Refused, match="two tokens"):
        classify(model, ca.tasks.as_prompts([5]))
    for least in (1.0, -0.1):
        with pytest.raises(Refused, match="share of attention"):
            classify(model, Repeats(2, 4), least=least)
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
