"""A GGUF file at the command line: from the file to an answer, repeated by the command that is printed."""

import json
import shlex
import sys

import pytest

from cutaway.cli import main
from cutaway.models.loading.load import load
from tests.models.gguf_files import tiny, written


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys.modules[load.__module__], "CACHE", tmp_path / "checks")
    return written(tiny("llama"), tmp_path / "a model.Q8_0.gguf", "llama", "Q8_0")


def test_a_file_is_a_model_like_any(file, capsys):
    assert main(["sites", "--model", file.name, "--json"]) == 0
    sites = {row["site"]: row for row in json.loads(capsys.readouterr().out)}
    assert "read and write" in sites["head_out"].values()
    command = ["lenses", "logit_lens", "--model", file.name, "--prompts", "the cat", "--json"]
    assert main(command) == 0
    first = json.loads(capsys.readouterr().out)
    assert main([*shlex.split(first["record"]["command"])[1:], "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert {k: v for k, v in again.items() if k != "record"} == {k: v for k, v in first.items() if k != "record"}
    assert first["record"]["subjects"]["model"]["origin"] == {"format": "GGUF", "stored": "Q8_0"}


def test_a_damaged_one_is_refused_in_three_lines(file, capsys):
    file.write_bytes(file.read_bytes()[:-9000])
    assert main(["sites", "--model", file.name]) == 2
    said = capsys.readouterr().err.splitlines()
    assert said[0] == f"refused: model '{file.name}'"
    assert "it is cut off" in said[1]
    assert said[2] == "  instead: download the file again"
