"""Interchange interventions at all sites: the same as patching, and lines beside whole vectors."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import cutaway as ca
from cutaway.core.refuse import Refused
from cutaway.interventions.interchange import HeldOut, bind_exchanges
from tests.conformance.subjects import miniworld
from tests.directions.test_das import names, planted


def test_the_whole_vector_is_patching_by_another_metric():
    model, task = miniworld(), ca.tasks.load("gender", miniworld(), n=12)
    found = ca.directions.interchange(model, task, sites=("resid_post",), spans=("last",), samples=1)
    rows = HeldOut.of(bind_exchanges(model, task), 0).test
    tested = replace(task, pairs=tuple(task.pairs[i] for i in rows))
    for metric, field in (("accuracy", "iia"), ("logit_diff", "preferred")):
        bound = tested.bind(model, metric)
        for layer in range(model.shape.n_layers):
            place = f"resid_post.{layer}"
            donor = model.capture(bound.clean, place, logits=False)[f"{place}@-1"]
            edit = ca.models.Replace(f"{place}@-1", donor)
            by_hand = (model.measure(bound.corrupt, bound.measure, edits=edit) > 0).float().mean()
            assert float(getattr(found, field)[0, layer, 0]) == pytest.approx(float(by_hand))
    assert found.ceiling[1:].tolist() == [1.0, 1.0]
    assert found.floor[1:].tolist() == [0.0, 0.0]


def test_a_planted_line_suffices_where_it_stands(tmp_path):
    model, line = planted()
    saved = ca.directions.direction({"resid_post.0": line}, "planted").save(tmp_path / "line.safetensors")
    found = ca.directions.interchange(model, names(), subspace=saved, sites=("resid_post.0", "resid_post.1"))
    span = found.labels["span"].index("last")
    assert found.labels["way"] == ["whole", "difference of means", "subspace"]
    assert bool((found.iia[:, :, span] == 1.0).all())
    assert float(found.iia_null[2].mean()) < 0.3
    assert found.record["split"] == "measured on 2 of 4 groups"


def test_places_without_a_difference_are_named():
    model, task = miniworld(), ca.tasks.load("gender", miniworld(), n=6)  # the last token is the same in both
    found = ca.directions.interchange(model, task, sites=("embed", "resid_post.1"), spans=("last",), samples=1)
    assert any("zero difference" in n and "embed" in n for n in found.record["notes"])
    assert float(found.margin[0, 0, 0]) == pytest.approx(float(found.floor[0]), abs=1e-4)
    assert bool(found.iia[1, 0].isnan().all())


def test_intervals_are_over_groups_where_three_are_held_out():
    model, task = planted()[0], names()
    groups = [f"g{i % 6}" for i in range(len(task))]
    many = replace(task, pairs=tuple(replace(p, group=g) for p, g in zip(task, groups, strict=True)))
    bound = bind_exchanges(model, many)
    held = HeldOut.of(bound, 0)
    pairs = {"fitted": len(held.fit), "tested": len(held.test)}
    assert held.record() == {"split": "measured on 3 of 6 groups", "pairs": pairs, "interval": "95 % over groups"}
    assert not {groups[i] for i in held.fit} & {groups[i] for i in held.test}
    right = torch.stack(
        [torch.ones(len(held.test)), held.group == held.group[0], torch.ones(len(held.test))], 1
    ).float()
    low, high = held.interval(right)[1].tolist()
    assert low == 0.0
    assert high == 1.0  # one group of three is right: three groups say little
    assert 0.75 < float(held.interval(right)[2, 0]) < 1.0  # all are right: Wilson's over pairs


def test_wrong_input_is_refused(tmp_path):
    model, task = miniworld(), ca.tasks.load("gender", miniworld(), n=4)
    other = ca.directions.interchange(model, task, sites=("resid_post.3",), samples=1).save(tmp_path / "x.safetensors")
    for options, match in [
        ({"spans": ("middle",)}, "no positions"),
        ({"sites": ("scores.1",)}, "no site of vectors"),
        ({"subspace": other}, "interchange_accuracy"),
        ({"subspace": tmp_path / "none.safetensors"}, "none"),
    ]:
        with pytest.raises(Refused, match=match):
            ca.directions.interchange(model, task, **options)
