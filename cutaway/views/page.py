"""Several results as one HTML file: a report that opens from disk, on a phone, in the dark, on paper, offline.

The policy in its head forbids every request; style, script and pictures are all inside the file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, Literal

from cutaway.core.files import write_text
from cutaway.core.result import Result
from cutaway.views import palette
from cutaway.views.html import computed, drawn, fold, numbers
from cutaway.views.spec import fields
from cutaway.views.style import asset, style
from cutaway.views.wording import spoken, visible

POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
Tone = Literal["agrees", "disagrees", "unknown"]
_LINE = '<figure class="cw-fig cw-line">'
_SIGNS: dict[Tone, str] = {"agrees": "✓", "disagrees": "✗", "unknown": "?"}


@dataclass(frozen=True)
class Badge:
    """A short verdict beside a finding, such as "agrees with known truth"; `detail` says what was compared."""

    text: str
    tone: Tone = "unknown"
    detail: str = ""


@dataclass(frozen=True)
class Show:
    """A field of a result to show in a section, with a caption and the options of `spec.pictures`."""

    result: Result
    field: str | None = None
    caption: str = ""
    options: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Section:
    """A question of a report with its answer: prose, pictures, verdicts, and how it was all computed."""

    heading: str
    question: str = ""
    prose: Sequence[str] = ()
    shows: Sequence[Show | Result] = ()
    badges: Sequence[Badge] = ()


@dataclass(frozen=True)
class Opening:
    """The head of a report: the prompt with the answer it got, the summary in words, verdicts, and key facts."""

    prompt: str = ""
    answer: str = ""
    foil: str = ""
    summary: Sequence[str] = ()
    badges: Sequence[Badge] = ()
    facts: Mapping[str, str] | None = None


def report(
    title: str, sections: Sequence[Section], path: str | Path | None = None, *, opening: Opening | None = None
) -> str:
    """Return the report as one self-contained HTML page, also written to `path` if given.

    Args:
        title: heading of the page.
        sections: the questions, in reading order.
        path: file to write.
        opening: prompt, answer, summary and facts shown before the sections.
    """
    body = "".join(_section(n, s) for n, s in enumerate(sections, 1))
    page = (
        "<!doctype html>\n<html lang=en><head><meta charset=utf-8>"
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name=viewport content="width=device-width, initial-scale=1">'
        '<meta name=color-scheme content="light dark"><meta name=generator content=cutaway>'
        f"<title>{escape(title)}</title><style>{style()}{asset('page.css')}</style></head>"
        f'<body class=cw><a class=skip href="#s1">Skip to the first finding</a>{_bar()}'
        f"<div class=page><main>{_head(title, opening or Opening())}{body}</main>{_contents(sections)}</div>"
        f"{_foot()}<div id=tip role=status hidden></div><script>{asset('marks.js')}{asset('page.js')}</script>"
        "</body></html>\n"
    )
    if path is not None:
        write_text(path, page)
    return page


def _bar() -> str:
    strata = "".join(
        f'<rect x=0 y="{3 + 4 * i}" width="{22 - 3 * i}" height=2.6 rx=1.3 style="fill:var(--{palette.name(n)})" />'
        for i, n in enumerate((-10, -6, 5, 8, 10))
    )
    return (
        f"<header class=bar><span class=brand><svg width=24 height=24 aria-hidden=true>{strata}</svg>cutaway</span>"
        "<button type=button id=theme hidden><span aria-hidden=true>◐</span> <span>theme: auto</span></button></header>"
    )


def _head(title: str, o: Opening) -> str:
    quote = ""
    if o.prompt:
        answer = f" <ins>{escape(visible(o.answer))}</ins>" if o.answer else ""
        foil = f"<p class=foil>rather than <s>{escape(visible(o.foil))}</s></p>" if o.foil else ""
        quote = f"<div class=quote><blockquote>{escape(o.prompt)}{answer}</blockquote>{foil}</div>"
    summary = "".join(_said(p) for p in o.summary)
    summary = f"<div class=summary>{summary}</div>" if summary else ""
    facts = "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in (o.facts or {}).items())
    facts = f"<dl class=facts>{facts}</dl>" if facts else ""
    return f"<div class=head><h1>{escape(title)}</h1>{quote}{_badges(o.badges)}{summary}{facts}</div>"


def _said(text: str) -> str:
    """Return a paragraph in which no number is parted from its per cent."""
    return f"<p>{escape(text).replace(' %', '&nbsp;%')}</p>"


def _contents(sections: Sequence[Section]) -> str:
    items = "".join(f'<li><a href="#s{n}">{escape(s.heading)}</a></li>' for n, s in enumerate(sections, 1))
    return f'<nav aria-label="Contents"><ol>{items}</ol></nav>' if len(sections) > 1 else ""


def _section(n: int, s: Section) -> str:
    shows = [x if isinstance(x, Show) else Show(x) for x in s.shows]
    question = f"<p class=question>{escape(s.question)}</p>" if s.question else ""
    prose = "".join(_said(p) for p in s.prose)
    prose = f"<div class=prose>{prose}</div>" if prose else ""
    pictures = "".join(_show(x) for x in shows)
    tables = "".join(_tables(x) for x in shows)
    return (
        f"<section id=s{n} aria-labelledby=h{n}><h2 id=h{n}><span aria-hidden=true>{n}</span>{escape(s.heading)}</h2>"
        f"{question}{_badges(s.badges)}{prose}<div class=shows>{pictures}</div>"
        f"<div class=folds>{fold('Numbers', tables)}{computed(x.result for x in shows)}</div></section>"
    )


def _show(x: Show) -> str:
    caption = f"<p class=caption>{escape(x.caption)}</p>" if x.caption else ""
    picture = drawn(x.result, x.field, **(x.options or {}))
    beside = " beside" if picture.startswith(_LINE) else ""  # curves read well at half the width
    return f'<div class="show{beside}">{picture}{caption}</div>'


def _tables(x: Show) -> str:
    title = escape(spoken(x.field or fields(x.result)[0]))
    return f"<h3>{title}</h3>{numbers(x.result, x.field, **(x.options or {}))}"


def _badges(badges: Sequence[Badge]) -> str:
    items = "".join(
        f'<li class="{b.tone}"><i aria-hidden=true>{_SIGNS[b.tone]}</i><b>{escape(b.text)}</b>'
        + (f" <span>{escape(b.detail)}</span>" if b.detail else "")
        + "</li>"
        for b in badges
    )
    return f"<ul class=badges>{items}</ul>" if items else ""


def _foot() -> str:
    return (
        "<footer><p>Made by cutaway. Every number stands beside its control and its interval where one was computed; "
        "where a claim has neither, “how computed” says why. This file asks nothing of any network.</p></footer>"
    )
