"""Activation patching, cell by cell against plain torch hooks and an attention function written out here."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cutaway as ca
from cutaway.core.record import counting
from cutaway.core.refuse import Refused
from cutaway.models.access.capture import Activations
from cutaway.models.access.positions import ForwardFrame
from cutaway.models.edits.library import Replace
from cutaway.patching import activation
from cutaway.tasks.task import Task
from tests.conformance import subjects
from tests.lenses.plain import WIRING
from tests.models.common import KINDS
from tests.models.tiny import CONFIGS

CAUSAL = [n for n in CONFIGS if n != "bert"]
BOTH = ("denoise", "noise")


def ids_of(text: str) -> Tensor:
    return torch.tensor([[int(word[1:]) for word in text.split()]])


class Site:
    """One site by hand: where it is written down in a run, and where a value is put into another run."""

    def __init__(self, name: str, hf: Any, heads: int):
        self.name, self.w, self.hf, self.heads = name, WIRING[hf.config.model_type_of_test], hf, heads

    def module(self, layer: int) -> tuple[nn.Module, bool]:
        """The module, and whether its input (not its output) is meant."""
        block = self.hf.get_submodule(self.w.blocks)[layer]
        path, inside = {
            "resid_pre": ("", True), "resid_post": ("", False), "z": (self.w.o, True),
            "attn_out": (self.w.after_attn or self.w.o, False), "mlp_out": (self.w.after_mlp or self.w.down, False),
        }[self.name]  # fmt: skip
        return (block.get_submodule(path) if path else block), inside

    def change(self, x: Tensor, value: Tensor, place: tuple[int, int | slice]) -> Tensor:
        """`x` [1, position, width] with the value at a position, or at one head of all positions."""
        new = x.clone()
        if self.name == "z":
            parts = new.view(*x.shape[:2], self.heads, -1)
            parts[:, :, place[1]] = value.view(*x.shape[:2], self.heads, -1)[:, :, place[1]]
        else:
            new[:, place[1]] = value[:, place[1]]
        return new

    def read(self, ids: Tensor, layer: int) -> Tensor:
        kept: list[Tensor] = []
        with self._hook(layer, lambda x: kept.append(x.clone())), torch.no_grad():
            self.hf(ids)
        return kept[0]

    def run(self, ids: Tensor, layer: int, value: Tensor, second: int) -> Tensor:
        """Last logits with a value put in."""
        with self._hook(layer, lambda x: self.change(x, value, (layer, second))), torch.no_grad():
            return self.hf(ids).logits[0, -1]

    @contextmanager
    def _hook(self, layer: int, act: Any) -> Iterator[None]:
        module, inside = self.module(layer)

        def before(m: nn.Module, args: Any, kw: Any) -> Any:
            x = args[0] if args else kw["hidden_states"]
            new = act(x)
            if new is None:
                return None
            return ((new, *args[1:]), kw) if args else (args, {**kw, "hidden_states": new})

        def after(m: nn.Module, args: Any, out: Any) -> Any:
            new = act(out[0] if isinstance(out, tuple) else out)
            return None if new is None else (new, *out[1:]) if isinstance(out, tuple) else new

        handle = (
            module.register_forward_pre_hook(before, with_kwargs=True)
            if inside
            else module.register_forward_hook(after)
        )
        try:
            yield
        finally:
            handle.remove()


def by_hand(name: str, site: str, direction: str, pair: Any, cells: list[tuple[int, int]]) -> list[float]:
    """Effects of single patches on one pair, by plain hooks."""
    model = subjects.family(name)
    model.hf.config.model_type_of_test = name
    s = Site(site, model.hf, model.shape.n_heads)
    clean, corrupt = ids_of(pair.clean), ids_of(pair.corrupt)
    target, donor = (corrupt, clean) if direction == "denoise" else (clean, corrupt)
    answer, foil = int(pair.answer[1:]), int(pair.foil[1:])
    with torch.no_grad():
        base = model.hf(target).logits[0, -1]
    out = []
    for layer, second in cells:
        logits = s.run(target, layer, s.read(donor, layer), second)
        out.append(float((logits[answer] - logits[foil]) - (base[answer] - base[foil])))
    del model.hf.config.model_type_of_test
    return out


@pytest.mark.parametrize("name", ["gpt2", "llama_gqa", "gemma2", "gpt_neox_parallel"])
@pytest.mark.parametrize("site", ["resid_pre", "attn_out", "mlp_out", "z"])
@pytest.mark.parametrize("direction", BOTH)
def test_cells_by_hand(name, site, direction):
    task = subjects.numbered_task()
    got = activation(subjects.family(name), task, site=site, direction=direction, samples=1)
    layers, second = got.effect.shape
    g = torch.Generator().manual_seed(len(name) + len(site))
    cells = [
        (int(torch.randint(layers, (), generator=g)), int(torch.randint(second, (), generator=g))) for _ in range(4)
    ]
    cells += [(0, 2 if second > 4 else 0), (layers - 1, second - 1)]
    each = torch.tensor([by_hand(name, site, direction, p, cells) for p in task.pairs])
    for (layer, where), want in zip(cells, each.mean(0).tolist(), strict=True):
        assert float(got.effect[layer, where]) == pytest.approx(want, abs=2e-5)


def attention(replaced: dict[str, Tensor], kept: dict[str, Tensor], layer: int, head: int) -> Any:
    """Grouped-query attention as Llama writes it, with one head's q, k, v or probabilities of one layer exchanged."""

    def forward(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, **_: Any
    ) -> Any:
        parts = {"q": query, "k": key, "v": value}
        if module.layer_idx == layer:
            kept.update({n: x.clone() for n, x in parts.items()})
            for n in parts:
                if n in replaced:
                    parts[n] = parts[n].clone()
                    parts[n][:, head] = replaced[n][:, head]
        groups = query.shape[1] // key.shape[1]
        k, v = (parts[n].repeat_interleave(groups, dim=1) for n in ("k", "v"))
        scores = parts["q"] @ k.transpose(2, 3) * scaling
        n = scores.shape[-1]
        scores = scores.masked_fill(torch.ones(n, n, dtype=torch.bool).triu(1), float("-inf"))
        pattern = scores.softmax(-1)
        if module.layer_idx == layer:
            kept["pattern"] = pattern.clone()
            if "pattern" in replaced:
                pattern = pattern.clone()
                pattern[:, head] = replaced["pattern"][:, head]
        return (pattern @ v).transpose(1, 2).contiguous(), pattern

    return forward


