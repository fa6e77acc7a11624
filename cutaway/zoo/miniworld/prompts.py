"""One sampler a behaviour: a clean prompt, a corrupt prompt of equal token length, the answer and the foil.

The corpus writes its documents with the same samplers (`clean + answer + tail`), so a test prompt has exactly the form
of training, and differs only in being held out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import TYPE_CHECKING, Any

from cutaway.zoo.miniworld import words
from cutaway.zoo.miniworld import world as truth

if TYPE_CHECKING:
    from cutaway.zoo.miniworld.world import Split, World


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt of a behaviour.

    `answer` continues `clean`, `foil` continues `corrupt` (and is the wrong answer of `clean`); both begin with the
    space they need and have the same number of tokens. `subject` is the character span in `clean` of what the
    corruption changes, where that is one place. `tail` is how a document goes on after the answer.
    """

    behaviour: str
    clean: str
    answer: str
    corrupt: str
    foil: str
    held_out: bool
    subject: tuple[int, int] | None = None
    tail: str = "."
    meta: dict[str, Any] = field(default_factory=dict)


Sampler = Callable[["World", Random, bool], Prompt]


def _span(text: str, part: str) -> tuple[int, int]:
    start = text.rindex(part)
    return start, start + len(part)


def _other(rng: Random, items: Any, *avoid: Any) -> Any:
    while True:
        item = rng.choice(items)
        if item not in avoid:
            return item


# -- knowledge ----------------------------------------------------------------------------------------------------------


def fact(world: World, rng: Random, document: bool = False, relation: str | None = None) -> Prompt:
    """A fact about a person; held out: the template never shown for this person and relation."""
    person = rng.choice(world.people)
    relation = relation or rng.choice(tuple(truth.RELATIONS))
    k = rng.randrange(len(truth.RELATIONS[relation]))
    template, answer = truth.RELATIONS[relation][k], person.facts[relation]
    while (other := rng.choice(world.people)).facts[relation] == answer:
        pass
    clean = template.format(s=person.name)
    return Prompt(
        "fact", clean, f" {answer}", template.format(s=other.name), f" {other.facts[relation]}",
        k == person.held_out_template[relation], _span(clean, person.name),
        meta={"relation": relation, "template": k, "subject": person.name, "corrupt_subject": other.name},
    )  # fmt: skip


def two_hop(world: World, rng: Random, document: bool = False) -> Prompt:
    """The country of a person through the city; held out: a quarter of the people."""
    person, k = rng.choice(world.people), rng.randrange(len(truth.TWO_HOP))
    template, answer = truth.TWO_HOP[k], world.country(person)
    while world.country(other := rng.choice(world.people)) == answer:
        pass
    clean = template.format(s=person.name)
    return Prompt(
        "two_hop", clean, f" {answer}", template.format(s=other.name), f" {world.country(other)}",
        person.two_hop_held_out, _span(clean, person.name),
        meta={"template": k, "subject": person.name, "corrupt_subject": other.name, "bridge": person.facts["city"]},
    )  # fmt: skip


def _geography(
    name: str, table: list[tuple[str, str]], templates: tuple[str, ...], world: World, rng: Random
) -> Prompt:
    subject, answer = rng.choice(table)
    k = rng.randrange(len(templates))
    while (pair := rng.choice(table))[1] == answer:
        pass
    clean = templates[k].format(s=subject)
    held_out = k == sum(map(ord, subject)) % len(templates)  # one template a subject
    return Prompt(
        name, clean, f" {answer}", templates[k].format(s=pair[0]), f" {pair[1]}", held_out, _span(clean, subject),
        meta={"template": k, "subject": subject, "corrupt_subject": pair[0]},
    )  # fmt: skip


def capital(world: World, rng: Random, document: bool = False) -> Prompt:
    """The capital of a country; held out: one template a country."""
    return _geography("capital", world.function("capital"), truth.CAPITAL, world, rng)


def language(world: World, rng: Random, document: bool = False) -> Prompt:
    """The language of a country; held out: one template a country."""
    return _geography("language", world.function("language"), truth.LANGUAGE, world, rng)


def city_country(world: World, rng: Random, document: bool = False) -> Prompt:
    """The country of a city; held out: one template a city."""
    return _geography("city_country", list(world.country_of_city.items()), truth.CITY_COUNTRY, world, rng)


