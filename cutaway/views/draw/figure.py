"""Pictures as matplotlib figures, for papers and notebooks. matplotlib is imported when a figure is drawn."""

from __future__ import annotations

import io
import math
import textwrap
from functools import partial
from typing import TYPE_CHECKING, Any

from cutaway.core.result import Result
from cutaway.views import palette
from cutaway.views.kinds import drawer
from cutaway.views.spec import Picture, pictures
from cutaway.views.wording import amount, number, spoken

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
else:  # run-time type checks must not load matplotlib
    Axes = Figure = Any

_CURVES = ("#2868ad", "#b85c0c", "#3d7d5a", "#7f4f9e", "#6b6f76", "#a83a5b")
_LETTER, _BESIDE = 0.062, 1.6  # inches: a letter of a tick's label, and what stands beside a frame
_HATCHES = ("////", "\\\\\\\\", "||||", "----", "xxxx", "....")
_STYLES = ("-", "--", ":", "-.", "-", "--")
_POSITIVE, _NEGATIVE, _WEAK, _NULL, _INK, _SOFT = "#2868ad", "#b85c0c", "#a7a59d", "#dedcd5", "#1c1e22", "#5c6169"


def figure(result: Result, field: str | None = None, *, width: float = 7.0, **options: Any) -> Figure:
    """Draw one field as a figure chosen by its axes, with interval and control where the result has them.

    Args:
        result: what to draw.
        field: which tensor field; the first if None.
        width: width of one panel in inches, at most.
        options: what `spec.pictures` takes (`text`, `bars`, `rows`, `columns`).

    Raises:
        Refused: no such field.
    """
    import matplotlib.figure

    found = pictures(result, field, **{"rows": 256, "columns": 256, **options})
    across = 1 if len(found) == 1 else 2
    down = math.ceil(len(found) / across)
    size = drawer(found[0].kind, "size")(found[0], width)
    drawing = matplotlib.figure.Figure(figsize=(size[0] * across, size[1] * down), layout="constrained")
    frames = drawing.subplots(down, across, squeeze=False).reshape(-1)
    for picture, frame in zip(found, frames, strict=False):
        drawer(picture.kind, "figure")(picture, frame)
        _finish(picture, frame)
    for frame in frames[len(found) :]:
        frame.set_axis_off()
    # Without pyplot nothing is global; notebooks find the picture through this method.
    drawing._repr_png_ = partial(_png, drawing)  # type: ignore[attr-defined]
    return drawing


def _png(drawing: Figure) -> bytes:
    out = io.BytesIO()
    drawing.savefig(out, format="png", dpi=110)
    return out.getvalue()


def usual_size(p: Picture, width: float) -> tuple[float, float]:
    """Return the size of a panel in inches."""
    return width * 0.85, 3.0


def heat_size(p: Picture, width: float) -> tuple[float, float]:
    """Return the size of a heat map in inches: wider cells where words are written into them."""
    across = 0.62 if p.words else 0.36
    return (
        min(max(3.6, 1.8 + across * len(p.columns)), max(width, 14.0 if p.words else width)),
        min(max(2.2, 1.1 + 0.3 * len(p.rows)), 11.0),
    )


def bars_size(p: Picture, width: float) -> tuple[float, float]:
    """Return the size of bars in inches."""
    return width * 0.85, 0.9 + 0.24 * max(len(p.rows), 2)


def strip_size(p: Picture, width: float) -> tuple[float, float]:
    """Return the size of a strip in inches."""
    return min(max(3.6, 0.55 * len(p.columns)), 14.0), 1.7


def number_size(p: Picture, width: float) -> tuple[float, float]:
    """Return the size of a single number in inches."""
    return 3.6, 1.0


def _finish(p: Picture, frame: Axes) -> None:
    parts = [spoken(p.title) + (f" · {p.panel}" if p.panel else ""), p.note]
    frame.set_title(_plain("   ".join(x for x in parts if x)), loc="left", fontsize=10)
    frame.tick_params(labelsize=8, length=0 if p.kind in ("heat", "strip") else 3, colors=_INK)
    for side, spine in frame.spines.items():
        spine.set_visible(p.kind == "line" and side in ("left", "bottom"))
        spine.set_color(_SOFT)


