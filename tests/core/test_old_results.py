"""Result files of earlier versions open as the classes of today, with the same numbers.

`old_results/` holds a file of every kind there was before `Effects`, with random numbers, as that version wrote it.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import cutaway as ca
from cutaway.core.files import read_tensors, write_tensors
from cutaway.core.old_kinds import OLD_KINDS
from cutaway.core.refuse import Refused
from cutaway.interventions.effects import Effects
from cutaway.views.spec import fields, pictures

FACTS = {"clean − corrupt": "gap", "clean − corrupted": "gap", "other − own": "gap", "changed positions": "changed",
         "answer": "answer", "foil": "foil", "rank of the answer": "rank"}  # fmt: skip
FILES = sorted((Path(__file__).parent / "old_results").glob("*.safetensors"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_an_old_file_opens_and_travels_on(path, tmp_path):
    before, header = read_tensors(path)
    found = ca.open(path)
    renamed, axes = OLD_KINDS[path.stem].renamed, OLD_KINDS[path.stem].axes
    kept = found.tensors()
    for name, t in before.items():
        assert torch.equal(kept[renamed.get(name, name)], t)
    assert found.labels == {axes.get(axis, axis): names for axis, names in header["labels"].items()}
    moved = _moved(header["record"], found)
    assert found.record == {k: v for k, v in header["record"].items() if k not in moved}
    assert all(pictures(found, field) for field in fields(found))
    again = ca.open(found.save(tmp_path / "a.safetensors"))
    assert (type(again), again.grid, again.record) == (type(found), found.grid, found.record)


def _moved(record, found):
    """The words of an old record that are fields of the result, which must hold the same."""
    said = {"no_interval": found.reasons.get(next(iter(found.schema()))), "units": found.units}
    said |= {word: getattr(found, name, None) for word, name in FACTS.items()}
    said = {k: v for k, v in said.items() if k in record and v is not None}
    for word, value in said.items():
        old = tuple(record[word]) if isinstance(record[word], list) else record[word]
        assert value == old or (word == "units" and value.items() >= old.items())
    return said


@pytest.mark.parametrize(
    ("name", "facts"),
    [("head_effects", {"gap": 1.5}), ("position_effects", {"gap": 1.5, "changed": (1,)}),
     ("group_effect", {"gap": 1.5}), ("trace", {"gap": 1.5}), ("cross_model_heads", {"gap": 1.5}),
     ("predictions", {"answer": 0, "foil": 1, "rank": 0})],
)  # fmt: skip
def test_what_code_reads_becomes_fields(name, facts):
    found = ca.open(Path(__file__).parent / "old_results" / f"{name}.safetensors")
    assert found.facts() == facts
    assert found.reasons == {next(iter(found.schema())): "one pair of prompts"}


def test_there_is_a_file_of_every_old_kind():
    assert [p.stem for p in FILES] == sorted(OLD_KINDS)
    merged = [p for p in FILES if isinstance(ca.open(p), Effects)]
    assert len(merged) == 23


@pytest.mark.parametrize("name", ["head_effects", "trace"])
def test_opening_loads_no_room_but_its_own(name, tmp_path):
    """In a fresh interpreter, a file from before and one of today."""
    path = next(p for p in FILES if p.stem == name)
    now = ca.open(path).save(tmp_path / "now.safetensors")
    code = (
        f"import sys, cutaway as ca; ca.open({str(path)!r}); print(type(ca.open({str(now)!r})).__name__);"
        "print([m for m in ('lenses', 'features', 'dictionaries', 'zoo') if f'cutaway.{m}' in sys.modules])"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split("\n")
    assert said[0] == type(ca.open(path)).__name__
    if name == "head_effects":
        assert said[1] == "[]"


@pytest.mark.parametrize(
    "where",
    ["os:system", "cutaway.core.files:read_tensors", "cutaway.__main__:Main", "cutaway.core.result:Absent",
     "cutaway.nowhere:Result", "cutaway.core.result:Result", 5, None],
)  # fmt: skip
def test_a_header_names_no_class_but_a_result_of_its_kind(where, tmp_path):
    path = write_tensors(tmp_path / "a.safetensors", {"x": torch.zeros(1)}, {"kind": "unheard_of", "class": where})
    with pytest.raises(Refused, match="its kind is 'unheard_of'"):
        ca.open(path)
