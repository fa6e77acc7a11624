"""Samplers of orders and numbers: years, series, arithmetic, sums step by step."""

from __future__ import annotations

from random import Random

from cutaway.zoo.miniworld import words
from cutaway.zoo.miniworld.facts import Facts
from cutaway.zoo.miniworld.prompt import Prompt, other_than, span


def greater_than(world: Facts, rng: Random, document: bool = False) -> Prompt:
    """Ask for an end year after the start year (Hanna et al. 2023); the corrupt prompt starts in the year 01."""
    event, century = rng.choice(words.EVENTS), rng.choice(words.CENTURIES)
    start = rng.randint(1 if document else 2, 97)
    text = "The {} lasted from the year {}{:02d} to the year {}"
    clean = text.format(event, century, start, century)
    return Prompt(
        "greater_than",
        clean,
        f"{rng.randint(start + 1, 99):02d}",
        text.format(event, century, 1, century),
        f"{rng.randint(0, start):02d}",
        world.held_out("greater_than", event, century, start),
        span(clean[: -len(century)], f"{start:02d}"),
        meta={"start": start, "century": century},
    )


SERIES = {
    "day": tuple(d.capitalize() for d in words.DAYS),
    "month": tuple(m.capitalize() for m in words.MONTHS),
    "number": words.NUMBER_WORDS,
    "ordinal": words.ORDINALS,
    "letter": words.LETTERS,
}
_AFTER = ("After {x} comes", "The {series} after {x} is", "{x} is followed by", "What comes right after {x} is")


def _listed(row: tuple[str, ...], series: str, k: int, n: int, start: int) -> tuple[str, str]:
    """Return the prompt of wording `k`, or `n` items in a row, from item `start`; and the item that follows."""
    run = [row[(start + i) % len(row)] for i in range(n + 1)]
    clean = _AFTER[k].format(x=run[0], series=series) if n == 1 else ", ".join(run[:n]) + ","
    return clean, f" {run[n]}"


def successor(world: Facts, rng: Random, document: bool = False) -> Prompt:
    """Ask for the next of a series (days, months, numbers in words, ordinals, letters), asked for or listed."""
    name = rng.choice(tuple(SERIES))
    row = SERIES[name]
    cyclic = name in ("day", "month")
    k = rng.randrange(len(_AFTER) + 2)
    n = 1 if k < len(_AFTER) else rng.randint(2, 4)

    starts = range(len(row) if cyclic else len(row) - n)
    start = rng.choice(starts)
    clean, answer = _listed(row, name, k, n, start)
    corrupt, foil = _listed(row, name, k, n, other_than(rng, starts, start))
    subject = None if n > 1 else span(clean, row[start])
    return Prompt(
        "successor", clean, answer, corrupt, foil, world.held_out("successor", clean), subject, meta={"series": name}
    )


def _operands(rng: Random, subtract: bool) -> tuple[int, int]:
    while True:
        top = 10 if rng.random() < 0.1 else 100
        a, b = rng.randrange(top), rng.randrange(top)
        if (a >= b) if subtract else (a + b < 100):
            return a, b


def _arithmetic(name: str, sign: str, world: Facts, rng: Random) -> Prompt:
    unit = 1 if sign == "+" else -1
    a, b = _operands(rng, sign == "-")
    total = a + unit * b
    for _ in range(200):
        c = rng.randrange(10, 100) if b > 9 else rng.randrange(10)
        foil = a + unit * c
        if c != b and 0 <= foil < 100 and len(str(foil)) == len(str(total)):
            break
    else:
        return _arithmetic(name, sign, world, rng)
    clean = f"{a} {sign} {b} ="
    return Prompt(
        name,
        clean,
        f" {total}",
        f"{a} {sign} {c} =",
        f" {foil}",
        world.held_out(name, a, b),
        span(clean, str(b)),
        meta={"a": a, "b": b, "corrupt_b": c},
    )


def addition(world: Facts, rng: Random, document: bool = False) -> Prompt:
    """Ask for a sum below 100; held out by pair."""
    return _arithmetic("addition", "+", world, rng)


def subtraction(world: Facts, rng: Random, document: bool = False) -> Prompt:
    """Ask for a difference of numbers below 100; held out by pair."""
    return _arithmetic("subtraction", "-", world, rng)


