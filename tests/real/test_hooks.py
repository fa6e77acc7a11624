"""Reading, editing, patching and generating equal hand-written hooks on plain transformers, to 1e-4 of the logits.

The prompts are of mixed lengths and padded on either side; the hooks see each alone.
"""

from __future__ import annotations

import pytest
import torch

import cutaway as ca
from cutaway.models import Ablate, Add, Knockout, Replace, Scale
from cutaway.models.sweep.executor import sweep
from cutaway.models.tokens import Tokens
from cutaway.tasks import Task
from tests.real import plain, sets

NEAR = 1e-4
SIDES = ("left", "right")


class Case:
    """Pairs of prompts of one model, tokenised by hand, with what plain transformers say of each."""

    def __init__(self, model: ca.Model):
        self.model, self.hf, self.n = model, model.hf, model.shape.n_layers
        lines = [*sets.spread("fact_capital", 2), *sets.spread("ioi", 2)]
        self.task = Task("mixed", tuple(map(sets.pair, lines)))
        self.clean = sets.ids(model.tokenizer, [p.clean for p in self.task])
        self.corrupt = sets.ids(model.tokenizer, [p.corrupt for p in self.task])
        self.words = [[sets.next_id(model.tokenizer, p.clean, f" {w}") for w in (p.answer, p.foil)] for p in self.task]
        assert len({len(ids) for ids in self.clean}) > 2
        self.logits = torch.stack([plain.last(self.hf, ids) for ids in self.clean])
        self.scale = float(self.logits.abs().max())

    def tokens(self, side) -> Tokens:
        return self.model.tokens([p.clean for p in self.task], side=side)

    def difference(self, logits: torch.Tensor, i: int) -> float:
        """logit(answer) − logit(foil) of one prompt."""
        answer, foil = self.words[i]
        return float(logits[answer] - logits[foil])


@pytest.fixture(scope="module")
def case(model) -> Case:
    return Case(model)


def same(got: torch.Tensor, want: torch.Tensor, scale: float) -> None:
    assert float((got.float() - want.float()).abs().max()) <= NEAR * scale


