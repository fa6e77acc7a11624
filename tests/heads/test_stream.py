"""Streamed attention, against dense patterns in double precision and what is planted in queries and keys."""

from __future__ import annotations

import json
import math
from functools import cache
from importlib import import_module
from typing import Any

import pytest
import torch
import transformers as tf

import cutaway as ca
from cutaway.cli import app
from cutaway.core.refuse import Refused
from cutaway.core.stats import generator, mean_interval
from cutaway.heads import StreamedAttention, pruned, stream, streamed
from cutaway.models.access.attention import Eager
from cutaway.models.access.tiles import EagerTiles, Tiles, tiled
from cutaway.models.edits.library import Replace
from cutaway.models.model import Model
from cutaway.tasks import Repeats
from tests.conformance import subjects
from tests.largest import Largest

ROWS = ([0, 9, 8, 7, 9, 8, 8, 5, 7, 9, 4], [0, 5, 6, 5, 5, 7])


def by_hand(pattern: torch.Tensor, ids: list[int]) -> dict[str, torch.Tensor]:
    """Statistics of one sequence from its patterns [layer head q k], by the definitions."""
    keys = [
        lambda q: [q - 1],
        lambda q: [q],
        lambda q: [0],
        lambda q: [k for k in range(q) if ids[k] == ids[q]],
        lambda q: [k for k in range(1, q) if ids[k - 1] == ids[q]],
    ]
    mass = []
    for looked in keys:
        found = [pattern[..., q, ks].sum(-1) for q in range(1, len(ids)) if (ks := looked(q))]
        mass.append(sum(found) / len(found))
    n, buckets = len(ids), streamed.edges(len(ids))
    spread = []
    for low, high in zip(buckets, [*buckets[1:], n], strict=True):
        each = [pattern[..., q, max(0, q - high + 1) : max(0, q - low + 1)].sum(-1) for q in range(1, n)]
        spread.append(sum(each) / (n - 1))
    p = pattern[..., 1:, :]
    entropy = -(p * p.clamp_min(1e-300).log()).sum(-1).mean(-1)
    return {"mass": torch.stack(mass), "distance": torch.stack(spread, -1), "entropy": entropy}


def tiny(kind: str) -> Model:
    """A model of a family whose attention has something of its own, in double precision."""
    sizes: dict[str, Any] = {"vocab_size": len(subjects.tokenizer()), "hidden_size": 32, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 1}
    hf: Any = tf
    grouped = {"num_key_value_heads": 2, "intermediate_size": 48, "head_dim": 8}
    if kind == "llama":
        return Model(subjects.random_llama().hf.double(), subjects.tokenizer(), "llama")
    if kind == "soft caps and windows":
        config = hf.Gemma2Config(**sizes, **grouped, sliding_window=4, attn_logit_softcapping=2.0)
    elif kind == "sinks":
        config = hf.GptOssConfig(**sizes, **grouped, sliding_window=4, num_local_experts=2, num_experts_per_tok=1)
    else:
        config = hf.GPTJConfig(
            vocab_size=sizes["vocab_size"], n_embd=32, n_layer=2, n_head=4, n_positions=64, rotary_dim=4
        )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        hf = tf.AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():
            for p in hf.parameters():
                p.add_(torch.randn_like(p) * 0.1)
    return Model(hf if kind == "sinks" else hf.double(), subjects.tokenizer(), kind)  # experts have no double


@pytest.mark.parametrize("kind", ["llama", "soft caps and windows", "sinks", "inline attention"])
def test_every_statistic_is_that_of_the_dense_pattern_of_any_family(kind, monkeypatch):
    monkeypatch.setattr(streamed, "_BLOCK", 2)
    monkeypatch.setattr(streamed, "_TILE", 4 * 4 * 4)  # tiles of a few keys
    model = tiny(kind)
    expected, patterns = [], []
    for ids in ROWS:
        patterns.append(model.capture(torch.tensor([ids]), "pattern")["pattern"][:, 0].double())
        expected.append(by_hand(patterns[-1], ids))
    got = stream(model, ca.tasks.as_prompts([*ROWS]), mode="exact", top=3)
    width = len(expected[0]["distance"][0, 0])
    for name in ("mass", "distance", "entropy"):
        parts = [e[name] for e in expected]
        if name == "distance":
            parts = [torch.nn.functional.pad(p, (0, width - p.shape[-1])) for p in parts]
        torch.testing.assert_close(getattr(got, name).double(), sum(parts) / 2, rtol=1e-5, atol=1e-7)
    for i, (p, ids) in enumerate(zip(patterns, ROWS, strict=True)):
        p, n = p[..., 1:, :], len(ids) - 1
        key, weight = got.key[:, :, i, :n].long(), got.weight[:, :, i, :n].double()
        torch.testing.assert_close(weight, p.topk(3, -1).values, rtol=1e-5, atol=1e-7)
        there = (key >= 0) & (weight > 1e-6)
        torch.testing.assert_close(weight[there], p.gather(3, key.clamp_min(0))[there], rtol=1e-5, atol=1e-7)
        assert ((key >= 0).sum(-1) <= torch.arange(2, n + 2).clamp_max(3)).all()
        assert got.position[i].tolist() == [*range(1, n + 1), *[-1] * (10 - n)]


