"""Pictures for a terminal: rich renderables that keep their meaning without colour, in ASCII, and at 80 columns.

Sign is a side or a minus, size is a length or a block's height, and colour only repeats it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from rich.cells import cell_len, set_cell_size
from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.style import Style
from rich.table import Table
from rich.text import Text

from cutaway.core.result import Result
from cutaway.views import palette
from cutaway.views.axes import has_role
from cutaway.views.kinds import KINDS, drawer
from cutaway.views.spec import Picture, aligned, pictures
from cutaway.views.wording import amount, number, span, spoken

_POSITIVE, _NEGATIVE, _WEAK = "#5b9bd8", "#dd8a3a", "grey58"
_UNIT = 12  # the longest unit, in columns, that fits into the head of a table
_CELL = 8  # the most columns that a word gets in a heat map
_FAINT = 2  # steps of a colour scale that have coloured ink in place of a coloured ground
_NAMED, _NAME = 12, 16  # the most columns of a heat map that get room for their names, and the longest such name


def terminal(result: Result, field: str | None = None, **options: Any) -> RenderableType:
    """Draw one field as a rich renderable chosen by its axes.

    Args:
        result: what to draw.
        field: which tensor field; the first if None.
        options: what `spec.pictures` takes (`text`, `bars`, `rows`, `columns`).

    Raises:
        Refused: no such field.
    """
    return Group(
        *(Drawn(p) for p in pictures(result, field, **{"rows": 40, "columns": 64, "bars": 12, "edges": 12, **options}))
    )


def table(result: Result, field: str | None = None, *, n: int = 10) -> RenderableType:
    """Tabulate the `n` largest entries of a field with interval and control; of several curves, some of each."""
    drawn = Table(box=None, pad_edge=False, header_style="dim")
    rows: list[tuple[float, bool, list[str]]] = []
    for p in pictures(result, field, bars=10**6, edges=10**6):
        apart = p.kind == "line" and len(p.rows) <= n  # the question of curves is how they differ
        for r, line in enumerate(p.values):
            sizes = [_size(value) for value in line]
            for c, size in enumerate(sizes):
                first = apart and c == sizes.index(max(sizes))
                rows.append((size, first, [p.place(r, c), *_numbers(p, r, c)]))
        heads = [spoken(p.title) + (f" ({p.unit})" if 0 < len(p.unit) <= _UNIT else "")]  # else the title says it
        heads += ["interval"] * (p.low is not None) + ["control"] * (p.null_low is not None)
    drawn.add_column("where", no_wrap=True)
    for head in heads:
        drawn.add_column(head, justify="right")
    chosen = sorted(rows, key=lambda row: (not row[1], -row[0]))[:n]
    for _, _, row in sorted(chosen, key=lambda row: -row[0]):
        drawn.add_row(*(Text(cell) for cell in row))
    return drawn


@dataclass(frozen=True)
class Pen:
    """Abilities of the console.

    Attributes:
        ascii: True if it shows ASCII only.
        colour: True if it shows colours.
        theme: whether its ground is light or dark, as far as it says so.
    """

    ascii: bool
    colour: bool
    theme: palette.Theme = "dark"


@dataclass(frozen=True)
class Drawn:
    """A picture as a rich renderable, fitted to the width of the console."""

    picture: Picture

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        p, pen = (
            self.picture,
            Pen(options.ascii_only, console.color_system is not None and not console.no_color, _theme(console)),
        )
        body = drawer(p.kind, "terminal")(p, options.max_width, pen) if p.rows and p.columns else [Text("  no entries")]
        for line in [_title(p), *body, *_key(p, pen)]:
            line.no_wrap = p.kind != "strip" and line in body
            if line:
                yield _safe(line) if pen.ascii else line


def _title(p: Picture) -> Text:
    text = Text(spoken(p.title), style="bold")
    parts = [p.panel, p.unit if p.unit != p.title else "", p.note]
    if p.kind == "heat":
        parts.insert(2, f"{spoken(p.row_axis)} × {spoken(p.column_axis)}")
    return text.append("".join(f"  {x}" for x in parts if x), style="not bold dim") if p.kind != "number" else Text()


def _key(p: Picture, pen: Pen) -> list[Text]:
    if p.kind in ("heat", "strip") and p.limit > 0:
        text = Text("  ", style="dim").append(f"{amount(-p.limit, p.unit)} " if p.signed else "0 ")
        for n in range(-10 if p.signed else 2, 11, 4 if p.signed else 2):
            text.append("  " if pen.colour else _minus(n).strip() + _block(n, pen), style=_ground(n, pen.theme))
        text.append(f" {amount(p.limit, p.unit)}")
        return [text, *_meaning("*", p)] if not p.words and p.kind == "heat" else [text]
    if KINDS[p.kind].ranked and (p.low is not None or p.null_low is not None):
        text = Text("  ", style="dim")
        text.append(f"{_glyphs(pen)['whisker']} interval   " if p.low is not None else "")
        text.append(f"{_glyphs(pen)['null']} {p.control}" if p.null_low is not None else "")
        return (
            [text, *_meaning("grey unless", p)]
            if any(p.stands_out(r, 0) is False for r in range(len(p.rows)))
            else [text]
        )
    return []


def _meaning(sign: str, p: Picture) -> list[Text]:
    """Return the meaning of a mark, and how often chance alone makes it."""
    return [Text(f"  {x}", "dim") for x in ([f"{sign} {p.mark}", p.chance] if p.mark else []) if x]


def _numbers(p: Picture, r: int, c: int) -> list[str]:
    out = [aligned(p.values[r][c], p)]
    for low, high in ((p.low, p.high), (p.null_low, p.null_high)):
        if low is not None and high is not None:
            out.append(span(low[r][c], high[r][c], p.unit))
    return out


def draw_bars(p: Picture, width: int, pen: Pen) -> list[Text]:
    """Draw one bar per row over its null band, with value and interval."""
    share = 2 if p.kind == "graph" or has_role(p.row_axis, "example") else 4  # an edge names two nodes
    label = min(max((cell_len(n) for n in p.rows), default=1), max(8, width // share))
    values = [aligned(p.values[r][0], p) for r in range(len(p.rows))]
    spans = [span(p.low[r][0], p.high[r][0], p.unit) if p.low and p.high else "" for r in range(len(p.rows))]
    right = max(map(len, values), default=0) + 1 + max(map(len, spans), default=0) + 1
    room = max(10, width - label - right - 3)
    lines = []
    for r, name in enumerate(p.rows):
        line = Text(f"{_cut(name, label)} ")
        line.append(_track(p, r, room, pen))
        line.append(f" {values[r]:>{max(map(len, values))}}", style="dim" if p.stands_out(r, 0) is False else "bold")
        line.append(f" {spans[r]}", style="dim")
        line.rstrip()
        lines.append(line)
    return lines


def _track(p: Picture, r: int, room: int, pen: Pen) -> Text:
    """Return a bar from zero, laid over its null band, with the whisker on top: one character a step."""
    low, high = p.extent()
    glyph, value = _glyphs(pen), p.values[r][0]

    def at(v: float) -> int:
        return round((v - low) / (high - low) * (room - 1))

    cells: list[tuple[str, str]] = [(" ", "")] * room
    if p.null_low and p.null_high and math.isfinite(p.null_low[r][0] + p.null_high[r][0]):
        for i in range(at(p.null_low[r][0]), at(p.null_high[r][0]) + 1):
            cells[i] = (glyph["null"], "grey50")
    if math.isfinite(value):
        style = _WEAK if p.stands_out(r, 0) is False else _POSITIVE if value >= 0 else _NEGATIVE
        for i in range(*sorted((at(0.0), at(value) + (value >= 0)))):
            cells[i] = (glyph["bar"], style)
        if not pen.ascii and value >= 0:
            rest = (value - low) / (high - low) * (room - 1) - at(value) + (0.5 if at(value) > at(0.0) else 0.0)
            cells[at(value)] = ("▏▎▍▌▋▊▉█"[min(7, max(0, int(8 * rest)))], style)
    if p.low and p.high and math.isfinite(p.low[r][0] + p.high[r][0]):
        for i in range(at(p.low[r][0]), at(p.high[r][0]) + 1):
            cells[i] = (glyph["whisker"], "default" if cells[i][0] != glyph["bar"] else f"bold {cells[i][1]}")
    if low < 0 and cells[at(0.0)][0] in (" ", glyph["null"]):
        cells[at(0.0)] = (glyph["zero"], "dim")
    text = Text()
    for character, style in cells:
        text.append(character, style=style)
    return text


def draw_heat(p: Picture, width: int, pen: Pen) -> list[Text]:
    """Draw a heat map in as many bands of columns as the width demands."""
    side = min(max([len(spoken(p.row_axis)), *(cell_len(n) for n in p.rows)]), max(8, width // 4))
    cells = [_cell_width(p, c, pen) for c in range(len(p.columns))]
    lines: list[Text] = []
    for chosen in _packed(cells, width - side - 1):
        head = Text(f"{spoken(p.row_axis):>{side}} ", style="dim")
        for c in chosen:
            head.append(_heading(p, c, cells[c], pen))
        lines.append(head)
        for r, name in enumerate(p.rows):
            line = Text(_cut(name, side, right=True) + " ", style="dim")
            for c in chosen:
                line.append(_heat_cell(p, r, c, cells[c], pen))
            lines.append(line)
    return lines


def _heading(p: Picture, c: int, width: int, pen: Pen) -> str:
    name = p.columns[c]
    if p.words:
        return (" " if pen.colour else "") + _cut(name, width - 1 - pen.colour) + " "
    return _cut(name, width - 1, right=pen.colour) + " " if cell_len(name) > 1 or pen.colour else f" {name}  "


def _cell_width(p: Picture, c: int, pen: Pen) -> int:
    """Return the characters of one column: its longest word with a block and a gap, or a number or a block with its
    mark.
    """
    if not p.words:
        least = 5 if pen.colour else 4
        named = len(p.columns) <= _NAMED and not has_role(p.column_axis, "place", "depth", "unit")
        return max(least, min(_NAME, cell_len(p.columns[c]) + 1)) if named else least
    return min(_CELL, max(cell_len(w) for w in (p.columns[c], *(line[c] for line in p.words)))) + 3


def _packed(cells: list[int], room: int) -> list[list[int]]:
    """Return the columns in as many bands as the width demands."""
    bands: list[list[int]] = [[]]
    for c, cell in enumerate(cells):
        if bands[-1] and sum(cells[i] for i in bands[-1]) + cell > room + 1:
            bands.append([])
        bands[-1].append(c)
    return bands


def _heat_cell(p: Picture, r: int, c: int, width: int, pen: Pen) -> Text:
    """Return a word or a number on its colour; without colour, a sign and a block say how large the value is."""
    value = p.values[r][c]
    n = palette.step(value, p.limit)
    if math.isnan(value):
        return Text(set_cell_size(" ?", width), style="dim")
    mark = "*" if p.stands_out(r, c) else " "
    if p.words and pen.colour:
        return Text().append(" " + _cut(p.words[r][c], width - 2), style=_ground(n, pen.theme)).append(" ")
    if p.words:
        return Text(f"{_cut(p.words[r][c], width - 3)} {_block(n, pen)} ")
    if pen.colour:
        return Text(f"{_brief(value, p):>{width - 1}}{mark}", style=_ground(n, pen.theme))
    return Text(f"{_minus(n)}{_block(n, pen)}{mark}{' ' * (width - 3)}")


def _brief(value: float, p: Picture) -> str:
    """Return a value in four characters, and only where it matters."""
    if abs(value) < 0.1 * p.limit or p.limit <= 0:
        return "·"
    value = 100 * value if p.unit == "probability" else value
    text = number(value, digits=2)
    text = text.replace("0.", ".", 1) if text.startswith(("0.", "−0.")) else text
    if len(text) > 4 and abs(value) < 1:
        text = number(value, digits=1).replace("0.", ".", 1)
    return text if len(text) <= 4 else number(round(value)) if abs(value) < 1000 else _minus(value) + "big"


def _minus(value: float) -> str:
    return "−" if value < 0 else " "


def draw_line(p: Picture, width: int, pen: Pen) -> list[Text]:
    """Draw one row of blocks per curve, with first and last value; the best rank is drawn tallest."""
    p = _thinned(p, max(8, width - 46))
    low, high = p.extent()
    step = 2 if 2 * len(p.columns) + 46 <= width else 1
    names = max((cell_len(n) for n in p.rows), default=0)
    lines: list[Text] = []
    for r, name in enumerate(p.rows):
        line = Text(f"  {_cut(name, names)} " if names else "  ")
        for value in p.values[r]:
            height = _height(value, low, high, p.unit)
            line.append(("?" if height is None else _block(height, pen)) * step, style=_POSITIVE)
        for part in _ends(p, r):  # what does not fit goes to a line of its own
            if line.cell_len + 1 + part.cell_len > width:
                lines.append(line)
                line = Text(" " * (names + 3 if names else 2))
            line.append(" ").append_text(part)
        lines.append(line)
    first, last = p.columns[0], p.columns[-1]
    gap = max(1, step * len(p.columns) - cell_len(first) - cell_len(last))
    foot = f"  {' ' * (names + 1 if names else 0)}{first}{' ' * gap}{last}  {spoken(p.column_axis)}"
    return [*lines, Text(foot, style="dim")]


def _ends(p: Picture, r: int) -> Iterator[Text]:
    """First and last value of a curve, and the last one's interval and control; the unit stands in the title."""
    percent = p.unit == "probability"

    def said(value: float) -> str:
        return amount(value, p.unit) if percent else aligned(value, p)

    yield Text(f" {said(p.values[r][0])} → {said(p.values[r][-1])}")
    for low, high, word in ((p.low, p.high, ""), (p.null_low, p.null_high, "control ")):
        if low is not None and high is not None:
            a, b = low[r][-1], high[r][-1]
            bounds = span(a, b, p.unit) if percent or math.isnan(a + b) else f"[{said(a)}, {said(b)}]"
            yield Text(f"{word}{bounds}", style="dim italic" if word else "dim")


