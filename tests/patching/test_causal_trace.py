"""Causal tracing against plain torch hooks, its equivalences, its two corruptions, and the facts of the small world."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from dataclasses import replace
from functools import cache

import pytest
import torch

import cutaway as ca
from cutaway.core.refuse import Refused
from cutaway.interventions.grid import window_of
from cutaway.models.model import Model
from cutaway.patching import activation, causal_trace
from cutaway.patching.causal_trace import SIGMAS, agreement
from cutaway.tasks.task import Task
from tests.conformance.subjects import NAMES, llama_task, miniworld, random_llama, told, uneven_task


@cache
def llama():
    return random_llama()


@cache
def subject_task(n=2):
    """Prompts whose subject is the giver."""
    pairs = (told(NAMES[i], NAMES[i + 1], NAMES[i + 2]) for i in range(n))
    return Task("told", tuple(replace(p, subject=p.clean.split(", ")[1].split(" ")[0]) for p in pairs))


def part(block, site):
    """The module whose output is the site."""
    return {"resid_post": block, "mlp_out": block.mlp, "attn_out": block.self_attn.o_proj}[site]


def by_hand(model, ids, noise=None, restored=(), keep=()):
    """Last logits with noise on the embeddings and `restored` (site, layer, position) → value, by plain hooks."""
    seen, blocks = {}, model.hf.model.layers

    def hook(places):
        def change(module, args, out):
            x = (out[0] if isinstance(out, tuple) else out).clone()
            for (site, layer, position), value in places.items():
                if value is None:
                    seen[site, layer] = x.clone()
                else:
                    x[:, position] = value
            return (x, *out[1:]) if isinstance(out, tuple) else x

        return change

    with ExitStack() as stack, torch.no_grad():
        if noise is not None:
            handle = model.hf.model.embed_tokens.register_forward_hook(lambda m, a, out: out + noise)
            stack.callback(handle.remove)
        for place, value in [*dict(restored).items(), *((k, None) for k in keep)]:
            handle = part(blocks[place[1]], place[0]).register_forward_hook(hook({place: value}))
            stack.callback(handle.remove)
        return model.hf(ids).logits[:, -1], seen


def noises(model, bound, draws, seed):
    """The noise of the definition: 3σ of the subjects' embeddings, in the order of a seeded generator."""
    where, table = bound.span("subject"), model.hf.model.embed_tokens.weight.detach()
    sigma = table[bound.clean.ids[where]].std()
    g = torch.Generator().manual_seed(seed)
    out = []
    for _ in range(draws):
        noise = torch.zeros(*bound.clean.ids.shape, table.shape[1])
        noise[where] = SIGMAS * sigma * torch.randn(int(where.sum()), table.shape[1], generator=g)
        out.append(noise)
    return out


@pytest.mark.parametrize(("site", "window"), [("resid_post", 1), ("mlp_out", 2), ("attn_out", 1)])
def test_noise_equals_the_definition(site, window):
    model, task = llama(), subject_task()
    bound = task.bind(model)
    assert bound.span("subject").sum(1).tolist() == [1, 1]
    ids = bound.clean.ids
    logits, clean = by_hand(model, ids, keep=[(site, i, 0) for i in range(2)])
    right, likely = bound.metric(logits), logits.softmax(-1).gather(1, bound.answers[:, None])[:, 0]
    wrong = torch.zeros(2)
    want, sure = torch.zeros(2, ids.shape[1], 2), torch.zeros(2, ids.shape[1], 2)
    for noise in noises(model, bound, 3, 7):
        worse, _ = by_hand(model, ids, noise)
        wrong += bound.metric(worse) / 3
        for layer in range(2):
            for p in range(ids.shape[1]):
                values = {(site, j, p): clean[site, j][:, p] for j in window_of(layer, window, range(2))}
                got, _ = by_hand(model, ids, noise, values)
                want[layer, p] += (bound.metric(got) - bound.metric(worse)) / 3
                gain = got.softmax(-1) - worse.softmax(-1)
                sure[layer, p] += gain.gather(1, bound.answers[:, None])[:, 0] / 3
    result = causal_trace(model, task, site=site, corruption="noise", window=window, draws=3, samples=1, seed=7)
    assert torch.allclose(result.effect, want.mean(-1), atol=2e-4)
    assert torch.allclose(result.probability, sure.mean(-1), atol=1e-5)
    assert torch.allclose(result.clean, right, atol=1e-4)
    assert torch.allclose(result.clean_probability, likely, atol=1e-5)
    assert torch.allclose(result.corrupt, wrong, atol=1e-4)
    assert torch.allclose(result.recovered, want.mean(-1) / (right - wrong).mean(), atol=1e-3)


@pytest.mark.parametrize("task", [llama_task(), uneven_task()], ids=["even", "uneven"])
@pytest.mark.parametrize("site", ["resid_post", "mlp_out", "attn_out"])
def test_symmetric_equals_activation_patching(task, site):
    trace = causal_trace(llama(), task, site=site, by="position", samples=1)
    other = activation(llama(), task, site=site, samples=1)
    for field in ("effect", "interval", "recovered", "clean", "corrupt"):
        assert torch.allclose(getattr(trace, field), getattr(other, field), atol=1e-4), field
    assert trace.labels["position"] == other.labels["position"]