class Plain:
    """Tiles of given queries and keys [head position d_head]."""

    formed = sink = False

    def __init__(self, q: torch.Tensor, k: torch.Tensor):
        self.q, self.k = q, k
        self.heads, self.length = q.shape[:2]

    def __call__(self, rows: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        scores = self.q[:, rows] @ self.k[:, start:stop].transpose(1, 2)
        return scores.masked_fill(torch.arange(start, stop) > rows[:, None], -1e30)

    def dense(self) -> torch.Tensor:
        return self(torch.arange(self.length), 0, self.length).softmax(-1)


def looked(tiles: Any, ids: torch.Tensor, rows: torch.Tensor, top: int = 4) -> streamed.Looked:
    g = generator(0)
    asked = [streamed.Asked.draw(ids, some, 3, g) for some in rows.split(32)]
    return streamed.Looked.join([streamed.look(tiles, a, top, streamed.edges(len(ids))) for a in asked])


@pytest.mark.parametrize("order", [1, -1])
def test_scores_that_grow_by_hundreds_along_the_text_lose_nothing(order, monkeypatch):
    monkeypatch.setattr(streamed, "_TILE", 2 * 32 * 32)
    g, n = generator(1), 150
    q = torch.randn(2, n, 8, generator=g, dtype=torch.float64)
    k = torch.randn(2, n, 8, generator=g, dtype=torch.float64)
    q[..., 0], k[..., 0] = 10, torch.arange(n).double() / 2.5 * order  # up to 600 from one end to the other
    tiles, ids, rows = Plain(q, k), torch.randint(9, (n,), generator=g), torch.arange(1, n)
    got, p = looked(tiles, ids, rows), tiles.dense()
    torch.testing.assert_close(got.entropy, -(p * p.clamp_min(1e-300).log()).sum(-1)[:, 1:], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(got.weight, p.topk(4, -1).values[:, 1:], rtol=1e-9, atol=1e-12)
    same = (ids[:, None] == ids) & (torch.arange(n)[:, None] > torch.arange(n))
    torch.testing.assert_close(got.mass[3, 0], (p * same).sum(-1)[:, 1:], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(got.distance.sum(0), torch.ones(2, n - 1, dtype=torch.float64))


def test_the_null_asks_for_a_random_key_and_for_the_token_of_another_query():
    g, n = generator(2), 60
    tiles = Plain(*(torch.randn(2, n, 8, generator=g, dtype=torch.float64) for _ in range(2)))
    ids, rows = torch.randint(7, (n,), generator=g), torch.arange(1, n)
    asked, p = streamed.Asked.draw(ids, rows, 5, generator(0)), tiles.dense()
    got, has = streamed.look(tiles, asked, 1, streamed.edges(n)).mass, asked.there()
    assert ((asked.keys >= 0) & (asked.keys <= rows[:, None])).all()
    back = rows[:, None] - torch.arange(n)
    follows = torch.cat([torch.full((1,), -1), ids[:-1]])
    for s in range(5):
        token = asked.tokens[:, s + 1, None]
        for kind, of in ((3, ids), (4, follows)):
            wanted = (of == token) & (back > 0)
            torch.testing.assert_close(got[kind, s + 1], (p[:, 1:] * wanted).sum(-1))
            assert torch.equal(has[kind, s + 1], wanted.any(-1))
        torch.testing.assert_close(got[0, s + 1], p[:, rows, asked.keys[:, s]])
    assert not torch.equal(asked.tokens[:, 1], asked.tokens[:, 0])


def test_random_queries_estimate_the_mean_over_all_and_their_intervals_cover_it():
    g, n = generator(3), 500
    q, k = (torch.randn(3, n, 8, generator=g) for _ in range(2))
    ids, every = torch.randint(40, (n,), generator=g), torch.arange(1, n)
    tiles = Plain(q * torch.tensor([0.3, 0.6, 1.0])[:, None, None], k)
    whole = looked(tiles, ids, every)
    values = torch.cat([whole.mass[:, 0], whole.entropy[None], whole.distance])  # [cell, head, row]
    truth, inside, apart = values.mean(-1), [], []
    for seed in range(60):
        rows = torch.randperm(n - 1, generator=generator(seed))[:96].sort().values
        bounds = mean_interval(values[..., rows].permute(2, 0, 1))
        inside.append(((bounds[..., 0] <= truth) & (truth <= bounds[..., 1])).float())
        apart.append(values[..., rows].mean(-1) - truth)
    assert torch.stack(inside).mean() > 0.92
    assert torch.stack(inside).mean(0).min() > 0.8
    bias = torch.stack(apart)
    assert (bias.mean(0).abs() < 4 * bias.std(0) / math.sqrt(60) + 1e-7).all()


@cache
def long_llama() -> Model:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        hf = tf.LlamaForCausalLM(subjects.config(max_position_embeddings=4096)).eval()
    return Model(hf, subjects.tokenizer(), "long-llama")


def test_sampled_is_the_default_of_long_texts_and_agrees_with_every_query(monkeypatch):
    monkeypatch.setattr(import_module(StreamedAttention.__module__), "_LONG", 300)
    model, text = long_llama(), ca.tasks.as_prompts([torch.randint(2, 90, (400,), generator=generator(0)).tolist()])
    every, some = stream(model, text, mode="exact"), stream(model, text, rows=96)
    assert (every.record["mode"], some.record["mode"]) == ("exact", "sampled")
    assert every.interval.isnan().all()
    assert every.reasons["mass"] == "one sequence, of which every query counts"
    assert some.record["queries"] == [96]
    inside = (some.interval[..., 0] <= every.mass) & (every.mass <= some.interval[..., 1])
    assert inside.float().mean() > 0.85
    assert (some.interval[..., 1] - some.interval[..., 0] > 0).all()
    at = some.position[0] - 1
    torch.testing.assert_close(some.weight, every.weight[:, :, :, at])
    assert (some.key == every.key[:, :, :, at]).float().mean() > 0.99, "equal but for ties"


@pytest.mark.parametrize("mode", ["exact", "sampled", "pruned"])
def test_no_tensor_is_as_large_as_a_pattern(mode, monkeypatch):
    monkeypatch.setattr(streamed, "_TILE", 1 << 15)
    n, model = 2048 if mode == "pruned" else 1024, long_llama()
    text = ca.tasks.as_prompts([torch.randint(2, 90, (n,), generator=generator(0)).tolist()])
    with Largest() as seen:
        stream(model, text, mode=mode, rows=32, top=2, layers=(1,), samples=1)
    assert seen.most < n * n / 4, "a quarter of one head's"


def eager(q: torch.Tensor, k: torch.Tensor, bias: float = 0.0) -> EagerTiles:
    """Tiles of queries and keys in the way of transformers, with a bias by distance on top."""

    def attend(module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: float = 1.0) -> Any:
        scores = query @ key.repeat_interleave(query.shape[1] // key.shape[1], 1).transpose(2, 3) * scaling
        scores = scores if mask is None else scores + mask
        return torch.softmax(scores + bias * torch.arange(key.shape[2]), -1)

    call = Eager(attend, torch.nn.Module(), q[None], k[None], k[None], None, True, {"scaling": 0.5})
    return EagerTiles(call)


def keys_of(kind: str, n: int, d: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    g = generator(4)
    k = torch.randn(2, n, d, generator=g)
    if kind == "local":  # neighbours alike
        k = torch.nn.functional.avg_pool1d(k.transpose(1, 2), 17, 1, 8).transpose(1, 2) * 6
    src = (torch.rand(4, n, generator=g) * torch.arange(n)).long()
    return torch.randn(4, n, d, generator=g) + k.repeat_interleave(2, 0).gather(1, src[..., None].expand(-1, -1, d)), k


@pytest.mark.parametrize("kind", ["local", "random"])
def test_the_certificate_of_pruned_keys_is_true_for_every_query(kind):
    n, top = 600, 4
    q, k = keys_of(kind, n)
    rows = torch.arange(1, n)
    kept = pruned.keys(0, eager(q, k), rows, top, pruned.Widths(8, 8, 3, 4))
    scores = (q * 0.5) @ k.repeat_interleave(2, 0).transpose(1, 2)
    scores = scores.masked_fill(torch.ones(n, n).triu(1).bool(), -math.inf)[:, 1:]
    there = kept.key >= 0
    torch.testing.assert_close(kept.score[there], scores.gather(2, kept.key.clamp_min(0))[there], rtol=1e-4, atol=1e-4)
    listed = kept.key.sort(-1).values
    assert ((listed[..., 1:] != listed[..., :-1]) | (listed[..., 1:] < 0)).all(), "no key is listed twice"
    best = scores.topk(top, -1).values
    recall = (kept.score.logsumexp(-1) - best.logsumexp(-1)).exp()
    assert (kept.least <= recall + 1e-5).all()
    assert (kept.least[:, :31] > 1 - 1e-5).all(), "all blocks of short texts are opened"
    assert recall.mean() > 0.9 if kind == "local" else recall.mean() < 0.8
    assert (recall[:, 300:] < 0.999).any()


def test_pruned_keys_come_with_a_recall_that_holds_over_all_queries(monkeypatch):
    monkeypatch.setattr(pruned, "WIDTHS", pruned.Widths(4, 4, 2, 4))
    model, text = subjects.random_llama(spread=6.0), Repeats(1, 30)
    got = stream(model, text, mode="pruned", top=3, rows=40)
    pattern = model.capture(text.bind(model), "pattern")["pattern"][:, 0, :, 1:]  # [layer head query key]
    key = got.key[:, :, 0].long()
    held = pattern.gather(3, key.clamp_min(0)) * (key >= 0)
    found = (held.sum(-1) / pattern.topk(3, -1).values.sum(-1)).mean(-1)
    assert (got.least_recall <= found + 1e-4).all()
    assert (got.recall >= got.least_recall).all()
    assert (got.recall_interval[..., 0] - 0.02 < found).all()
    assert (found < got.recall_interval[..., 1] + 0.02).all()
    assert got.weight.isnan().all(-1).sum(-1).eq(20).all(), "known for the 40 queries of the sample"
    assert 0.5 < float(found.min()) < 1
    some = stream(model, text, rows=4)
    assert torch.equal(some.recall, torch.ones_like(some.recall))


def test_keys_are_not_pruned_where_scores_are_no_products():
    q, k = keys_of("local", 100)
    with pytest.raises(Refused, match="bias by position"):
        pruned.keys(0, eager(q, k, bias=0.1), torch.arange(1, 100), 4)
    with pytest.raises(Refused, match="its pattern is formed"):
        stream(tiny("inline attention"), Repeats(1, 8), mode="pruned")


def test_edited_patterns_are_what_is_streamed():
    model = subjects.random_llama()
    ids = Repeats(2, 6).bind(model).ids
    planted = torch.eye(ids.shape[1]).roll(1, 0).expand(1, -1, -1)  # every query at the token before it
    with model.edited(Replace("pattern.1.2", planted.clone())):
        got = stream(model, Repeats(2, 6))
    assert float(got.mass[0, 1, 2]) == pytest.approx(1, abs=1e-6)
    assert float(got.entropy[1, 2]) == pytest.approx(0, abs=1e-6)
    assert float(got.distance[1, 2, 1]) == pytest.approx(1, abs=1e-6)
    assert float(got.null[0, 1, 2].mean()) < 0.7
    assert got.uniform.sum() == pytest.approx(1, abs=1e-6)


def test_what_cannot_be_asked_is_refused(capsys):
    model = subjects.random_llama()
    for wrong in ({"rows": 0}, {"top": 0}):
        with pytest.raises(Refused, match="a query to look from"):
            stream(model, Repeats(1, 4), **wrong)
    with pytest.raises(Refused, match="attention is in layers 0, 1"):
        stream(model, Repeats(1, 4), layers=(0, 7))
    with pytest.raises(Refused, match="one token"):
        stream(model, ca.tasks.as_prompts([5]))
    line = "heads stream --model miniworld --repeats 2 --layers 1,3 --samples 1 --json"
    assert app.main(line.split()) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["labels"]["layer"] == [1, 3]
    assert app.main(line.replace("1,3", "77").split()) == 2
    assert "attention is in layers" in capsys.readouterr().err


def test_a_layer_that_no_forward_passes_is_refused():
    seen: list[Tiles] = []
    with pytest.raises(Refused, match="never passed"), tiled(subjects.random_llama().anatomy, {0: seen.append}):
        pass
