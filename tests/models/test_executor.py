"""The executor against one plain run a variant: every family, both paddings, every way in which work is saved."""

from __future__ import annotations

import weakref
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from cutaway.core.record import counting
from cutaway.core.refuse import OutOfMemory, Refused
from cutaway.models.edits.edit import Edit
from cutaway.models.edits.library import Ablate, Add, Freeze, Knockout, Project, Replace, Scale
from cutaway.models.model import Model
from cutaway.models.sweep import partial_forward as resume
from cutaway.models.sweep import plan as plans
from cutaway.models.sweep.executor import SweepPart, streamed, sweep
from cutaway.models.tokens import Tokens, batch
from tests.models.common import CAUSAL, PADDED, by_turns, by_turns_widely, gap, model, noise

KINDS = ["gpt2", "bloom", "gemma2", "mixtral", "mistral_window"]


def metric(logits: Tensor, prompt: Tensor) -> Tensor:
    """A number that tells prompts apart."""
    rows = torch.arange(len(logits))
    return logits[rows, prompt + 3] - logits[:, 9] + 0.25 * logits[:, 17]


def one_by_one(m: Model, t: Tokens, variants: list[list[Edit]], measure: Any = metric) -> Tensor:
    return torch.stack([measure(m.run_last(t, v), torch.arange(len(t))) for v in variants])


def everywhere(m: Model) -> list[list[Edit]]:
    """Edits at first and last layers and positions, at streams, heads, attention and neurons, alone and together."""
    d, last = noise(m.shape.d_model), m.shape.n_layers - 1
    out: list[list[Edit]] = [[], [Add("embed", d)]]
    out += [[Add(f"resid_pre.{i}@{p}", d)] for i, p in ((0, 1), (1, 0), (1, -1), (last, -2))]
    out += [[Add(f"resid_post.{last}@-1", d)], [Add(f"resid_post.{last}@0", d)], [Add(f"resid_post.{last}", d)]]
    out += [[Ablate("z.0.3")], [Ablate(f"z.{last}.0")], [Ablate("z.1.2@-1")], [Ablate("z.1.2@1")]]
    out += [[Scale("mlp_out.1", 0.0)], [Scale(f"attn_out.{last}@-1", -1.0)], [Scale(f"mlp_out.{last}", 0.5)]]
    out += [[Ablate("z.0.1"), Add("attn_out.2@1", d)], [Add("resid_pre.2@2", d), Add("resid_pre.1@-1", d)]]
    out += [[Scale("mlp_out.0@1", 0.0)], [Add("resid_post.0@2", d)], [Scale("mlp_out.1", 0.5), Ablate("z.2.1")]]
    out += [[Scale("mlp_out.0", 0.5), Add("resid_post.0@-1", d), Scale("mlp_out.1@-1", 0.0)]]
    out += [[Add("resid_post.1", d), Scale("resid_pre.2@1", 0.5)], [Scale("resid_post.0@-1", 0.5)]]
    out += [[Scale("v.1.0@0", 0.0)], [Scale("k.1.0@1", 2.0)], [Scale("q.2.1@-1", -1.0)], [Scale("logits", 2.0)]]
    allowed = {s for s, can in m.sites().items() if can.startswith("read and write")}
    return [v for v in out if all(e.where.site in allowed for e in v)]


@pytest.mark.parametrize(("name", "side"), by_turns_widely(CAUSAL))
def test_a_sweep_is_one_run_a_variant(name, side):
    m = model(name)
    variants = everywhere(m)
    assert len(variants) >= 16
    assert gap(sweep(m, PADDED[side], variants, metric), one_by_one(m, PADDED[side], variants)) < 2e-5


