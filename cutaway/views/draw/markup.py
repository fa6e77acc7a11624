"""Pictures as HTML and inline SVG: no script needed, every label escaped, colours from custom properties.

Heat maps are tables (row names stay in sight while columns scroll, screen readers hear the headers); bars and lines
are SVG with percentage coordinates, so that they stretch while their text keeps its size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from html import escape

from cutaway.views import palette
from cutaway.views.axes import has_role
from cutaway.views.kinds import KINDS, drawer
from cutaway.views.spec import Picture, aligned
from cutaway.views.wording import amount, number, span, spoken, ticks

_ROWS_IN_TABLE = 400


def draw(picture: Picture, key: bool = True) -> str:
    """Draw a picture as a `<figure>`, with or without its legend."""
    body = drawer(picture.kind, "markup")(picture) + (legend(picture) if key else "")
    return f'<figure class="cw-fig cw-{picture.kind}">{_caption(picture)}{body}</figure>'


def table(picture: Picture) -> str:
    """Return the numbers of a picture, largest first beyond a page's worth, as an ordinary table."""
    cells = [(r, c) for r in range(len(picture.rows)) for c in range(len(picture.columns))]
    left_out = len(cells) - _ROWS_IN_TABLE
    if left_out > 0:
        kept = sorted(cells, key=lambda rc: -abs(_finite(picture.values[rc[0]][rc[1]])))[:_ROWS_IN_TABLE]
        cells = sorted(kept)
    heads = [spoken(a) for a in (picture.row_axis, picture.column_axis) if a]
    heads += ["word"] * (picture.words is not None) + [_unit(spoken(picture.title), picture.unit)]
    heads += ["interval"] * (picture.low is not None) + ["control"] * (picture.null_low is not None)
    rows = "".join(f"<tr>{''.join(_table_cells(picture, r, c))}</tr>" for r, c in cells)
    note = f"<p class=cw-note>{left_out} smaller entries left out</p>" if left_out > 0 else ""
    caption = f"<caption>{escape(picture.panel)}</caption>" if picture.panel else ""
    head = "".join(f"<th scope=col>{escape(h)}</th>" for h in heads)
    return (
        f'<div class=cw-scroll tabindex=0 role=region aria-label="numbers"><table class=cw-table>{caption}'
        f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>{note}"
    )


def _table_cells(p: Picture, r: int, c: int) -> list[str]:
    out = [f"<th scope=row>{escape(n)}</th>" for n, a in ((p.rows[r], p.row_axis), (p.columns[c], p.column_axis)) if a]
    if p.words:
        out.append(f"<td>{escape(p.words[r][c])}</td>")
    out.append(f"<td>{escape(amount(p.values[r][c], p.unit if p.unit == 'probability' else ''))}</td>")
    for low, high in ((p.low, p.high), (p.null_low, p.null_high)):
        if low is not None and high is not None:
            out.append(f"<td>{escape(span(low[r][c], high[r][c], p.unit))}</td>")
    return out


def _caption(p: Picture) -> str:
    if p.kind == "number":
        return ""
    main = f"<b>{escape(spoken(p.title))}</b>" + (f" · {escape(p.panel)}" if p.panel else "")
    unit = f" <span class=cw-unit>{escape(p.unit)}</span>" if p.unit not in ("", p.title) else ""
    if p.kind == "heat":
        unit += f" <span class=cw-unit>{escape(spoken(p.row_axis))} × {escape(spoken(p.column_axis))}</span>"
    note = f" <span class=cw-unit>{escape(p.note)}</span>" if p.note else ""
    return f"<figcaption>{main}{unit}{note}</figcaption>"


