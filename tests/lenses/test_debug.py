"""Debugging a prediction: a turn planted in one component is found there, and the prediction returns without it."""

from __future__ import annotations

import copy
from functools import cache

import pytest
import torch

import cutaway as ca
from cutaway.core.address import Address
from cutaway.core.refuse import Refused
from cutaway.lenses.debug import _drawn
from cutaway.models.edits.library import Replace
from cutaway.models.model import Model
from tests.conformance import subjects

TEXT, RIGHT, WRONG = "While Kate and Max were at the market, Max passed the book to", " Kate", " Nina"
PROMPT = ca.tasks.as_prompts(TEXT)


@cache
def planted(component: str) -> Model:
    """Miniworld with one component that also writes a wrong name at the end of the prompt, which it answers right.

    Its output matrix gets one more term: what it reads there, times a step toward the wrong name.
    """
    model = subjects.miniworld()
    hf, (layer, unit) = copy.deepcopy(model.hf), (int(n) for n in component.replace("mlp_out.", "-1.").split("."))
    layer, head = (unit, None) if layer < 0 else (layer, unit)
    block, width = hf.model.layers[layer], model.shape.d_head
    site, module = ("z", block.self_attn.o_proj) if head is not None else ("mlp_post", block.mlp.down_proj)
    acts = model.capture(TEXT, [f"{site}.{layer}", f"resid_post.{model.shape.n_layers - 1}"])
    read = acts[f"{site}.{layer}@-1"][0] if head is None else acts[f"z.{layer}.{head}@-1"][0]
    ids = [model.text.token_id(w) for w in (WRONG, RIGHT)]
    toward = (hf.lm_head.weight[ids[0]] - hf.lm_head.weight[ids[1]]) * hf.model.norm.weight
    step = acts[f"resid_post.{model.shape.n_layers - 1}@-1"].norm() * toward / toward.norm()
    columns = slice(None) if head is None else slice(head * width, (head + 1) * width)
    with torch.no_grad():
        module.weight[:, columns] += torch.outer(step, read / read.pow(2).sum())
    return Model(hf, model.tokenizer, f"planted at {component}")


@pytest.mark.parametrize("component", ["3.0", "4.2", "mlp_out.3", "mlp_out.5"])
def test_a_planted_turn_is_found_and_confirmed(component):
    model, healthy = planted(component), subjects.miniworld()
    right, wrong = (healthy.text.token_id(w) for w in (RIGHT, WRONG))
    assert int(healthy.run_last(TEXT).argmax()) == right
    assert int(model.run_last(TEXT).argmax()) == wrong
    got = ca.lenses.debug(model, PROMPT, expected=RIGHT, samples=5)
    depth = component.removeprefix("mlp_out.") if component.startswith("mlp") else f"{component[0]}.mid"
    assert (got.suspect, got.record["largest step toward it"]) == (component, depth)
    assert got.confirmed
    assert float(got.returned[got.labels["component"].index(component)]) == 1
    assert got.turn == depth, "the right name is ahead before"
    assert got.interval.isnan().all()
    assert got.reasons["effect"] == "one prompt"


def test_the_record_says_which_random_components_there_were():
    for top, which in ((6, "of its kind, none of the top"), (1000, "of its kind, among the top too")):
        got = ca.lenses.debug(planted("4.2"), PROMPT, expected=RIGHT, top=top, samples=2)
        assert got.record["random components"] == which
    alone, mlp = Address("z", 0, 0), Address("mlp_out", 0)
    assert _drawn([alone], [alone, mlp], 2, 0) == ({alone: [mlp, mlp]}, "of any kind")
    with pytest.raises(Refused, match="no other"):
        _drawn([alone], [alone], 2, 0)


def test_a_turn_of_two_components_together_is_not_confirmed():
    """Either of two equal steps toward the wrong name is enough, so that it stays without one of them."""
    model, other = planted("mlp_out.5"), planted("4.2")
    hf = copy.deepcopy(model.hf)
    hf.model.layers[4].self_attn.o_proj.weight.data.copy_(other.hf.model.layers[4].self_attn.o_proj.weight)
    got = ca.lenses.debug(Model(hf, model.tokenizer, "both"), PROMPT, expected=RIGHT, samples=5)
    assert {"mlp_out.5", "4.2"} <= {*got.labels["component"]}
    assert got.suspect in ("mlp_out.5", "4.2")
    assert not got.confirmed
    assert got.turn == "4.mid"


@pytest.mark.parametrize("options", [{}, {"how": "mean"}, {"reference": "When Karl and Kate went, Karl gave a hat to"}])
def test_effects_are_those_of_plain_edits(options):
    """Each number against a run of the edited model, with the value that stands in taken by hand."""
    model, text = (
        planted("4.2"),
        ca.tasks.as_prompts([TEXT, "When Nina and Karl went to the house, Karl gave a letter to"]),
    )
    right, wrong = (model.text.token_id(w) for w in (RIGHT, WRONG))
    got = ca.lenses.debug(model, text, expected=RIGHT, actual=WRONG, samples=3, **options)

    def margin(edits=()):
        logits = model.run_last(list(text), edits=edits)
        return (logits[:, right] - logits[:, wrong]).mean()

    clean = margin()
    for name, effect in zip(got.labels["component"], got.effect, strict=True):
        place = f"z.{name}" if name[0].isdigit() else name
        if "reference" in options:
            value = model.capture(options["reference"], place.rsplit(".", 1)[0] if place[0] == "z" else place)
            value = value[f"{place}@-1"][0]
        else:
            acts = model.capture(list(text), place.rsplit(".", 1)[0] if place[0] == "z" else place)
            x, mask = acts[place], acts.tokens.mask.clone()
            mask[:, 0] = False
            value = x[mask].mean(0) if options else torch.zeros_like(x[0, 0])
        assert float(effect) == pytest.approx(float(margin([Replace(f"{place}@-1", value)]) - clean), abs=2e-4)
    assert float(got.difference[-1]) == pytest.approx(float(clean), abs=1e-3)


def test_nothing_that_turns_is_refused():
    model = subjects.miniworld()
    with pytest.raises(Refused, match="nothing turns"):
        ca.lenses.debug(model, PROMPT, expected=RIGHT, actual=WRONG)
    with pytest.raises(Refused, match="is the actual one"):
        ca.lenses.debug(model, PROMPT, expected=RIGHT)
    with pytest.raises(Refused, match="nothing would be removed"):
        ca.lenses.debug(model, PROMPT, top=0)