@pytest.mark.parametrize("site", ["q", "k", "v", "pattern"])
@pytest.mark.parametrize("direction", BOTH)
def test_attention_sites_by_hand(site, direction, monkeypatch):
    from transformers.models.llama import modeling_llama

    from cutaway.models.model import Model
    from tests.models.tiny import V, build

    hf = build("llama_gqa")
    task = subjects.numbered_task()
    got = activation(Model(hf, subjects.word_tokenizer(V), "x"), task, site=site, direction=direction, samples=1)
    assert got.effect.shape == (3, 2 if site in ("k", "v") else 4)
    hf.set_attn_implementation("eager")

    def logits(ids: Tensor, *arguments: Any) -> Tensor:
        with monkeypatch.context() as m, torch.no_grad():
            m.setattr(modeling_llama, "eager_attention_forward", attention(*arguments))
            return hf(ids).logits[0, -1]

    for layer, head in [(0, 0), (1, got.effect.shape[1] - 1), (2, 1)]:
        each = []
        for pair in task.pairs:
            clean, corrupt = ids_of(pair.clean), ids_of(pair.corrupt)
            target, donor = (corrupt, clean) if direction == "denoise" else (clean, corrupt)
            kept: dict[str, Tensor] = {}
            logits(donor, {}, kept, layer, head)
            base, patched = logits(target, {}, {}, layer, head), logits(target, {site: kept[site]}, {}, layer, head)
            answer, foil = int(pair.answer[1:]), int(pair.foil[1:])
            each.append(float((patched - base)[answer] - (patched - base)[foil]))
        assert float(got.effect[layer, head]) == pytest.approx(sum(each) / len(each), abs=2e-5)


def away(x: Tensor) -> list[int]:
    """Where a row is not zero up to rounding."""
    return [int(i) for i in (x.abs() > 1e-4).nonzero()]


