"""The first message of a worker: its model with sizes and tasks, and the method table."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from cutaway.core.form import form, schema
from cutaway.core.refuse import Refused
from cutaway.studio.messages import Entry, MethodCard, ModelCard, TaskCard
from cutaway.studio.session import Session
from cutaway.tasks import load, names


def hello(session: Session) -> dict[str, Any]:
    """Return the card of the model and those of all methods."""
    model = session.model
    card = ModelCard(
        name=session.name,
        source=session.source,
        state="ready",
        family=model.family.name,
        sizes=model.sizes(),
        tasks=_tasks(session),
        sites=[s for s, said in model.sites().items() if said.startswith("read")],
    )
    return {"model": card.model_dump(), "methods": [method_card(row).model_dump() for row in session.methods.values()]}


def method_card(row: Any) -> MethodCard:
    """Return the card of a method."""
    return MethodCard(
        name=row.name,
        room=row.room,
        answers=row.answers,
        paper=row.paper,
        control=row.control,
        rung=row.rung,
        cost=row.cost,
        results=[c.__name__ for c in row.results],
        form=[Entry.model_validate({k: _listed(v) for k, v in asdict(e).items()}) for e in form(row)],
        json_schema=schema(row),
    )


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _tasks(session: Session) -> list[TaskCard]:
    """Return the tasks that the model can be asked, each with its first prompt."""
    found = []
    for name in names(session.model):
        try:
            task = load(name, session.model, 1)
        except Refused:  # its words are no single tokens here
            continue
        pair = task.pairs[0]
        found.append(
            TaskCard(
                name=name,
                metric=str(task.metric),
                example=pair.clean,
                target=pair.answer,
                foil=pair.foil,
                corrupt=pair.corrupt,
            )
        )
    return found
