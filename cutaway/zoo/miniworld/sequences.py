"""Samplers of what the model finds in its context: names, lists, copies, labels, functions."""

from __future__ import annotations

from random import Random

from cutaway.zoo.miniworld import facts, words
from cutaway.zoo.miniworld.facts import Facts
from cutaway.zoo.miniworld.prompt import Prompt, span

IOI_TEMPLATES = (
    "When {x} and {y} went to the {place}, {s} gave a {object} to",
    "Then, {x} and {y} went to the {place}. {s} gave a {object} to",
    "Then {x} and {y} had a long talk at the {place}, and {s} handed the {object} to",
    "After {x} and {y} met at the {place}, {s} decided to give a {object} to",
    "While {x} and {y} were at the {place}, {s} passed the {object} to",
    "Friends {x} and {y} found a {object} at the {place}. {s} gave it to",
)


def ioi(world: Facts, rng: Random, document: bool = False) -> Prompt:
    """Indirect-object identification, ABBA and BABA; the corrupt prompt has the other name as second subject."""
    x, y = (name.capitalize() for name in rng.sample(words.NAMES, 2))
    s, io, order = (x, y, "BABA") if rng.random() < 0.5 else (y, x, "ABBA")
    k = rng.randrange(len(IOI_TEMPLATES))
    fill = {"x": x, "y": y, "place": rng.choice(words.PLACES), "object": rng.choice(words.OBJECTS)}
    clean = IOI_TEMPLATES[k].format(s=s, **fill)
    a, b, c = (n.capitalize() for n in rng.sample([n for n in words.NAMES if n.capitalize() not in (x, y)], 3))
    return Prompt(
        "ioi",
        clean,
        f" {io}",
        IOI_TEMPLATES[k].format(s=io, **fill),
        f" {s}",
        world.held_out("ioi", *sorted((x, y))),
        span(clean, s),
        meta={
            "order": order,
            "template": k,
            "io": io,
            "s": s,
            "abc": IOI_TEMPLATES[k].format(s=c, **(fill | {"x": a, "y": b})),
        },
    )


def _repeat(name: str, items: list[str], other: str, cut: int, gap: str, world: Facts, times: int = 2) -> Prompt:
    """Repeat the items up to `cut`; item `cut` is the answer, and `other` replaces it in the corrupt prompt."""
    wrong = [*items[:cut], other, *items[cut + 1 :]]
    clean = gap.join(items + items[:cut]) + gap.rstrip()
    rest = gap.join([""] + items[cut + 1 :] + items * (times - 2)).rstrip()
    return Prompt(
        name,
        clean,
        f" {items[cut]}",
        gap.join(wrong + items[:cut]) + gap.rstrip(),
        f" {other}",
        world.held_out(name, *items[:2]),
        tail=rest + ".",
        meta={"period": len(items), "cut": cut},
    )


_LISTED = tuple(n.capitalize() for n in words.NAMES) + tuple(w for c in words.CLASSES.values() for w in c)


def induction(world: Facts, rng: Random, document: bool = False) -> Prompt:
    """Ask for a list of names or things that repeats; held out by its first two items."""
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


def random_induction(world: Facts, rng: Random, document: bool = False) -> Prompt:
    """Any words, numbers and spelled-out strings in any order, repeated."""
    drawn = _random_items(rng, rng.randint(4, 14))
    items = [item for _, item in drawn]
    cut = rng.randrange(1, len(items))
    kind = drawn[cut][0]
    for _ in range(20_000):
        other = next((item for k, item in _random_items(rng, 4) if k == kind and item not in items), None)
        if other is not None:
            return _repeat("random_induction", items, other, cut, " ", world, rng.choice((2, 2, 3)))
    return random_induction(world, rng, document)  # an item like no other of its length


