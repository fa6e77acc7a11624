"""Sources: the same documents each time, from any document on; files and data that are not what they should be."""

import json
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from cutaway.core.refuse import Refused
from cutaway.streams import documents, from_ids, from_json_lines, from_text_files, from_texts
from cutaway.streams.sources import HubTexts


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\n\n\nthree\n", "utf-8")
    (tmp_path / "b.txt").write_text("  \n", "utf-8")
    (tmp_path / "c.txt").write_text("fünf", "utf-8")
    return tmp_path


@pytest.mark.parametrize(
    ("unit", "found"),
    [
        ("file", ["one\ntwo\n\n\nthree\n", "fünf"]),
        ("paragraph", ["one\ntwo", "three", "fünf"]),
        ("line", ["one", "two", "three", "fünf"]),
    ],
)
def test_text_files_are_cut_as_asked_and_read_from_any_document_on(folder, unit, found):
    source = from_text_files(folder, unit)
    for first in range(len(found) + 1):
        assert list(source.read(first)) == found[first:]


def test_json_lines_hold_texts_or_ids(tmp_path):
    rows = [{"text": "one", "n": 1}, {"text": [3, 4]}, {"text": "three"}]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n", "utf-8")
    source = from_json_lines(tmp_path)
    for first in range(4):
        assert list(source.read(first)) == ["one", [3, 4], "three"][first:]


def test_ids_come_from_tensors_and_files(tmp_path):
    ids = torch.arange(12).reshape(3, 4)
    save_file({"ids": ids}, tmp_path / "i.safetensors")
    np.save(tmp_path / "i.npy", ids.numpy().astype(np.uint16))
    for source in (from_ids(ids), from_ids(tmp_path / "i.safetensors"), documents(str(tmp_path / "i.npy"))):
        assert torch.equal(torch.stack(list(source.read(1))), ids[1:])
        assert source.identity()["hash"] == from_ids(ids).identity()["hash"]
    assert [len(d) for d in from_ids(ids.reshape(-1)).read(0)] == [12]


def test_collections_and_functions_can_be_read_again(tmp_path):
    for source in (from_texts(["a", [1, 2], "c"]), from_texts(lambda: iter(["a", [1, 2], "c"]), "made")):
        assert list(source.read(0)) == ["a", [1, 2], "c"]
        assert list(source.read(2)) == ["c"]
    assert from_texts(["a"]).identity() != from_texts(["b"]).identity()


def test_identity_follows_the_content_of_files(folder):
    before = from_text_files(folder).identity()
    assert from_text_files(folder).identity() == before
    (folder / "c.txt").write_text("sechs", "utf-8")
    assert from_text_files(folder).identity() != before


def test_every_byte_of_a_large_file_counts(tmp_path):
    with (tmp_path / "large.txt").open("wb") as f:
        f.truncate(65 << 20)
    before = from_text_files(tmp_path / "large.txt").identity()
    with (tmp_path / "large.txt").open("r+b") as f:
        f.seek(70_000)
        f.write(b"x")
    assert from_text_files(tmp_path / "large.txt").identity() != before


def test_half_a_character_is_refused_with_its_line(tmp_path):
    lines = '{"text": "whole \\ud83d\\ude00"}\n{"text": "cut \\ud83d here"}\n'
    (tmp_path / "t.jsonl").write_text(lines, encoding="utf-8")
    found = from_json_lines(tmp_path / "t.jsonl").read(0)
    assert next(found) == "whole \U0001f600"
    with pytest.raises(Refused, match=r"(?s)line 2 of .* half of"):
        next(found)
    with pytest.raises(Refused, match="document 1 of texts"):
        from_texts(["a", "\ud83d"])


def test_a_short_text_names_documents(folder, tmp_path):
    assert documents(str(folder)) == from_text_files(folder)
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "x.jsonl").write_text('{"body": "b"}', "utf-8")
    assert list(documents(str(tmp_path / "d"), "body").read(0)) == ["b"]
    assert documents("hub:org/name:small:test") == HubTexts("org/name", "text", "test", "small")
    assert documents("hub:org/name:test") == HubTexts("org/name", "text", "test")
    assert documents("hub:org/name") == HubTexts("org/name")


class Rows(list):
    def skip(self, n):
        return Rows(self[n:])


def test_data_sets_of_the_hub_are_streamed_through_the_extra(monkeypatch):
    asked = []

    def load_dataset(*args, **options):
        asked.append((args, options))
        return Rows([{"text": "a"}, {"text": "b"}])

    monkeypatch.setitem(sys.modules, "datasets", type(sys)("datasets"))
    monkeypatch.setattr(sys.modules["datasets"], "load_dataset", load_dataset, raising=False)
    assert list(HubTexts("org/name").read(1)) == ["b"]
    assert asked == [(("org/name", None), {"split": "train", "revision": None, "streaming": True})]
    with pytest.raises(Refused, match="no field 'body'"):
        list(HubTexts("org/name", "body").read(0))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(Refused, match=r"pip install 'cutaway\[datasets\]'"):
        list(HubTexts("org/name").read(0))


def test_what_is_no_source_is_refused(tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"text": 3}\nnot json\n', "utf-8")
    (tmp_path / "latin.txt").write_bytes(b"\xff\xfe\xfa")
    np.save(tmp_path / "objects.npy", np.array([{}, "x"], dtype=object), allow_pickle=True)
    save_file({"tokens": torch.zeros(2)}, tmp_path / "other.safetensors")
    for make, words in [
        (lambda: from_text_files(tmp_path / "no.txt"), "no such file"),
        (lambda: from_text_files(tmp_path / "latin.tx"), "near: latin.txt"),
        (lambda: from_text_files([]), "nothing to read"),
        (lambda: from_json_lines(tmp_path / "x" / "y.jsonl"), "no such file"),
        (lambda: list(from_text_files(tmp_path / "latin.txt").read(0)), "not UTF-8"),
        (lambda: from_text_files(tmp_path, "word"), "no way of cutting"),
        (lambda: list(from_json_lines(tmp_path / "bad.jsonl").read(0)), "it is int"),
        (lambda: list(from_json_lines(tmp_path / "bad.jsonl").read(1)), "not JSON"),
        (lambda: list(from_json_lines(tmp_path / "bad.jsonl", "body").read(0)), "no field 'body'"),
        (lambda: from_ids(torch.zeros(3)), "float32"),
        (lambda: from_ids(torch.zeros(1, 2, 3, dtype=torch.long)), "shape"),
        (lambda: from_ids(tmp_path / "objects.npy"), "not an array of numbers"),
        (lambda: from_ids(tmp_path / "other.safetensors"), "no tensor `ids`"),
        (lambda: documents(str(tmp_path / "x.pt")), "pickle"),
        (lambda: from_texts(iter(["a"])), "read only once"),
        (lambda: from_texts("a text"), "characters"),
        (lambda: list(from_texts(lambda: [1.5]).read(0)), "it is float"),
    ]:
        with pytest.raises(Refused, match=words):
            make()
