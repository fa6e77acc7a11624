"""Circuits that are not there, and their twins that are: what is said of both.

    found = absent_circuits()
    found.verdict, found.level

A method that finds a circuit for any question finds none. Three ways to ask for one that is not there, each beside the
same question where there is one: a model without induction heads is asked to go on with a random block; answers are
exchanged among prompts, so that they mean nothing; weights are random. Edges are scored by `eap_ig` on half of the
prompts. On the other half faithfulness has its verdict, beside random circuits and the answers of others; and the first
tenth of the edges is certified, without a search, which can only take levels away.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from cutaway.circuits.certify import Certificate, certify
from cutaway.circuits.eap_ig import eap_ig
from cutaway.circuits.faithfulness import Faithfulness, faithfulness
from cutaway.circuits.opening import open_circuit
from cutaway.core.refuse import Refused
from cutaway.core.result import Result
from cutaway.core.stats import BOUNDS
from cutaway.interventions.ablation_values import derangements
from cutaway.models.model import Model
from cutaway.tasks.named import load as load_task
from cutaway.tasks.pair import Pair
from cutaway.tasks.task import Task
from cutaway.zoo.induction.texts import SHORTEST, WORDS
from cutaway.zoo.load import load as load_model

SHARE = 0.1  # of all edges, in the circuit that is reported and certified
TASKS = ("ioi", "facts", "greater_than")
_SAID = 7  # words of the block that are said again
#: by which random matrices are larger than first ones, so that prompts differ in their answers
_SPREAD = 3.0


@dataclass(frozen=True, kw_only=True)
class AbsentCircuits(Result, kind="absent_circuits"):
    """Verdicts on circuits that are not there, and on those that are.

    Attributes:
        carried: the share of the answer that the first tenth of the edges by |score| carries.
        interval: of `carried`, 95 %, over prompts.
        null: that of random circuits.
        worth: the metric of the model less that with all edges cut.
        verdict: of `faithfulness`.
        level: of `certify`.
    """

    page = ("worth",)
    carried: Float[Tensor, "case"]
    interval: Float[Tensor, "case bound"]
    null: Float[Tensor, "case sample"]
    worth: Float[Tensor, "case"]
    verdict: tuple[str, ...]
    level: tuple[str, ...]


def cases() -> dict[str, Callable[[int, int], tuple[Model, Task]]]:
    """Return what makes the model and the prompts of each case, given their number and a seed; a case whose name
    begins with `no` has no circuit.
    """
    found: dict[str, Callable[[int, int], tuple[Model, Task]]] = {
        "induction": partial(_repeated, "induction"),
        "no induction heads": partial(_repeated, "shortcut"),
    }
    for name in TASKS:
        found[name] = partial(_named, name)
        found[f"no meaning: {name}"] = partial(_meaningless, name)
        found[f"no training: {name}"] = partial(_random, name)
    return found


def absent_circuits(
    names: Sequence[str] = (),
    *,
    n: int = 32,
    samples: int = 8,
    seed: int = 0,
    each: Callable[[str], None] | None = None,
) -> AbsentCircuits:
    """Look for circuits that are there and for those that are not.

    Args:
        names: which of `cases`; all if empty.
        n: prompts; edges are scored on half of them, and measured on the other half.
        samples: how many random circuits stand beside each.
        seed: of the prompts, the exchange of answers, random weights and random circuits.
        each: called with the name of each case before it.

    Raises:
        Refused: no such case.
    """
    known = cases()
    for name in names:
        if name not in known:
            raise Refused(f"case {name!r}", "none has that name", f"use some of {', '.join(known)}")
    chosen, rows = list(names or known), list[tuple[Faithfulness, Certificate]]()
    for name in chosen:
        if each is not None:
            each(name)
        rows.append(judged(*known[name](n, seed), samples=samples, seed=seed))
    curves, certificates = zip(*rows, strict=True)
    at = curves[0].labels["share"].index(f"{SHARE:g}")
    unit = "share of m(M) − m(∅)"
    return AbsentCircuits(
        carried=torch.stack([c.absolute[at] for c in curves]),
        interval=torch.stack([c.absolute_interval[at] for c in curves]),
        null=torch.stack([c.null[at] for c in curves]),
        worth=torch.stack([c.whole - c.empty for c in curves]),
        verdict=tuple(c.verdict for c in curves),
        level=tuple(c.level for c in certificates),
        labels={"case": chosen, "bound": BOUNDS},
        units={"carried": unit, "interval": unit, "null": unit, "worth": "metric of the task"},
        reasons={"worth": "its interval is in the verdict, where it holds 0"},
        record={"prompts": n, "share": SHARE, "seed": seed, "scores": "eap_ig on the first half, by |score|"},
    )


def judged(
    model: Model, task: Task, *, share: float = SHARE, samples: int = 8, seed: int = 0
) -> tuple[Faithfulness, Certificate]:
    """Score edges on half of the prompts; return faithfulness and the certificate of the first ones on the other."""
    first, second = task.split(0.5, seed)
    scores = eap_ig(model, first, audit=0, samples=1)
    circuit = open_circuit(scores, edges=round(share * len(scores.score)))
    curve = faithfulness(model, second, open_circuit(scores), samples=samples, seed=seed)
    return curve, certify(model, second, circuit, draws=4, steps=0, samples=1, seed=seed)


def meaningless(task: Task, seed: int = 0) -> Task:
    """Return the prompts with answers that mean nothing: each has those of another one; where it has many answers and
    foils, they are dealt out among the two.

    The later years of one prompt are later years for another one, too. Dealt out, they are any years.
    """
    rng, order = random.Random(seed), derangements([range(len(task))], 1, seed)[0]
    return replace(task, pairs=tuple(_dealt(p, task.pairs[i], rng) for p, i in zip(task.pairs, order, strict=True)))


def _dealt(pair: Pair, other: Pair, rng: random.Random) -> Pair:
    if not other.answers:
        return replace(pair, answer=other.answer, foil=other.foil)
    words = [*other.answers, *other.foils]
    rng.shuffle(words)
    half = len(words) // 2
    return replace(pair, answer=words[0], foil=words[-1], answers=tuple(words[:half]), foils=tuple(words[half:]))


def untrained(model: Model, seed: int = 0) -> Model:
    """Return a model like another one with random weights, large enough that its answers depend on the prompt."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        hf: Any = type(model.hf)(model.hf.config).eval()
        for p in hf.parameters():
            p.mul_(_SPREAD if p.ndim > 1 else 1.0)
    return Model(hf, model.tokenizer, f"untrained-{seed}")