def draw_heat(p: Picture, frame: Axes) -> None:
    """Draw a heat map, with the words or marks of its cells."""
    image = _image(p, frame)
    frame.set_xlabel(spoken(p.column_axis), fontsize=9)
    frame.set_ylabel(spoken(p.row_axis), fontsize=9)
    _names(frame, p.columns, "x")
    _names(frame, p.rows, "y")
    if p.words:
        _write_words(p, frame)
    elif p.mark and (marked := _marked(p)):
        frame.scatter([c for _, c in marked], [r for r, _ in marked], s=5, c=[_ink(p, r, c) for r, c in marked])
        _explain(p, frame, "•", spoken(p.column_axis))
    bar = frame.figure.colorbar(image, ax=frame, fraction=0.04, pad=0.02)
    bar.set_label(_plain(p.unit or spoken(p.title)), fontsize=8)
    bar.ax.tick_params(labelsize=7)
    bar.outline.set_visible(False)  # type: ignore[operator]


def _explain(p: Picture, frame: Axes, sign: str, label: str) -> None:
    """Below the axis and its label, what a mark says and how often chance alone makes it."""
    width = int(13 * frame.figure.bbox.width / frame.figure.dpi / (1 + (len(frame.figure.axes) > 2)))
    said = [line for x in (f"{sign} {p.mark}", p.chance) for line in textwrap.wrap(x, max(width, 30))]
    frame.set_xlabel(_plain("\n".join([label, *said])), fontsize=8)


def _image(p: Picture, frame: Axes) -> Any:
    from matplotlib.colors import ListedColormap, Normalize

    steps = [palette.colour(n) for n in range(-palette.STEPS, palette.STEPS + 1)]
    colours = ListedColormap(steps if p.signed else steps[palette.STEPS :]).with_extremes(bad="#ffffff")
    limit = p.limit or 1.0
    scale = Normalize(-limit if p.signed else 0.0, limit)
    return frame.imshow(p.values, cmap=colours, norm=scale, aspect="auto", interpolation="nearest")


def _marked(p: Picture) -> list[tuple[int, int]]:
    return [(r, c) for r in range(len(p.rows)) for c in range(len(p.columns)) if p.stands_out(r, c)]


def _write_words(p: Picture, frame: Axes) -> None:
    for r, line in enumerate(p.words or ()):
        for c, word in enumerate(line):
            short = word if len(word) <= 9 else word[:8] + "…"
            frame.text(c, r, _plain(short), ha="center", va="center", fontsize=7, color=_ink(p, r, c))


def _ink(p: Picture, r: int, c: int) -> str:
    return palette.ink(palette.step(p.values[r][c], p.limit))


def _names(frame: Axes, names: tuple[str, ...], side: str) -> None:
    every = math.ceil(len(names) / 40)
    at = range(0, len(names), every)
    shown = [_plain(names[i] if len(names[i]) <= 18 else names[i][:17] + "…") for i in at]
    if side == "y":
        frame.set_yticks(list(at), shown)
        return
    longest = max(map(len, shown), default=0)
    spec = frame.get_subplotspec()
    across = frame.figure.get_figwidth() / (spec.get_gridspec().ncols if spec else 1) - _BESIDE  # type: ignore[union-attr]
    long = longest > 3 and (sum(len(n) + 1 for n in shown) > 44 or longest * _LETTER > across / len(shown))
    frame.set_xticks(
        list(at), shown, rotation=60 if long else 0, ha="right" if long else "center", rotation_mode="anchor"
    )


