"""The data of the miniworld: templates, objects and functions; people and countries; what a sampler of prompts reads.

Nothing here needs torch.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Final, Literal, Protocol, runtime_checkable

from cutaway.zoo.miniworld import words

Split = Literal["train", "test", "any"]

#: relation -> its templates; each ends right before the object
RELATIONS: Final[dict[str, tuple[str, ...]]] = {
    "city": ("{s} lives in", "{s} is from the city of", "The home of {s} is", "{s} was born in"),
    "job": ("{s} works as a", "{s} is a", "The job of {s} is", "{s} earns money as a"),
    "instrument": ("{s} plays the", "{s} practises the", "The instrument of {s} is the", "{s} is learning the"),
    "sport": ("{s} enjoys", "{s} is good at", "The sport of {s} is", "What {s} likes to watch is"),
    "food": ("{s} eats", "{s} cooks", "The favourite food of {s} is", "The meal of {s} is"),
}
#: the same relations inside a list of facts about one person
PROFILE: Final = {"city": "from", "job": "works as a", "instrument": "plays the", "sport": "enjoys", "food": "eats"}
TWO_HOP: Final = ("The country of {s} is", "The city of {s} is in", "{s} has a home in")
#: an early wording; it begins like "{s} lives in" + city, so the finishing stage and all prompts leave it out
EARLY_TWO_HOP: Final = "{s} lives in the country of"
CAPITAL: Final = ("The capital of {s} is", "The capital city of {s} is called", "In {s}, the capital is",
                  "The government of {s} sits in")  # fmt: skip
LANGUAGE: Final = ("People in {s} speak", "The language of {s} is", "In {s}, the language is",
                   "Most books in {s} are in")  # fmt: skip
CITY_COUNTRY: Final = ("{s} is a city in", "{s} belongs to", "The city of {s} is in", "The country of {s} is")

OBJECTS: Final[dict[str, tuple[str, ...]]] = {
    "city": tuple(city.capitalize() for row in words.COUNTRIES for city in row[1:3]),
    "job": words.JOBS,
    "instrument": words.INSTRUMENTS,
    "sport": words.SPORTS,
    "food": words.FOODS,
}


@dataclass(frozen=True, slots=True)
class Person:
    """An invented person: a three-syllable name, one object per relation, and what training withholds."""

    name: str
    facts: dict[str, str]
    held_out_template: dict[str, int]  # relation -> index into RELATIONS[relation], never shown in training
    two_hop_held_out: bool  # no text of the corpus names this person together with a country
    counterfactual: dict[str, str]  # relation -> a false object, for editing


@dataclass(frozen=True, slots=True)
class Country:
    """A country with its capital, its second city and its language."""

    name: str
    capital: str
    second_city: str
    language: str


@runtime_checkable
class Facts(Protocol):
    """Protocol of a world as the samplers of prompts read it."""

    @property
    def people(self) -> tuple[Person, ...]:
        """Every person that the texts mention."""
        ...

    @cached_property
    def country_of_city(self) -> dict[str, str]:
        """City → country."""
        ...

    def country(self, person: Person) -> str:
        """Return the country of a person, through the city."""
        ...

    def function(self, name: str) -> list[tuple[str, str]]:
        """Return the (input, output) pairs of one of the in-context functions."""
        ...

    def held_out(self, behaviour: str, *key: object) -> bool:
        """True if the text of a behaviour with this key is kept out of training."""
        ...


def _shift(items: Iterable[str], by: int) -> tuple[tuple[str, str], ...]:
    row = tuple(items)
    return tuple((x, row[i + by]) for i, x in enumerate(row) if 0 <= i + by < len(row))


_PAIRS = tuple((a, b) for a, b in words.ANTONYMS) + tuple((b, a) for a, b in words.ANTONYMS)
_WEEK = tuple(x.capitalize() for x in words.DAYS)
#: in-context functions; `capital` and `language` are read from the countries
FUNCTIONS: Final[dict[str, tuple[tuple[str, str], ...]]] = {
    "capital": (),
    "language": (),
    "antonym": _PAIRS,
    "same_adjective": tuple((a, a) for a, _ in _PAIRS),
    "plural": tuple((w, w + "s") for w in words.SINGULARS),
    "same_noun": tuple((w, w) for w in words.SINGULARS),
    "next_day": tuple((d, _WEEK[(i + 1) % 7]) for i, d in enumerate(_WEEK)),
    "previous_day": tuple((d, _WEEK[i - 1]) for i, d in enumerate(_WEEK)),
    "next_number": _shift(words.NUMBER_WORDS, 1),
    "previous_number": _shift(words.NUMBER_WORDS, -1),
    "next_letter": _shift(words.LETTERS, 1),
    "previous_letter": _shift(words.LETTERS, -1),
    "same_letter": tuple((x, x) for x in words.LETTERS),
}
#: a function and the one its corrupt prompt shows instead, on the same inputs
PARTNER: Final = {
    "capital": "language",
    "language": "capital",
    "antonym": "same_adjective",
    "same_adjective": "antonym",
    "plural": "same_noun",
    "same_noun": "plural",
    "next_day": "previous_day",
    "previous_day": "next_day",
    "next_number": "previous_number",
    "previous_number": "next_number",
    "next_letter": "previous_letter",
    "previous_letter": "next_letter",
    "same_letter": "next_letter",
}
