"""A kind of picture is one file and one row: a toy one is drawn in every medium and from the command line."""

from __future__ import annotations

import sys

import pytest
import torch
from rich.console import Console

from cutaway.cli import app
from cutaway.views.draw.terminal import terminal
from cutaway.views.html import html
from cutaway.views.kinds import KINDS
from cutaway.views.spec import pictures
from tests.views import samples

COMPASS = '''"""A toy: four numbers as the points of a compass."""

from rich.text import Text

from cutaway.views.kinds import Kind


def frame(result, field, sizes):
    return ((), "head", "") if tuple(sizes) == ("head",) and sizes["head"] == 4 else None


def terminal(p, width, pen):
    return [Text("  compass " + " ".join(f"{n}:{v[0]:.1f}" for n, v in zip(p.rows, p.values)))]


def markup(p):
    return f"<p class=compass>{'/'.join(p.rows)}</p>"


def figure(p, frame):
    frame.set_title("compass")
    frame.plot([0, 1], [1, 0], label="needle")


def size(p, width):
    return 2.5, 2.5


KIND = Kind(frame, *(f"toy_compass:{name}" for name in ("terminal", "markup", "figure", "size")))
'''


@pytest.fixture
def compass(tmp_path, monkeypatch):
    (tmp_path / "toy_compass.py").write_text(COMPASS, "utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    from toy_compass import KIND  # type: ignore[import-not-found]

    before = dict(KINDS)
    KINDS.clear()
    KINDS.update({"compass": KIND, **before})
    yield
    KINDS.pop("compass")
    sys.modules.pop("toy_compass")


def test_a_kind_of_one_file_is_drawn_everywhere(compass, tmp_path, capsys):
    result = samples.Shapes(flags=torch.tensor([1, -2, 3, 0]), labels={"head": ["n", "e", "s", "w"]})
    (picture,) = pictures(result)
    assert picture.kind == "compass"
    assert f"<p class=compass>{'/'.join(picture.rows)}</p>" in html(result)
    drawing = result.plot()
    assert drawing.get_size_inches().tolist() == [2.5, 2.5]
    assert drawing.axes[0].get_legend_handles_labels()[1] == ["needle"]
    console = Console(width=80)
    with console.capture() as said:
        console.print(terminal(result))
    assert "compass n:1.0 e:-2.0 s:3.0 w:0.0" in said.get()

    file = tmp_path / "points.safetensors"
    result.save(file)
    assert app.main(["open", str(file)]) == 0
    assert "compass n:1.0" in capsys.readouterr().out


def test_other_fields_keep_their_kinds(compass):
    assert {p.kind for p in pictures(samples.shapes(), "pattern")} == {"heat"}
    assert torch.isfinite(torch.tensor(pictures(samples.shapes(), "flags")[0].values)).all()