def draw_bars(p: Picture, frame: Axes) -> None:
    """Draw bars over their null bands, with intervals."""
    for r in range(len(p.rows)):
        value = p.values[r][0]
        if p.null_low is not None and p.null_high is not None:
            low, high = p.null_low[r][0], p.null_high[r][0]
            frame.barh(r, high - low, left=low, height=0.86, color=_NULL, label=_once(p.control, r))
        weak = p.stands_out(r, 0) is False
        frame.barh(r, value, height=0.52, color=_WEAK if weak else _POSITIVE if value >= 0 else _NEGATIVE)
        if p.low is not None and p.high is not None:
            named = _once("interval", r) or "_nolegend_"
            frame.hlines(r, p.low[r][0], p.high[r][0], color=_INK, linewidth=1, label=named)
    frame.axvline(0, color=_SOFT, linewidth=0.8)
    frame.set_yticks(range(len(p.rows)), [_plain(n) for n in p.rows])
    frame.invert_yaxis()
    frame.set_xlabel(_plain(p.unit), fontsize=9)
    if p.mark and any(p.stands_out(r, 0) is False for r in range(len(p.rows))):
        _explain(p, frame, "grey unless", p.unit)
    _legend(frame)


def draw_line(p: Picture, frame: Axes) -> None:
    """Draw a curve per row, with its interval and control."""
    x = list(range(len(p.columns)))
    for r, name in enumerate(p.rows):
        if p.null_low is not None and p.null_high is not None:
            _null_band(p, frame, r, x)
        if p.low is not None and p.high is not None:
            frame.fill_between(
                x, p.low[r], p.high[r], color=_CURVES[r % 6], alpha=0.2, linewidth=0, label=_once("interval", r)
            )
        frame.plot(
            x,
            p.values[r],
            _STYLES[r % 6],
            color=_CURVES[r % 6],
            marker="o",
            markersize=3.5,
            linewidth=1.8,
            label=_plain(name) if len(p.rows) > 1 else None,
        )
    low, high = p.extent()
    if p.unit == "rank":
        frame.set_yscale("log")
        frame.set_ylim(high * 1.3, 0.8)
    else:
        frame.set_ylim(low - 0.04 * (high - low), high + 0.04 * (high - low))
    _names(frame, p.columns, "x")
    frame.set_xlabel(spoken(p.column_axis), fontsize=9)
    frame.set_ylabel(_plain(p.unit), fontsize=9)
    frame.grid(axis="y", color=_NULL, linewidth=0.6)
    _legend(frame)


def _null_band(p: Picture, frame: Axes, r: int, x: list[int]) -> None:
    """Draw the control of a curve: grey if it is alone, else hatched in the curve's colour, each with its own slant."""
    assert p.null_low is not None
    assert p.null_high is not None
    look: dict[str, Any] = {"facecolor": _NULL, "linewidth": 0}
    if len(p.rows) > 1:
        look = {
            "facecolor": "none",
            "edgecolor": _CURVES[r % 6],
            "alpha": 0.45,
            "linewidth": 0,
            "hatch": _HATCHES[r % 6],
        }
    frame.fill_between(x, p.null_low[r], p.null_high[r], label=_once(p.control, r), **look)


def draw_strip(p: Picture, frame: Axes) -> None:
    """Draw the tokens of a prompt on their colours."""
    _image(p, frame)
    for c, name in enumerate(p.columns):
        frame.text(c, 0, _plain(name), ha="center", va="center", fontsize=8, color=_ink(p, 0, c))
    frame.set_xticks(range(len(p.columns)), [number(v, digits=2) for v in p.values[0]])
    frame.set_yticks([])
    frame.set_xlabel(_plain(p.unit or spoken(p.title)), fontsize=8)


def draw_number(p: Picture, frame: Axes) -> None:
    """Write a single number with its interval and control."""
    lines = [amount(p.values[0][0], p.unit), *p.facts(0, 0)[1:]]
    frame.text(0, 0.4, _plain("\n".join(lines)), fontsize=11, va="center", transform=frame.transAxes)
    frame.set_xticks([])
    frame.set_yticks([])


def _once(label: str, r: int) -> str | None:
    return _plain(label) if r == 0 and label else None


def _legend(frame: Axes) -> None:
    if frame.get_legend_handles_labels()[1]:
        frame.legend(fontsize=7, frameon=False)


def _plain(text: str) -> str:
    """Return the text that matplotlib does not read as mathematics."""
    return text.replace("$", r"\$")