def copy(world: Facts, rng: Random, document: bool = False) -> Prompt:
    """Repeat given words after a colon; the answer has several tokens."""
    items = [item for _, item in _random_items(rng, rng.randint(2, 6))]
    swapped = items[1:] + items[:1]
    return Prompt(
        "copy",
        f"Repeat {' '.join(items)}:",
        f" {' '.join(items)}",
        f"Repeat {' '.join(swapped)}:",
        f" {' '.join(swapped)}",
        world.held_out("copy", *items[:2]),
    )


def docstring(world: Facts, rng: Random, document: bool = False) -> Prompt:
    """Ask for the next argument name in a docstring (Heimersheim and Janiak 2023)."""
    *names, other = rng.sample(words.ARGUMENTS, rng.choice((4, 5)) if document else 5)
    known = rng.randint(1, len(names) - 1) if document else 2
    about = [" ".join(rng.sample(_ANY, 2)) for _ in range(len(names) + 1)]
    head = f'def {rng.choice(words.FUNCTIONS)}(self, {{}}):\n    """{about[-1]}\n\n'
    body = "".join(f"    :param {n}: {d}\n" for n, d in zip(names[:known], about, strict=False)) + "    :param"
    wrong = [*names[:known], other, *names[known + 1 :]]
    rest = "".join(f"\n    :param {n}: {d}" for n, d in zip(names[known + 1 :], about[known + 1 :], strict=False))
    return Prompt(
        "docstring",
        head.format(", ".join(names)) + body,
        f" {names[known]}",
        head.format(", ".join(wrong)) + body,
        f" {other}",
        world.held_out("docstring", *sorted(names[:2])),
        tail=f': {about[known]}{rest}\n    """',
        meta={"arguments": names, "position": known},
    )


def _labelled(items: list[tuple[str, int]], labels: list[str]) -> str:
    return " ".join(f"{word}: {labels[side]};" for word, side in items[:-1]) + f" {items[-1][0]}:"


def icl_label(world: Facts, rng: Random, document: bool = False) -> Prompt:
    """Ask for two made-up labels for two classes of words; the corrupt prompt has the labels swapped."""
    classes = sorted(rng.sample(tuple(words.CLASSES), 2))
    labels = rng.sample(words.LABELS, 2)
    shots = rng.randint(3, 8) if document else 4
    while True:
        sides = [rng.randrange(2) for _ in range(shots + 1)]
        if len(set(sides[:-1])) == 2:
            break
    left = [list(rng.sample(words.CLASSES[c], 10)) for c in classes]
    items = [(left[s].pop(), s) for s in sides]

    right, wrong = labels[sides[-1]], labels[1 - sides[-1]]
    return Prompt(
        "icl_label",
        _labelled(items, labels),
        f" {right}",
        _labelled(items, labels[::-1]),
        f" {wrong}",
        world.held_out("icl_label", *classes, *sorted(labels)),
        meta={"classes": classes, "labels": labels},
    )


def icl_function(world: Facts, rng: Random, document: bool = False, function: str | None = None) -> Prompt:
    """Ask for a function shown by examples (`Norway -> Oslo; Egypt ->`); held out by first example and query."""
    names = tuple(facts.FUNCTIONS)
    letters = ("next_letter", "previous_letter", "same_letter")
    name = function or (rng.choice(letters) if document and rng.random() < 0.3 else rng.choice(names))
    partner = facts.PARTNER[name]
    other = dict(world.function(partner))
    pairs = [p for p in world.function(name) if p[0] in other]
    drawn = rng.sample(pairs, min(len(pairs), (rng.randint(3, 8) if document else 4) + 1))
    clean = " ".join(f"{a} -> {b};" for a, b in drawn[:-1]) + f" {drawn[-1][0]} ->"
    corrupt = " ".join(f"{a} -> {other[a]};" for a, _ in drawn[:-1]) + f" {drawn[-1][0]} ->"
    held_out = world.held_out("icl_function", name, drawn[0][0], drawn[-1][0])
    query, answer = drawn[-1]
    return Prompt(
        "icl_function",
        clean,
        f" {answer}",
        corrupt,
        f" {other[query]}",
        held_out,
        meta={"function": name, "partner": partner, "query": query},
    )