def repeated_blocks(n: int, seed: int = 0) -> Task:
    """Return prompts of the induction model: a block of random words, and its first words again; in the corrupt prompt
    another word followed the last of them.
    """
    rng, pairs = random.Random(seed), list[Pair]()
    for _ in range(n):
        *block, foil = (f"w{i:02d}" for i in rng.sample(range(WORDS), SHORTEST + 1))
        answer, again = block[_SAID], block[:_SAID]
        changed = [foil if w == answer else w for w in block]
        clean, corrupt = (" ".join([*b, *again]) for b in (block, changed))
        pairs.append(Pair(clean, corrupt, f" {answer}", f" {foil}", group="repeated blocks"))
    return Task("repeated blocks", tuple(pairs), "logit_diff", "another word follows in the block")


def _repeated(name: str, n: int, seed: int) -> tuple[Model, Task]:
    # its MLPs are held at zero, so the self-check finds that nothing follows from them, and edges need their sites
    return load_model(name, check=False), repeated_blocks(n, seed)


def _named(name: str, n: int, seed: int) -> tuple[Model, Task]:
    model = load_model("miniworld")
    return model, load_task(name, model, n, seed)


def _meaningless(name: str, n: int, seed: int) -> tuple[Model, Task]:
    model, task = _named(name, n, seed)
    return model, meaningless(task, seed)


def _random(name: str, n: int, seed: int) -> tuple[Model, Task]:
    model, task = _named(name, n, seed)
    return untrained(model, seed), task