def legend(p: Picture) -> str:
    """Colour scale, what the marks mean, what the band is."""
    parts = []
    if p.kind in ("heat", "strip") and p.limit > 0:
        first = -palette.STEPS if p.signed else 0
        scale = "".join(f"<i class={palette.name(n)}></i>" for n in range(first, palette.STEPS + 1))
        low = amount(-p.limit, p.unit) if p.signed else "0"
        parts.append(
            f"<span class=cw-scale>{escape(low)} <span>{scale}</span> {escape(amount(p.limit, p.unit))}</span>"
        )
    if p.kind == "heat" and p.mark:
        parts.append(f"<span><i class=cw-dot></i>{escape(_meaning(p))}</span>")
    if p.kind in ("bars", "line") and p.low is not None:
        shape = "<i class=cw-whisker></i>" if p.kind == "bars" else "<i class=cw-bandkey></i>"
        parts.append(f"<span>{shape}interval</span>")
    if p.kind in ("bars", "line") and p.null_low is not None:
        parts.append(f"<span><i class=cw-nullkey></i>{escape(p.control)}</span>")
    if p.kind == "graph":
        parts.append("<span><i class=cw-solid></i>positive</span><span><i class=cw-dashed></i>negative</span>")
    if KINDS[p.kind].ranked and p.mark and _any_inside(p):
        parts.append(f"<span><i class=cw-weakkey></i>unless {escape(_meaning(p))}</span>")
    return f"<p class=cw-key>{''.join(parts)}</p>" if parts else ""