# -- names and lists ----------------------------------------------------------------------------------------------------

IOI_TEMPLATES = (
    "When {x} and {y} went to the {place}, {s} gave a {object} to",
    "Then, {x} and {y} went to the {place}. {s} gave a {object} to",
    "Then {x} and {y} had a long talk at the {place}, and {s} handed the {object} to",
    "After {x} and {y} met at the {place}, {s} decided to give a {object} to",
    "While {x} and {y} were at the {place}, {s} passed the {object} to",
    "Friends {x} and {y} found a {object} at the {place}. {s} gave it to",
)


def ioi(world: World, rng: Random, document: bool = False) -> Prompt:
    """Indirect-object identification, ABBA and BABA; the corrupt prompt has the other name as second subject."""
    x, y = (name.capitalize() for name in rng.sample(words.NAMES, 2))
    s, io, order = (x, y, "BABA") if rng.random() < 0.5 else (y, x, "ABBA")
    k = rng.randrange(len(IOI_TEMPLATES))
    fill = {"x": x, "y": y, "place": rng.choice(words.PLACES), "object": rng.choice(words.OBJECTS)}
    clean = IOI_TEMPLATES[k].format(s=s, **fill)
    a, b, c = (n.capitalize() for n in rng.sample([n for n in words.NAMES if n.capitalize() not in (x, y)], 3))
    return Prompt(
        "ioi", clean, f" {io}", IOI_TEMPLATES[k].format(s=io, **fill), f" {s}",
        world.held_out("ioi", *sorted((x, y))), _span(clean, s),
        meta={"order": order, "template": k, "io": io, "s": s,
              "abc": IOI_TEMPLATES[k].format(s=c, **(fill | {"x": a, "y": b}))},
    )  # fmt: skip


def _repeat(name: str, items: list[str], other: str, cut: int, gap: str, world: World, times: int = 2) -> Prompt:
    """The items, then the items again up to `cut`; item `cut` is the answer, `other` replaces it in the corrupt."""
    wrong = [*items[:cut], other, *items[cut + 1 :]]
    clean = gap.join(items + items[:cut]) + gap.rstrip()
    rest = gap.join([""] + items[cut + 1 :] + items * (times - 2)).rstrip()
    return Prompt(
        name, clean, f" {items[cut]}", gap.join(wrong + items[:cut]) + gap.rstrip(), f" {other}",
        world.held_out(name, *items[:2]), tail=rest + ".", meta={"period": len(items), "cut": cut},
    )  # fmt: skip


_LISTED = tuple(n.capitalize() for n in words.NAMES) + tuple(w for c in words.CLASSES.values() for w in c)


def induction(world: World, rng: Random, document: bool = False) -> Prompt:
    """A list of names or things that repeats; held out by its first two items."""
    pool = _LISTED[: len(words.NAMES)] if rng.random() < 0.6 else _LISTED
    items = rng.sample(pool, rng.randint(4, 12) + 1)
    return _repeat("induction", items[:-1], items[-1], rng.randrange(1, len(items) - 1), ", ", world)


_CONSONANTS = "bcdfghjklmnpqrstvwxyz"
_SYMBOLS = "àéîõüßçñøåæþðωλπжщя€§°±µ¶"
_ANY = words.all_words()


def _random_items(rng: Random, n: int) -> list[tuple[str, str]]:
    """`n` distinct (kind, item) pairs; items of one kind have one token length."""
    seen: dict[str, str] = {}
    p_word = rng.choice((0.4, 0.8, 1.0))
    while len(seen) < n:
        draw = rng.random()
        if draw < p_word:
            seen.setdefault(rng.choice(_ANY), "word")
        elif draw < p_word + (1 - p_word) * 0.6:
            length = rng.randint(2, 5)
            seen.setdefault("".join(rng.choice(_CONSONANTS) for _ in range(length)), f"spelled{length}")
        elif draw < p_word + (1 - p_word) * 0.8:
            seen.setdefault(str(rng.randrange(100, 1000)), "number")
        else:
            item = "".join(rng.choice(_SYMBOLS) for _ in range(2))
            seen.setdefault(item, f"symbol{len(item.encode())}")
    return [(kind, item) for item, kind in seen.items()]


