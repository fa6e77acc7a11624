"""Jobs: calls that run in the background, kept in a database so that a stop of the server loses none.

    waiting → running → done | refused | cancelled

A job that ran when the server stopped waits again and goes on where its sweeps were.
"""

from __future__ import annotations

import json
import secrets
import sqlite3
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cutaway.core.refuse import Refused
from cutaway.studio.messages import Job, State

MOST_WAITING = 64
_TABLE = """
CREATE TABLE IF NOT EXISTS jobs (
    id TEXT PRIMARY KEY, method TEXT NOT NULL, model TEXT NOT NULL, given TEXT NOT NULL, state TEXT NOT NULL,
    done REAL NOT NULL DEFAULT 0, total REAL NOT NULL DEFAULT 0, made REAL NOT NULL, ended REAL,
    result TEXT, refusal TEXT
)
"""


class Jobs:
    """The table of jobs."""

    def __init__(self, database: Path):
        self._path = database
        with self._open() as db:
            db.execute("PRAGMA journal_mode=WAL")
            db.execute(_TABLE)
            db.execute("UPDATE jobs SET state='waiting', done=0 WHERE state='running'")

    def add(self, model: str, method: str, values: Mapping[str, Any]) -> Job:
        """Add a job that waits.

        Raises:
            Refused: too many wait already.
        """
        name = f"{method.replace('.', '-').replace('_', '-')}-{secrets.token_hex(4)}"
        with self._open() as db:
            (waiting,) = db.execute("SELECT count(*) FROM jobs WHERE state='waiting'").fetchone()
            if waiting >= MOST_WAITING:
                raise Refused("another job", f"{waiting} wait already", "cancel some, or let them end")
            row = (name, method, model, json.dumps(dict(values)), "waiting", time.time())
            db.execute("INSERT INTO jobs (id, method, model, given, state, made) VALUES (?,?,?,?,?,?)", row)
        return self.get(name)

    def get(self, name: str) -> Job:
        """Return a job by its id.

        Raises:
            Refused: no job has that id.
        """
        with self._open() as db:
            row = db.execute("SELECT * FROM jobs WHERE id=?", (name,)).fetchone()
        if row is None:
            raise Refused(f"job {name!r}", "there is no such job", "choose one of the list of runs")
        return _job(row)

    def all(self, most: int = 200) -> list[Job]:
        """Return the newest jobs, newest first."""
        with self._open() as db:
            return [_job(r) for r in db.execute("SELECT * FROM jobs ORDER BY made DESC LIMIT ?", (most,))]

    def next(self, model: str) -> Job | None:
        """Take the oldest job that waits for a model; it runs from now on."""
        with self._open() as db:
            found = db.execute(
                "UPDATE jobs SET state='running' WHERE id=(SELECT id FROM jobs WHERE state='waiting' AND model=? "
                "ORDER BY made LIMIT 1) RETURNING *",
                (model,),
            ).fetchone()
        return None if found is None else _job(found)

    def progress(self, name: str, done: float, total: float) -> None:
        """Write down how far a job is."""
        with self._open() as db:
            db.execute("UPDATE jobs SET done=?, total=? WHERE id=? AND state='running'", (done, total, name))

    def end(self, name: str, state: State, result: str | None = None, refusal: Mapping[str, str] | None = None) -> None:
        """Write down how a job ended; one that has ended already stays as it is."""
        said = json.dumps(dict(refusal)) if refusal is not None else None
        with self._open() as db:
            db.execute(
                "UPDATE jobs SET state=?, ended=?, result=?, refusal=? WHERE id=? AND state IN ('waiting', 'running')",
                (state, time.time(), result, said, name),
            )

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        db = sqlite3.connect(self._path, timeout=10.0)
        db.row_factory = sqlite3.Row
        try:
            with db:
                yield db
        finally:
            db.close()


def _job(row: sqlite3.Row) -> Job:
    found = dict(row)
    values, refusal = json.loads(found.pop("given")), found.pop("refusal")
    return Job(**found, values=values, refusal=json.loads(refusal) if refusal else None)
