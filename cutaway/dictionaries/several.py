"""Several dictionaries of one kind, as trainings with several seeds give them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from cutaway.core import repeat as again
from cutaway.core.repeat import Made
from cutaway.dictionaries.dictionary import Dictionary


class Dictionaries(tuple[Dictionary, ...]):
    """Several dictionaries to compare with each other, in order; a tuple of them that a method may be about."""

    def __new__(cls, dictionaries: Iterable[Dictionary] = ()) -> Dictionaries:
        return super().__new__(cls, dictionaries)

    @property
    def made(self) -> Made:
        """Recipe that makes all of them again, as each of them is at present."""
        parts = [again.made("dictionary", d) for d in self]
        files = [str(p.flags.get("", "")) for p in parts]
        no_flags = next((p.no_flags for p in parts if p.no_flags), "")
        if any("," in f for f in files):
            no_flags = no_flags or "the path of a dictionary has a comma"
        return Made(
            f"ca.dictionaries.Dictionaries([{', '.join(p.python for p in parts)}])",
            {"": ",".join(files)},
            no_flags=no_flags,
            no_python=next((p.no_python for p in parts if p.no_python), ""),
        )

    def identity(self) -> dict[str, Any]:
        """Return the entries of all of them in the record of a result."""
        return {"dictionaries": [d.identity() for d in self]}

    def sizes(self) -> dict[str, int]:
        """Return the number of dictionaries, for costs."""
        return {"dictionaries": len(self)}