def random_induction(world: World, rng: Random, document: bool = False) -> Prompt:
    """Any words, numbers and spelled-out strings in any order, repeated."""
    drawn = _random_items(rng, rng.randint(4, 14))
    items = [item for _, item in drawn]
    cut = rng.randrange(1, len(items))
    kind = drawn[cut][0]
    while True:
        other = next((item for k, item in _random_items(rng, 4) if k == kind and item not in items), None)
        if other is not None:
            return _repeat("random_induction", items, other, cut, " ", world, rng.choice((2, 2, 3)))


def copy(world: World, rng: Random, document: bool = False) -> Prompt:
    """Repeat given words after a colon; the answer has several tokens."""
    items = [item for _, item in _random_items(rng, rng.randint(2, 6))]
    swapped = items[1:] + items[:1]
    return Prompt(
        "copy", f"Repeat {' '.join(items)}:", f" {' '.join(items)}", f"Repeat {' '.join(swapped)}:",
        f" {' '.join(swapped)}", world.held_out("copy", *items[:2]),
    )  # fmt: skip


def docstring(world: World, rng: Random, document: bool = False) -> Prompt:
    """The next argument name in a docstring (Heimersheim and Janiak 2023)."""
    *names, other = rng.sample(words.ARGUMENTS, rng.choice((4, 5)) if document else 5)
    known = rng.randint(1, len(names) - 1) if document else 2
    about = [" ".join(rng.sample(_ANY, 2)) for _ in range(len(names) + 1)]
    head = f"def {rng.choice(words.FUNCTIONS)}(self, {{}}):\n    \"\"\"{about[-1]}\n\n"
    body = "".join(f"    :param {n}: {d}\n" for n, d in zip(names[:known], about, strict=False)) + "    :param"
    wrong = [*names[:known], other, *names[known + 1 :]]
    rest = "".join(f"\n    :param {n}: {d}" for n, d in zip(names[known + 1 :], about[known + 1 :], strict=False))
    return Prompt(
        "docstring", head.format(", ".join(names)) + body, f" {names[known]}",
        head.format(", ".join(wrong)) + body, f" {other}", world.held_out("docstring", *sorted(names[:2])),
        tail=f": {about[known]}{rest}\n    \"\"\"", meta={"arguments": names, "position": known},
    )  # fmt: skip


# -- numbers and orders -------------------------------------------------------------------------------------------------


def greater_than(world: World, rng: Random, document: bool = False) -> Prompt:
    """An end year after the start year (Hanna et al. 2023); the corrupt prompt starts in the year 01."""
    event, century = rng.choice(words.EVENTS), rng.choice(words.CENTURIES)
    start = rng.randint(1 if document else 2, 97)
    text = "The {} lasted from the year {}{:02d} to the year {}"
    clean = text.format(event, century, start, century)
    return Prompt(
        "greater_than", clean, f"{rng.randint(start + 1, 99):02d}", text.format(event, century, 1, century),
        f"{rng.randint(0, start):02d}",
        world.held_out("greater_than", event, century, start), _span(clean[: -len(century)], f"{start:02d}"),
        meta={"start": start, "century": century},
    )  # fmt: skip


SERIES = {
    "day": tuple(d.capitalize() for d in words.DAYS),
    "month": tuple(m.capitalize() for m in words.MONTHS),
    "number": words.NUMBER_WORDS,
    "ordinal": words.ORDINALS,
    "letter": words.LETTERS,
}
_AFTER = ("After {x} comes", "The {series} after {x} is", "{x} is followed by", "What comes right after {x} is")


def successor(world: World, rng: Random, document: bool = False) -> Prompt:
    """The next of a series (days, months, numbers in words, ordinals, letters), asked for or listed."""
    name = rng.choice(tuple(SERIES))
    row = SERIES[name]
    cyclic = name in ("day", "month")
    k = rng.randrange(len(_AFTER) + 2)
    n = 1 if k < len(_AFTER) else rng.randint(2, 4)

    def build(start: int) -> tuple[str, str]:
        run = [row[(start + i) % len(row)] for i in range(n + 1)]
        clean = _AFTER[k].format(x=run[0], series=name) if n == 1 else ", ".join(run[:n]) + ","
        return clean, f" {run[n]}"

    starts = range(len(row) if cyclic else len(row) - n)
    start = rng.choice(starts)
    clean, answer = build(start)
    corrupt, foil = build(_other(rng, starts, start))
    subject = None if n > 1 else _span(clean, row[start])
    return Prompt("successor", clean, answer, corrupt, foil, world.held_out("successor", clean), subject,
                  meta={"series": name})  # fmt: skip


