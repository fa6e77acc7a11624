"""Bad input of every method of this room that takes it: refused by the method itself, before anything is measured."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

import cutaway as ca
from cutaway.core.files import read_tensors, write_tensors
from tests.conformance.rows import NAMED, ROWS, arguments
from tests.conformance.subjects import llama_task, random_llama

OWN = {n: r for n, r in ROWS.items() if n.startswith(("directions.", "features.contrast"))}


def taking(*subjects: str) -> list[str]:
    return [n for n, r in OWN.items() if set(subjects) <= set(r.subjects)]


def refusal(name: str, options: dict[str, object] | None = None, **bad: object) -> str:
    """The refusal of a call of a method on these subjects in place of its own."""
    model = random_llama()
    asked = arguments(name, model, llama_task())
    given = [bad.get(s, x) for s, x in zip(ROWS[name].subjects, asked, strict=True)]
    with pytest.raises(ca.Refused) as refused:
        ROWS[name].function(*given, **{**NAMED.get(name, {}), **(options or {})})
    return str(refused.value)


def labelled(name: str):
    model = random_llama()
    return dict(zip(ROWS[name].subjects, arguments(name, model, llama_task()), strict=True))["labelled"]


@pytest.mark.parametrize("name", taking("labelled"))
def test_texts_of_one_class_or_without_a_word_are_refused(name):
    own = labelled(name)
    assert "every text shows the concept" in refusal(name, labelled=replace(own, shown=torch.ones_like(own.shown)))
    assert "no text shows the concept" in refusal(name, labelled=replace(own, shown=torch.zeros_like(own.shown)))
    assert "text 0 is empty" in refusal(name, labelled=replace(own, texts=("", *own.texts[1:]), prompts=()))
    assert "0 texts" in refusal(name, labelled=ca.tasks.Labelled((), own.concepts, own.shown[:0]))


@pytest.mark.parametrize("name", taking("direction"))
def test_directions_of_another_model_are_refused(name):
    own = ROWS[name].subjects
    direction = dict(zip(own, arguments(name, random_llama(), llama_task()), strict=True))["direction"]
    assert "it is 5 wide" in refusal(name, direction=ca.directions.direction({"resid_post.1": torch.ones(5)}))
    far = ca.directions.direction({"resid_post.99": direction.vector[0]})
    assert "layer 99 is outside" in refusal(name, direction=far)


@pytest.mark.parametrize("name", [n for n, r in OWN.items() if {"site", "sites"} & {o.name for o in r.options}])
def test_unknown_places_are_refused(name):
    option = next(o.name for o in OWN[name].options if o.name in ("site", "sites"))
    for place, why in (
        ("nonsense", "no site has that name"),
        ("resid_post.99", "layer 99 is outside"),
        ("", "must be|no site"),
    ):
        assert re.search(why, refusal(name, {option: place}))


def test_a_file_with_an_undefined_number_is_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    ca.directions.direction({"resid_post.1": torch.ones(8)}).save(path)
    tensors, header = read_tensors(path)
    tensors["vector"][0, 3] = torch.nan
    write_tensors(path, tensors, header)
    with pytest.raises(ca.Refused, match="undefined"):
        ca.directions.open(path)
