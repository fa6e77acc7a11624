"""Tracing and exchanging at the own sites of state-space models: plain hooks, plain scans, and a planted truth."""

from __future__ import annotations

from contextlib import ExitStack
from functools import cache

import pytest
import torch
from torch.nn import functional
from transformers.models.mamba import modeling_mamba

from cutaway.core.refuse import Refused
from cutaway.interventions.grid import window_of
from cutaway.models.model import Model
from cutaway.patching import ablate, activation, attribution, causal_trace, knockout_curve, self_repair
from cutaway.patching.causal_trace import SIGMAS
from cutaway.tasks.pair import Pair
from cutaway.tasks.task import Task
from tests.conformance.subjects import numbered, numbered_task, word_tokenizer
from tests.models.tiny import V, build

GENERATIONS = ["mamba", "mamba2"]
CHANGED, LENGTH, REACH = 2, 9, 3  # the exchanged word, the prompt, and how far back the convolution sees


@cache
def model(name):
    hf = build(name)
    hf.requires_grad_(False)
    return Model(hf, word_tokenizer(V), f"tiny-{name}")


def part(m, site, layer):
    """The module whose output a site is."""
    block = m.hf.backbone.layers[layer]
    return {"resid_post": block, "ssm.out": block.mixer.out_proj}[site]


def by_hooks(m, ids, noise=0.0, put=None, keep=None):
    """Last logits with noise on the embeddings, `put` (site, layer, position) → value, and what `keep` outputs."""
    kept = {}

    def writing(position, value):
        def change(module, args, out):
            out = out.clone()
            out[:, position] = value
            return out

        return change

    with ExitStack() as stack, torch.no_grad():
        hook = m.hf.backbone.embeddings.register_forward_hook(lambda module, args, out: out + noise)
        stack.callback(hook.remove)
        for (site, layer, position), value in (put or {}).items():
            stack.callback(part(m, site, layer).register_forward_hook(writing(position, value)).remove)
        for layer in range(3 if keep else 0):
            reading = lambda module, args, out, layer=layer: kept.__setitem__(layer, out)  # noqa: E731
            stack.callback(part(m, keep, layer).register_forward_hook(reading).remove)
        return m.hf(ids).logits[:, -1], kept


@pytest.mark.parametrize("name", GENERATIONS)
@pytest.mark.parametrize(("site", "window"), [("resid_post", 1), ("ssm.out", 2)])
def test_noise_equals_plain_hooks(name, site, window):
    m, task = model(name), numbered_task()
    bound = task.bind(m)
    where, ids = bound.changed, bound.clean.ids
    g = torch.Generator().manual_seed(7)
    noise = torch.zeros(*ids.shape, 32)
    noise[where] = (
        SIGMAS * m.hf.backbone.embeddings.weight[ids[where]].std() * torch.randn(int(where.sum()), 32, generator=g)
    )
    right, clean = by_hooks(m, ids, keep=site)
    worse, _ = by_hooks(m, ids, noise)
    want = torch.zeros(3, ids.shape[1])
    for layer in range(3):
        for p in range(ids.shape[1]):
            values = {(site, j, p): clean[j][:, p] for j in window_of(layer, window, range(3))}
            want[layer, p] = (bound.metric(by_hooks(m, ids, noise, values)[0]) - bound.metric(worse)).mean()
    result = causal_trace(m, task, site=site, corruption="noise", window=window, draws=1, samples=1, seed=7)
    assert torch.allclose(result.effect, want, atol=1e-4)
    assert torch.allclose(result.clean, bound.metric(right), atol=1e-4)
    assert want.abs().max() > 0.1