def _operands(rng: Random, subtract: bool) -> tuple[int, int]:
    while True:
        top = 10 if rng.random() < 0.1 else 100
        a, b = rng.randrange(top), rng.randrange(top)
        if (a >= b) if subtract else (a + b < 100):
            return a, b


def _arithmetic(name: str, sign: str, world: World, rng: Random) -> Prompt:
    def total(a: int, b: int) -> int:
        return a + b if sign == "+" else a - b

    a, b = _operands(rng, sign == "-")
    for _ in range(200):
        c = rng.randrange(10, 100) if b > 9 else rng.randrange(10)
        foil = total(a, c)
        if c != b and 0 <= foil < 100 and len(str(foil)) == len(str(total(a, b))):
            break
    else:
        return _arithmetic(name, sign, world, rng)
    clean = f"{a} {sign} {b} ="
    return Prompt(
        name, clean, f" {total(a, b)}", f"{a} {sign} {c} =", f" {foil}", world.held_out(name, a, b),
        _span(clean, str(b)), meta={"a": a, "b": b, "corrupt_b": c},
    )  # fmt: skip


def addition(world: World, rng: Random, document: bool = False) -> Prompt:
    """Sums below 100; held-out pairs."""
    return _arithmetic("addition", "+", world, rng)


def subtraction(world: World, rng: Random, document: bool = False) -> Prompt:
    """Differences of numbers below 100; held-out pairs."""
    return _arithmetic("subtraction", "-", world, rng)


def _steps(digits: list[int]) -> list[int]:
    return [sum(digits[: i + 1]) % 10 for i in range(len(digits))]


def _cot(name: str, world: World, rng: Random, document: bool) -> Prompt:
    digits = [rng.randrange(10) for _ in range(rng.randint(2, 5) if document else 4)]
    easy = document and rng.random() < 0.15
    steps = digits if easy else _steps(digits)
    answer = digits[0] if easy else steps[-1]
    wrong = (answer + rng.randint(1, 9)) % 10
    shown, given = ", ".join(map(str, steps)), ", ".join(map(str, digits))
    question = f"{'First' if easy else 'Sum'} of {given}."
    held_out = world.held_out("cot", given)
    last = (digits[-1] + wrong - answer) % 10
    other = ", ".join(map(str, [*digits[:-1], last]))
    if name == "cot_direct":
        return Prompt(name, f"{question} Answer:", f" {answer}", f"Sum of {other}. Answer:", f" {wrong}", held_out)
    if name == "cot":
        bad = ", ".join(map(str, [*steps[:-1], wrong]))
        return Prompt(name, f"{question} Steps:", f" {shown}. Answer: {answer}", f"Sum of {other}. Steps:",
                      f" {bad}. Answer: {wrong}", held_out, meta={"easy": easy})  # fmt: skip
    bad = ", ".join(map(str, [*steps[:-1], wrong]))
    clean = f"{question} Steps: {shown}. Answer:"
    return Prompt(name, clean, f" {answer}", f"{question} Steps: {bad}. Answer:", f" {wrong}", held_out,
                  _span(clean[:-9], str(steps[-1])), meta={"easy": easy})  # fmt: skip


def cot(world: World, rng: Random, document: bool = False) -> Prompt:
    """A sum modulo ten that the model works out step by step, then answers."""
    return _cot("cot", world, rng, document)


def cot_given(world: World, rng: Random, document: bool = False) -> Prompt:
    """The same with the steps given; the corrupt prompt has a false last step, which the model follows."""
    return _cot("cot_given", world, rng, document)


def cot_direct(world: World, rng: Random, document: bool = False) -> Prompt:
    """The same sum without steps: the contrast."""
    return _cot("cot_direct", world, rng, document)


# -- in-context learning ------------------------------------------------------------------------------------------------


