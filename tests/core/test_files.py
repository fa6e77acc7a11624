"""Files are written whole or not at all, and nothing is ever unpickled."""

import os
import pickle

import pytest
import torch

from cutaway.core import files
from cutaway.core.refuse import Refused


def test_json_and_tensors_round_trip(tmp_path):
    data = {"a": [1, None, "é"], "b": {"c": 0.5}}
    assert files.read_json(files.write_json(tmp_path / "x" / "a.json", data)) == data
    tensors = {"t": torch.arange(6).reshape(2, 3).T, "h": torch.ones(2, dtype=torch.bfloat16)}
    got, header = files.read_tensors(files.write_tensors(tmp_path / "a.safetensors", tensors, {"n": [1, "two"]}))
    assert all(torch.equal(got[n], t) for n, t in tensors.items())
    assert header == {"n": [1, "two"]}


def test_tensors_that_share_memory_are_written_each(tmp_path):
    whole = torch.arange(6.0)
    tensors = {"a": whole, "b": whole, "part": whole[2:4]}
    got, _ = files.read_tensors(files.write_tensors(tmp_path / "a.safetensors", tensors, {}))
    assert all(torch.equal(got[n], t) for n, t in tensors.items())


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path, monkeypatch):
    target = files.write_text(tmp_path / "a.txt", "old")

    def fail(*args):
        raise OSError("disk is gone")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(Refused, match="disk is gone"):
        files.write_text(target, "new")
    assert target.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_written_files_are_readable_by_others(tmp_path):
    assert files.write_text(tmp_path / "a.txt", "x").stat().st_mode & 0o044 == 0o044


@pytest.mark.parametrize("name", ["a.pt", "a.pth", "a.pkl", "a.bin", "a.ckpt"])
def test_pickles_are_refused_unread(tmp_path, name):
    with pytest.raises(Refused, match="pickle"):
        files.read_tensors(tmp_path / name)


def test_a_pickle_under_another_name_is_refused_and_does_not_run(tmp_path):
    marker = tmp_path / "ran"

    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(marker),)

    (tmp_path / "a.safetensors").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(Refused, match="not a readable safetensors file"):
        files.read_tensors(tmp_path / "a.safetensors")
    assert not marker.exists()


def test_missing_and_broken_json_are_refused(tmp_path):
    (tmp_path / "a.json").write_text("{")
    for path in (tmp_path / "a.json", tmp_path / "missing.json", tmp_path):
        with pytest.raises(Refused, match="cannot be read as JSON"):
            files.read_json(path)


def test_tensor_bytes_are_the_values(tmp_path):
    assert bytes(files.tensor_bytes(torch.tensor([1, 2], dtype=torch.int16).view(1, 2))) == b"\x01\x00\x02\x00"