@pytest.mark.parametrize("corruption", ["symmetric", "noise"])
def test_the_last_state_brings_all_of_it_back(corruption):
    result = causal_trace(llama(), subject_task(), corruption=corruption, draws=2, samples=1)
    assert result.recovered[-1, -1] == pytest.approx(1, abs=1e-4)
    assert torch.allclose(result.probability[-1, -1], (result.clean_probability - result.corrupt_probability).mean())
    subject = int(subject_task().bind(llama()).span("subject")[0].nonzero()[0])
    assert result.effect[:, :subject].abs().max() < 1e-5  # nothing has changed before the subject


@pytest.mark.parametrize("task", [subject_task(), uneven_task()], ids=["even", "uneven"])
def test_draws_side_by_side_equal_draws_one_after_the_other(task, monkeypatch):
    options = {"site": "mlp_out", "corruption": "noise", "by": "position", "window": 2, "draws": 2, "samples": 3}
    together = causal_trace(llama(), task, **options)
    monkeypatch.setattr(sys.modules[agreement.__module__], "_TOGETHER", 1)
    apart = causal_trace(llama(), task, **options)
    for field in ("effect", "single", "null", "corrupt", "probability"):
        assert torch.allclose(getattr(together, field), getattr(apart, field), atol=1e-5), field


def test_windows_stand_beside_their_single_layers():
    task = subject_task()
    one = causal_trace(llama(), task, site="mlp_out", samples=1)
    wide = causal_trace(llama(), task, site="mlp_out", window=3, samples=1)
    assert torch.equal(one.effect, one.single)
    assert torch.equal(one.null, one.single_null)
    assert not torch.allclose(wide.null, wide.single_null, atol=1e-3)
    assert torch.allclose(wide.single, one.effect, atol=1e-5)
    assert torch.allclose(wide.single_interval, one.interval, atol=1e-5)
    assert torch.allclose(wide.effect[0], wide.effect[1], atol=1e-5)  # both windows are all of the two layers
    assert not torch.allclose(wide.effect, wide.single, atol=1e-3)
    assert [window_of(i, 10, range(12)) for i in (0, 6, 11)] == [[*range(5)], [*range(1, 11)], [*range(6, 12)]]
    assert window_of(4, 3, range(12)) == [3, 4, 5]


def test_both_corruptions_are_compared():
    task = subject_task()
    result = causal_trace(llama(), task, both=True, draws=2, samples=1)
    noisy = causal_trace(llama(), task, corruption="noise", draws=2, samples=1)
    assert torch.allclose(result.other, noisy.recovered, atol=1e-5)
    gap = noisy.gap
    assert torch.allclose(
        result.other_interval, noisy.interval / gap if gap > 0 else noisy.interval.flip(-1) / gap, atol=1e-4
    )
    assert torch.allclose(result.other_null, noisy.null / gap, atol=1e-4)
    assert result.record["agreement"] == agreement(result.recovered, result.other)
    assert agreement(noisy.effect, noisy.effect)["spearman"] == pytest.approx(1)
    assert agreement(noisy.effect, -noisy.effect)["pearson"] == pytest.approx(-1)
    assert noisy.other is None


def test_a_pair_without_a_subject_gets_its_noise_where_it_changes():
    result = causal_trace(llama(), llama_task(), corruption="noise", draws=2, samples=1)
    assert "the tokens that the corruption changes" in result.record["corruption"]
    named = causal_trace(llama(), subject_task(), corruption="noise", draws=2, samples=1)
    assert "the embeddings of the subject; 2 draws" in named.record["corruption"]


def test_facts_of_the_small_world_pass_from_the_subject_to_the_end():
    model = miniworld()
    task = ca.tasks.load("facts", model, 4)
    subject = task.bind(model).span("subject")
    assert subject.any(1).all()
    for corruption in ("symmetric", "noise"):
        result = causal_trace(model, task, corruption=corruption, draws=2, samples=2)
        early, late = result.recovered[0], result.recovered[-1]
        assert int(late.argmax()) == len(late) - 1
        assert late[-1] == pytest.approx(1, abs=1e-3)
        assert early[-1].abs() < 0.05  # nothing can have arrived yet
        assert early.max() > 0.2
        assert (result.effect.max() > result.null.max()).item()


def test_windows_and_draws_that_make_no_sense_are_refused():
    for options in ({"window": 0}, {"window": 2}, {"draws": 0}):
        with pytest.raises(Refused) as refusal:
            causal_trace(llama(), llama_task(), **options)
        assert next(iter(options)) in refusal.value.what


def roles_task():
    """Three lengths; subjects of three tokens, of one, and of three right before the last token."""
    pairs = uneven_task().pairs
    subjects = ("Mary and John", "Anna", "letter of Emma")
    return Task("roles", tuple(replace(p, subject=s) for p, s in zip(pairs, subjects, strict=True)))


