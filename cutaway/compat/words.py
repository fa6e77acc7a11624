"""Configurations as words with defaults, which files beside them hold."""

from __future__ import annotations

from copy import deepcopy
from typing import TYPE_CHECKING, Any, ClassVar

from cutaway.core.refuse import Refused, nearest


class Words:
    """A configuration: attributes by the words of its class, each with a default.

    Attributes:
        words: the words with their defaults.
        old: words of earlier versions, with the versions that had them.
    """

    words: ClassVar[dict[str, Any]] = {}
    old: ClassVar[dict[str, str]] = {}

    if TYPE_CHECKING:

        def __getattr__(self, word: str) -> Any: ...

        def __setattr__(self, word: str, value: Any) -> None: ...

    def __init__(self, **given: Any):
        for word in given.keys() - self.words:
            near = nearest(word, [*self.words, *self.old], 3)
            era = f"it is a word of versions {self.old[word]}" if word in self.old else "no version has it"
            why = f"{era}, and {type(self).__name__} does not take it" + (f"; near: {near}" if near else "")
            raise Refused(f"word {word!r}", why, "leave it out, or use one of its words")
        vars(self).update(deepcopy(self.words) | given)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{n}={v!r}' for n, v in vars(self).items())})"

    def to_dict(self) -> dict[str, Any]:
        """Return the words with their values."""
        return vars(self)
