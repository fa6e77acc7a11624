"""Every chapter runs, and says what its docstring promises."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

CHAPTERS = sorted(Path(__file__).parents[2].glob("examples/*.py"))
SAYS = {
    "1_explain_a_sentence": "The capital of France is",
    "2_read_and_edit": "without head 4.0",
    "3_any_model": "identities that fail: none",
    "4_patch_and_save": "the same after saving: True",
    "5_sparse_dictionaries": "random latents, lowered as much",
}


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda p: p.stem)
def test_chapter_runs(path, capsys):
    runpy.run_path(str(path))
    assert SAYS[path.stem] in capsys.readouterr().out


def test_every_chapter_is_listed():
    assert {p.stem for p in CHAPTERS} == set(SAYS)