def plain_scan(at=None, value=None, states=None):
    """The recurrence written out, in place of the library's function: `states` collects, `value` is put at `at`."""
    calls = iter(range(99))

    def scan(x, dt, A, B, C, *, D, z, delta_bias, **_):
        layer = next(calls)
        dt = functional.softplus(dt + delta_bias[:, None])
        h, out, seen = torch.zeros(*x.shape[:2], A.shape[1]), [], []
        for t in range(x.shape[2]):
            h = torch.exp(A * dt[:, :, t, None]) * h + dt[:, :, t, None] * B[:, None, :, t] * x[:, :, t, None]
            h = value if (layer, t) == at else h
            seen.append(h)
            out.append((h * C[:, None, :, t]).sum(-1) + D * x[:, :, t])
        if states is not None:
            states[layer] = torch.stack(seen, 1)
        return torch.stack(out, 2) * functional.silu(z)

    return scan


def test_states_equal_a_recurrence_written_out(monkeypatch):
    m, task, states = model("mamba"), numbered_task(), {}
    bound = task.bind(m)

    def run(tokens, scan):
        with monkeypatch.context() as patch, torch.no_grad():
            patch.setattr(modeling_mamba, "mamba_selective_scan", scan)
            return bound.metric(m.hf(tokens.ids, use_cache=False).logits[:, -1])

    clean, corrupt = run(bound.clean, plain_scan(states=states)), run(bound.corrupt, plain_scan())
    want = torch.stack(
        [
            torch.stack([run(bound.corrupt, plain_scan((layer, p), states[layer][:, p])) - corrupt for p in range(6)])
            for layer in range(3)
        ]
    )
    result = causal_trace(m, task, site="ssm.state", samples=1)
    assert torch.allclose(result.effect, want.mean(-1), atol=1e-4)
    assert torch.allclose(result.clean, clean, atol=1e-4)
    assert want.abs().max() > 0.1


@pytest.mark.parametrize("name", GENERATIONS)
@pytest.mark.parametrize("site", ["resid_post", "ssm.state", "ssm.dt"])
def test_symmetric_tracing_equals_activation_patching(name, site):
    task, m = numbered_task(uneven=site == "ssm.state"), model(name)
    if (name, site) == ("mamba", "ssm.dt"):  # of its steps of up to 27, random ones overflow, and are refused
        m = Model(build(name), word_tokenizer(V), name)
        with torch.no_grad():
            for block in m.hf.backbone.layers:
                block.mixer.dt_proj.weight.mul_(0.05)
    trace, other = (f(m, task, site=site, by="position", samples=1) for f in (causal_trace, activation))
    for field, atol in (("effect", 2e-6), ("recovered", 2e-6), ("interval", 3e-5)):  # two to four times what was seen
        assert torch.allclose(getattr(trace, field), getattr(other, field), rtol=0, atol=atol), field
    assert trace.labels["position"] == other.labels["position"]


# --- truth: one layer carries everything


@cache
def one_layer(name):
    """A model whose layers write nothing, but one."""
    hf = build(name, seed=4)
    hf.requires_grad_(False)
    for i in (0, 2):
        hf.backbone.layers[i].mixer.out_proj.weight.zero_()
    return Model(hf, word_tokenizer(V), f"one-layer-{name}")


def long_task():
    """Prompts whose third word is exchanged, too early for the last position's convolution to see it."""
    rows = [[5 + 20 * i + k for k in range(LENGTH)] for i in range(3)]
    pairs = [
        Pair(numbered(*r), numbered(*r[:CHANGED], r[CHANGED] + 9, *r[CHANGED + 1 :]), f"w{71 + i}", f"w{81 + i}")
        for i, r in enumerate(rows)
    ]
    return Task("long", tuple(pairs), corruption="the third word becomes another")


