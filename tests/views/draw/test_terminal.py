"""Terminal pictures: every field, 80 columns and 40, without colour, in ASCII."""

from __future__ import annotations

import io
import math
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from rich.theme import Theme

from cutaway.views import palette
from cutaway.views.draw.terminal import Drawn, table, terminal
from cutaway.views.spec import fields, pictures
from tests.views import samples

EVERY = [(r, f) for r in samples.every() for f in fields(r)]


def shown(drawing, width=80, colour=False, encoding="utf-8", ground=None) -> str:
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding=encoding, write_through=True)
    system = "truecolor" if colour else None
    theme = Theme({"ground": ground} if ground else {})
    Console(
        file=file, width=width, color_system=system, force_terminal=colour, legacy_windows=False, theme=theme
    ).print(drawing)
    return raw.getvalue().decode(encoding)


@pytest.mark.parametrize(("result", "field"), EVERY, ids=[f"{r.kind}-{f}" for r, f in EVERY])
@pytest.mark.parametrize("width", [40, 80])
def test_every_field_fits_the_window(result, field, width):
    text = shown(terminal(result, field), width)
    assert text.strip()
    assert max(map(len, text.splitlines())) <= width
    assert "\x1b" not in text
    assert shown(terminal(result, field), width) == text


@pytest.mark.parametrize(("result", "field"), EVERY, ids=[f"{r.kind}-{f}" for r, f in EVERY])
def test_ascii_consoles_get_ascii(result, field):
    assert shown(terminal(result, field), encoding="ascii").isascii()


def test_no_color_is_honoured(monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    text = shown(terminal(samples.heads()), colour=True)
    assert "48;2" not in text
    assert "38;2" not in text
    monkeypatch.delenv("NO_COLOR")
    assert "48;2" in shown(terminal(samples.heads()), colour=True)


def test_bars_show_side_interval_and_control():
    lines = shown(terminal(samples.parts())).splitlines()
    row = next(line for line in lines if line.startswith("head 5.2"))
    assert row.index("█") < row.index("│")
    assert "−0.91 [−1.02, −0.804]" in row
    assert "━" in row
    assert "░" in row
    assert "range of 100 random heads" in lines[-3]
    assert lines[-2].startswith("  grey unless interval without 0 and outside the range")
    assert lines[-1] == "  chance alone marks at most about 1 of 32 cells"
    assert lines[1].startswith("head 4.1")


def test_heat_without_colour_keeps_sign_size_and_mark():
    text = shown(terminal(samples.heads()))
    assert "█*" in text
    assert "−▅*" in text
    assert "* interval without 0 and outside the pooled band of 60 random heads a cell" in text.replace("\n", "")


def test_heat_in_colour_writes_numbers():
    text = shown(terminal(samples.heads()), colour=True)
    assert "1.9*" in text
    assert "−1.3*" in text


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_colours_follow_the_ground_of_the_terminal(theme):
    p = pictures(samples.heads())[0]
    p = replace(p, limit=0.4, values=((0.4, -0.076, *p.values[0][2:]), *p.values[1:]))
    drawn = shown(Drawn(p), colour=True, ground="on white" if theme == "light" else "on black")
    strong, faint = (";".join(str(int(palette.colour(n, theme)[i : i + 2], 16)) for i in (1, 3, 5)) for n in (10, -10))
    assert f"48;2;{strong}m" in drawn, "a strong value has a ground"
    assert f"38;2;{faint}m" in drawn, "a weak one has ink on the terminal's own"
    assert "−.08" in drawn, "two digits would not fit"
    assert theme == "light" or shown(Drawn(p), colour=True) == drawn, "dark where nothing is said"


def test_all_columns_are_there_in_bands():
    text = shown(terminal(samples.lens()))
    for word in samples.PROMPT.split():
        assert word in text
    assert text.count("embed") == 2


def test_curves_show_both_ends_and_the_interval():
    assert "0.2 % → 86 % [82, 90] %" in shown(terminal(samples.lens(), "target"))
    assert "▁▁▁▁▃▃▅▅▇▇████  1210 → 1" in shown(terminal(samples.lens(), "rank"))


def test_table_is_ranked_with_interval_and_control():
    lines = shown(table(samples.parts(), n=3)).splitlines()
    assert [line.split()[1] for line in lines[1:]] == ["4.1", "4.2", "5.2"]
    assert "interval" in lines[0]
    assert "control" in lines[0]


def test_a_table_of_curves_has_an_entry_of_each():
    answer = torch.tensor([[0.9, 0.8, 0.7], [0.02, -0.1, 0.01], [0.3, 0.2, 0.1]]).T
    result = replace(samples.lens(3), answer=answer, labels={"candidate": ["loud", "quiet", "middle"]})
    lines = shown(table(result, "answer", n=4)).splitlines()[1:]
    assert [line.split(" ·")[0] for line in lines] == [*["candidate loud"] * 2, "candidate middle", "candidate quiet"]
    assert len(shown(table(result, "answer", n=2)).splitlines()) == 3


def test_missing_values_and_markup_are_plain():
    x = torch.tensor([[math.nan, 1.0]])
    assert "?" in shown(terminal(samples.Heads(effect=x)))
    assert shown(terminal(samples.Heads(effect=torch.full((2, 2), math.nan)))).strip()
    assert "??██" in shown(terminal(samples.Shapes(curve=torch.tensor([0.0, math.nan, 1.0]))))
    result = samples.Parts(contribution=torch.ones(1), labels={"component": ["[red]x[/red] :smile:"]})
    assert "[red]x[/red] :smile:" in shown(terminal(result))
    assert shown(terminal(samples.Shapes(edges=torch.zeros(0)))).strip()
    assert "no entries" in shown(terminal(samples.Shapes(curve=torch.zeros(0))))