@pytest.mark.parametrize("side", SIDES)
def test_what_is_read(case, side):
    layers = (0, case.n // 2, case.n - 1)
    sites = ("resid_pre", "attn_out", "z", "v", "mlp_out", "mlp_post", "resid_post")
    tokens = case.tokens(side)
    same(case.model.run_last(tokens), case.logits, case.scale)
    acts = case.model.capture(tokens, [f"{s}.{i}" for s in sites for i in layers], logits=False)
    for row, ids in enumerate(case.clean):
        _, found = plain.read(case.hf, ids, [(s, i) for s in sites for i in layers])
        for (site, layer), want in found.items():
            same(acts[f"{site}.{layer}"][row][tokens.mask[row]], want, float(want.abs().max()))


@pytest.mark.parametrize("side", SIDES)
def test_what_is_edited(case, side):
    d = torch.randn(case.model.shape.d_model, generator=torch.Generator().manual_seed(0))
    late, put, hf = case.n - 2, plain.put, case.hf
    tries = [
        (Ablate("z.1.2"), {("z", 1): put(hf, "z", 0.0, 2)}),
        (Replace(f"resid_pre.{late}@-2", 3 * d), {("resid_pre", late): put(hf, "resid_pre", 3 * d, at=[-2])}),
        (Scale("mlp_out.3", 0.5), {("mlp_out", 3): lambda x: 0.5 * x}),
        (Add("attn_out.5", d, positions=(0, -1)), {("attn_out", 5): lambda x: _added(x, d)}),
        (Ablate("v.4"), {("v", 4): put(hf, "v", 0.0)}),
        (Ablate("mlp_post.6", "mean", torch.tensor(0.1)), {("mlp_post", 6): put(hf, "mlp_post", 0.1)}),
    ]
    for edit, changes in tries:
        got = case.model.run_last(case.tokens(side), edit)
        same(got, torch.stack([plain.last(hf, ids, changes) for ids in case.clean]), case.scale)
        assert float((got - case.logits).abs().max()) > 10 * NEAR * case.scale, edit
    same(case.model.run_last(case.tokens(side)), case.logits, case.scale)


def _added(x: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
    new = x.clone()
    new[0, [0, -1]] += d
    return new


@pytest.mark.parametrize("side", SIDES)
def test_what_is_swept(case, side):
    """Variants of all depths in one plan, against one plain run each."""
    heads = [(i, h) for i in (0, case.n // 3, case.n - 1) for h in (0, case.model.shape.n_heads - 1)]
    got = sweep(case.model, case.tokens(side), [[Ablate(f"z.{i}.{h}@-1")] for i, h in heads], lambda x, _: x.float())
    for v, (i, h) in enumerate(heads):
        change = {("z", i): plain.put(case.hf, "z", 0.0, h, at=[-1])}
        same(got[v], torch.stack([plain.last(case.hf, ids, change) for ids in case.clean]), case.scale)


@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_activation_patching(case, direction):
    layer, hf = case.n * 3 // 4, case.hf
    found = ca.patching.activation(case.model, case.task, site=f"z.{layer}", direction=direction, samples=1)
    streams = ca.patching.activation(case.model, case.task, site=f"resid_pre.{layer}", direction=direction, samples=1)
    targets, donors = (case.corrupt, case.clean) if direction == "denoise" else (case.clean, case.corrupt)
    heads, places = range(0, case.model.shape.n_heads, 3), range(-streams.effect.shape[1], 0)
    effects: dict[tuple[str, int], list[float]] = {}
    for row, (target, donor) in enumerate(zip(targets, donors, strict=True)):
        before = case.difference(plain.last(hf, target), row)
        _, given = plain.read(hf, donor, [("z", layer), ("resid_pre", layer)])
        z, x = given["z", layer], given["resid_pre", layer]
        changes = {("head", h): {("z", layer): plain.put(hf, "z", z[:, h], h)} for h in heads}
        changes |= {("at", p): {("resid_pre", layer): plain.put(hf, "resid_pre", x[p], at=[p])} for p in places}
        for key, change in changes.items():
            effects.setdefault(key, []).append(case.difference(plain.last(hf, target, change), row) - before)
    means = {key: sum(values) / len(values) for key, values in effects.items()}
    same(found.effect[0, list(heads)], torch.tensor([means["head", h] for h in heads]), case.scale)
    same(streams.effect[0], torch.tensor([means["at", p] for p in places]), case.scale)


def test_attribution(case):
    found = ca.patching.attribution(case.model, case.task, audit=2, samples=1)
    places = [("z", i) for i in range(case.n)]
    total = torch.zeros(case.n, case.model.shape.n_heads)
    for row, (own, donor) in enumerate(zip(case.corrupt, case.clean, strict=True)):
        _, mine = plain.read(case.hf, own, places)
        _, given = plain.read(case.hf, donor, places)
        slope = plain.slopes(case.hf, own, places, *case.words[row])
        for i in range(case.n):
            total[i] += (slope["z", i] * (given["z", i] - mine["z", i])).sum((0, 2)) / len(case.clean)
    same(found.effect, total, case.scale)


def test_direct_attribution(case):
    found = ca.lenses.direct_attribution(case.model, case.task, samples=1)
    each = [plain.shares(case.hf, ids, *case.words[row]) for row, ids in enumerate(case.clean)]
    mean = {part: sum(s[part] for s in each) / len(each) for part in each[0]}
    got = dict(zip(found.labels["component"], found.effect.tolist(), strict=True))
    assert set(mean) <= set(got)
    same(torch.tensor([got[part] for part in mean]), torch.tensor(list(mean.values())), case.scale)
    assert all(abs(value) < 1e-6 for part, value in got.items() if part not in mean), "biases that are not there"
    totals = [case.difference(case.logits[row], row) for row in range(len(each))]
    same(found.total, torch.tensor(totals), case.scale)
    assert abs(sum(mean.values()) - sum(totals) / len(totals)) <= NEAR * case.scale


@pytest.mark.parametrize("how", ["zero", "mean"])
def test_ablation(case, how):
    layer, hf = case.n // 2, case.hf
    found = ca.patching.ablate(case.model, case.task, how=how, layers=str(layer), samples=1)
    z = [plain.read(hf, ids, [("z", layer)])[1]["z", layer] for ids in case.clean]
    stands = torch.cat([x[1:] for x in z]).mean(0) if how == "mean" else torch.zeros_like(z[0][0])
    for h in range(0, case.model.shape.n_heads, 3):
        total = 0.0
        for row, ids in enumerate(case.clean):
            at = range(1 if how == "mean" else 0, len(ids))  # a mean leaves the first token as it is
            change = {("z", layer): plain.put(hf, "z", stands[h], h, at=at)}
            total += case.difference(plain.last(hf, ids, change), row) - case.difference(case.logits[row], row)
        assert abs(float(found.effect[0, h]) - total / len(case.clean)) <= NEAR * case.scale


def test_knockout(case):
    """The share of the answer's probability that is lost when the last position may not read the subject."""
    task, layers = sets.task(case.model, "fact_capital", 2), (case.n // 3, case.n * 3 // 4)
    found = ca.patching.knockout(case.model, task, window=3, samples=1)
    lost = torch.zeros(2, len(layers))
    for row in task:
        ids, other = sets.ids(case.model.tokenizer, [row.clean, row.corrupt])
        answer, end = sets.next_id(case.model.tokenizer, row.clean, f" {row.answer}"), len(ids) - 1
        edges = [(end, p) for p in range(end) if ids[p] != other[p]]
        before = float(plain.last(case.hf, ids).softmax(-1)[answer])
        for n, layer in enumerate(layers):
            for k, cut in enumerate(((layer,), (layer - 1, layer, layer + 1))):
                p = float(plain.last(case.hf, ids, cuts=dict.fromkeys(cut, edges)).softmax(-1)[answer])
                lost[k, n] += (p - before) / before / len(task)
    same(found.single[0, list(layers)], lost[0], 1.0)
    same(found.effect[0, list(layers)], lost[1], 1.0)
    assert float(lost.abs().max()) > 0.01


def test_generation(case):
    """Greedy, from prompts of mixed lengths, with edits of the prompt alone and of every token."""
    hf, new, late = case.hf, 6, case.n - 3
    d = 30 * torch.randn(case.model.shape.d_model, generator=torch.Generator().manual_seed(1))
    tries = [
        ((), {}, None),
        (Scale(f"mlp_out.{late}", 0.0), {("mlp_out", late): lambda x: 0 * x}, None),
        (Replace("resid_pre.4@1", d), {("resid_pre", 4): plain.put(hf, "resid_pre", d, at=[1])}, None),
        ([Knockout(f"pattern.{i}", queries=(3,), keys=(1, 2)) for i in range(case.n)], {}, [(3, 1), (3, 2)]),
    ]
    texts = []
    for edits, changes, edges in tries:
        cuts = dict.fromkeys(range(case.n), edges) if edges else None
        want = [plain.continued(hf, ids, new, changes, cuts) for ids in case.clean[1:3]]
        text = [case.model.tokenizer.decode(ids, skip_special_tokens=True) for ids in want]
        assert case.model.generate([p.clean for p in case.task.pairs[1:3]], new, edits) == text
        texts.append(text)
    assert any(text != texts[0] for text in texts[1:]), "no edit changed a word"
