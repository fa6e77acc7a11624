"""Interventions written as texts: they are the library's own edits, and their control is the same elsewhere."""

from __future__ import annotations

import pytest
import torch

import cutaway as ca
from cutaway.core.refuse import Refused
from cutaway.directions.direction import direction
from cutaway.directions.found import FoundDirections
from cutaway.interventions.ablation_values import ordinary
from cutaway.models.edits.library import Ablate, Add, Freeze, Replace, Scale
from cutaway.patching import activation, intervene
from tests.conformance import subjects

QUICK = {"samples": 3, "top": 4}


@pytest.fixture(scope="module")
def model():
    return subjects.random_llama()


@pytest.fixture(scope="module")
def task():
    return subjects.llama_task()


def expected(model, bound, edits):
    """The change of every probability by brute force."""
    plain, edited = (model.run_last(bound.clean, e).softmax(-1) for e in ((), edits))
    return (edited - plain).mean(0)


@pytest.mark.parametrize(
    "text", ["zero z.1.2@-1", "scale z.*.0 0.5", "patch resid_post.0@-2", "mean mlp_out.1", "steer"]
)
def test_texts_are_edits(model, task, tmp_path, text):
    bound = task.bind(model)
    vector = torch.randn(model.shape.d_model, generator=torch.Generator().manual_seed(1))
    file = direction({"resid_post.0": vector}).save(tmp_path / "a direction.safetensors")
    if text == "steer":
        text, edits = f"steer resid_post.0 2.5 {file}", [Add("resid_post.0", vector, 2.5)]
    elif text.startswith("zero"):
        edits = [Ablate("z.1.2@-1")]
    elif text.startswith("scale"):
        edits = [Scale(a, 0.5) for a in model.places("z.*.0")]
    elif text.startswith("patch"):
        edits = [Freeze("resid_post.0@-2", model.capture(bound.corrupt, "resid_post.0"))]
    else:
        x, where = model.capture(bound.clean, "mlp_out.1")["mlp_out.1"].clone(), ordinary(model, bound.clean)
        x[where] = x[where].mean(0)
        edits = [Replace("mlp_out.1", x)]
    r = intervene(model, task, edits=(text,), **QUICK)
    change = expected(model, bound, edits)
    torch.testing.assert_close(r.change, change[r.record["tokens"]].cpu(), atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(r.probability[1] - r.probability[0], r.change, atol=1e-6, rtol=1e-4)
    assert float(r.divergence) >= 0
    assert r.change_null.shape == (len(r.change), 3)


def test_a_patch_is_activation_patching_and_head_controls_are_heads(model, task):
    exact = activation(model, task, site="z", direction="noise", samples=1)
    heads = range(model.sizes()["head"])
    r = intervene(model, task, edits=("patch z.1.0",), samples=12, seed=3)
    torch.testing.assert_close(r.effect, exact.effect[1, 0], atol=1e-5, rtol=1e-4)
    others = exact.effect[1, [h for h in heads if h != 0]]
    assert all(float((others - v).abs().min()) < 1e-5 for v in r.null)


def test_a_found_direction_steers_where_it_was_found(model, task, tmp_path):
    places, width, g = ["resid_post.0", "resid_post.1"], model.shape.d_model, torch.Generator().manual_seed(2)
    vector = torch.randn(1, 1, 2, width, generator=g)
    none = torch.zeros(1, 1, 2)
    found = FoundDirections(
        auroc=none, interval=none[..., None].expand(1, 1, 2, 2), null=none[..., None], cosine=none, vector=vector,
        midpoint=none, concept="it", family="", reasons={"auroc": "a test", "cosine": "a test"},
        labels={"finder": ["mean"], "reading": ["last"], "address": places},
    )  # fmt: skip
    r = intervene(model, task, edits=(f"steer resid_post.1@-1 3 {found.save(tmp_path / 'f.safetensors')}",), **QUICK)
    change = expected(model, task.bind(model), [Add("resid_post.1@-1", vector[0, 0, 1], 3.0)])
    torch.testing.assert_close(r.change, change[r.record["tokens"]].cpu(), atol=1e-6, rtol=1e-4)


def test_resampled_values_stay_among_the_tokens_and_several_changes_act_at_once(model, task):
    a, b = (intervene(model, task, edits=("resample mlp_out.0", "zero z.1"), seed=s, **QUICK) for s in (0, 1))
    assert not torch.equal(a.change, b.change)
    both = intervene(model, task, edits=("zero z.0.0", "zero z.1.1"), **QUICK)
    bound = task.bind(model)
    change = expected(model, bound, [Ablate("z.0.0"), Ablate("z.1.1")])
    torch.testing.assert_close(both.change, change[both.record["tokens"]].cpu(), atol=1e-6, rtol=1e-4)


def test_continuations_are_those_of_the_model():
    model = ca.load("miniworld")
    task = ca.tasks.load("ioi", model, 1)
    r = intervene(model, task, edits=("zero resid_post.5",), words=4, samples=1)
    prompt = task.pairs[0].clean
    assert (r.text, r.edited_text) == (
        model.generate(prompt, 4)[0],
        model.generate(prompt, 4, Ablate("resid_post.5"))[0],
    )
    assert r.text != r.edited_text


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "nothing is changed"),
        ("remove z.0.0", "cannot be read"),
        ("scale z.0.0", "cannot be read"),
        ("scale z.0.0 much", "is no number"),
        ("zero z.99.0", "outside this model"),
        ("steer resid_post.0 1 {result}", "holds a intervention"),
        ("steer resid_post.1 1 {direction}", "none was found there"),
    ],
)
def test_refusals(model, task, tmp_path, text, why):
    if "{" in text:
        two = {f"resid_post.{i}": torch.ones(model.shape.d_model) for i in (0, 2)}
        files = {"direction": direction(two).save(tmp_path / "d.safetensors")}
        files["result"] = intervene(model, task, edits=("zero z.0.0",), **QUICK).save(tmp_path / "r.safetensors")
        text = text.format(**files)
    with pytest.raises(Refused, match=why):
        intervene(model, task, edits=(text,) if text else (), **QUICK)
