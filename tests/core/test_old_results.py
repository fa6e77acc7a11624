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

FILES = sorted((Path(__file__).parent / "old_results").glob("*.safetensors"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_an_old_file_opens_and_travels_on(path, tmp_path):
    before, header = read_tensors(path)
    found = ca.open(path)
    renamed = OLD_KINDS[path.stem].renamed
    kept = found.tensors()
    for name, t in before.items():
        assert torch.equal(kept[renamed.get(name, name)], t)
    assert found.labels == header["labels"]
    assert all(pictures(found, field) for field in fields(found))
    again = ca.open(found.save(tmp_path / "a.safetensors"))
    assert (type(again), again.grid, again.record) == (type(found), found.grid, found.record)


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
