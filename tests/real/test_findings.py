"""Findings that a first look at the two models gave, looked at again: each with its interval and what chance gives.

Nothing is tuned: the prompts are the first of each set, groups are judged on prompts that did not choose them, and what
does not come out is written down as it is.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import cutaway as ca
from cutaway.core.address import Address
from cutaway.interventions.components import random_sets
from cutaway.interventions.effects import Effects
from cutaway.models import Ablate
from cutaway.models.sweep.executor import sweep
from cutaway.tasks import Task
from tests.real import sets
from tests.real.written import mean, measure, share

N = 16
HEADS = "heads, one at a time"
ATTENTION = "where heads look"
TOGETHER = "heads together"
DIRECT = "what heads write"


def first(model: ca.Model, name: str) -> Task:
    """The prompts that findings are read from."""
    return sets.task(model, name, N)


def held_out(model: ca.Model, name: str) -> Task:
    """As many others, which chose nothing."""
    return sets.task(model, name, N, skip=N)


def heads_of(found: Effects) -> dict[str, int]:
    """Every head by name, with its place in the flattened grid; the strongest first."""
    width = found.effect.shape[1]
    order = found.effect.abs().flatten().argsort(descending=True).tolist()
    return {f"{i // width}.{i % width}": i for i in order}


def write_heads(results, what: str, n: int, found: Effects, wanted: list[str], least: int = 6) -> None:
    """The strongest heads and those asked for, beside what random steps of the same length do at them."""
    order = heads_of(found)
    rest = found.effect.flatten()[list(order.values())[least:]]
    results.row(HEADS, f"{what}: all others", n, effect={"value": float(rest.mean()), "range": _range(rest)})
    for head in dict.fromkeys([*list(order)[:least], *wanted]):
        i = order[head]
        numbers = (found.effect.flatten()[i], found.interval.flatten(0, 1)[i], found.null.flatten(0, 1)[i])
        recovered = {"value": float(found.recovered.flatten()[i])}
        results.row(HEADS, f"{what}: {head}", n, effect=measure(*numbers), recovered=recovered)


def _range(x: Tensor) -> list[float]:
    return [float(x.min()), float(x.max())]


def looks(model: ca.Model, task: Task, layer: int) -> Tensor:
    """How much of each head's attention goes from the last token to the tokens that tell clean from corrupt."""
    bound = task.bind(model)
    pattern = model.capture(bound.clean, f"pattern.{layer}", logits=False)[f"pattern.{layer}"]
    last = pattern[torch.arange(len(bound)), :, bound.clean.last]
    return (last * bound.changed[:, None]).sum(-1)  # [prompt, head]


@pytest.fixture(scope="module")
def capitals(model, name) -> Effects:
    assert name == "smollm2"
    return ca.patching.activation(model, first(model, "fact_capital"), site="z", samples=1, null_cells=0)


@pytest.mark.parametrize("name", ["smollm2"], indirect=True)
def test_one_head_brings_the_capital(model, results, capitals):
    write_heads(results, "capital", N, capitals, ["23.4", "29.1", "23.5", "29.0"])
    order = list(heads_of(capitals))
    assert order[0] == "23.4"
    assert {"29.1", "23.5"} <= set(order[:6])
    assert float(capitals.interval[23, 4, 0]) > 2 * float(capitals.effect.abs().flatten().sort().values[-2])
    assert 0.6 < float(capitals.recovered[23, 4]) < 0.8, "0.70 in the first look"
    assert float(min(capitals.interval[29, 1, 0], capitals.interval[23, 5, 0])) > 0
    assert float(capitals.interval[29, 0, 1]) < 0, "29.0 works against it"
    named = [f"z.{h}" for h in ("23.4", "29.1", "23.5", "29.0")]
    country = ca.patching.activation(model, first(model, "fact_country"), site=named, samples=4)
    for i, node in enumerate(country.labels["node"]):
        row = measure(country.effect[i], country.interval[i], country.null[i])
        part = {"value": float(country.recovered[i])}
        results.row(HEADS, f"country of a city: {node.removeprefix('z.')}", N, effect=row, recovered=part)


@pytest.mark.parametrize("name", ["smollm2"], indirect=True)
def test_it_reads_the_subject(model, results):
    for what, task in (
        ("capital", first(model, "fact_capital")),
        ("capital, other prompts", held_out(model, "fact_capital")),
    ):
        found = looks(model, task, 23)
        others = found[:, [h for h in range(9) if h != 4]].mean(0)
        results.row(ATTENTION, f"{what}: 23.4 → subject", N, attention=mean(found[:, 4], others))
        assert float(found[:, 4].mean()) > 0.8
        assert float(found[:, 4].mean()) > float(others.max())


@pytest.mark.parametrize("name", ["smollm2"], indirect=True)
def test_three_heads_carry_the_capital(model, results):
    for what, task in (
        ("capital", first(model, "fact_capital")),
        ("capital, other prompts", held_out(model, "fact_capital")),
    ):
        found = ca.patching.group(model, task, heads=["23.4", "29.1", "23.5"], samples=20)
        parts = {"effect": measure(found.effect, found.interval, found.null),
                 "recovered": {"value": float(found.recovered)}}  # fmt: skip
        results.row(TOGETHER, f"{what}: 23.4, 29.1, 23.5", N, **parts)
        assert float(found.interval[1]) < 2 * float(found.null.min())
        assert float(found.recovered) < -0.8, "-0.95 in the first look"


