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


_ROW = torch.arange(12.0)
_ODD = {
    "one element with any strides": _ROW.as_strided((1, 1, 1), (7, 3, 5), 2),
    "one row of a column": _ROW.view(4, 3)[2:3, ::3],
    "transposed": _ROW.view(4, 3).T,
    "no axes": torch.tensor(3.0),
    "empty": torch.empty(0, 5)[:, ::5],
    "expanded": _ROW[:2, None].expand(2, 3),
    "conjugate view": torch.view_as_complex(_ROW.view(6, 2)).conj(),
    "one negative": torch.view_as_complex(_ROW.view(6, 2)).conj().imag[2:3],
    "bool": torch.tensor([[True, False]])[:, ::2],
    "bf16": _ROW.bfloat16()[::3],
    "fp8": _ROW.to(torch.float8_e4m3fn)[::3],
}


@pytest.mark.parametrize("name", _ODD)
def test_bytes_and_files_hold_the_values_whatever_the_strides(name, tmp_path):
    t = _ODD[name]
    plain = torch.empty(t.shape, dtype=t.dtype).copy_(t)
    assert bytes(files.tensor_bytes(t)) == bytes(plain.reshape(-1).view(torch.uint8).tolist())
    got = files.read_tensors(files.write_tensors(tmp_path / "a.safetensors", {"t": t, "again": t}, {}))[0]
    assert got["t"].dtype == t.dtype
    assert got["again"].shape == t.shape
    assert bytes(files.tensor_bytes(got["t"])) == bytes(files.tensor_bytes(t))


def test_what_has_no_bytes_or_no_name_in_a_file_is_refused(tmp_path):
    assert bytes(files.tensor_bytes(torch.tensor([1, 2], dtype=torch.int16).view(1, 2))) == b"\x01\x00\x02\x00"
    half = torch.zeros(3, dtype=torch.uint8).view(torch.uint4)  # a dtype of less than a byte
    assert bytes(files.tensor_bytes(half)) == b"\0\0\0"
    with pytest.raises(Refused, match=r"do not hold torch\.uint4"):
        files.write_tensors(tmp_path / "a.safetensors", {"t": half}, {})
    with pytest.raises(Refused, match="meta device"):
        files.tensor_bytes(torch.empty(2, device="meta"))
