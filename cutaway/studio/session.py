"""The session of a worker: one model, what was opened for it, and the actions it is asked for."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import cached_property
from typing import Any, TypeVar

import cutaway
from cutaway.core.form import form, opened
from cutaway.core.method import Method
from cutaway.core.refuse import Keyword, Refused
from cutaway.models.model import Model
from cutaway.studio.actions import ACTIONS
from cutaway.studio.folder import Folder
from cutaway.zoo.load import from_flags

T = TypeVar("T")
_MOST_KEPT = 48  # subjects and pages that stay open


class Session:
    """A model and what was opened for it.

    Attributes:
        folder: the places of the studio.
        name: the name that the model has on the page.
        source: what `ca.load` was given for it.
        others: the sources of the other models, by their names.
    """

    def __init__(self, folder: Folder, name: str, source: str, others: Mapping[str, str]):
        self.folder, self.name, self.source, self.others = folder, name, source, dict(others)
        self.kept: OrderedDict[Any, Any] = OrderedDict()

    @cached_property
    def model(self) -> Model:
        """The model."""
        return from_flags(self.source)

    @cached_property
    def methods(self) -> dict[str, Method]:
        """The method table."""
        return cutaway.methods()

    def do(self, action: str, arguments: Mapping[str, Any], job: str | None = None) -> Any:
        """Do an action and return its answer, JSON-ready; the sweeps of a job go on where they were interrupted.

        Raises:
            Refused: what the action refuses.
        """
        row = ACTIONS[action]
        with cutaway.resuming(self.folder.resumed / job) if job else nullcontext():
            return row.function()(self, row.request(**arguments)).model_dump()

    def keep(self, key: Any, make: Callable[[], T]) -> T:
        """Return what was opened under a key, opened now if it was not."""
        if key not in self.kept:
            self.kept[key] = make()
        self.kept.move_to_end(key)
        found = self.kept[key]
        self._trim()
        return found

    def _trim(self) -> None:
        while len(self.kept) > _MOST_KEPT:
            self.kept.popitem(last=False)

    def method(self, name: str) -> Method:
        """Return a method by name.

        Raises:
            Refused: no method has that name.
        """
        if name not in self.methods:
            raise Refused(f"method {name!r}", "there is no such method", "choose one of the list of methods")
        return self.methods[name]

    def opened(self, row: Method, values: Mapping[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        """Return the subjects and options of a call, from the values of its form.

        Raises:
            Refused: a value that names a place on disk, or what the form refuses.
        """
        flags = {e.name for e in form(row)}
        given = {n: self.meant(n, v) for n, v in values.items()} | ({"model": self.source} if "model" in flags else {})
        self._keep_model(row)
        found = opened(row, given, self.kept)
        self._trim()
        return found

    def meant(self, name: str, value: Any) -> Any:
        """Return the value of a form that a value of the page means.

        Raises:
            Refused: a model or a file that the studio does not have.
        """
        if name == "other":
            if value not in (*self.others, "shuffled"):
                known = ", ".join([*self.others, "shuffled"])
                raise Refused(Keyword(name, value), "the studio has no such model", f"use one of {known}")
            return self.others.get(value, value)
        if name == "edits":  # texts whose last word may be a file
            texts = [t for v in ([value] if isinstance(value, str) else value) for t in str(v).split(",")]
            return [" ".join(self.folder.placed(name, word) for word in t.split()) for t in texts]
        return self.folder.placed(name, value)

    def _keep_model(self, row: Method) -> None:
        """Let the model that is loaded be the one that its flags mean."""
        if "model" in (flags := {e.name: e.default for e in form(row) if e.subject == "model"}):
            self.kept["model", self.source, *list(flags.values())[1:]] = self.model
            self.kept.move_to_end(("model", self.source, *list(flags.values())[1:]))
