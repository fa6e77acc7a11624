"""Labels of latents with their scores, lists and notes, in SQLite with full text."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from cutaway.core.refuse import Refused

VERSION = 1
RULE, LLM = "rule", "llm"  # sources of labels
NONE = "no short rule"  # how the label of a latent begins whose best rule does not hold
_TABLES = """
create table about (version integer not null, store text not null);
create table label (
    id integer primary key, dictionary text not null, latent integer not null, source text not null,
    text text not null, scores text not null, details text not null, unique (dictionary, latent, source));
create table list (id integer primary key, name text not null unique, note text not null default '');
create table item (
    list integer not null references list (id) on delete cascade, dictionary text not null, latent integer not null,
    primary key (list, dictionary, latent));
create table note (id integer primary key, dictionary text not null, latent integer not null, text text not null);
create virtual table words using fts5 (text, content='label', content_rowid='id', tokenize='unicode61');
create trigger label_in after insert on label begin
    insert into words (rowid, text) values (new.id, new.text); end;
create trigger label_out after delete on label begin
    insert into words (words, rowid, text) values ('delete', old.id, old.text); end;
create trigger label_new after update on label begin
    insert into words (words, rowid, text) values ('delete', old.id, old.text);
    insert into words (rowid, text) values (new.id, new.text); end;
"""
_LABEL = "label.dictionary, label.latent, label.source, label.text, label.scores, label.details"


@dataclass(frozen=True)
class Label:
    """A description of a latent.

    Attributes:
        dictionary: name of the dictionary.
        latent: number of the latent.
        source: what made it, such as `rule`.
        text: the description.
        scores: numbers by name; a score's interval is `NAME interval`.
        details: whatever else the source says, JSON-ready.
    """

    dictionary: str
    latent: int
    source: str
    text: str
    scores: Mapping[str, Any] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)


def _rank(label: Label) -> int:
    if label.source == LLM:
        return 1 if label.details.get("leads") else 3
    return 2 if label.source == RULE else 0


class Meta:
    """The file `meta.sqlite` of a store; made when it is first written to."""

    def __init__(self, path: Path, store: str):
        self.path, self.store = path, store

    def put(self, labels: Iterable[Label]) -> None:
        """Write labels, in place of those of the same latents and sources."""
        rows = [
            (x.dictionary, x.latent, x.source, x.text, json.dumps(dict(x.scores)), json.dumps(dict(x.details)))
            for x in labels
        ]
        with self._writing() as file:
            file.executemany(
                "insert into label (dictionary, latent, source, text, scores, details) values (?, ?, ?, ?, ?, ?) "
                "on conflict (dictionary, latent, source) do update set text = excluded.text, "
                "scores = excluded.scores, details = excluded.details",
                rows,
            )

    def stamp(self) -> tuple[tuple[int, int], ...]:
        """Return a mark of the file that changes when it is written to."""
        files = (self.path, self.path.with_name(f"{self.path.name}-wal"))
        found = [f.stat() for f in files if f.is_file()]
        return tuple((x.st_mtime_ns, x.st_size) for x in found)

    def count(self, dictionary: str) -> int:
        """Return how many latents of a dictionary have a label."""
        query = "select count(distinct latent) from label where dictionary = ?"
        return sum(n for (n,) in self._rows(query, (dictionary,)))

    def labels(self, dictionary: str, latent: int | None = None) -> list[Label]:
        """Return the labels of a latent, or of all of a dictionary's, by latent; people's first.

        A language model's label comes before the rule if it beat the rule on the same documents, and else after it.
        """
        more = "" if latent is None else " and latent = ?"
        where = (dictionary,) if latent is None else (dictionary, latent)
        found = self._labels(f"select {_LABEL} from label where dictionary = ?{more} order by latent, source", where)
        return sorted(found, key=lambda x: (x.latent, _rank(x)))

    def find(self, query: str, most: int = 50) -> list[Label]:
        """Return the labels that hold all words of a query, the best first (BM25)."""
        words = " ".join('"' + w.replace('"', '""') + '"' for w in query.split())
        if not words:
            raise Refused(f"labels with {query!r}", "there is no word in it", "give at least one")
        own = f"select {_LABEL} from words join label on label.id = words.rowid where words match ?"
        return self._labels(f"{own} order by bm25(words), label.id limit ?", (words, most))

    def add_to_list(self, name: str, latents: Iterable[tuple[str, int]], note: str = "") -> None:
        """Put latents (dictionary and number) on a list, which is made if there is none of that name."""
        with self._writing() as file:
            file.execute("insert into list (name, note) values (?, ?) on conflict (name) do nothing", (name, note))
            (number,) = file.execute("select id from list where name = ?", (name,)).fetchone()
            rows = [(number, *pair) for pair in latents]
            file.executemany("insert or ignore into item (list, dictionary, latent) values (?, ?, ?)", rows)

    def lists(self) -> dict[str, list[tuple[str, int]]]:
        """Return the latents of every list."""
        query = (
            "select name, dictionary, latent from list left join item on list = id order by name, dictionary, latent"
        )
        out: dict[str, list[tuple[str, int]]] = {}
        for name, dictionary, latent in self._rows(query):
            out.setdefault(name, []).extend([(dictionary, latent)] if dictionary is not None else [])
        return out

    def add_note(self, dictionary: str, latent: int, text: str) -> None:
        """Write a note about a latent."""
        with self._writing() as file:
            file.execute("insert into note (dictionary, latent, text) values (?, ?, ?)", (dictionary, latent, text))

    def notes(self, dictionary: str, latent: int) -> list[str]:
        """Return the notes about a latent, the oldest first."""
        query = "select text from note where dictionary = ? and latent = ? order by id"
        return [text for (text,) in self._rows(query, (dictionary, latent))]

    def _labels(self, query: str, values: tuple[Any, ...]) -> list[Label]:
        return [
            Label(d, n, source, text, json.loads(s), json.loads(more))
            for d, n, source, text, s, more in self._rows(query, values)
        ]

    def _rows(self, query: str, values: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
        if not self.path.is_file():
            return []
        with self._blamed():
            return self._file.execute(query, values).fetchall()

    @cached_property
    def _file(self) -> sqlite3.Connection:
        new = not self.path.is_file()
        file = sqlite3.connect(self.path)
        if new:
            file.execute("pragma journal_mode = wal")
            file.executescript(_TABLES)
            file.execute("insert into about values (?, ?)", (VERSION, self.store))
            file.commit()
        file.execute("pragma foreign_keys = on")
        version, store = file.execute("select version, store from about").fetchone()
        if version != VERSION or store != self.store:
            why = f"it is of {'another store' if version == VERSION else f'version {version}'}"
            raise Refused(f"file {str(self.path)!r}", why, "put it back where it was, or take it away")
        return file

    @contextmanager
    def _writing(self):
        with self._blamed(), self._file as file:
            yield file

    @contextmanager
    def _blamed(self):
        try:
            yield
        except sqlite3.Error as error:
            raise Refused(f"file {str(self.path)!r}", f"SQLite says: {error}", "check it, or take it away") from error
