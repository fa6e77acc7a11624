"""The latents of a dictionary of a store as a table of SQLite in memory: sorted, filtered and paged there.

Pages follow each other by a cursor, the sort value and the number of the last latent, so that a page far down costs as
much as the first one. Flags of health: `dead` (active on no token), `rare` (on fewer than ten), `dense` (on more than a
tenth), `start` (over half of its largest examples stand on the first two positions of their contexts).
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from cutaway.core.latent_row import LatentRow
from cutaway.core.refuse import Keyword, Refused
from cutaway.dictionaries.evaluation.firing import DENSE
from cutaway.features.store.feature_store import FeatureStore
from cutaway.features.store.meta import NONE, Label

SORTS = ("latent", "density", "largest", "mean", "F1", "label")
RARE = 10
_START = 2  # positions of a context
_LARGE = 1 << 63  # beyond the integers of SQLite
_TABLE = """
create table latent (latent integer primary key, density real, low real, high real, largest real, mean real,
    peak text, flags text, label text, source text, F1 real, scores text)
"""
_WHERE: dict[str, str] = {
    "all": "1",
    "alive": "flags != 'dead'",
    "ruled": "F1 is not null and label not like :none || '%'",
    "unruled": "label is null or label like :none || '%'",
} | {n: f"instr(flags, '{n}')" for n in ("dead", "rare", "dense", "start")}
_KEYS = {"F1": "coalesce(F1, -1)", "label": "coalesce(label, '')", "mean": "coalesce(mean, 0)"}


@dataclass(frozen=True)
class Page:
    """A page of the table.

    Attributes:
        rows: the latents.
        total: how many latents the filters leave.
        next: the cursor of the next page; empty behind the last.
    """

    rows: list[LatentRow]
    total: int
    next: str


class LatentTable:
    """All latents of a dictionary, as rows that are sorted, filtered and paged by SQLite."""

    def __init__(self, store: FeatureStore, dictionary: str | None = None):
        self.store, self.known = store, store.latents(dictionary)
        self._stamp: Any = None

    def page(
        self,
        sort: str = "density",
        descending: bool = True,
        *,
        only: str = "alive",
        text: str = "",
        after: str = "",
        most: int = 50,
    ) -> Page:
        """Return a page of latents.

        Args:
            sort: the column, one of `SORTS`.
            descending: the largest first.
            only: a flag of health, `alive`, `all`, or whether a rule holds: `ruled`, `unruled`.
            text: a part of the label.
            after: the cursor that the page before gave.
            most: rows of a page.

        Raises:
            Refused: no such column or filter, or a cursor that is none.
        """
        for name, value, known in (("sort", sort, SORTS), ("only", only, _WHERE)):
            if value not in known:
                raise Refused(Keyword(name, value), "there is no such one", f"use one of {', '.join(known)}")
        self._label()
        key = _KEYS.get(sort, sort)
        where, order = f"({_WHERE[only]})", "desc" if descending else "asc"
        given: dict[str, Any] = {"none": NONE, "most": most + 1}
        if text:
            where += " and instr(lower(label), lower(:text))"
            given["text"] = text
        (total,) = self._file.execute(f"select count(*) from latent where {where}", given).fetchone()
        if after:
            given |= dict(zip(("value", "last"), _cursor(after), strict=True))
            where += f" and ({key}, latent) {'<' if descending else '>'} (:value, :last)"
        query = f"select {key}, * from latent where {where} order by {key} {order}, latent {order} limit :most"
        found = self._file.execute(query, given).fetchall()
        shown = found[:most]
        more = json.dumps([shown[-1][0], shown[-1][1]]) if len(found) > most else ""
        return Page([_row(*values[1:]) for values in shown], total, more)

    def row(self, latent: int) -> LatentRow:
        """Return the row of a latent.

        Raises:
            Refused: no such latent.
        """
        self._label()
        found = self._file.execute("select * from latent where latent = ?", (self.known.check(latent),)).fetchone()
        return _row(*found)

    @cached_property
    def _file(self) -> sqlite3.Connection:
        file = sqlite3.connect(":memory:")
        file.execute(_TABLE)
        places = ", ".join("?" * 8)
        names = "latent, density, low, high, largest, mean, peak, flags"
        file.executemany(f"insert into latent ({names}) values ({places})", self._numbers())
        for name in ("density", "largest"):
            file.execute(f"create index by_{name} on latent ({name}, latent)")
        return file

    def _numbers(self) -> Iterator[tuple[Any, ...]]:
        known = self.known
        place, ids = known.tensors["top.place"], self.store.column("ids").flatten()
        there = place >= 0
        peak = ids[place.clamp(min=0)].masked_fill(~there, -1).mode(1).values
        words = self.store.vocabulary(int(ids.max()) + 1)
        early = ((place % known.context_width < _START) & there).sum(1) * 2 > there.sum(1)
        columns = (known.density, *known.density_interval().unbind(1), known.tensors["largest"], known.mean())
        each = zip(*(t.tolist() for t in (*columns, peak, known.count, early)), strict=True)
        for i, (density, low, high, largest, mean, at, count, start) in enumerate(each):
            flags = {"dead": not count, "rare": 0 < count < RARE, "dense": density > DENSE, "start": start}
            said = " ".join(n for n, yes in flags.items() if yes)
            yield i, density, low, high, largest, mean if count else None, words[at] if at >= 0 else "", said

    def _label(self) -> None:
        """Take over the labels, if they have changed."""
        meta = self.store.meta
        if (stamp := meta.stamp()) == self._stamp:
            return
        first: dict[int, Label] = {}
        for label in meta.labels(self.known.name):
            first.setdefault(label.latent, label)
        rows = [(x.text, x.source, x.scores.get("F1"), json.dumps(dict(x.scores)), x.latent) for x in first.values()]
        with self._file as file:
            file.execute("update latent set label = null, source = null, F1 = null, scores = null")
            file.executemany("update latent set label = ?, source = ?, F1 = ?, scores = ? where latent = ?", rows)
        self._stamp = stamp


def _row(*values: Any) -> LatentRow:
    latent, density, low, high, largest, mean, peak, flags, label, source, _, scores = values
    said = json.loads(scores) if scores else {}
    return LatentRow(latent, density, (low, high), largest, mean, peak, tuple(flags.split()), label, source, said)


def _cursor(text: str) -> tuple[Any, int]:
    try:
        value, last = json.loads(text)
        small = all(abs(x) < _LARGE for x in (value, last) if isinstance(x, int))
        if small and isinstance(value, int | float | str) and isinstance(last, int):
            return value, last
    except (ValueError, TypeError):
        pass
    raise Refused(f"the cursor {text[:60]!r}", "no page came with it", "give the one that came with the page before")
