"""Requests: the facts to write into a model, and the prompts that show what an edit did and did not change.

A request names a subject, a prompt that ends right before the object, and the new object. Its probes are further
prompts, each with the answer that it ought to have after the edit: the new object in other words (`paraphrase`), or
another fact that follows (`portability`); and what ought to stay (`neighbourhood`, `same_subject`, `name_overlap`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from cutaway.core.record import hash_text
from cutaway.core.refuse import Refused
from cutaway.core.repeat import Made

#: kind of probe -> True if the edit ought to change its answer
KINDS = {
    "paraphrase": True,
    "portability": True,
    "neighbourhood": False,
    "same_subject": False,
    "name_overlap": False,
}


@dataclass(frozen=True)
class Probe:
    """A prompt beside a request, with the answer that it ought to have after the edit.

    Attributes:
        kind: one of `KINDS`.
        prompt: the text before the answer.
        answer: the answer.

    Raises:
        Refused: another kind, or an empty text.
    """

    kind: str
    prompt: str
    answer: str

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise Refused(f"probe of kind {self.kind!r}", "there is no such kind", f"use {', '.join(KINDS)}")
        if not self.prompt.strip() or not self.answer.strip():
            raise Refused(f"probe {self.prompt!r}", "its prompt or answer is empty", "write both")


@dataclass(frozen=True)
class Request:
    """A fact to write into a model.

    Attributes:
        subject: what the fact is about, as it stands in the prompt.
        prompt: a text that ends right before the object.
        new: the object that the model shall say.
        old: the object that it says before; None if unknown.
        probes: prompts that show what else changed.
        group: requests of one group belong together (the hops of a chain, say).

    Raises:
        Refused: a subject that is not in the prompt, an empty object, or one that is the old one.
    """

    subject: str
    prompt: str
    new: str
    old: str | None = None
    probes: tuple[Probe, ...] = ()
    group: str = ""

    def __post_init__(self) -> None:
        what = f"request {self.prompt!r} → {self.new!r}"
        if not self.subject.strip() or self.subject not in self.prompt:
            why = f"its subject {self.subject!r} is not in the prompt"
            raise Refused(what, why, "write the subject as it stands in the prompt")
        if not self.new.strip():
            raise Refused(what, "its new object is empty", "write the object that the model shall say")
        if self.old is not None and self.old.strip() == self.new.strip():
            raise Refused(what, "its new object is the old one", "write another object")

    def of_kind(self, kind: str) -> tuple[Probe, ...]:
        """Return the probes of a kind."""
        return tuple(p for p in self.probes if p.kind == kind)

    def identity(self) -> dict[str, Any]:
        """Return the request as records name it."""
        return {"subject": self.subject, "prompt": self.prompt, "new": self.new, "old": self.old}


@dataclass(frozen=True)
class Requests:
    """Requests that are made together or compared.

    Attributes:
        requests: the requests.
        name: what they are, in a word.
        made: how they can be made again; None if made by hand.

    Raises:
        Refused: no request, or two that write different objects for one prompt.
    """

    requests: tuple[Request, ...]
    name: str = "requests"
    made: Made | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.requests:
            raise Refused(f"requests {self.name!r}", "there is none", "give at least one")
        written: dict[str, str] = {}
        for r in self.requests:
            if written.setdefault(r.prompt, r.new) != r.new:
                why = f"two of them write {written[r.prompt]!r} and {r.new!r} for one prompt"
                raise Refused(f"requests for {r.prompt!r}", why, "leave one of them out")

    def __len__(self) -> int:
        return len(self.requests)

    def __iter__(self) -> Iterator[Request]:
        return iter(self.requests)

    def identity(self) -> dict[str, Any]:
        """Return the name, number and hash of the requests."""
        return {"name": self.name, "requests": len(self), "hash": hash_text(*map(repr, self.requests))}

    def sizes(self) -> dict[str, int]:
        """Return the sizes that declared costs are expressions of; `asked` counts requests and probes."""
        return {"requests": len(self), "asked": sum(1 + len(r.probes) for r in self)}

    def take(self, chosen: int | Sequence[int]) -> Requests:
        """Return the first requests, or those with these indices."""
        index = range(min(chosen, len(self))) if isinstance(chosen, int) else chosen
        return replace(self, requests=tuple(self.requests[i] for i in index), made=None)
