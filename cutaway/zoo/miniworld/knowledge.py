"""Samplers of what the model knows: facts, two hops, geography."""

from __future__ import annotations

from random import Random

from cutaway.zoo.miniworld import facts
from cutaway.zoo.miniworld.facts import Facts
from cutaway.zoo.miniworld.prompt import Prompt, span


def fact(world: Facts, rng: Random, document: bool = False, relation: str | None = None) -> Prompt:
    """Ask for a fact about a person; held out: the template never shown for this person and relation."""
    person = rng.choice(world.people)
    relation = relation or rng.choice(tuple(facts.RELATIONS))
    k = rng.randrange(len(facts.RELATIONS[relation]))
    template, answer = facts.RELATIONS[relation][k], person.facts[relation]
    while (other := rng.choice(world.people)).facts[relation] == answer:
        pass
    clean = template.format(s=person.name)
    return Prompt(
        "fact",
        clean,
        f" {answer}",
        template.format(s=other.name),
        f" {other.facts[relation]}",
        k == person.held_out_template[relation],
        span(clean, person.name),
        meta={"relation": relation, "template": k, "subject": person.name, "corrupt_subject": other.name},
    )


def two_hop(world: Facts, rng: Random, document: bool = False) -> Prompt:
    """Ask for the country of a person through the city; held out: a quarter of the people."""
    templates = (facts.TWO_HOP[0], facts.EARLY_TWO_HOP, *facts.TWO_HOP[1:]) if document else facts.TWO_HOP
    person, k = rng.choice(world.people), rng.randrange(len(templates))
    template, answer = templates[k], world.country(person)
    while world.country(other := rng.choice(world.people)) == answer:
        pass
    clean = template.format(s=person.name)
    return Prompt(
        "two_hop",
        clean,
        f" {answer}",
        template.format(s=other.name),
        f" {world.country(other)}",
        person.two_hop_held_out,
        span(clean, person.name),
        meta={"template": k, "subject": person.name, "corrupt_subject": other.name, "bridge": person.facts["city"]},
    )


def _geography(
    name: str, table: list[tuple[str, str]], templates: tuple[str, ...], world: Facts, rng: Random
) -> Prompt:
    subject, answer = rng.choice(table)
    k = rng.randrange(len(templates))
    while (pair := rng.choice(table))[1] == answer:
        pass
    clean = templates[k].format(s=subject)
    held_out = k == sum(map(ord, subject)) % len(templates)  # one template a subject
    return Prompt(
        name,
        clean,
        f" {answer}",
        templates[k].format(s=pair[0]),
        f" {pair[1]}",
        held_out,
        span(clean, subject),
        meta={"template": k, "subject": subject, "corrupt_subject": pair[0]},
    )


def capital(world: Facts, rng: Random, document: bool = False) -> Prompt:
    """Ask for the capital of a country; held out: one template per country."""
    return _geography("capital", world.function("capital"), facts.CAPITAL, world, rng)


def language(world: Facts, rng: Random, document: bool = False) -> Prompt:
    """Ask for the language of a country; held out: one template per country."""
    return _geography("language", world.function("language"), facts.LANGUAGE, world, rng)


def city_country(world: Facts, rng: Random, document: bool = False) -> Prompt:
    """Ask for the country of a city; held out: one template per city."""
    return _geography("city_country", list(world.country_of_city.items()), facts.CITY_COUNTRY, world, rng)