@pytest.mark.parametrize(
    ("name", "direction"),
    [
        *(pytest.param(n, "denoise", marks=() if n in KINDS else pytest.mark.wide) for n in CAUSAL),
        *((n, "noise") for n in ("gpt2", "gemma2", "mixtral")),
    ],
)
def test_the_whole_difference_enters_at_the_changed_position_and_leaves_at_the_last(name, direction):
    model, task = subjects.family(name), subjects.numbered_task()
    whole = 1.0 if direction == "denoise" else -1.0
    first = activation(model, task, site="resid_pre", direction=direction, samples=1)
    assert first.changed == (2,)
    assert (first.select(position=[3, 2]).changed, first.select(position=0).changed) == ((1,), ())
    assert float(first.recovered[0, 2]) == pytest.approx(whole, abs=1e-3)
    assert away(first.recovered[0]) == [2], "what is equal in both runs changes nothing"
    last = activation(model, task, site="resid_post", direction=direction, samples=1)
    assert float(last.recovered[-1, -1]) == pytest.approx(whole, abs=1e-3)
    assert away(last.recovered[-1]) == [last.effect.shape[1] - 1]


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "falcon_alibi", "mixtral"])
def test_every_changed_position_at_once_gives_the_other_run(name):
    model = subjects.family(name)
    pair = subjects.Pair("w5 w6 w7 w8 w9 w10", "w5 w16 w7 w18 w9 w10", "w61", "w71")
    bound = Task("two", (pair,)).bind(model)
    clean, corrupt = (model.capture(t, "resid_pre.0") for t in (bound.clean, bound.corrupt))
    changed = [int(p) for p in bound.changed[0].nonzero()]
    assert changed == [1, 3]
    edits = [Replace(f"resid_pre.0@{p}", clean[f"resid_pre.0@{p}"]) for p in changed]
    torch.testing.assert_close(model.run_last(bound.corrupt, edits), model.run_last(bound.clean), atol=1e-5, rtol=1e-4)
    assert not corrupt["resid_pre.0"].equal(clean["resid_pre.0"])


def test_positions_and_heads_of_prompts_of_several_lengths_count_from_the_end():
    task = subjects.numbered_task(uneven=True)
    got = activation(subjects.family("llama_gqa"), task, site="resid_pre", samples=1)
    assert got.effect.shape == (3, 4)
    assert got.labels["position"] == ["@-4", "@-3", "@-2", "last@-1"]
    for p in (-4, -1):
        each = [by_hand("llama_gqa", "resid_pre", "denoise", x, [(1, p)])[0] for x in task.pairs]
        assert float(got.effect[1, p]) == pytest.approx(sum(each) / 3, abs=2e-5)


@pytest.mark.parametrize("site", ["resid_pre", "attn_out", "z", "k", "pattern"])
@pytest.mark.parametrize("direction", BOTH)
def test_null_steps_are_as_long_as_the_real_ones(site, direction, monkeypatch):
    """Looked at where they are made: what the sweep is given."""
    import importlib

    module, seen = importlib.import_module("cutaway.patching.activation"), []
    sweep = module.sweep

    def watched(model: Any, tokens: Any, variants: Any, *rest: Any, **more: Any) -> Any:
        seen.append((tokens, variants))
        return sweep(model, tokens, variants, *rest, **more)

    monkeypatch.setattr(module, "sweep", watched)
    model = subjects.family("llama_gqa")
    got = activation(model, subjects.numbered_task(), site=site, direction=direction, samples=3)
    tokens, variants = seen[0]
    cells, rest = divmod(len(variants), 4)
    assert rest == 0
    still = got.effect.numel() - cells  # the value is the same in both runs: neither is run, and both have no effect
    assert int((got.effect == 0).sum()) >= still
    assert int((got.null == 0).all(-1).sum()) >= still
    real, null = variants[:cells], variants[cells:]
    for i, (edit,) in enumerate(null):
        (twin,) = real[i % len(real)]
        assert edit.where == twin.where
        place = edit.where.place
        acts = model.capture(tokens, str(place))
        frame, own = ForwardFrame(tokens, len(tokens), tokens.ids.shape[1]), acts[str(edit.where)]
        made = [Activations({place: e.apply(acts[str(place)], frame)}, tokens) for e in (edit, twin)]
        values = [m[str(edit.where)] for m in made]
        steps = [(v - own).norm(dim=-1) for v in values]
        torch.testing.assert_close(*steps, atol=1e-4, rtol=1e-3)
        if float(steps[1].min()) > 1e-3:
            assert not torch.allclose(*values, atol=1e-3)


def test_the_numbers_belong_together():
    got = activation(subjects.family("gpt2"), subjects.numbered_task(), site="z", direction="noise", samples=2)
    gap = float((got.clean - got.corrupt).mean())
    assert got.gap == pytest.approx(gap, rel=1e-5)
    torch.testing.assert_close(got.recovered, got.effect / gap)
    assert got.units["effect"] == "logits"
    assert got.record["corruption"] == "the third word becomes another"