def _thinned(p: Picture, most: int) -> Picture:
    """Return a long curve by every n-th of its points, its last among them."""
    every = math.ceil(len(p.columns) / most)
    at = sorted(range(len(p.columns) - 1, -1, -every))
    grids = {
        n: tuple(tuple(row[i] for i in at) for row in grid) if (grid := getattr(p, n)) is not None else None
        for n in ("values", "low", "high", "null_low", "null_high")
    }
    return replace(p, columns=tuple(p.columns[i] for i in at), words=None, **grids)


def _height(value: float, low: float, high: float, unit: str) -> int | None:
    if not math.isfinite(value):
        return None
    if unit == "rank":
        return max(1, round(10 * (1 - math.log(max(value, 1.0)) / math.log(high * 1.05))))
    return max(1, round(10 * (value - low) / (high - low)))


def draw_strip(p: Picture, width: int, pen: Pen) -> list[Text]:
    """Write the tokens of a prompt on their colours."""
    text = Text("  ")
    for c, name in enumerate(p.columns):
        n = palette.step(p.values[0][c], p.limit)
        size = "" if pen.colour else _minus(n).strip() + _block(n, pen)
        text.append(f" {name}{size} ", style=_ground(n, pen.theme)).append(" ")
    return [text]


def draw_number(p: Picture, width: int, pen: Pen) -> list[Text]:
    """Write a single number with its interval and control."""
    first, *more = p.facts(0, 0)
    return [Text(first, style="bold").append("".join(f"  {m}" for m in more), style="not bold dim")]


