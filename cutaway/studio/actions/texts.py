"""Results as a few lines of text, for agents: numbers with interval and control, a verdict, and what may be said."""

from __future__ import annotations

import math

from cutaway.core.refuse import Refused
from cutaway.core.result import Result, open_result
from cutaway.core.rung import NAMES, WORDS, exceeding
from cutaway.studio.messages import Claim, Judged, Lines, ResultOf
from cutaway.studio.session import Session
from cutaway.views.spec import Picture, checked, fields, pictures, valued
from cutaway.views.summary import summary
from cutaway.views.wording import spoken

MOST = 2000  # bytes of a text
_ENTRIES = 8
_ALL = 1 << 20  # nothing is pooled or left out before the largest are chosen


def text(session: Session, request: ResultOf) -> Lines:
    """Return the largest entries of a result, its verdict and the words that its rung allows, in at most 2 kB."""
    result = open_result(session.folder.result(request.result))
    return Lines(text=rendered(request.result, result, request.fields[0] if request.fields else None))


def judge(session: Session, request: Claim) -> Judged:
    """Return the words of a sentence about a result that its rung does not allow.

    Raises:
        Refused: the result has no rung.
    """
    result = open_result(session.folder.result(request.result))
    rung = result.record.get("rung")
    if rung not in NAMES:
        raise Refused(f"result {request.result!r}", "it has no rung", "choose the result of a method")
    beyond = exceeding(request.sentence, rung)
    return Judged(allowed=not beyond, beyond=beyond, rung=rung, instead=WORDS[rung].examples)


def rendered(name: str, result: Result, field: str | None = None, most: int = MOST) -> str:
    """Return a result in at most `most` bytes of text; what is left out is the smallest."""
    shown = checked(result, field or valued(result)[0][0])
    drawn = pictures(result, shown, bars=_ALL, rows=_ALL, columns=_ALL, panels=_ALL)
    head, tail = _head(result), _tail(name, result, shown)
    for entries in range(_ENTRIES, -1, -1):
        lines = "\n".join([*head, *_entries(drawn, entries), *tail])
        if len(lines.encode()) <= most:
            return lines
    return lines.encode()[: most - 3].decode("utf-8", "ignore") + "…"


def _head(result: Result) -> list[str]:
    record, rung = result.record, result.record.get("rung")
    words = f", whose words are “{WORDS[rung].examples}”" if rung in NAMES else ""
    return [
        f"{record.get('method', result.kind)}: {record.get('answers', '')}",
        f"control: {spoken(str(record.get('control', 'none')))}; rung: {rung}{words}",
    ]


def _entries(drawn: list[Picture], most: int) -> list[str]:
    """Return the largest cells of all panels, each with interval, control and verdict, and the count of verdicts."""
    cells = [(p, r, c) for p in drawn for r in range(len(p.rows)) for c in range(len(p.columns))]
    cells = [(p, r, c) for p, r, c in cells if not math.isnan(p.values[r][c])]
    largest = sorted(cells, key=lambda at: -abs(at[0].values[at[1]][at[2]]))[:most]
    lines = [f"{len(largest)} largest of {len(cells)}:"] if largest else []
    for p, r, c in largest:
        verdict = {True: "stands out", False: "does not stand out", None: ""}[p.stands_out(r, c)]
        lines.append("- " + "; ".join(x for x in (p.place(r, c), *p.facts(r, c), verdict) if x))
    judged = [v for p, r, c in cells if (v := p.stands_out(r, c)) is not None]
    if judged:
        mark = next((p.mark for p in drawn if p.mark), "")
        lines.append(f"verdict: {sum(judged)} of {len(judged)} stand out ({mark})")
    return lines


def _tail(name: str, result: Result, shown: str) -> list[str]:
    reasons = [f"no interval or control: {spoken(n)}, {why}" for n, why in list(result.reasons.items())[:2]]
    rest = [f for f in fields(result) if f != shown]
    lines = [*summary(result, shown), *reasons]
    lines += [f"other fields: {', '.join(rest)}"] if rest else []
    return [*lines, f"result: {name}", f"again: {result.record.get('command', '')}"]