@pytest.mark.parametrize(("name", "side"), by_turns(KINDS))
def test_patterns_and_knockouts(name, side):
    m, t = model(name), PADDED[side]
    variants: list[list[Edit]] = [[Ablate("pattern.1.2")], [Scale("pattern.2.0", 0.5), Scale("mlp_out.2@-1", 0.0)]]
    variants += [[Knockout("pattern.1", queries=(-1,), keys=(0,))], [Scale("scores.0.1", 2.0)], []]
    assert gap(sweep(m, t, variants, metric), one_by_one(m, t, variants)) < 2e-5


@pytest.mark.parametrize("name", ["llama_gqa", "gemma2"])
@pytest.mark.parametrize("budget", [1, 40])
def test_any_budget_gives_the_same_numbers(name, budget):
    m, variants = model(name), everywhere(model(name))
    got = sweep(m, PADDED["right"], variants, metric, budget=budget)
    assert gap(got, one_by_one(m, PADDED["right"], variants)) < 2e-5


@pytest.mark.parametrize("name", KINDS)
def test_edits_made_in_every_variant(name):
    m, t = model(name), PADDED["left"]
    base = [Scale("mlp_out.0", 0.5), Add("resid_pre.1@-2", noise(m.shape.d_model, seed=3))]
    variants = everywhere(m)
    want = one_by_one(m, t, [[*base, *v] for v in variants])
    assert gap(sweep(m, t, variants, metric, base=base), want) < 2e-5


@pytest.mark.parametrize("name", KINDS)
def test_edits_made_in_every_variant_at_the_borders_of_blocks(name):
    """There the variants' own edits at the end of a block cannot be made at the next one."""
    m, t = model(name), PADDED["right"]
    base = [Add("resid_post.0@1", noise(m.shape.d_model, seed=3)), Scale("resid_pre.2@0", 0.5), Scale("mlp_out.1", 0.5)]
    variants = everywhere(m)
    want = one_by_one(m, t, [[*base, *v] for v in variants])
    assert gap(sweep(m, t, variants, metric, base=base), want) < 2e-5


def test_a_block_whose_end_is_edited_does_not_run_again():
    m, t = model("gpt2"), PADDED["right"].rows([0])
    spent = []
    for site in ("mlp_out.0@1", "resid_post.0@1", "resid_pre.1@1", "resid_mid.0@1"):
        with counting() as used:
            sweep(m, t, [[Scale(site, 0.5)]], metric)
        spent.append(used.forwards)
    assert spent[0] == spent[1] == spent[2] < spent[3]


@pytest.mark.parametrize("name", KINDS)
def test_values_of_each_prompt_go_to_their_prompt(name):
    m, t = model(name), batch([[5, 6, 7, 8], [15, 16, 17, 18], [25, 26, 27, 28]])
    donor = m.capture(batch([[5, 9, 7, 8], [15, 19, 17, 18], [25, 29, 27, 28]]), ["resid_pre", "z"])
    variants: list[list[Edit]] = [[Replace(a, donor[a])] for a in ("resid_pre.1@1", "z.2.0", "resid_pre.2@-1", "z.1.1")]
    assert gap(sweep(m, t, variants, metric), one_by_one(m, t, variants)) < 2e-5


def test_several_numbers_a_row():
    m = model("llama_gqa")

    def several(logits: Tensor, prompt: Tensor) -> Tensor:
        return torch.stack([metric(logits, prompt), logits[:, 0]], dim=1)

    variants = everywhere(m)
    got = sweep(m, PADDED["right"], variants, several)
    assert got.shape == (len(variants), 2, 2)
    assert gap(got, one_by_one(m, PADDED["right"], variants, several)) < 2e-5


def test_nothing_to_run_is_nothing():
    assert sweep(model("gpt2"), PADDED["right"], [], metric).shape == (0, 2)


def test_late_variants_cost_less_than_a_forward_each():
    m, t = model("llama_gqa"), PADDED["right"]
    variants = [[Scale(f"z.2.{h}", 0.0)] for h in range(4)] * 8
    with counting() as spent:
        sweep(m, t, variants, metric)
    assert 0 < spent.forwards < 0.6 * len(variants) * len(t)