def _block(size: int, pen: Pen) -> str:
    """Return a character whose ink grows with a size from 0 to 10."""
    marks = " .:-=+*#%@@" if pen.ascii else " ▁▁▂▃▄▄▅▆▇█"
    return marks[max(0, min(10, abs(size)))]


def _glyphs(pen: Pen) -> dict[str, str]:
    if pen.ascii:
        return {"bar": "#", "null": ".", "whisker": "-", "zero": "|"}
    return {"bar": "█", "null": "░", "whisker": "━", "zero": "│"}


def _ground(n: int, theme: palette.Theme) -> Style:
    """Black or white on a step's colour; zero keeps the terminal's own ground, and so does a step that hardly differs
    from it: where the terminal is of the other theme than it says, that would be the strongest of all.
    """
    if abs(n) <= _FAINT:
        ink = palette.colour(palette.STEPS if n > 0 else -palette.STEPS, theme)
        return Style(color=ink, dim=False) if n else Style(dim=False)
    return Style(color=palette.ink(n, theme), bgcolor=palette.colour(n, theme), dim=False)


def _theme(console: Console) -> palette.Theme:
    """Return what the console's style `ground` says of the terminal's own: light or dark, as most are."""
    ground = console.get_style("ground", default="on black").bgcolor
    return "light" if ground is not None and ground.name == "white" else "dark"


def _cut(text: str, width: int, right: bool = False) -> str:
    if cell_len(text) > width:
        return set_cell_size(text, width - 1) + "…" if width > 1 else text[:width]
    return " " * (width - cell_len(text)) + text if right else set_cell_size(text, width)


def _safe(line: Text) -> Text:
    """Return the line in ASCII: a true minus becomes a hyphen, what cannot be said becomes its escape."""
    out = Text(style=line.style, no_wrap=line.no_wrap)
    swap = str.maketrans({"−": "-", "×": "x", "…": "~", "→": ">", "·": ".", "“": '"', "”": '"', "⏎": "~", "–": "-"})
    for text, style in _pieces(line):
        out.append(text.translate(swap).encode("ascii", "backslashreplace").decode(), style=style)
    return out


def _pieces(line: Text) -> list[tuple[str, Style]]:
    console = Console(color_system=None, width=10**4)
    return [(s.text, s.style or Style.null()) for s in line.render(console, end="")]


def _size(value: float) -> float:
    return -1.0 if math.isnan(value) else abs(value)