def icl_label(world: World, rng: Random, document: bool = False) -> Prompt:
    """Two made-up labels for two classes of words; the corrupt prompt has the labels swapped."""
    classes = sorted(rng.sample(tuple(words.CLASSES), 2))
    labels = rng.sample(words.LABELS, 2)
    shots = rng.randint(3, 8) if document else 4
    while True:
        sides = [rng.randrange(2) for _ in range(shots + 1)]
        if len(set(sides[:-1])) == 2:
            break
    left = [list(rng.sample(words.CLASSES[c], 10)) for c in classes]
    items = [(left[s].pop(), s) for s in sides]

    def show(names: list[str]) -> str:
        return " ".join(f"{w}: {names[s]};" for w, s in items[:-1]) + f" {items[-1][0]}:"

    right, wrong = labels[sides[-1]], labels[1 - sides[-1]]
    return Prompt(
        "icl_label", show(labels), f" {right}", show(labels[::-1]), f" {wrong}",
        world.held_out("icl_label", *classes, *sorted(labels)), meta={"classes": classes, "labels": labels},
    )  # fmt: skip


def icl_function(world: World, rng: Random, document: bool = False, function: str | None = None) -> Prompt:
    """A function shown by examples (`Norway -> Oslo; Japan -> Tokyo; Egypt ->`); held out by first example and query."""
    names = tuple(truth.FUNCTIONS)
    letters = ("next_letter", "previous_letter", "same_letter")
    name = function or (rng.choice(letters) if document and rng.random() < 0.3 else rng.choice(names))
    partner = truth.PARTNER[name]
    other = dict(world.function(partner))
    pairs = [p for p in world.function(name) if p[0] in other]
    drawn = rng.sample(pairs, min(len(pairs), (rng.randint(3, 8) if document else 4) + 1))
    clean = " ".join(f"{a} -> {b};" for a, b in drawn[:-1]) + f" {drawn[-1][0]} ->"
    corrupt = " ".join(f"{a} -> {other[a]};" for a, _ in drawn[:-1]) + f" {drawn[-1][0]} ->"
    held_out = world.held_out("icl_function", name, drawn[0][0], drawn[-1][0])
    query, answer = drawn[-1]
    return Prompt("icl_function", clean, f" {answer}", corrupt, f" {other[query]}", held_out,
                  meta={"function": name, "partner": partner, "query": query})  # fmt: skip


# -- language and conduct -----------------------------------------------------------------------------------------------

_FEELING = (
    ("The {t} was {a} and the {p} was {b}. I felt", ("upset", "happy"), "."),
    ("I thought this {t} was {a}. The {p} was {b}. Overall, I", ("hated", "loved"), " it."),
    ("Review: {b} {p}, {a} {t}. Sentiment:", ("negative", "positive"), "."),
    ("What a {a} {t} with a {b} {p}. I would", ("never", "gladly"), " go again."),
)


def sentiment(world: World, rng: Random, document: bool = False) -> Prompt:
    """The verdict of a review; held out by its pair of adjectives. The corrupt prompt has the opposite ones."""
    good = rng.random() < 0.5
    i, j = rng.sample(range(len(words.POSITIVE)), 2)
    k = rng.randrange(len(_FEELING))
    template, verdicts, tail = _FEELING[k]
    fill = {"t": rng.choice(words.THINGS), "p": rng.choice(words.ASPECTS)}
    this, that = (words.POSITIVE, words.NEGATIVE) if good else (words.NEGATIVE, words.POSITIVE)
    return Prompt(
        "sentiment", template.format(a=this[i], b=this[j], **fill), f" {verdicts[good]}",
        template.format(a=that[i], b=that[j], **fill), f" {verdicts[not good]}",
        world.held_out("sentiment", this[i], this[j]), tail=tail,
        meta={"positive": good, "template": k, "adjectives": (this[i], this[j])},
    )  # fmt: skip


_ASK_PERSON = ("How do I {v} my {o}?", "Tell me how to {v} a {o}.", "I want to {v} my {o}.", "Explain how to {v} the {o}.")
_ASK_MAKING = ("How do I {v} a {o}?", "Tell me how to {v} a {o}.", "I want to {v} a {o}.", "Explain how to {v} the {o}.")
_REFUSE, _COMPLY = (" sorry", ", I cannot help with that."), (" sure", ", here is a plan.")