#: what each token of these prompts is, written by hand
BY_HAND = [
    ["before", "first", "middle", "last", "next", *["further"] * 6, "end"],
    ["before"] * 9 + ["last", "next", "further", "further", "end"],
    ["before"] * 12 + ["first", "middle", "last", "end"],
]
NAMED = {
    "before": "before", "first": "first subject token", "middle": "middle subject tokens", "last": "last subject token",
    "next": "next token", "further": "further tokens", "end": "last token",
}  # fmt: skip


def averaged(rows):
    """Prompt by prompt the mean over each role's tokens, then the mean over the prompts that have any."""
    out = []
    for role in NAMED:
        own = [
            [r[:, i] for i, name in enumerate(names) if name == role] for r, names in zip(rows, BY_HAND, strict=True)
        ]
        out.append(torch.stack([torch.stack(o).mean(0) for o in own if o]).mean(0))
    return torch.stack(out, 1)


@cache
def each_alone():
    """Traces of the prompts one by one, where there is nothing to pad."""
    return [causal_trace(llama(), Task("one", (p,)), by="position", samples=1) for p in roles_task().pairs]


@pytest.mark.parametrize("side", ["left", "right"])
def test_roles_are_means_over_each_prompts_own_tokens(side, monkeypatch):
    model, task, tokens = llama(), roles_task(), Model.tokens
    monkeypatch.setattr(Model, "tokens", lambda self, prompts, pad=side, bos=None: tokens(self, prompts, pad, bos))
    result = causal_trace(model, task, samples=2)
    alone = each_alone()
    assert [len(r.labels["position"]) for r in alone] == list(map(len, BY_HAND))
    assert result.labels["position"] == list(NAMED.values())
    assert torch.allclose(result.effect, averaged([r.effect for r in alone]), atol=1e-4)
    assert torch.allclose(result.probability, averaged([r.probability for r in alone]), atol=1e-5)
    for i, names in enumerate(BY_HAND):
        assert [result.labels["position"][r] for r in result.roles[i] if r >= 0] == [NAMED[n] for n in names]
    assert result.record["prompts with the role"]["middle subject tokens"] == 2
    gap = torch.stack([r.clean - r.corrupt for r in alone])[[0, 2]].mean()
    assert torch.allclose(result.recovered[:, 1], result.effect[:, 1] / gap, atol=1e-4)
    assert result.interval.isfinite().all()
    assert result.select(position="last subject token").effect.shape == (2, 1)
    assert torch.allclose(causal_trace(model, task, by="role", samples=2).null, result.null)


def test_roles_under_noise_equal_the_definition():
    model, task = llama(), roles_task()
    bound = task.bind(model)
    (noise,) = noises(model, bound, 1, 3)
    rows = []
    for i, n in enumerate(bound.clean.lengths.tolist()):
        one, ids = bound.rows([i]), bound.clean.ids[i : i + 1, :n]
        _, clean = by_hand(model, ids, keep=[("resid_post", j, 0) for j in range(2)])
        worse, _ = by_hand(model, ids, noise[i : i + 1, :n])
        rows.append(torch.zeros(2, n))
        for layer in range(2):
            for p in range(n):
                place = {("resid_post", layer, p): clean["resid_post", layer][:, p]}
                got, _ = by_hand(model, ids, noise[i : i + 1, :n], place)
                rows[-1][layer, p] = float(one.metric(got) - one.metric(worse))
    result = causal_trace(model, task, corruption="noise", draws=1, samples=1, seed=3)
    assert torch.allclose(result.effect, averaged(rows), atol=2e-4)


def test_roles_are_taken_where_positions_would_mix_subjects_with_other_words():
    same = causal_trace(llama(), subject_task(), samples=1)
    assert (same.record["by"], same.roles) == ("position", None)
    pairs = subject_task().pairs
    moved = Task("moved", (pairs[0], replace(pairs[1], subject=pairs[1].clean.split(" ")[0])))
    assert causal_trace(llama(), moved, samples=1).record["by"] == "role"
    unnamed = causal_trace(llama(), uneven_task(), samples=1)
    assert unnamed.labels["position"] == ["before", "last changed token", "next token", "further tokens", "last token"]
    assert "the tokens that the corruption changes" in unnamed.record["roles of"]
    none = Task("none", tuple(replace(p, corrupt=p.clean) for p in pairs[:1]) + pairs[1:])
    none = Task("none", tuple(replace(p, subject=None) for p in none.pairs))
    assert causal_trace(llama(), none, samples=1).record["by"] == "position"
    with pytest.raises(Refused, match="names no subject"):
        causal_trace(llama(), none, by="role", samples=1)


def test_a_corruption_without_effect_is_refused():
    pair = told("Mary", "John", "Anna")
    with pytest.raises(Refused, match="nothing to bring back"):
        causal_trace(llama(), Task("same", (replace(pair, corrupt=pair.clean),)))
    with pytest.raises(Refused, match="names none"):
        causal_trace(llama(), Task("same", (replace(pair, corrupt=pair.clean),)), corruption="noise")