def _digits(rng: Random, n: int) -> list[int]:
    return [rng.randrange(10) for _ in range(n)]


def running_sum(world: Facts, rng: Random, document: bool = False) -> Prompt:
    """Build a sum of digits modulo ten: the model writes all running sums, then the last of them."""
    digits = _digits(rng, rng.randint(2, 5) if document else 4)
    first = document and rng.random() < 0.15
    steps = digits if first else [sum(digits[: i + 1]) % 10 for i in range(len(digits))]
    answer = digits[0] if first else steps[-1]
    wrong = (answer + rng.randint(1, 9)) % 10
    given, other = (", ".join(map(str, [*digits[:-1], d])) for d in (digits[-1], (digits[-1] + wrong - answer) % 10))
    right, false = (", ".join(map(str, [*steps[:-1], s])) for s in (steps[-1], wrong))
    return Prompt(
        "running_sum",
        f"{'First' if first else 'Sum'} of {given}. Steps:",
        f" {right}. Answer: {answer}",
        f"Sum of {other}. Steps:",
        f" {false}. Answer: {wrong}",
        world.held_out("cot", given),
    )


def running_sum_direct(world: Facts, rng: Random, document: bool = False) -> Prompt:
    """Ask for the last running sum without the others: no step is written."""
    digits = _digits(rng, rng.randint(2, 5) if document else 4)
    first = document and rng.random() < 0.15
    answer = digits[0] if first else sum(digits) % 10
    wrong = (answer + rng.randint(1, 9)) % 10
    given, other = (", ".join(map(str, [*digits[:-1], d])) for d in (digits[-1], (digits[-1] + wrong - answer) % 10))
    ask = "First" if first else "Sum"
    return Prompt(
        "running_sum_direct",
        f"{ask} of {given}. Answer:",
        f" {answer}",
        f"{ask} of {other}. Answer:",
        f" {wrong}",
        world.held_out("cot", given),
    )


def _chain(digits: list[int], false_last: int | None = None) -> str:
    """`3 + 5 = 8, 8 + 4 = 12`: one step an addition; the last result may be false."""
    totals = [sum(digits[: i + 1]) for i in range(len(digits))]
    if false_last is not None:
        totals[-1] = false_last
    return ", ".join(f"{totals[i]} + {digits[i + 1]} = {totals[i + 1]}" for i in range(len(digits) - 1))


def _cot(name: str, world: Facts, rng: Random, document: bool) -> Prompt:
    wanted: list[int] = []
    while not wanted:
        digits = _digits(rng, rng.randint(2, 4) if document else 4)
        total = sum(digits)
        wanted = [d for d in range(10) if d != digits[-1] and len(str(total - digits[-1] + d)) == len(str(total))]
    other = [*digits[:-1], rng.choice(wanted)]
    question, changed = (f"What is {' + '.join(map(str, row))}?" for row in (digits, other))
    held_out, wrong = world.held_out("chain", *digits), sum(other)
    if name == "cot_direct":
        return Prompt(name, f"{question} Answer:", f" {total}", f"{changed} Answer:", f" {wrong}", held_out)
    if name == "cot":
        return Prompt(
            name,
            f"{question} Steps:",
            f" {_chain(digits)}. Answer: {total}",
            f"{changed} Steps:",
            f" {_chain(other)}. Answer: {wrong}",
            held_out,
        )
    clean = f"{question} Steps: {_chain(digits)}. Answer:"
    return Prompt(
        name,
        clean,
        f" {total}",
        f"{question} Steps: {_chain(digits, wrong)}. Answer:",
        f" {wrong}",
        held_out,
        span(clean[: -len(". Answer:")], str(total)),
    )


def cot(world: Facts, rng: Random, document: bool = False) -> Prompt:
    """Ask for a sum of digits that the model works out step by step, all steps its own, then answers."""
    return _cot("cot", world, rng, document)


def cot_given(world: Facts, rng: Random, document: bool = False) -> Prompt:
    """Ask for the same with the steps given; the corrupt prompt has a false last step, which the model may follow."""
    return _cot("cot_given", world, rng, document)


def cot_direct(world: Facts, rng: Random, document: bool = False) -> Prompt:
    """Ask for the same sum without steps: the contrast."""
    return _cot("cot_direct", world, rng, document)