@pytest.mark.parametrize("name", GENERATIONS)
def test_tracing_finds_the_one_layer_that_carries_everything(name):
    m, task = one_layer(name), long_task()
    found = {s: causal_trace(m, task, site=s, samples=2) for s in ("resid_post", "ssm.out", "ssm.y", "ssm.state")}
    assert abs(found["resid_post"].gap) > 1e-2
    stream = torch.zeros(3, LENGTH)
    stream[0, CHANGED] = stream[1, -1] = stream[2, -1] = 1  # in at the changed word, out at the end
    assert torch.allclose(found["resid_post"].recovered, stream, atol=1e-3)
    for site in ("ssm.out", "ssm.y"):
        written = torch.zeros(3, LENGTH)
        written[1, -1] = 1
        assert torch.allclose(found[site].recovered, written, atol=1e-3), site
    states = found["ssm.state"].recovered
    assert torch.allclose(states[[0, 2]], torch.zeros(2, LENGTH), atol=1e-3)
    assert torch.allclose(states[1, :CHANGED], torch.zeros(CHANGED), atol=1e-3)
    assert torch.allclose(states[1, CHANGED + REACH :], torch.ones(LENGTH - CHANGED - REACH), atol=1e-3)
    taken = causal_trace(m, task, site="ssm.conv", samples=1).recovered
    assert torch.allclose(taken[1, CHANGED + REACH + 1 :], torch.zeros(LENGTH - CHANGED - REACH - 1), atol=1e-3)
    assert taken[1, CHANGED : CHANGED + REACH + 1].abs().max() > 0.05


@pytest.mark.parametrize("name", GENERATIONS)
def test_removing_the_layer_that_tracing_names_takes_the_answer_and_others_do_not(name):
    removed = ablate(one_layer(name), long_task(), site="ssm.out", how="corrupt", samples=1)
    gap = causal_trace(one_layer(name), long_task(), samples=1).gap
    assert torch.allclose(removed.effect, torch.tensor([0.0, -gap, 0.0]), atol=1e-3 * abs(gap))


@pytest.mark.parametrize("name", GENERATIONS)
@pytest.mark.parametrize("site", ["ssm.out", "ssm.state"])
def test_estimates_agree_where_little_changes(name, site):
    """Attribution patching goes through the states' gradients; with almost equal words it is the exact effect."""
    m, task = Model(build(name), word_tokenizer(V), name), numbered_task()
    bound, table = task.bind(m), m.hf.get_input_embeddings().weight
    words = torch.cat([t.ids[bound.changed] for t in (bound.clean, bound.corrupt)]).unique()
    with torch.no_grad():
        mean = table[words].mean(0)
        table[words] = mean + 1e-4 * (table[words] - mean)
    estimate = attribution(m, task, site=site, samples=1)
    exact = activation(m, task, site=site, samples=1)
    assert float((estimate.effect - exact.effect).abs().max()) < 0.1 * float(exact.effect.abs().max())


# --- refusals


def test_channels_are_named_and_not_cut():
    m, task = model("mamba2"), numbered_task()
    named = activation(m, task, site="ssm.y.1.3,ssm.dt.0.2@-1,ssm.out", samples=1)
    assert named.labels["node"][:2] == ["ssm.y.1.3", "ssm.dt.0.2 last"]
    assert len(named.effect) == 2 + 3 * 6
    with pytest.raises(Refused, match="no units"):
        activation(m, task, site="ssm.y", by="unit")
    with pytest.raises(Refused, match="whole layer"):
        ablate(m, task, site="ssm.state", how="optimal")
    with pytest.raises(Refused, match="window"):
        causal_trace(m, task, site="ssm.state", window=2)


@pytest.mark.parametrize("name", GENERATIONS)
def test_methods_of_attention_are_refused(name):
    m, task = model(name), numbered_task()
    for site in ("attn_out", "mlp_out", "z"):
        with pytest.raises(Refused, match="no such place"):
            causal_trace(m, task, site=site)
    for method in (knockout_curve, self_repair, ablate, attribution):
        with pytest.raises(Refused, match=r"no such place|has no head"):
            method(m, task)
    for site in ("embed", "ln1.scale", "final.scale"):
        with pytest.raises(Refused, match="tracing site"):
            causal_trace(m, task, site=site)