@pytest.mark.parametrize("site", ["scores", "ln1.scale", "router", "pos_embed", "embed", "logits"])
def test_sites_that_are_no_places_of_the_stream_or_of_heads(site):
    model, task = subjects.family("gpt2"), subjects.numbered_task()
    if site == "scores":  # minus infinity above the diagonal in both runs: no difference there, and no NaN
        got = activation(model, task, site=site, samples=1)
        assert got.effect.isfinite().all()
        assert got.null.isfinite().all()
        return
    with pytest.raises(Refused, match=r"use a stream site|no such place"):
        activation(model, task, site=site)


def test_a_corruption_without_effect_is_refused():
    pair = subjects.Pair("w5 w6 w7", "w5 w6 w7", "w61", "w71")
    with pytest.raises(Refused, match="does not change the metric"):
        activation(subjects.family("gpt2"), Task("same", (pair,)))


def test_numbers_that_are_none_are_refused():
    from cutaway.models.model import Model
    from tests.models.tiny import V, build

    hf = build("gpt2")
    with torch.no_grad():
        hf.transformer.ln_f.weight.fill_(float("nan"))
    with pytest.raises(Refused, match="numbers that are none"):
        activation(Model(hf, subjects.word_tokenizer(V), "broken"), subjects.numbered_task())


def test_a_parallel_block_has_no_middle():
    with pytest.raises(Refused):
        activation(subjects.family("gptj"), subjects.numbered_task(), site="resid_mid")
    assert ca.patching.activation(subjects.family("gpt2"), subjects.numbered_task(), site="resid_mid", samples=1)


@pytest.mark.parametrize("name", ["gpt2", "llama_gqa"])
@pytest.mark.parametrize("direction", ["denoise", pytest.param("noise", marks=pytest.mark.wide)])
def test_neurons_and_units_at_positions_by_hand(name, direction):
    """A neuron or head at all positions or at one, each against a single replaced entry of the other run."""
    model, task = subjects.family(name), subjects.numbered_task()
    bound = task.bind(model)
    target, donor = (bound.corrupt, bound.clean) if direction == "denoise" else (bound.clean, bound.corrupt)
    base, given = bound.metric(model.run_last(target)), model.capture(donor, ["mlp_post", "z"])
    grids = {
        ("mlp_post", "auto"): ("layer", "neuron"), ("mlp_post.1", "both"): ("layer", "neuron", "position"),
        ("z", "both"): ("layer", "head", "position"), ("z", "position"): ("layer", "position"),
    }  # fmt: skip
    for (site, by), grid in grids.items():
        got = activation(model, task, site=site, by=by, direction=direction, samples=1)
        assert got.grid == grid
        layer = 1 if site == "mlp_post.1" else 2
        for unit, place in [(0, 2), (3, 5)]:
            where = {
                "auto": f"{site}.{layer}.{unit}", "position": f"{site}.{layer}@{place}",
                "both": f"{site.split('.')[0]}.{layer}.{unit}@{place}",
            }[by]  # fmt: skip
            want = bound.metric(model.run_last(target, Replace(where, given[where]))) - base
            cell = {"auto": (unit,), "position": (place,), "both": (unit, place)}[by]
            row = 0 if site == "mlp_post.1" else layer
            assert float(got.effect[row, *cell]) == pytest.approx(float(want.mean()), abs=2e-5)


def test_patterns_that_name_their_places_give_a_list():
    model, task = subjects.family("gpt2"), subjects.numbered_task()
    got = activation(model, task, site="z.*.1, mlp_post.2.17@-1, resid_pre.1", samples=1)
    assert got.grid == ("node",)
    names = ["z.0.1", "z.1.1", "z.2.1", "mlp_post.2.17 last", *(f"resid_pre.1 {p}" for p in ("first", "before"))]
    assert got.labels["node"][:6] == names
    whole = activation(model, task, site="z", samples=1)
    torch.testing.assert_close(got.effect[:3], whole.effect[:, 1])
    stream = activation(model, task, site="resid_pre.1", samples=1)
    torch.testing.assert_close(got.effect[4:], stream.effect[0])
    assert stream.labels["layer"] == [1]


def test_windows_stand_beside_the_single_layer():
    model, task = subjects.family("llama_gqa"), subjects.numbered_task()
    alone = activation(model, task, site="mlp_out", samples=1)
    wide = activation(model, task, site="mlp_out", window=3, samples=2)
    assert wide.grid == ("layer", "position")
    assert alone.single is None
    torch.testing.assert_close(wide.single, alone.effect)
    torch.testing.assert_close(wide.single_interval, alone.interval)
    bound = task.bind(model)
    given = model.capture(bound.clean, "mlp_out")
    edits = [Replace(f"mlp_out.{i}@2", given[f"mlp_out.{i}@2"]) for i in range(3)]
    want = bound.metric(model.run_last(bound.corrupt, edits)) - bound.metric(model.run_last(bound.corrupt))
    assert float(wide.effect[1, 2]) == pytest.approx(float(want.mean()), abs=2e-5)
    torch.testing.assert_close(activation(model, task, site="mlp_out", window=1, samples=1).effect, alone.effect)