@pytest.mark.parametrize("name", ["gemma3"], indirect=True)
def test_heads_that_write_the_name(model, results):
    found = ca.patching.activation(model, first(model, "ioi"), site="z", samples=1, null_cells=0)
    direct = ca.lenses.direct_attribution(model, first(model, "ioi"), samples=20)
    wanted = ["11.3", "15.1", "15.3", "15.2", "15.0", "17.2"]
    write_heads(results, "IOI", N, found, wanted)
    at = {c: i for i, c in enumerate(direct.labels["component"])}
    for head in wanted:
        i = at[f"head_out.{head}"]
        results.row(DIRECT, f"IOI: {head}", N, share=measure(direct.effect[i], direct.interval[i], direct.null[i]))
    shares = {h: (direct.effect[i], direct.interval[i]) for h in wanted if (i := at[f"head_out.{h}"]) >= 0}
    chance = float(torch.stack([direct.null[at[f"head_out.{h}"]] for h in wanted]).abs().max())
    assert {"11.3", "15.1"} <= set(list(heads_of(found))[:4])
    assert float(found.interval[11, 3, 0]) > 0
    assert float(found.interval[15, 1, 1]) < 0
    assert float(shares["11.3"][1][0]) > chance, "11.3 writes the name"
    assert float(shares["15.1"][1][1]) < -chance, "15.1 writes against it"


def induction(model: ca.Model, seed: int, rows: int = 6, length: int = 30) -> tuple[Tensor, Tensor]:
    """Random tokens twice: each head's attention to what followed the token before, and to the token beside that.

    The second is the control: it is as far away. Both [layer, head, row].
    """
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(1000, 40000, (rows, length), generator=g)
    begin = model.tokens("a").ids[:, :-1].expand(rows, -1)
    pattern = model.capture(torch.cat([begin, ids, ids], dim=1), "pattern", logits=False)["pattern"]
    query = torch.arange(begin.shape[1] + length + 1, begin.shape[1] + 2 * length - 1)
    found = [pattern[..., query, query - length + 1 + off].mean(-1).transpose(1, 2) for off in (0, 1)]
    return found[0], found[1]


@pytest.fixture(scope="module")
def order(model) -> list[int]:
    """Every head by how much it looks at what followed, the strongest first, as its place in the flattened grid."""
    return induction(model, 0)[0].mean(-1).flatten().argsort(descending=True).tolist()


def test_induction_heads(model, results, order):
    """Heads found on random tokens are what random words need: judged on others, against random heads."""
    width = model.shape.n_heads
    names = [f"{i // width}.{i % width}" for i in order[:5]]
    fresh, control = (x.flatten(0, 1) for x in induction(model, 1))
    rest = fresh.mean(-1)[order[5:]]
    for head, i in zip(names, order, strict=False):
        results.row(
            ATTENTION, f"induction: {head} → what followed", 6, attention=mean(fresh[i], control[i].mean()[None])
        )
        assert float(fresh[i].mean()) > 5 * float(control[i].mean())
    results.row(ATTENTION, "induction: all others", 6, attention={"value": float(rest.mean()), "range": _range(rest)})
    words = sets.task(model, "induction_words", 10)
    found = ca.patching.group(model, words, heads=names, samples=20)
    parts = {"effect": measure(found.effect, found.interval, found.null),
             "recovered": {"value": float(found.recovered)}}  # fmt: skip
    results.row(TOGETHER, f"random words: {', '.join(names)}", len(words), **parts)
    assert float(found.interval[1]) < float(found.null.min())


def test_induction_needs_them(model, results, order):
    """Without these heads, the second copy of random tokens is foreseen less often than without random ones."""
    width, g = model.shape.n_heads, torch.Generator().manual_seed(2)
    ids = torch.randint(1000, 40000, (16, 24), generator=g)
    begin = model.tokens("a").ids[:, :-1].expand(16, -1)
    tokens = model.tokens(torch.cat([begin, ids, ids[:, :12]], dim=1))
    heads = [Address("z", i // width, i % width) for i in range(len(order))]
    chosen = [heads[i] for i in order[:5]]
    drawn, _ = random_sets(heads, chosen, 10, seed=0)
    variants = [[Ablate(a) for a in places] for places in ([], chosen, *drawn)]
    hit = sweep(model, tokens, variants, lambda x, p: (x.argmax(-1) == ids[p, 12]).float()).float()
    chance = hit[2:].mean(1)
    what = "random tokens foreseen"
    results.row(TOGETHER, f"{what}: as it is", 16, share=share(hit[0]))
    results.row(
        TOGETHER, f"{what}: without five induction heads", 16, share=share(hit[1]) | {"control": _range(chance)}
    )
    assert share(hit[1])["interval"][1] < float(chance.mean())
    assert float(hit[1].mean()) <= float(chance.min())
