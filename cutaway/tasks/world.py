"""Tasks over a model that knows the truth of its own world: `model.world` gives the prompts, this module the form."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from cutaway.core.refuse import Keyword, Refused
from cutaway.models.model import Model
from cutaway.tasks.bound import askable, narrowed
from cutaway.tasks.pair import Pair, Truth
from cutaway.tasks.task import Task

#: task → the behaviours of the world that it is made of; any other behaviour is a task under its own name
BEHAVIOURS: dict[str, tuple[str, ...]] = {
    "facts": ("fact",),
    "arithmetic": ("addition", "subtraction"),
    "refusal": ("refusal", "compliance"),
}
SPLITS = ("test", "train", "any")
METRIC = {"greater_than": "prob_diff"}
SAYS = {
    "fact": "the person becomes another person, of whom another fact is true",
    "two_hop": "the person becomes another person, from another country",
    "capital": "the country becomes another country",
    "language": "the country becomes another country",
    "city_country": "the city becomes a city of another country",
    "ioi": "the second mention of the subject becomes the indirect object",
    "induction": "the word that followed becomes another, which is then the answer",
    "random_induction": "the item that followed becomes another, which is then the answer",
    "copy": "the given items come in another order",
    "docstring": "the third argument of the definition becomes another, which is then the answer",
    "greater_than": "the start year becomes the first of its century",
    "successor": "the item, or the run of items, becomes another of the same series",
    "addition": "the second number becomes another",
    "subtraction": "the second number becomes another",
    "cot": "the last number of the sum becomes another",
    "cot_given": "the last of the given steps becomes false",
    "cot_direct": "the last number of the sum becomes another",
    "running_sum": "the last digit becomes another",
    "running_sum_direct": "the last digit becomes another",
    "sentiment": "every adjective becomes its opposite",
    "refusal": "the request becomes its harmless match",
    "compliance": "the request becomes its harmful match",
    "agreement": "the subject changes between singular and plural",
    "gender": "the name becomes one of the other gender",
    "icl_label": "the two labels change places",
    "icl_function": "the examples show another function of the same inputs",
}
_OPERATOR = re.compile(r" [+-] ")
_NO_OPERATOR = {
    "no_operator": (
        lambda r: _OPERATOR.sub(" < ", r.clean, 1),
        "the operator becomes <, so that no number is asked for",
    )
}
#: task → its further corruptions beside the world's own: the corrupt prompt of a record, and what was done in words
MORE: dict[str, dict[str, tuple[Callable[[Any], str], str]]] = {
    "ioi": {"abc": (lambda r: r.meta["abc"], "the three mentions become three other names, so nobody is repeated")},
    **dict.fromkeys(("arithmetic", *BEHAVIOURS["arithmetic"]), _NO_OPERATOR),
}
_TOLD, _EACH = (
    ("fact", "two_hop", "ioi", "agreement"),
    64,
)  # behaviours whose prompts are sentences, and how many of each
_ANY = "the prompt becomes its counterfactual in the world, which has another answer"


def behaviours(name: str) -> tuple[str, ...]:
    """Return the behaviours of the world that task `name` is made of."""
    return BEHAVIOURS.get(name, (name,))


def from_world(model: Model, name: str, n: int, seed: int, corruption: str | None, split: str) -> Task:
    """Task `name` in the world of a model; `split` is `test` (withheld from training), `train` or `any`.

    Answers of several tokens are narrowed; prompts that still have none of one token (a spelled-out string whose
    letters are tokens of their own elsewhere) are left out.

    Raises:
        Refused: the world has no such behaviour, no prompts of that split, or the corruption is not one of the task's.
    """
    more = MORE.get(name, {})
    known = ("s2_io_flip" if name == "ioi" else "counterfactual", *more)
    chosen = corruption or known[0]
    if chosen not in known:
        raise Refused(
            f"corruption {chosen!r} of task {name!r}", "the world does not make it", f"use {', '.join(known)}"
        )
    if split not in SPLITS:
        raise Refused(f"split {split!r} of task {name!r}", "the world has no such split", f"use {', '.join(SPLITS)}")
    parts, found = behaviours(name), {}
    for times in (1, 4):  # most tasks keep all; some behaviours have prompts without an answer of one token
        records = [model.world.prompts(b, times * -(-n // len(parts)), seed, split) for b in parts]
        mixed = [r for turn in zip_turns(records) for r in turn]
        pairs = narrowed([_pair(r, more[chosen][0] if chosen in more else None) for r in mixed], model, strict=False)
        good = askable(model, pairs)
        found = {p: r for p, r in zip(pairs, mixed, strict=True) if p in good}
        if len(found) >= n:
            break
    if not found:
        raise Refused(
            (f"task {name!r} with ", Keyword("split", split, of="task")),
            "the world has no such prompts",
            "use another split",
        )
    kept = dict(list(found.items())[:n])
    says = more[chosen][1] if chosen in more else "; ".join(dict.fromkeys(SAYS.get(b, _ANY) for b in parts))
    options = {"n": n, "seed": seed, "split": split} | ({"corruption": chosen} if corruption else {})
    return Task(name, tuple(kept), METRIC.get(name, "logit_diff"), says, _truth(list(kept.values())), options)


def zip_turns(parts: list[list[Any]]) -> list[list[Any]]:
    """Take one item of each part in turn, until all parts are used up."""
    return [[p[i] for p in parts if i < len(p)] for i in range(max(map(len, parts), default=0))]


def _pair(record: Any, corrupted: Callable[[Any], str] | None) -> Pair:
    corrupt = corrupted(record) if corrupted else record.corrupt
    subject = record.clean[slice(*record.subject)] if record.subject else None
    right, wrong = _SETS[record.behaviour](record.meta) if record.behaviour in _SETS else ((), ())
    pair = Pair(record.clean, corrupt, record.answer, record.foil, subject, _group(record), right, wrong)
    return pair.literal()


def _group(record: Any) -> str:
    """Return the finest name that the world gives to a kind of prompt: order of names, relation, series, else
    behaviour.
    """
    meta = record.meta
    return next((meta[k] for k in ("order", "relation", "series", "function") if k in meta), record.behaviour)


def _years(meta: dict[str, Any]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    start = meta["start"]
    return tuple(f"{y:02d}" for y in range(start + 1, 100)), tuple(f"{y:02d}" for y in range(start + 1))


#: behaviour → all right and all wrong continuations, where there are more than one
_SETS: dict[str, Callable[[dict[str, Any]], tuple[tuple[str, ...], tuple[str, ...]]]] = {"greater_than": _years}


def _truth(records: list[Any]) -> Truth:
    held = sum(r.held_out for r in records)
    note = (
        "every answer is true in the world by construction; only the changed tokens tell the clean from the corrupt "
        f"answer; {held} of {len(records)} prompts were withheld from training"
    )
    span = "subject" if all(r.subject for r in records) else "changed"
    return Truth(note, "the world's own data", positions=(span, "last"))


def sentences(world: Any, seed: int = 0) -> list[str]:
    """Return sentences of a world, of its facts and stories in turn."""
    records = [world.prompts(b, _EACH, seed, "any") for b in _TOLD]
    return [f"{r.clean}{r.answer}{r.tail}" for turn in zip_turns(records) for r in turn]


def kinds(world: Any) -> list[frozenset[str]]:
    """Return the sets of words of one kind in a world: people, countries, cities, and the objects of each relation."""
    found = [frozenset(p.name for p in world.people)]
    found += [frozenset(getattr(c, part) for c in world.countries) for part in _PARTS]
    found += [frozenset(p.facts[r] for p in world.people) for r in world.people[0].facts]
    return found


def lands(world: Any) -> tuple[tuple[str, ...], ...]:
    """Return the countries of a world, each with its cities and its language."""
    return tuple(tuple(getattr(c, part) for part in _PARTS) for c in world.countries)


def known(world: Any, sentence: str, answer: str) -> Truth | None:
    """Look up the truth about a sentence that follows one of the world's rules, or names its people or countries."""
    rule = world.rule(sentence)
    if rule is not None:
        note = f"by the rule of its world: {rule[1]}"
        return Truth(note, "the world's own rules", positions=("changed", "last"), answer=rule[0])
    said = {w.lower() for w in re.findall(r"\w+", sentence)}
    facts = {p.name: {**p.facts, "country": world.country(p)} for p in world.people if p.name.lower() in said}
    if not facts:
        facts = {
            c.name: {part: getattr(c, part) for part in _PARTS[1:]} for c in world.countries if c.name.lower() in said
        }
    if not facts:
        return None
    word = answer.strip().lower()
    right = [(n, r, v) for n, of in facts.items() for r, v in of.items() if v.lower() == word]
    if right:
        note = "; ".join(f"in its world the {r} of {n} is {v}" for n, r, v in right)
        return Truth(note, "the world's own data", positions=("subject", "last"), answer=right[0][2])
    note = "; ".join(f"{n}: " + ", ".join(f"{r} {v}" for r, v in of.items()) for n, of in facts.items())
    return Truth(f"{answer.strip()!r} is none of the facts ({note})", "the world's own data")


_PARTS = ("name", "capital", "second_city", "language")
