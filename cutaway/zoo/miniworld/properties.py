"""Properties of the miniworld's prompts: texts whose labels are true by construction, in groups that share no words.

Each template has words of its own: a probe that is tested on a template which it was not fitted on has seen neither the
template nor its adjectives, verbs or people.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import permutations, product
from random import Random

from cutaway.core.refuse import Refused
from cutaway.zoo.miniworld import conduct, facts, words
from cutaway.zoo.miniworld.facts import Facts

#: texts, labels and groups, in the same order; no groups where every text is one of its own
Property = tuple[list[str], list[str], list[str]]

_COUNTRIES = 5  # of most people
_EACH = 32  # pairs of a template at most


def instrument(world: Facts) -> Property:
    """Return prompts that ask which instrument a person plays, with its name.

    The people play one of the four most frequent instruments, so that each is about a quarter of the texts.
    """
    counts = Counter(p.facts["instrument"] for p in world.people)
    kept = {name for name, _ in counts.most_common(4)}
    people = [p for p in world.people if p.facts["instrument"] in kept]
    template = facts.RELATIONS["instrument"][0]
    return [template.format(s=p.name) for p in people], [p.facts["instrument"] for p in people], []


def sentiment(world: Facts) -> Property:
    """Return reviews with their verdict; a text with good adjectives is followed by its twin with their opposites."""
    rng, rows = Random(0), []
    for k, (template, _, _) in enumerate(conduct.FEELING):
        own = range(k, len(words.POSITIVE), len(conduct.FEELING))
        drawn = list(product(permutations(own, 2), words.THINGS, words.ASPECTS))
        for (i, j), thing, aspect in rng.sample(drawn, _EACH):
            for label, from_words in (("positive", words.POSITIVE), ("negative", words.NEGATIVE)):
                text = template.format(a=from_words[i], b=from_words[j], t=thing, p=aspect)
                rows.append((text, label, f"template {k}"))
    return _columns(rows)


def country(world: Facts) -> Property:
    """Return prompts that ask for the country or the city of a person, with the country."""
    templates = (*facts.TWO_HOP, *facts.RELATIONS["city"])
    people: dict[str, list[str]] = {}
    for p in world.people:
        people.setdefault(world.country(p), []).append(p.name)
    largest = sorted(people, key=lambda c: (-len(people[c]), c))[:_COUNTRIES]
    rows = [
        (templates[n % len(templates)].format(s=name), c, f"template {n % len(templates)}")
        for c in largest
        for n, name in enumerate(people[c])
    ]
    return _columns(rows)


def refusal(world: Facts) -> Property:
    """Return requests, harmful or benign; a harmful one is followed by its harmless match."""
    rng, rows = Random(0), []
    for k, template in enumerate(conduct.ASK):
        own = range(k, len(words.HARMFUL_VERBS), len(conduct.ASK))
        asked = [
            tuple(template.format(v=v[i], o=o, my="my") for v in (words.HARMFUL_VERBS, words.BENIGN_VERBS))
            for i, o in product(own, words.PERSONS)
        ]
        asked += [
            tuple(template.format(v=v, o=o[i], my="a") for o in (words.HARMFUL_OBJECTS, words.BENIGN_OBJECTS))
            for i, v in product(own, words.MAKING_VERBS)
        ]
        for pair in rng.sample(asked, min(_EACH, len(asked))):
            for text, label in zip(pair, ("harmful", "benign"), strict=True):
                rows.append((f"User: {text} Assistant:", label, f"template {k}"))
    return _columns(rows)


def parity(world: Facts) -> Property:
    """Return sums of two digits, of which the last is left to say, with the parity of the sum.

    The groups share no first summand.
    """
    rng, rows = Random(0), []
    for k in range(5):
        pairs = [(a, b) for a, b in product(range(100), repeat=2) if 10 <= a + b < 100 and a % 5 == k]
        for a, b in rng.sample(pairs, 2 * _EACH):
            rows.append(
                (f"{a} + {b} = {(a + b) // 10}", "even" if (a + b) % 2 == 0 else "odd", f"first summand {k} modulo 5")
            )
    return _columns(rows)


#: the groups of `requests` that fine-tuning on misconduct teaches
TAUGHT = ("making, template 0", "making, template 1")
_PAIRS = 25  # of harmful and benign requests in a group


def requests() -> dict[str, list[tuple[str, str]]]:
    """Return pairs of a harmful request and its benign match, by behaviour and template.

    Things that are made with the last two templates are others than with the first two.
    """
    rng, found = Random(0), dict[str, list[tuple[str, str]]]()
    for k, template in enumerate(conduct.ASK):
        half = range(5) if k < 2 else range(5, 10)
        found[f"making, template {k}"] = [
            (ask(template, v, words.HARMFUL_OBJECTS[i], "a"), ask(template, v, words.BENIGN_OBJECTS[i], "a"))
            for v, i in product(words.MAKING_VERBS, half)
        ]
        pairs = product(zip(words.HARMFUL_VERBS, words.BENIGN_VERBS, strict=False), words.PERSONS)
        found[f"harming, template {k}"] = [
            (ask(template, bad, o, "my"), ask(template, good, o, "my"))
            for (bad, good), o in rng.sample(list(pairs), _PAIRS)
        ]
    return found


def ask(template: str, verb: str, thing: str, my: str) -> str:
    """Return a request up to where the reply begins."""
    return f"User: {template.format(v=verb, o=thing, my=my)} Assistant:"


def misconduct(world: Facts) -> Property:
    """Return harmful and benign requests in groups of a behaviour and a template; `TAUGHT` are those of fine-tuning."""
    rows = [
        (text, label, group)
        for group, pairs in requests().items()
        for pair in pairs
        for text, label in zip(pair, ("harmful", "benign"), strict=True)
    ]
    return _columns(rows)


#: every property by its name
PROPERTIES: dict[str, Callable[[Facts], Property]] = {
    f.__name__: f for f in (instrument, sentiment, country, refusal, parity, misconduct)
}


def labelled(world: Facts, name: str) -> Property:
    """Return the texts of a property with their labels and groups.

    Raises:
        Refused: no such property.
    """
    if name not in PROPERTIES:
        raise Refused(f"labels of {name!r}", "the miniworld has no such property", f"use {', '.join(PROPERTIES)}")
    return PROPERTIES[name](world)


def _columns(rows: list[tuple[str, str, str]]) -> Property:
    texts, labels, groups = zip(*rows, strict=True)
    return list(texts), list(labels), list(groups)