def test_the_same_sweep_gives_the_same_bits_and_leaves_the_model_alone():
    m, t = model("gemma2"), PADDED["left"]
    before, hooks = m.fingerprint(), sum(len(x._forward_hooks) + len(x._forward_pre_hooks) for x in m.hf.modules())
    a, b = (sweep(m, t, everywhere(m), metric) for _ in range(2))
    assert torch.equal(a, b)
    assert m.fingerprint() == before
    assert hooks == sum(len(x._forward_hooks) + len(x._forward_pre_hooks) for x in m.hf.modules())
    assert not any("forward" in vars(x) for x in m.hf.modules())


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("no more"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_memory_that_runs_out_halves_the_batch(error, monkeypatch):
    m, t, variants = model("llama_gqa"), PADDED["right"], everywhere(model("llama_gqa"))
    want, sizes = one_by_one(m, t, variants), []
    layer = type(m.hf.model.layers[0])
    forward = layer.forward

    def small(self: Any, hidden_states: Tensor, *rest: Any, **more: Any) -> Any:
        sizes.append(len(hidden_states))
        if len(hidden_states) > 8:
            raise error
        return forward(self, hidden_states, *rest, **more)

    monkeypatch.setattr(layer, "forward", small)
    assert gap(sweep(m, t, variants, metric), want) < 2e-5
    assert max(sizes) > 8


def test_a_single_variant_that_does_not_fit_is_refused(monkeypatch):
    m = model("llama_gqa")

    def never(*rest: Any, **more: Any) -> Any:
        raise torch.OutOfMemoryError("no more")

    monkeypatch.setattr(type(m.hf.model.layers[0]), "forward", never)
    with pytest.raises(OutOfMemory, match="memory"):
        sweep(m, PADDED["right"], [[Scale("z.1.0", 0.0)]], metric)
    assert not any(x._forward_hooks or x._forward_pre_hooks for x in m.hf.modules())


@pytest.mark.parametrize(
    "edit", [Scale("z.9.0", 0.0), Scale("resid_pre.0@7", 0.0), Scale("z.0.9", 0.0), Add("z.0.0", noise(5))]
)
def test_impossible_edits_are_refused(edit):
    m = model("llama_gqa")
    with pytest.raises(Refused):
        sweep(m, PADDED["right"], [[Scale("z.1.0", 0.0)], [edit]], metric)
    assert not any(x._forward_hooks or x._forward_pre_hooks for x in m.hf.modules())


@pytest.mark.parametrize("name", ["gpt2", "bloom", "llama_gqa", "gemma2", "mistral_window", "gptj"])
def test_in_bfloat16_a_sweep_is_as_exact_as_one_run_a_variant(name):
    """Both round; neither may be further from the exact numbers than the other by more than a few roundings."""
    exact, half, t = model(name), model(name, torch.bfloat16), PADDED["right"].rows([0])
    same = Model(deepcopy(half.hf).float(), name=name)  # the rounded weights, computed exactly
    variants = everywhere(exact)
    want = one_by_one(same, t, variants)
    swept, alone = (x.float() for x in (sweep(half, t, variants, metric), one_by_one(half, t, variants)))
    scale = torch.finfo(torch.bfloat16).eps * float(same.run_last(t).abs().max())
    errors = [(x - want).abs().mean() / scale for x in (swept, alone)]
    assert float(errors[0]) <= 1.5 * float(errors[1]) + 1, "the sweep rounds more than plain runs do"
    assert float((swept - alone).abs().max()) <= 16 * scale


@pytest.mark.parametrize("name", ["gpt2", "bloom"])
def test_moments_of_prompts_seen_in_parts_are_those_of_all(name):
    m = model(name)
    prompts = [[5 + i, 6, 7 + i, 8, 9] for i in range(7)]
    variants = everywhere(m)[:9]
    whole = torch.cat([sweep(m, batch([p]), variants, lambda x, i: metric(x, i)) for p in prompts], dim=1)
    seen = (
        SweepPart(batch(prompts[a:b]), variants, lambda x, i: metric(x, 0 * i)) for a, b in ((0, 3), (3, 4), (4, 7))
    )
    got = streamed(m, seen)
    assert got.count == 7
    torch.testing.assert_close(got.mean, whole.double().mean(1), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(got.variance, whole.double().var(1, correction=0), atol=1e-6, rtol=1e-4)
    with pytest.raises(Refused, match="no prompts"):
        streamed(m, [])
    with pytest.raises(Refused, match="width"):
        streamed(m, [SweepPart(batch(prompts[:2]), variants[:n], metric) for n in (2, 3)])


def mixed(side: Any) -> Tokens:
    """Prompts of three lengths."""
    return batch(
        [[5, 6, 7, 8, 9, 11], [15, 16, 17], [25, 26, 27, 28, 29, 31], [35, 36, 37, 38], [45, 46, 47]], side=side
    )


def of_each_prompt(m: Model, t: Tokens) -> list[list[Edit]]:
    """Edits with values of their own for every prompt, at one place and at many, and runs that are held."""
    g = torch.Generator().manual_seed(4)
    other = batch([torch.randint(3, 60, (int(n),), generator=g).tolist() for n in t.lengths], side="left")
    donor, here = m.capture(other, ["resid_pre", "z", "pattern"]), m.capture(t, ["resid_pre", "z", "pattern"])
    shifted = m.capture(replace(t, ids=(t.ids * 2) % 60), ["resid_pre", "z"])
    out: list[list[Edit]] = [[Replace(a, donor[a])] for a in ("resid_pre.1@1", "z.2.0@-1", "resid_pre.2@-2")]
    out += [[Replace(a, shifted[a])] for a in ("z.1.1", "resid_pre.1", "z.2")]
    out += [[Add("z.1.2@0", here["z.1.2@-1"], 0.5)], [Ablate("resid_pre.2@1", "resample", donor["resid_pre.2@1"])]]
    out += [[Freeze("z.1", donor)], [Freeze("resid_pre.2@-1", shifted), Scale("z.0.0", 0.0)], [Freeze("z.2", here)]]
    out += [[Ablate("z.0.1", "mean", here["z.0.1@0"].mean(0))], [Project("resid_pre.1", noise(m.shape.d_model)[None])]]
    return [*out, [Freeze("pattern.2", here), Scale("mlp_out.0", 0.5)]]


@pytest.mark.parametrize(
    ("name", "side"), [*by_turns(["gpt2", "bloom", "llama_gqa", "gemma2", "mistral_window"]), ("llama_gqa", "right")]
)
def test_prompts_of_many_lengths_run_apart_with_their_own_values(name, side, monkeypatch):
    m, t = model(name), mixed(side)
    variants, want = of_each_prompt(m, t), one_by_one(m, t, of_each_prompt(m, t))
    assert gap(sweep(m, t, variants, metric), want) < 2e-5
    monkeypatch.setitem(plans._CALL, "cpu", 0.0)  # batches cost nothing of their own: lengths run apart
    assert len({c.width for c in plans.groups(m, t, variants, None)}) == 3
    for budget in (None, 7, 1):
        assert gap(sweep(m, t, variants, metric, budget=budget), want) < 2e-5


def test_lengths_run_apart_only_where_that_is_cheaper(monkeypatch):
    m, t = model("llama_gqa"), mixed("right")
    late: list[list[Edit]] = [[Scale("z.2.0@-1", 0.5)]] * 40
    monkeypatch.setitem(plans._CALL, "cpu", 1e12)
    assert [len(c) for c in plans.groups(m, t, late, None)] == [5]
    monkeypatch.setitem(plans._CALL, "cpu", 1.0)
    assert [(len(c), c.width) for c in plans.groups(m, t, late, None)] == [(2, 3), (1, 4), (2, 6)]


@pytest.mark.parametrize("side", ["left", "right"])
def test_memory_that_runs_out_halves_the_prompts(side, monkeypatch):
    m, t = model("llama_gqa"), mixed(side)
    variants = of_each_prompt(m, t)
    want, layer = one_by_one(m, t, variants), type(m.hf.model.layers[0])
    forward = layer.forward

    def small(self: Any, hidden_states: Tensor, *rest: Any, **more: Any) -> Any:
        if len(hidden_states) > 2:
            raise torch.OutOfMemoryError("no more")
        return forward(self, hidden_states, *rest, **more)

    monkeypatch.setattr(layer, "forward", small)
    assert gap(sweep(m, t, variants, metric), want) < 2e-5


def test_a_budget_bounds_the_prompts_of_a_batch(monkeypatch):
    m, t, sizes = model("gpt2"), batch([[5 + i, 6, 7, 8] for i in range(12)]), []
    block = type(m.hf.transformer.h[0])
    forward = block.forward

    def seen(self: Any, hidden_states: Tensor, *rest: Any, **more: Any) -> Any:
        sizes.append(hidden_states.shape[0] * hidden_states.shape[1])
        return forward(self, hidden_states, *rest, **more)

    variants = everywhere(m)
    want = one_by_one(m, t, variants)
    monkeypatch.setattr(block, "forward", seen)
    assert gap(sweep(m, t, variants, metric, budget=8), want) < 2e-5
    assert max(sizes) <= 8


def test_a_position_that_some_prompt_lacks_is_refused_before_anything_runs():
    m, t = model("gpt2"), mixed("left")
    with counting() as spent, pytest.raises(Refused, match="shortest prompt has 3"):
        sweep(m, t, [[Scale("z.0.0", 0.5)], [Scale("resid_pre.1@4", 0.5)]], metric)
    assert spent.forwards == 0


@pytest.mark.parametrize("name", ["gpt2", "llama_gqa"])
def test_edits_that_change_nothing_before_a_position_start_there(name):
    m = model(name)
    tokens = m.tokens(torch.tensor([[5, 6, 7, 8, 9, 10, 11], [15, 16, 17, 18, 19, 20, 21]]))
    own = m.capture(tokens, ["z.1", "mlp_post.0", "k.1"], logits=False)
    start = tokens.ids.shape[1] - 2
    given = {a: own[a].clone() for a in own}
    for x in given.values():
        x[:, start:] += 1.5

    def variants(since: int) -> list[list[Any]]:
        return [[Replace(f"z.1.{h}", given["z.1"][:, :, h], since=since)] for h in range(3)] + [
            [Replace("mlp_post.0.5", given["mlp_post.0"][..., 5], since=since)],
            [Replace("k.1", given["k.1"], since=since)],
            [Add("z.1", given["z.1"] - own["z.1"], since=since)],
            [Replace("z.1", given["z.1"], since=since), Scale("z.2.0@-1", 0.5)],
        ]

    with counting() as whole:
        expected = sweep(m, tokens, variants(0), metric)
    with counting() as late:
        got = sweep(m, tokens, variants(start), metric)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    assert late.forwards < 0.7 * whole.forwards
    assert (got - metric(m.run_last(tokens), torch.arange(2))).abs().amin() > 1e-6


def test_keys_and_values_of_a_prefix_are_laid_out_for_one_layer_at_a_time(monkeypatch):
    m, held = model("llama_gqa"), []

    def behind(prefix: Tensor, new: Tensor) -> Tensor:
        out = whole(prefix, new)
        held.append(weakref.ref(out))
        alive.append(sum(r() is not None for r in held))
        return out

    whole, alive = resume._behind, list[int]()
    monkeypatch.setattr(resume, "_behind", behind)
    tokens = m.tokens(torch.tensor([[5, 6, 7, 8, 9, 10, 11]]))
    sweep(m, tokens, [[Ablate(f"z.{i}.{h}@-1")] for i in range(3) for h in range(4)], metric)
    assert len(held) >= 4
    assert max(alive) <= 2, "one layer's keys and values"
