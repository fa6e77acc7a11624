"""Results to files by suffix, one field of a result, what is no result, and several processes with one voice."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

import cutaway as ca
from cutaway.cli import app, shell
from cutaway.cli import output as saving
from cutaway.core.refuse import Refused
from tests.views import samples

FIRST = {".safetensors": None, ".png": b"\x89PNG", ".svg": b"<?xml", ".html": b"<!doctype html>"}


def run(capsys, line: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of one command line."""
    code = app.main(shlex.split(line))
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture
def saved(tmp_path) -> Path:
    return samples.lens().save(tmp_path / "lens.safetensors")


@pytest.mark.parametrize("suffix", list(FIRST))
def test_the_suffix_says_what_is_written(capsys, saved, tmp_path, suffix):
    out = tmp_path / f"out{suffix}"
    code, text, err = run(capsys, f"open {saved} --out {out}")
    assert (code, err) == (0, "")
    assert f"saved to {out}" in text
    if suffix == saving.RESULT:
        assert ca.open(out).compare(samples.lens())["target"]["largest"] == 0
    else:
        assert out.read_bytes().startswith(FIRST[suffix])


def test_several_results_are_shown_in_turn_or_on_one_page(capsys, saved, tmp_path):
    other, page = samples.heads().save(tmp_path / "heads.safetensors"), tmp_path / "both.html"
    code, text, err = run(capsys, f"open {saved} {other} --out {page}")
    assert (code, err) == (0, "")
    assert f"saved to {page}" in text
    sections = page.read_text("utf-8").split("</main>")[0].split("<section")[1:]
    assert ["target" in part for part in sections] == [True, False]
    code, out, _ = run(capsys, f"open {saved} {other} --json")
    assert ["target" in d["fields"] for d in json.loads(out)] == [True, False]
    for flag in ("--out both.png", "--field target"):
        code, _, err = run(capsys, f"open {saved} {other} {flag}")
        assert code == 2
        assert "open one at a time" in err


@pytest.mark.parametrize("name", ["out.pdf", "out", "out.pt"])
@pytest.mark.parametrize("line", ["patching activation --task nothere", "open missing.safetensors"])
def test_other_suffixes_are_refused_before_anything_is_done(capsys, name, line):
    code, out, err = run(capsys, f"{line} --out {name}")
    assert (code, out) == (2, "")
    assert "refused: --out " + name in err
    assert all(s in err for s in FIRST)


def test_one_field_is_shown_drawn_and_written(capsys, saved, tmp_path):
    code, text, _ = run(capsys, f"open {saved} --field target")
    assert code == 0
    assert "\ntarget" in text
    code, out, _ = run(capsys, f"open {saved} --field target --json")
    assert list(json.loads(out)["fields"]) == ["target", "target_interval"]
    page = tmp_path / "one.html"
    run(capsys, f"open {saved} --field rank --out {page}")
    assert "<b>rank</b>" in page.read_text("utf-8")
    assert "<b>target</b>" not in page.read_text("utf-8")


@pytest.mark.parametrize("more", ["", "--json", "--out x.png"])
def test_a_wrong_field_is_refused_with_the_list(capsys, saved, more):
    code, out, err = run(capsys, f"open {saved} --field tagret {more}")
    assert (code, out) == (2, "")
    assert "use one of probability, target, rank, answer" in err


def test_a_dictionary_is_sent_to_its_judge(capsys):
    from cutaway.dictionaries.formats.shared.located import located

    file = located("miniworld/resid_post.3")
    code, out, err = run(capsys, f"open {file}")
    assert (code, out) == (2, "")
    assert "sparse dictionary" in err
    assert f"cutaway dict eval {file}" in err


def test_only_the_first_of_several_processes_saves_and_speaks(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        saving.save(samples.heads(), tmp_path / f"{rank}.png")
        assert (tmp_path / f"{rank}.png").exists() == (rank == "0")
        assert shell.refused(Refused("a", "b", "c"), "cutaway x", as_json=False) == 2
        assert bool(capsys.readouterr().err) == (rank == "0")
    assert shell.refused(MemoryError(), "cutaway x", as_json=False) == 2
    assert "memory" in capsys.readouterr().err, "this may happen in one process only"
