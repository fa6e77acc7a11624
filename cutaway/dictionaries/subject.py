"""Several dictionaries of one kind, as trainings with several seeds give them: the subject `dictionaries`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from cutaway.core import repeat as again
from cutaway.core.method import parse_list
from cutaway.core.repeat import Made
from cutaway.core.subject import REQUIRED, Flag, Subject, register
from cutaway.dictionaries.dictionary import Dictionary
from cutaway.dictionaries.opening import HELP, open_named, random_latents


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
        """Return the numbers of dictionaries and of their blocks, for costs."""
        return {"dictionaries": len(self), "blocks": sum(len(d.blocks) for d in self)}


def open_several(flags: Mapping[str, Any], given: Mapping[str, Any]) -> Dictionaries:
    """Open the dictionaries that the flag of a subject lists."""
    (listed,) = flags.values()
    return Dictionaries(open_named({"dictionary": named}, given) for named in parse_list(listed))


def accept_several(source: Any) -> Dictionaries | None:
    """Take a list or tuple of dictionaries in the place of `Dictionaries`."""
    whole = isinstance(source, list | tuple) and all(isinstance(d, Dictionary) for d in source)
    return Dictionaries(source) if whole else None


_HELP = f"dictionaries of one site with commas between them, such as several seeds: each {HELP.partition(': ')[2]}"
SEVERAL = register(
    Subject(
        "dictionaries",
        Dictionaries,
        (Flag("dictionaries", str, REQUIRED, _HELP),),
        open_several,
        lambda given: Dictionaries(random_latents(given["model"], seed) for seed in (24, 25, 26)),
        accept=accept_several,
        advice="[one, two], a list of dictionaries",
    )
)
