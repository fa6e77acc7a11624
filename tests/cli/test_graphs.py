"""`cutaway graphs`: a graph is traced, shown and exported, and other tools' files are shown too."""

import json

import pytest

from cutaway.cli import app
from cutaway.graphs.schema import faults, graph_schema

TRACED = ["graphs", "trace", "--prompts", "The capital of Norway is", "--transcoders", "miniworld/transcoders"]


@pytest.fixture(scope="module")
def traced(tmp_path_factory):
    path = tmp_path_factory.mktemp("graphs") / "nor way.safetensors"
    assert app.main([*TRACED, "--samples", "2", "--out", str(path)]) == 0
    return path


def test_a_traced_graph_is_shown_and_exported(traced, tmp_path, capsys):
    assert app.main(["graphs", "show", str(traced), "--nodes", "0.6", "--out", str(tmp_path / "a.html")]) == 0
    shown = capsys.readouterr().out
    assert "logit.885@5" in shown
    assert "replacement" in shown
    assert "<svg class=cw-nodes" in (tmp_path / "a.html").read_text("utf-8")
    assert app.main(["graphs", "export", str(traced), "--out", str(tmp_path / "a.json"), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    data = json.loads((tmp_path / "a.json").read_text("utf-8"))
    assert not list(faults(data, graph_schema()))
    assert data["metadata"]["slug"] == "nor-way"
    assert (said["nodes"], said["edges"]) == (len(data["nodes"]), len(data["links"]))
    assert len(said["upload"]) == 3
    assert app.main(["graphs", "show", str(tmp_path / "a.json")]) == 0
    assert "logit.885@5" in capsys.readouterr().out


def test_other_files_are_refused(traced, tmp_path, capsys):
    (tmp_path / "b.json").write_text("{}", "utf-8")
    for words in (["show", str(tmp_path / "b.json")], ["show", str(traced), "--preset", "mine"]):
        assert app.main(["graphs", *words]) == 2
        assert "instead" in capsys.readouterr().err
    assert app.main(["graphs", "export", str(traced), "--out", str(tmp_path / "a.json")]) == 0
    capsys.readouterr()
    for option in (["--nodes", "0.5"], ["--pinned", "embed@1"], ["--preset", "paper"]):
        assert app.main(["graphs", "show", str(tmp_path / "a.json"), *option]) == 2
        assert "pruned already" in capsys.readouterr().err
    assert app.main(["graphs", "export", str(tmp_path / "a.json"), "--out", str(tmp_path / "c.json")]) == 2
    assert "no whole graph" in capsys.readouterr().err


def test_graphs_of_paraphrases_are_compared(traced, tmp_path, capsys):
    other = tmp_path / "other.safetensors"
    words = [*TRACED[:3], "In Norway, the capital is", *TRACED[4:]]
    assert app.main([*words, "--samples", "2", "--out", str(other)]) == 0
    capsys.readouterr()
    assert app.main(["graphs", "stability", str(traced), str(other), "--samples", "3"]) == 0
    said = capsys.readouterr().out
    assert "stability" in said
    assert "control" in said
    assert app.main(["graphs", "export", str(traced), "--out", str(tmp_path / "a.json")]) == 0
    assert app.main(["graphs", "stability", str(traced), str(tmp_path / "a.json")]) == 2
    assert "no whole graph" in capsys.readouterr().err


def test_supernodes_are_suggested_edited_tested_and_shown(traced, tmp_path, capsys):
    found, file, page = (str(tmp_path / name) for name in ("s.safetensors", "s.json", "a.html"))
    asked = ["graphs", "supernodes", *TRACED[2:], "--samples", "2"]
    assert app.main([*asked, "--out", found]) == 0
    assert app.main(["graphs", "group", found, "--out", file]) == 0
    data = json.loads((tmp_path / "s.json").read_text("utf-8"))
    data["supernodes"] = [{**data["supernodes"][0], "name": "mine"}]
    (tmp_path / "s.json").write_text(json.dumps(data), "utf-8")
    capsys.readouterr()
    assert app.main([*asked, "--groups", file]) == 0
    assert "mine" in capsys.readouterr().out
    assert app.main(["graphs", "show", str(traced), "--supernodes", file, "--out", page]) == 0
    assert "<title>mine</title>" in (tmp_path / "a.html").read_text("utf-8")
    assert app.main(["graphs", "export", str(traced), "--supernodes", found, "--out", str(tmp_path / "a.json")]) == 0
    assert len(json.loads((tmp_path / "a.json").read_text("utf-8"))["qParams"]["supernodes"]) > 1
    capsys.readouterr()
    for words in (["show", str(tmp_path / "a.json"), "--supernodes", file], ["group", str(traced), "--out", file]):
        assert app.main(["graphs", *words]) == 2
        assert "instead" in capsys.readouterr().err
