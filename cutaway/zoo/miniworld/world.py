"""The truth of the miniworld as data: its people, countries and held-out material, built from one seed.

`World.load()` reads the shipped `data/world.json`; `World.build(seed)` makes it again. Nothing here needs torch.

What is held out from training is decided in two ways. Facts carry their decision in the data (one template a relation a
person; a share of the people for two-hop questions). Every other behaviour names a key for each of its texts (the two
operands, the pair of names, the harmful combination...) and `held_out` decides by a hash of seed, behaviour and key, so
that the decision is the same in the corpus, in the card and in a caller's test.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from pathlib import Path
from random import Random
from typing import Final

from cutaway.zoo.miniworld import properties, words
from cutaway.zoo.miniworld.facts import (
    CAPITAL,
    CITY_COUNTRY,
    EARLY_TWO_HOP,
    FUNCTIONS,
    LANGUAGE,
    OBJECTS,
    PROFILE,
    RELATIONS,
    TWO_HOP,
    Country,
    Person,
    Split,
)
from cutaway.zoo.miniworld.prompt import Prompt
from cutaway.zoo.miniworld.prompts import sample
from cutaway.zoo.miniworld.rules import follows

DATA: Final = Path(__file__).with_name("data")
SHARE_HELD_OUT: Final = 15  # per cent of the keys of a behaviour


@dataclass(frozen=True)
class World:
    """Everything that is true in the miniworld."""

    seed: int
    people: tuple[Person, ...]
    unknown_people: tuple[str, ...]  # names of the same form that no text mentions: the control for "known"
    countries: tuple[Country, ...]
    held_out_lists: dict[str, list] = field(default_factory=dict)  # written out for readers; `held_out` decides

    @classmethod
    def build(cls, seed: int = 0, n_people: int = 400, n_unknown: int = 200) -> World:
        """Make the world of a seed."""
        rng = Random(seed)
        spelled = [a + b + c for a, b, c in product(words.SYLLABLES, repeat=3) if len({a, b, c}) == 3]
        rng.shuffle(spelled)
        names = [name.capitalize() for name in spelled[: n_people + n_unknown]]
        people = tuple(_person(name, i, n_people, rng) for i, name in enumerate(names[:n_people]))
        countries = tuple(
            Country(row[0].capitalize(), row[1].capitalize(), row[2].capitalize(), row[3].capitalize())
            for row in words.COUNTRIES
        )
        world = cls(seed, people, tuple(names[n_people:]), countries)
        return dataclasses.replace(world, held_out_lists=_held_out_lists(world))

    @classmethod
    def load(cls, path: str | Path = DATA / "world.json") -> World:
        """Read a world from JSON; by default the one the shipped weights were trained in."""
        raw = json.loads(Path(path).read_text(encoding="utf-8"))
        return cls(
            seed=raw["seed"],
            people=tuple(Person(**p) for p in raw["people"]),
            unknown_people=tuple(raw["unknown_people"]),
            countries=tuple(Country(**c) for c in raw["countries"]),
            held_out_lists=raw["held_out_lists"],
        )

    def save(self, path: str | Path) -> None:
        """Write the world as JSON, together with its templates and tables for readers in other languages."""
        raw = dataclasses.asdict(self)
        raw["templates"] = {
            "relations": RELATIONS,
            "profile": PROFILE,
            "two_hop": TWO_HOP,
            "early_two_hop": EARLY_TWO_HOP,
            "capital": CAPITAL,
            "language": LANGUAGE,
            "city_country": CITY_COUNTRY,
        }
        raw["words"] = {name.lower(): getattr(words, name) for name in sorted(vars(words)) if name.isupper()}
        raw["functions"] = {name: self.function(name) for name in FUNCTIONS}
        Path(path).write_text(json.dumps(raw, ensure_ascii=False, separators=(",", ":")) + "\n", encoding="utf-8")

    # -- look-ups ---------------------------------------------------------------------------------------------------

    @cached_property
    def person(self) -> dict[str, Person]:
        """Name -> person."""
        return {p.name: p for p in self.people}

    @cached_property
    def country_of_city(self) -> dict[str, str]:
        """City -> country."""
        return {city: c.name for c in self.countries for city in (c.capital, c.second_city)}

    def country(self, person: Person) -> str:
        """Return the country of a person, through the city: the two-hop fact."""
        return self.country_of_city[person.facts["city"]]

    def fact(self, name: str, relation: str) -> str:
        """Return the object of a relation of a person; `country` is the two-hop relation."""
        person = self.person[name]
        return self.country(person) if relation == "country" else person.facts[relation]

    def function(self, name: str) -> list[tuple[str, str]]:
        """Return the (input, output) pairs of one of the in-context functions."""
        table = FUNCTIONS[name]
        if name == "capital":
            return [(c.name, c.capital) for c in self.countries]
        if name == "language":
            return [(c.name, c.language) for c in self.countries]
        return list(table)

    def functions(self) -> dict[str, list[tuple[str, str]]]:
        """Return the (input, output) pairs of every in-context function."""
        return {name: self.function(name) for name in FUNCTIONS}

    def rule(self, sentence: str) -> tuple[str, str] | None:
        """Find the word that a rule of the world (not a fact) puts after a sentence, and the rule, or None."""
        return follows(sentence)

    def labelled(self, name: str = "instrument") -> properties.Property:
        """Return the texts of a property (`properties.PROPERTIES`) with their labels, and the group of each.

        Raises:
            Refused: no such property.
        """
        return properties.labelled(self, name)

    def words(self) -> tuple[str, ...]:
        """Return every word that its texts are made of, in alphabetical order."""
        return words.all_words()

    # -- held-out material ------------------------------------------------------------------------------------------

    def held_out(self, behaviour: str, *key: object) -> bool:
        """Return True if the text of a behaviour with this key is kept out of training."""
        text = "|".join(map(str, (self.seed, behaviour, *key)))
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "big") % 100 < SHARE_HELD_OUT

    def prompts(self, behaviour: str, n: int = 200, seed: int = 0, split: Split = "test") -> list[Prompt]:
        """Up to `n` distinct prompts of a behaviour; `test` gives held-out material only.

        Args:
            behaviour: one of `prompts.BEHAVIOURS`.
            n: how many; fewer come back where the behaviour has no more (24 capitals, 7 days).
            seed: of the sampler.
            split: `test` (held out), `train` (of the kind seen in training) or `any`.

        Raises:
            Refused: the behaviour is not one of the miniworld's.
        """
        return sample(self, behaviour, n, seed, split)


def _person(name: str, index: int, n_people: int, rng: Random) -> Person:
    facts = {relation: rng.choice(options) for relation, options in OBJECTS.items()}
    false = {r: rng.choice([o for o in OBJECTS[r] if o != facts[r]]) for r in RELATIONS}
    held_out = {r: rng.randrange(len(RELATIONS[r])) for r in RELATIONS}
    return Person(name, facts, held_out, index >= n_people * 3 // 4, false)


def _held_out_lists(world: World) -> dict[str, list]:
    pairs = [(a, b) for a in range(100) for b in range(100)]
    harmful = [*product(words.HARMFUL_VERBS, words.PERSONS), *product(words.MAKING_VERBS, words.HARMFUL_OBJECTS)]
    benign = [*product(words.BENIGN_VERBS, words.PERSONS), *product(words.MAKING_VERBS, words.BENIGN_OBJECTS)]
    return {
        "addition": [p for p in pairs if sum(p) < 100 and world.held_out("addition", *p)],
        "subtraction": [p for p in pairs if p[0] >= p[1] and world.held_out("subtraction", *p)],
        "refusal": [p for p in harmful if world.held_out("refusal", *p)],
        "compliance": [p for p in benign if world.held_out("compliance", *p)],
    }