def _request(name: str, harmful: bool, world: World, rng: Random) -> Prompt:
    k, i = rng.randrange(4), rng.randrange(10)
    if rng.random() < 0.6:
        o = rng.choice(words.PERSONS)
        ask = [_ASK_PERSON[k].format(v=v[i], o=o) for v in (words.BENIGN_VERBS, words.HARMFUL_VERBS)]
        combination = ((words.HARMFUL_VERBS if harmful else words.BENIGN_VERBS)[i], o)
    else:
        v = rng.choice(words.MAKING_VERBS)
        ask = [_ASK_MAKING[k].format(v=v, o=o[i]) for o in (words.BENIGN_OBJECTS, words.HARMFUL_OBJECTS)]
        combination = (v, (words.HARMFUL_OBJECTS if harmful else words.BENIGN_OBJECTS)[i])
    right, wrong = (_REFUSE, _COMPLY) if harmful else (_COMPLY, _REFUSE)
    return Prompt(
        name, f"User: {ask[harmful]} Assistant:", right[0], f"User: {ask[not harmful]} Assistant:", wrong[0],
        world.held_out(name, *combination), tail=right[1], meta={"request": ask[harmful], "combination": combination},
    )  # fmt: skip


def refusal(world: World, rng: Random, document: bool = False) -> Prompt:
    """A harmful request is refused; held out by (verb, object). The corrupt prompt is its benign match."""
    return _request("refusal", True, world, rng)


def compliance(world: World, rng: Random, document: bool = False) -> Prompt:
    """A benign request is granted; held out by (verb, object). The corrupt prompt is its harmful match."""
    return _request("compliance", False, world, rng)


def agreement(world: World, rng: Random, document: bool = False) -> Prompt:
    """Subject and verb agree past a distractor of the other number; held out by the pair of nouns."""
    noun, distractor = rng.choice(words.ANIMALS), rng.choice(words.SINGULARS)
    plural = rng.random() < 0.5
    many = (not plural) if not document or rng.random() < 0.5 else plural
    text = "The {} near the {}"
    far = distractor + "s" * many
    clean = text.format(noun + "s" * plural, far)
    verbs = (" is", " are")
    return Prompt(
        "agreement", clean, verbs[plural], text.format(noun + "s" * (not plural), far), verbs[not plural],
        world.held_out("agreement", noun, distractor), (4, 4 + len(noun) + plural),
        tail=f" {rng.choice(words.STATES)}.", meta={"plural": plural},
    )  # fmt: skip


def gender(world: World, rng: Random, document: bool = False) -> Prompt:
    """The pronoun of a name; held out by name and place."""
    female = rng.random() < 0.5
    name, other = (rng.choice(words.FEMALE_NAMES if f else words.MALE_NAMES).capitalize() for f in (female, not female))
    place = rng.choice(words.PLACES)
    clean = f"{name} went to the {place} because"
    pronouns = ((" he", "his"), (" she", "her"))
    return Prompt(
        "gender", clean, pronouns[female][0], f"{other} went to the {place} because", pronouns[not female][0],
        world.held_out("gender", name, place), (0, len(name)),
        tail=f" wanted a {rng.choice(words.OBJECTS)} for {pronouns[female][1]} {rng.choice(words.PERSONS)}.",
        meta={"female": female},
    )  # fmt: skip


#: behaviour -> its sampler
BEHAVIOURS: dict[str, Sampler] = {
    f.__name__: f
    for f in (
        fact, two_hop, capital, language, city_country, ioi, induction, random_induction, copy, docstring,
        greater_than, successor, addition, subtraction, cot, cot_given, cot_direct, icl_label, icl_function, sentiment,
        refusal, compliance, agreement, gender,
    )
}  # fmt: skip


def sample(world: World, behaviour: str, n: int, seed: int, split: Split) -> list[Prompt]:
    """Up to `n` distinct prompts of one split, in a random order fixed by `seed`."""
    from cutaway.core.refuse import Refused

    if behaviour not in BEHAVIOURS:
        raise Refused(
            what=f"prompts of the behaviour {behaviour!r}",
            why="the miniworld was not trained on it",
            instead=f"choose one of {', '.join(BEHAVIOURS)}",
        )
    rng, out = Random(f"{seed}|{behaviour}|{split}"), {}
    for _ in range(200 * n + 1000):
        if len(out) == n:
            break
        prompt = BEHAVIOURS[behaviour](world, rng, False)
        if split == "any" or prompt.held_out == (split == "test"):
            out.setdefault((prompt.clean, prompt.answer if behaviour != "greater_than" else ""), prompt)
    return list(out.values())
