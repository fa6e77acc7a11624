"""Sweeps around a base of edits, cut edges and frozen positions agree with one run after another."""

from __future__ import annotations

import pytest
import torch

from cutaway.core.record import counting
from cutaway.core.refuse import Refused
from cutaway.models.edits.edit import Edit
from cutaway.models.edits.library import Add, Freeze, Knockout, Replace, Scale
from cutaway.models.sweep.executor import sweep
from tests.models.common import IDS, KINDS, PADDED, by_turns, gap, metric, model, noise

BATCHES = {"even": IDS, **PADDED}
FAMILIES = pytest.mark.parametrize(
    ("name", "how"), [*by_turns(KINDS), *(pytest.param(n, "even", marks=pytest.mark.wide) for n in KINDS)]
)


def swept(m, t, variants, base=()):
    return sweep(m, t, variants, lambda logits, prompt: metric(logits.float()), base=base)


def one_by_one(m, t, variants, base=()):
    return torch.stack([metric(m.run_last(t, edits=[*base, *v])) for v in variants])


@FAMILIES
def test_a_base_holds_in_every_variant(name, how):
    m, t = model(name), BATCHES[how]
    x = noise(*t.ids.shape, m.shape.d_model)
    acts, other = m.capture(t, ["z", "resid_post", "mlp_out"]), m.capture(t, ["z", "mlp_out"], edits=[Add("embed", x)])
    layers = range(m.shape.n_layers)
    variants: list[list[Edit]] = [
        *([Replace(f"resid_post.{i}@{p}", acts[f"resid_post.{i}@{p}"])] for i in layers for p in (1, -1)),
        *([Replace(f"z.{i}.1", other[f"z.{i}.1"])] for i in layers),
        [Replace(f"mlp_out.{i}@1", other[f"mlp_out.{i}@1"]) for i in layers],
        [Replace("embed@2", x[:, 2])],
        [Add("resid_pre.0@1", x[:, 1])],
        [],
    ]
    bases: list[list[Edit]] = [
        [Add("embed", x)],
        [Add("embed@1", x[:, 1])],
        [Freeze(a, acts) for a in m.places("z")],
        [Add("resid_pre.1@1", x[:, 1]), Scale("resid_post.0", 1.3)],
    ]
    for base in bases:
        assert gap(swept(m, t, variants, base), one_by_one(m, t, variants, base)) < 1e-4


@FAMILIES
def test_cut_edges_and_frozen_positions_reuse_what_is_before_them(name, how):
    m, t = model(name), BATCHES[how]
    other = m.capture(t, "resid_post", edits=[Add("embed", noise(*t.ids.shape, m.shape.d_model))])
    layers = range(m.shape.n_layers)
    cuts: list[list[Edit]] = [[Knockout(f"pattern.{i}", (q,), (1, 0))] for i in layers for q in (-1, 2)]
    held: list[list[Edit]] = [[Freeze(f"resid_post.{i}", other, (2,))] for i in layers]
    for variants in (cuts, held):
        want = one_by_one(m, t, variants)
        assert gap(swept(m, t, variants), want) < 1e-4
        assert not torch.allclose(want, metric(m.run_last(t)), atol=1e-4)


def test_cutting_edges_into_the_last_position_runs_that_position_only():
    m = model("llama_gqa")
    with counting() as spent:
        swept(m, IDS, [[Knockout(f"pattern.{i}", (-1,), (1,))] for i in range(3)])
    n, width = IDS.ids.shape
    assert spent.forwards == pytest.approx(n * (1 + (3 + 2 + 1) / (3 * width)))


@pytest.mark.parametrize(("edit", "columns"), [(Freeze, 1), (Scale, 7)], ids=["placed", "everywhere"])
def test_what_a_base_does_before_a_variant_is_not_done_again(edit, columns):
    """A frozen place can be held from any column on; other edits are made of all columns at once."""
    m = model("llama_gqa")
    n, width = IDS.ids.shape
    acts = m.capture(IDS, "z")
    base = [edit(a, acts if edit is Freeze else 0.5) for a in m.places("z")]
    with counting() as spent:
        swept(m, IDS, [[Scale(f"z.{i}.1@-1", 0.0)] for i in range(3)], base)
    assert spent.forwards == pytest.approx(n * (1 + columns / width * (3 + 2 + 1) / 3))


def test_a_base_that_never_takes_place_is_refused_before_anything_runs():
    m = model("llama_gqa")
    with pytest.raises(Refused, match="no such place"):
        swept(m, IDS, [[Scale("z.0.1", 0.0)]], [Scale("pos_embed", 0.0)])
