"""Requests about a world whose facts are known: a false object for a person's relation, with probes of every kind."""

from __future__ import annotations

from random import Random
from typing import Any

from cutaway.core.refuse import Refused
from cutaway.core.repeat import Made, called
from cutaway.editing.request import Probe, Request, Requests
from cutaway.models.model import Model
from cutaway.zoo.miniworld.facts import RELATIONS, TWO_HOP

_EACH = 4  # probes of a kind at most


def from_world(model: Model, n: int = 8, seed: int = 0) -> Requests:
    """Return requests about people of the model's world: each the false object that the world keeps for an edit.

    The prompt is a wording that training showed of this fact, `paraphrase` the others. `neighbourhood` asks of people
    with the same object, `same_subject` for the person's other facts, `name_overlap` of people who share all but one
    syllable of the name (two letters each), and `portability` for the country of a person who was moved.

    Raises:
        Refused: a model without a world of people.
    """
    people = getattr(model.world, "people", None)
    if not people:
        raise Refused(f"requests about the world of {model.name}", "it has none", "give a .jsonl file of requests")
    rng = Random(f"requests:{seed}")
    asked = [(p, r) for p in people for r in RELATIONS]
    if not 1 <= n <= len(asked):
        raise Refused(f"{n} requests", f"the world has {len(asked)} facts about people", f"ask for 1 to {len(asked)}")
    made = Requests(tuple(_request(model.world, p, r, rng) for p, r in rng.sample(asked, n)), "facts")
    needs = {"model": model.made.python if model.made is not None else ""}
    how = Made(
        called("ca.editing.from_world", "model", n=n, seed=seed), {"": "facts", "n": n, "seed": seed}, needs=needs
    )
    return Requests(made.requests, made.name, how.of(made, Requests.identity))


def _request(world: Any, person: Any, relation: str, rng: Random) -> Request:
    new, old = person.counterfactual[relation], person.facts[relation]
    wordings = RELATIONS[relation]
    shown = [k for k in range(len(wordings)) if k != person.held_out_template[relation]]
    k = rng.choice(shown)

    def ask(who: Any, about: str, wording: int) -> str:
        return RELATIONS[about][wording].format(s=who.name)

    probes = [Probe("paraphrase", ask(person, relation, i), new) for i in range(len(wordings)) if i != k]
    if relation == "city":
        probes += [Probe("portability", t.format(s=person.name), world.country_of_city[new]) for t in TWO_HOP]
    others = [p for p in world.people if p is not person]
    same = [p for p in others if p.facts[relation] == old]
    probes += [Probe("neighbourhood", ask(p, relation, k), old) for p in _some(same, rng)]
    rest = [(r, i) for r, own in RELATIONS.items() if r != relation for i in range(len(own))]
    rest = [(r, i) for r, i in rest if i != person.held_out_template[r]]
    probes += [Probe("same_subject", ask(person, r, i), person.facts[r]) for r, i in _some(rest, rng)]
    alike = [p for p in others if _shared(p.name, person.name) == len(person.name) // 2 - 1]
    probes += [Probe("name_overlap", ask(p, relation, k), p.facts[relation]) for p in _some(alike, rng)]
    return Request(person.name, ask(person, relation, k), new, old, tuple(probes), relation)


def _some(found: list[Any], rng: Random) -> list[Any]:
    return rng.sample(found, min(_EACH, len(found)))


def _shared(one: str, other: str) -> int:
    """Return how many syllables of two letters two names share at the same places."""
    pairs = zip(one.lower()[::2], one.lower()[1::2], other.lower()[::2], other.lower()[1::2], strict=False)
    return sum((a, b) == (c, d) for a, b, c, d in pairs)
