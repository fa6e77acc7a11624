"""Run a method of the table, or tell what it would cost."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import cutaway
from cutaway.core.out_of_memory import raising_out_of_memory
from cutaway.core.refuse import Refused
from cutaway.core.result import Result, open_result
from cutaway.studio.actions.results import shown
from cutaway.studio.messages import Cost, Shown, Values
from cutaway.studio.session import Session


def run(session: Session, request: Values) -> Shown:
    """Run a method, keep its result in the folder, and show it; what was computed before is opened again.

    Raises:
        Refused: what the form or the method refuses, or an outcome that has no picture.
    """
    name = result_id(session, request)
    file = session.folder.new_result(name)
    if file.exists():
        return shown(name, open_result(file))
    row = session.method(request.method)
    subjects, options = session.opened(row, request.values)
    with raising_out_of_memory(row.name):
        outcome = row.function(*subjects, **options)
    if not isinstance(outcome, Result):
        raise Refused(row.name, "its outcome has no picture", "run it on the command line, with --out FILE")
    outcome.save(file)
    return shown(name, outcome)


def cost(session: Session, request: Values) -> Cost:
    """Plan a call and count what it would cost, without making it."""
    from cutaway.suites.dry_run import dry_run

    row = session.method(request.method)
    subjects, options = session.opened(row, request.values)
    found = dry_run(row.function, *subjects, **options)
    return Cost(
        lines=found.lines(),
        forwards=found.forwards,
        backwards=found.backwards,
        seconds=found.seconds,
        memory=found.memory,
    )


def result_id(session: Session, request: Values) -> str:
    """Return the id of a call's result: the method's name and a hash of model, version and values."""
    said: list[Any] = [session.source, session.model.fingerprint(), cutaway.__version__, request.method]
    text = json.dumps([*said, request.values], sort_keys=True)
    return f"{request.method.replace('.', '-').replace('_', '-')}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