def draw_heat(p: Picture) -> str:
    """Draw a heat map as a table."""
    heads = "".join(f"<th scope=col><span>{escape(name)}</span></th>" for name in p.columns)
    rows = []
    for r, name in enumerate(p.rows):
        cells = "".join(_cell(p, r, c) for c in range(len(p.columns)))
        rows.append(f"<tr><th scope=row>{escape(name)}</th>{cells}</tr>")
    tall = p.words is None and max((len(n) for n in p.columns), default=0) > 3
    style = "cw-grid" + (" cw-words" if p.words else "") + (" cw-tall" if tall else "")
    # The last position is where a language model speaks, so a long row opens at its end.
    start = " data-end" if has_role(p.column_axis, "place") else ""
    label = escape(f"{spoken(p.title)} by {spoken(p.row_axis)} and {spoken(p.column_axis)}", quote=True)
    return (
        f'<div class=cw-scroll tabindex=0 role=region aria-label="{label}"{start}><table class="{style}"><thead><tr>'
        f"<th class=cw-corner>{escape(spoken(p.row_axis))}</th>{heads}</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _cell(p: Picture, r: int, c: int) -> str:
    value = p.values[r][c]
    ground = "nan" if math.isnan(value) else palette.name(palette.step(value, p.limit))
    marked = " m" if p.stands_out(r, c) else ""
    inside = escape(p.words[r][c]) if p.words else _short(value, p)
    return f'<td class="{ground}{marked}" title="{_tip(p, r, c)}">{inside}</td>'


def _short(value: float, p: Picture) -> str:
    """Return the value in few characters, and only where it matters."""
    if math.isnan(value) or p.limit <= 0 or abs(value) < 0.12 * p.limit or len(p.columns) > 48:
        return ""
    value = 100 * value if p.unit == "probability" else value
    text = number(value, digits=2) if abs(value) < 100 else number(round(value))
    return text.replace("0.", ".", 1) if text.startswith(("0.", "−0.")) else text


def _tip(p: Picture, r: int, c: int) -> str:
    return escape("\n".join([p.place(r, c), *p.facts(r, c)]).strip(), quote=True)


def draw_bars(p: Picture) -> str:
    """Draw a table with an SVG track per row."""
    x = _scale(*p.extent())
    rows = []
    for r, name in enumerate(p.rows):
        value = p.values[r][0]
        weak = p.stands_out(r, 0) is False
        rows.append(
            f'<tr class="cw-row{" weak" if weak else ""}" title="{_tip(p, r, 0)}" tabindex=0>'
            f"<th scope=row>{escape(name)}</th>"
            f"<td><svg class=cw-track width=100% height=22 aria-hidden=true>{_track(p, r, x)}</svg></td>"
            f"<td>{escape(aligned(value, p))}</td></tr>"
        )
    style = '"cw-rows cw-texts"' if has_role(p.row_axis, "example") else "cw-rows"
    return f"<table class={style}><tbody>{''.join(rows)}</tbody></table>"


def _track(p: Picture, r: int, x: Callable[[float], float]) -> str:
    zero, out = x(0.0), []
    value = p.values[r][0]
    if p.null_low is not None and p.null_high is not None and math.isfinite(p.null_low[r][0] + p.null_high[r][0]):
        out.append(_rect("cw-null", x(p.null_low[r][0]), x(p.null_high[r][0]), 1, 20))
    if math.isfinite(value):
        out.append(_rect("cw-pos" if value >= 0 else "cw-neg", zero, x(value), 5, 12))
    out.append(f'<line class=cw-zero x1="{zero:.2f}%" x2="{zero:.2f}%" y1=0 y2=22 />')
    if p.low is not None and p.high is not None and math.isfinite(p.low[r][0] + p.high[r][0]):
        low, high = x(p.low[r][0]), x(p.high[r][0])
        out.append(f'<line class=cw-err x1="{low:.2f}%" x2="{high:.2f}%" y1=11 y2=11 />')
        out += [f'<line class=cw-err x1="{at:.2f}%" x2="{at:.2f}%" y1=7.5 y2=14.5 />' for at in (low, high)]
    return "".join(out)


def _rect(style: str, a: float, b: float, y: float, height: float) -> str:
    low, high = sorted((a, b))
    return (
        f'<rect class={style} x="{low:.2f}%" width="{max(high - low, 0.15):.2f}%" y={y:g} height={height:g} rx=1.5 />'
    )


def draw_line(p: Picture) -> str:
    """Draw curves as SVG, with their key."""
    low, high = p.extent()
    y = _rank_scale(high) if p.unit == "rank" else _scale(low, high, 96, 4)
    marks = _rank_ticks(high) if p.unit == "rank" else ticks(low, high, 4)
    x = _scale(0, max(len(p.columns) - 1, 1), 3, 97)
    side = "".join(
        f'<span style="top:{y(m):.2f}%">{escape(amount(m, p.unit if p.unit == "probability" else ""))}</span>'
        for m in marks
    )
    lines = "".join(f'<line class=cw-rule x1=0 x2="100%" y1="{y(m):.2f}%" y2="{y(m):.2f}%" />' for m in marks)
    bands = "".join(_curve_bands(p, r, x, y) for r in range(len(p.rows)))
    dots = "".join(_dot(p, r, c, x, y) for r in range(len(p.rows)) for c in range(len(p.columns)))
    every = math.ceil(len(p.columns) / 16)
    wide = every > 1 and len(p.columns[0]) > 3  # a word as the first label takes the place of the second
    shown = [c for c in range(0, len(p.columns), max(every, 1)) if not (wide and c == every)]
    foot = "".join(f'<span style="left:{x(c):.2f}%">{escape(p.columns[c])}</span>' for c in shown)
    stretched = f'<svg viewBox="0 0 100 100" preserveAspectRatio=none width="100%" height="100%">{bands}</svg>'
    axis = spoken(p.column_axis) + (" → depth" if p.column_axis == "layer" else "")
    label = escape(f"{spoken(p.title)} over {spoken(p.column_axis)}", quote=True)
    return (
        f"{_curves_key(p)}<div class=cw-chart><div class=cw-side>{side}</div>"
        f'<svg class=cw-plot width="100%" height=210 role=group aria-label="{label}">'
        f"{lines}{stretched}{dots}</svg><div class=cw-foot>{foot}</div><p class=cw-axis>{escape(axis)}</p></div>"
    )


def _curves_key(p: Picture) -> str:
    if len(p.rows) < 2:
        return ""
    keys = "".join(f"<span><i class='cw-curvekey k{r % 6}'></i>{escape(n)}</span>" for r, n in enumerate(p.rows))
    return f"<p class=cw-key>{keys}</p>"


def _curve_bands(p: Picture, r: int, x: Callable[[float], float], y: Callable[[float], float]) -> str:
    out = []
    for style, low, high in (("cw-null", p.null_low, p.null_high), (f"cw-band k{r % 6}", p.low, p.high)):
        if low is not None and high is not None:
            for run in _runs(low[r], high[r]):
                there = [f"{x(c):.2f},{y(high[r][c]):.2f}" for c in run]
                back = [f"{x(c):.2f},{y(low[r][c]):.2f}" for c in reversed(run)]
                out.append(f'<polygon class="{style}" points="{" ".join(there + back)}" />')
    for run in _runs(p.values[r]):
        points = " ".join(f"{x(c):.2f},{y(p.values[r][c]):.2f}" for c in run)
        out.append(f'<polyline class="cw-curve k{r % 6}" vector-effect=non-scaling-stroke points="{points}" />')
    return "".join(out)


def _dot(p: Picture, r: int, c: int, x: Callable[[float], float], y: Callable[[float], float]) -> str:
    if not math.isfinite(p.values[r][c]):
        return ""
    at = f'cx="{x(c):.2f}%" cy="{y(p.values[r][c]):.2f}%"'
    return (
        f"<g class=cw-point tabindex=0 role=img><title>{_tip(p, r, c)}</title>"
        f'<circle class=cw-hit {at} r=11 /><circle class="cw-mark k{r % 6}" {at} r=3.5 /></g>'
    )


def draw_strip(p: Picture) -> str:
    """Draw the tokens of a prompt as a list."""
    tokens = []
    for c, name in enumerate(p.columns):
        value = p.values[0][c]
        ground = "nan" if math.isnan(value) else palette.name(palette.step(value, p.limit))
        below = "" if math.isnan(value) else escape(number(100 * value if p.unit == "probability" else value, digits=2))
        word = f"{escape(name)} → {escape(p.words[0][c])}" if p.words else escape(name)
        tokens.append(f'<li title="{_tip(p, 0, c)}" tabindex=0><b class={ground}>{word}</b><small>{below}</small></li>')
    return f"<ol class=cw-tokens>{''.join(tokens)}</ol>"


def draw_number(p: Picture) -> str:
    """Write a single number as a paragraph."""
    facts = p.facts(0, 0)[1:]
    more = f" <small>{escape(', '.join(facts))}</small>" if facts else ""
    return f"<p><span>{escape(spoken(p.title))}</span> <b>{escape(amount(p.values[0][0], p.unit))}</b>{more}</p>"


def _scale(low: float, high: float, start: float = 1.5, end: float = 98.5) -> Callable[[float], float]:
    width = (high - low) or 1.0
    return lambda v: start + (end - start) * (v - low) / width


def _rank_scale(worst: float) -> Callable[[float], float]:
    depth = math.log10(worst)
    return lambda v: 4 + 92 * math.log10(max(v, 1.0)) / depth


def _rank_ticks(worst: float) -> list[float]:
    return [10.0**k for k in range(int(math.log10(worst)) + 1)]


def _runs(*rows: tuple[float, ...]) -> list[list[int]]:
    """Stretches of columns where every row is finite."""
    out: list[list[int]] = [[]]
    for c, cells in enumerate(zip(*rows, strict=True)):
        if all(map(math.isfinite, cells)):
            out[-1].append(c)
        elif out[-1]:
            out.append([])
    return [run for run in out if run]


def _finite(v: float) -> float:
    return -1.0 if math.isnan(v) else v


def _any_inside(p: Picture) -> bool:
    return any(p.stands_out(r, 0) is False for r in range(len(p.rows)))


def _meaning(p: Picture) -> str:
    return "; ".join(x for x in (p.mark, p.chance) if x)


def _unit(title: str, unit: str) -> str:
    return f"{title} ({unit})" if unit not in ("", title) else title
