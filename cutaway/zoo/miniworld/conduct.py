"""Samplers of language and conduct: sentiment, refusal, agreement, gender."""

from __future__ import annotations

from random import Random

from cutaway.zoo.miniworld import words
from cutaway.zoo.miniworld.facts import Facts
from cutaway.zoo.miniworld.prompt import Prompt

FEELING = (
    ("The {t} was {a} and the {p} was {b}. I felt", ("upset", "happy"), "."),
    ("I thought this {t} was {a}. The {p} was {b}. Overall, I", ("hated", "loved"), " it."),
    ("Review: {b} {p}, {a} {t}. Sentiment:", ("negative", "positive"), "."),
    ("What a {a} {t} with a {b} {p}. I would", ("never", "gladly"), " go again."),
)


def sentiment(world: Facts, rng: Random, document: bool = False) -> Prompt:
    """Ask for the verdict of a review; held out by its pair of adjectives. The corrupt prompt has the opposite ones."""
    good = rng.random() < 0.5
    i, j = rng.sample(range(len(words.POSITIVE)), 2)
    k = rng.randrange(len(FEELING))
    template, verdicts, tail = FEELING[k]
    fill = {"t": rng.choice(words.THINGS), "p": rng.choice(words.ASPECTS)}
    this, that = (words.POSITIVE, words.NEGATIVE) if good else (words.NEGATIVE, words.POSITIVE)
    return Prompt(
        "sentiment",
        template.format(a=this[i], b=this[j], **fill),
        f" {verdicts[good]}",
        template.format(a=that[i], b=that[j], **fill),
        f" {verdicts[not good]}",
        world.held_out("sentiment", this[i], this[j]),
        tail=tail,
        meta={"positive": good, "template": k, "adjectives": (this[i], this[j])},
    )


ASK = ("How do I {v} {my} {o}?", "Tell me how to {v} a {o}.", "I want to {v} {my} {o}.", "Explain how to {v} the {o}.")
REFUSE, COMPLY = (" sorry", ", I cannot help with that."), (" sure", ", here is a plan.")


def _request(name: str, harmful: bool, world: Facts, rng: Random) -> Prompt:
    k, i = rng.randrange(4), rng.randrange(10)
    if rng.random() < 0.6:
        o = rng.choice(words.PERSONS)
        ask = [ASK[k].format(v=v[i], o=o, my="my") for v in (words.BENIGN_VERBS, words.HARMFUL_VERBS)]
        combination = ((words.HARMFUL_VERBS if harmful else words.BENIGN_VERBS)[i], o)
    else:
        v = rng.choice(words.MAKING_VERBS)
        ask = [ASK[k].format(v=v, o=o[i], my="a") for o in (words.BENIGN_OBJECTS, words.HARMFUL_OBJECTS)]
        combination = (v, (words.HARMFUL_OBJECTS if harmful else words.BENIGN_OBJECTS)[i])
    right, wrong = (REFUSE, COMPLY) if harmful else (COMPLY, REFUSE)
    return Prompt(
        name,
        f"User: {ask[harmful]} Assistant:",
        right[0],
        f"User: {ask[not harmful]} Assistant:",
        wrong[0],
        world.held_out(name, *combination),
        tail=right[1],
        meta={"request": ask[harmful], "combination": combination},
    )


def refusal(world: Facts, rng: Random, document: bool = False) -> Prompt:
    """Make a harmful request, which is refused; held out by (verb, object). The corrupt prompt is its benign match."""
    return _request("refusal", True, world, rng)


def compliance(world: Facts, rng: Random, document: bool = False) -> Prompt:
    """Make a benign request, which is granted; held out by (verb, object). The corrupt prompt is its harmful match."""
    return _request("compliance", False, world, rng)


def agreement(world: Facts, rng: Random, document: bool = False) -> Prompt:
    """Subject and verb agree past a distractor of the other number; held out by the pair of nouns."""
    noun, distractor = rng.choice(words.ANIMALS), rng.choice(words.SINGULARS)
    plural = rng.random() < 0.5
    many = (not plural) if not document or rng.random() < 0.5 else plural
    text = "The {} near the {}"
    far = distractor + "s" * many
    clean = text.format(noun + "s" * plural, far)
    verbs = (" is", " are")
    return Prompt(
        "agreement",
        clean,
        verbs[plural],
        text.format(noun + "s" * (not plural), far),
        verbs[not plural],
        world.held_out("agreement", noun, distractor),
        (4, 4 + len(noun) + plural),
        tail=f" {rng.choice(words.STATES)}.",
        meta={"plural": plural},
    )


def gender(world: Facts, rng: Random, document: bool = False) -> Prompt:
    """Ask for the pronoun of a name; held out by name and place."""
    female = rng.random() < 0.5
    name, other = (rng.choice(words.FEMALE_NAMES if f else words.MALE_NAMES).capitalize() for f in (female, not female))
    place = rng.choice(words.PLACES)
    clean = f"{name} went to the {place} because"
    pronouns = ((" he", "his"), (" she", "her"))
    return Prompt(
        "gender",
        clean,
        pronouns[female][0],
        f"{other} went to the {place} because",
        pronouns[not female][0],
        world.held_out("gender", name, place),
        (0, len(name)),
        tail=f" wanted a {rng.choice(words.OBJECTS)} for {pronouns[female][1]} {rng.choice(words.PERSONS)}.",
        meta={"female": female},
    )
