"""A clean and a corrupt prompt with their answers, and what is known to be true of such prompts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import zip_longest

from cutaway.core.refuse import Refused
from cutaway.models.spacing import forms
from cutaway.tasks.answers import continuation


@dataclass(frozen=True)
class Pair:
    """A clean prompt with its answer, and a corrupt one of the same token length that should not give it.

    `answer` and `foil` are what follows the prompt. The space between words is put by `continuation`, and after a mark
    by what the model has, unless `joined` says that they go on with the prompt's last word. `answers` and `foils`, if
    given, are all right and all wrong continuations (every later year); they include `answer` and `foil`. `subject` is
    the part of the clean prompt that the question is about; `group` names the template.
    """

    clean: str
    corrupt: str
    answer: str
    foil: str
    subject: str | None = None
    group: str = ""
    answers: tuple[str, ...] = ()
    foils: tuple[str, ...] = ()
    joined: bool = False

    def __post_init__(self):
        for role in ("clean", "corrupt", "answer", "foil"):
            if not getattr(self, role):
                raise Refused(f"pair with the prompt {self.clean!r}", f"its {role} is empty", f"give a {role}")
        if self.answer.strip() == self.foil.strip():
            raise Refused(
                f"answer {self.answer!r} of the prompt {self.clean!r}",
                "the foil is the same word, so their difference is always 0",
                "give a foil that would be a wrong answer",
            )

    def follows(self, answer: str) -> str:
        """Return the text by which the clean prompt goes on with `answer`."""
        return continuation(self.clean, answer, self.joined)

    def literal(self) -> Pair:
        """Return the same pair, its answers written as they usually follow the prompt, so that no model is asked."""
        given = (self.answer, self.foil, *self.answers, *self.foils)
        if all(len(forms(self.clean, a, self.joined)) == 1 for a in given):
            return self
        sets = {r: tuple(map(self.follows, getattr(self, r))) for r in ("answers", "foils")}
        return replace(self, answer=self.follows(self.answer), foil=self.follows(self.foil), joined=True, **sets)

    def changes(self) -> list[tuple[str, str]]:
        """Return the words that the corruption replaces, each with its replacement."""
        words = zip_longest(self.clean.split(" "), self.corrupt.split(" "), fillvalue="")
        return [(a.strip(".,;:?!\n"), b.strip(".,;:?!\n")) for a, b in words if a != b]


@dataclass(frozen=True)
class Truth:
    """The known truth about a task, with which findings are compared.

    Attributes:
        note: the truth in words.
        source: who established it.
        components: addresses (`z.9.6`) that a correct circuit contains.
        positions: names of spans that must matter (`changed`, `subject`, `last`; see `Bound.span`).
        answer: the true answer of a single question.
    """

    note: str
    source: str
    components: tuple[str, ...] = ()
    positions: tuple[str, ...] = ()
    answer: str | None = None