def test_several_metrics_in_one_run():
    model, task = subjects.family("gpt2"), subjects.numbered_task()
    got = activation(model, task, site="z", metrics="prob, kl,rank", samples=2)
    assert got.labels["metric"] == ["prob (probability)", "kl (−nats)", "rank (−places)"]
    plain = activation(model, task, site="z", samples=2)
    torch.testing.assert_close(got.effect, plain.effect)
    base = task.bind(model)
    for i, name in enumerate(("prob", "kl", "rank")):
        if name == "rank":  # its mean does not change between the two runs, so it is held against a hand-made patch
            rank, given = base.measured_by(name, model).metric, model.capture(base.clean, "z.1.2")["z.1.2"]
            want = rank(model.run_last(base.corrupt, Replace("z.1.2", given))) - rank(model.run_last(base.corrupt))
            assert float(got.metrics[i, 1, 2]) == pytest.approx(float(want.mean()), abs=1e-5)
            continue
        alone = activation(model, Task(task.name, task.pairs, metric=name), site="z", samples=2)
        torch.testing.assert_close(got.metrics[i], alone.effect, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(got.metrics_interval[i], alone.interval, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(got.metrics_null[i], alone.null, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("uneven", [False, True])
def test_prompts_in_parts_give_the_same_effects(uneven, monkeypatch):
    import importlib

    model, task = subjects.family("llama_gqa"), subjects.numbered_task(uneven)
    whole = activation(model, task, site="attn_out", metrics="prob", samples=1)
    monkeypatch.setattr(importlib.import_module("cutaway.patching.activation"), "_PART_BYTES", 1)
    apart = activation(model, task, site="attn_out", metrics="prob", samples=1)
    for n in ("effect", "interval", "recovered", "clean", "corrupt", "metrics", "metrics_interval"):
        torch.testing.assert_close(getattr(apart, n), getattr(whole, n), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"site": "resid_pre", "window": 3}, "a window is for"), ({"site": "mlp_out", "window": 0}, "nothing would"),
        ({"site": "resid_pre", "by": "unit"}, "no units"), ({"site": "pattern", "by": "both"}, "its axes are"),
        ({"site": "z.1.2", "by": "both"}, "names its places"), ({"site": "z", "metrics": "logitdiff"}, "did you mean"),
        ({"site": "z.9"}, "outside this model"), ({"site": "z,zz"}, "no site has that name"),
    ],
)  # fmt: skip
def test_what_cannot_be_cut_is_refused(options, why):
    with pytest.raises(Refused, match=why):
        activation(subjects.family("gpt2"), subjects.numbered_task(), **options)


def test_a_cell_that_is_the_same_in_both_runs_costs_nothing():
    model, task = subjects.family("llama_gqa"), subjects.numbered_task()
    with counting() as all_places:
        whole = activation(model, task, site="resid_pre", samples=1)
    with counting() as one:
        alone = activation(model, task, site="resid_pre.0@0,resid_pre.0@2", samples=1)
    assert float(whole.effect[0, 0]) == float(alone.effect[0]) == 0
    assert float(whole.effect[0, 2]) == pytest.approx(float(alone.effect[1]), rel=1e-4)
    assert one.forwards < all_places.forwards


def test_a_null_of_some_cells_costs_less_and_changes_no_effect():
    model, task = subjects.random_llama(), subjects.llama_task(3)
    with counting() as every:
        whole = activation(model, task, samples=6)
    with counting() as few:
        some = activation(model, task, samples=6, null_cells=1, seed=2)
    assert torch.allclose(whole.effect, some.effect, rtol=0, atol=1e-7)
    assert int(some.null.isfinite().all(-1).sum()) == 1
    assert few.forwards < 0.92 * every.forwards
    moving = (whole.null != 0).all(-1)
    assert bool(moving[some.null.isfinite().all(-1)].all()), "a cell that is equal in both runs makes no null"
    assert len({tuple(activation(model, task, samples=6, null_cells=1, seed=s).null.isnan().flatten().tolist())
                for s in range(4)}) > 1  # fmt: skip
