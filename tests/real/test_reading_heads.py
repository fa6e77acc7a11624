"""Types of heads on a real model: found in random tokens said twice, and confirmed there, on text and on names.

Nothing is tuned. Heads are claimed on random tokens and removed on others, and on passages that chose nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

import cutaway as ca
from cutaway.core.address import Address
from cutaway.core.stats import mean_interval
from cutaway.heads import HeadTypes, TypeEffects
from cutaway.interventions.components import random_sets
from cutaway.models.edits.edit import Edit
from cutaway.models.edits.library import Replace
from cutaway.tasks import Repeats
from cutaway.tasks.bound import Bound
from tests.real import sets
from tests.real.written import mean, measure

NAMES = "heads that move names"
TYPES = "types of heads"
REMOVED = "types of heads, removed"
SMOLLM2 = pytest.mark.parametrize("name", ["smollm2"], indirect=True)
BACK = ("previous token", "duplicate token", "prefix matching", "induction")
N = 16


@pytest.fixture(scope="module")
def found(model, name) -> HeadTypes:
    assert name == "smollm2"
    return ca.heads.classify(model, Repeats(16, 24))


@SMOLLM2
def test_heads_of_all_types_but_two_are_found_in_random_tokens(results, found):
    names = {t: found.named(t) for t in found.labels["type"]}
    assert {kind for kind, heads in names.items() if not heads} == {"anti-induction", "delimiter"}
    for kind, heads in names.items():
        t = found.labels["type"].index(kind)
        for head in heads[:5]:
            at = (t, *map(int, head.split(".")))
            score = measure(found.score[at], found.interval[at], found.null[at])
            raises = measure(found.raises[at], found.raises_interval[at], found.raises_null[at])
            results.row(TYPES, f"{kind}: {head}, of {len(heads)}", N, attention=score, raises=raises,
                        weighted={"value": float(found.weighted[at])})  # fmt: skip
    assert {"16.0", "11.1", "2.1"} <= set(names["previous token"])
    assert {"14.3", "8.0"} <= set(names["duplicate token"])
    assert {"17.3", "17.4", "17.5", "18.6", "23.2"} <= set(names["prefix matching"])
    assert {"18.6", "23.2"} <= set(names["induction"]) <= set(names["prefix matching"])
    assert not {"17.3", "17.4", "17.5"} & set(names["induction"]), "they hardly raise what they look at"
    assert float(found.copying[23, 2]) < 0 < float(found.raises[found.labels["type"].index("induction"), 23, 2])


def write(results, what: str, n: int, got: TypeEffects) -> None:
    for t, kind in enumerate(got.labels["type"]):
        parts = {
            where: measure(got.effect[w, t], got.interval[w, t], got.null[w, t])
            for w, where in enumerate(got.labels["span"])
        }
        kept = measure(got.accuracy[0, t], got.accuracy_interval[0, t], got.accuracy_null[0, t])
        results.row(REMOVED, f"{what}: {kind}, {int(got.removed[t])} heads", n, **parts, foreseen=kept)


@SMOLLM2
def test_they_carry_what_is_said_again(model, results, found):
    fresh = Repeats(8, 20, 1)
    for kind in BACK:
        got = ca.heads.confirm(model, fresh, heads=found.named(kind), samples=4)
        got = got.select(type=0)
        got.labels["type"][0] = kind
        write(results, "random tokens", 8, got)
        assert float(got.interval[0, 0, 0]) > max(0.5, float(got.null[0, 0].max())), kind
        assert float(got.accuracy[0, 0]) < float(got.accuracy_null[0, 0].min()), kind


@SMOLLM2
def test_they_carry_what_text_says_again(model, results, found):
    texts = ca.tasks.as_prompts([row["text"] for row in sets.rows("passages")])
    for kind in BACK:
        got = ca.heads.confirm(model, texts, heads=found.named(kind), samples=4)
        got.labels["type"][0] = kind
        write(results, "text", len(texts), got)
        assert float(got.effect[0, 0]) > float(got.effect[1, 0]), f"{kind}: more than elsewhere"
        if kind != "duplicate token":
            assert float(got.interval[0, 0, 0]) > float(got.null[0, 0].max()), kind


@SMOLLM2
def test_heads_of_other_types_on_text(model, results):
    """The five heads that look most, chosen on every second passage and removed on the others."""
    rows = [row["text"] for row in sets.rows("passages")]
    chose, texts = (ca.tasks.as_prompts(some) for some in (rows[::2], rows[1::2]))
    claimed = ca.heads.classify(model, chose, eigenvalues=False, samples=4)
    effect = dict[str, TypeEffects]()
    for kind in ("current token", "first token", "delimiter", "local window"):
        own = [h for h in claimed.named(kind) if kind != "local window" or h not in claimed.named("previous token")]
        got = ca.heads.confirm(model, texts, heads=own[:5], samples=3)
        got.labels["type"][0] = kind
        write(results, "every second text", len(texts), got)
        effect[kind] = got
    nothing = effect["first token"]
    assert float(nothing.interval[0, 0, 0]) < 0 < float(nothing.interval[0, 0, 1]), "attention only rests there"


def last_looks(model: ca.Model, bound: Bound, edits: Sequence[Edit] = ()) -> Tensor:
    """Attention from the last token to every position: [prompt, layer, head, position]."""
    pattern = model.capture(bound.clean, "pattern", edits, logits=False)["pattern"]  # [layer prompt head q k]
    return torch.stack([pattern[:, i, :, q] for i, q in enumerate(bound.clean.last.tolist())])


def toward(looks: Tensor, where: Tensor) -> Tensor:
    """Attention to some positions of each prompt: [prompt, layer, head]."""
    return (looks * where[:, None, None]).sum(-1)


@SMOLLM2
def test_heads_move_names_and_others_tell_them_which(model, results):
    task, other = (sets.task(model, "ioi", N, skip=skip) for skip in (0, N))
    bound = task.bind(model)
    wrote = ca.lenses.direct_attribution(model, task, samples=19)
    at = [i for i, c in enumerate(wrote.labels["component"]) if c.startswith("head_out")]
    shape = (model.shape.n_layers, model.shape.n_heads)
    effect, null = wrote.effect[at].reshape(shape), wrote.null[at].reshape(*shape, -1)
    low, high = wrote.interval[at].reshape(*shape, 2).unbind(-1)
    looks = last_looks(model, bound)
    name, foil = (toward(looks, bound.clean.ids == ids[:, None]) for ids in (bound.answers, bound.foils))
    second, elsewhere = toward(looks, bound.changed), looks[..., 1:].mean(-1).mean(0)
    lifts, lowers = low > null.amax(-1), high < null.amin(-1)
    roles = {
        "mover": ((name.mean(0) > 0.3) & lifts, name),
        "negative mover": ((name.mean(0) > 0.3) & lowers, name),
        "suppressor of the other name": ((foil.mean(0) > 0.3) & lifts, foil),
    }
    heads = {role: where.nonzero().tolist() for role, (where, _) in roles.items()}
    first = min(i for i, _ in heads["mover"])
    reads = (mean_interval(second)[..., 0] > 0.3).nonzero().tolist()
    heads["inhibition"] = [[i, h] for i, h in reads if i < first]
    for role, found in heads.items():
        attention = roles[role][1] if role in roles else second
        for i, h in found:
            results.row(NAMES, f"{role}: {i}.{h}", N, attention=mean(attention[:, i, h], elsewhere[i, h][None]),
                        direct=measure(effect[i, h], torch.stack([low[i, h], high[i, h]]), null[i, h]))  # fmt: skip
    assert divmod(int(effect.argmax()), shape[1]) == (23, 3), "the largest direct effect is no mover's"
    assert [23, 0] in heads["mover"]
    assert heads["negative mover"] == [[24, 4]]
    assert heads["suppressor of the other name"] == [[23, 3]]
    assert heads["inhibition"] == [[19, 2], [20, 0]]
    for role, found in heads.items():
        got = ca.patching.group(model, other, heads=[f"{i}.{h}" for i, h in found], samples=10)
        parts = {"logits": measure(got.effect, got.interval, got.null), "recovered": {"value": float(got.recovered)}}
        results.row(NAMES, f"{role}: all {len(found)} exchanged, other prompts", N, **parts)
        if role in ("inhibition", "suppressor of the other name"):
            assert float(got.interval[1]) < float(got.null.min())
    held = other.bind(model)
    corrupt = model.capture(held.corrupt, "z", logits=False)
    pool = [Address("z", i, h) for i in range(first) for h in range(shape[1])]
    chosen = [Address("z", i, h) for i, h in heads["inhibition"]]
    before = moved(last_looks(model, held), held, heads["mover"])
    fall, *chance = (
        moved(last_looks(model, held, [Replace(a, corrupt[str(a)]) for a in some]), held, heads["mover"]) - before
        for some in (chosen, *random_sets(pool, chosen, 4, 0)[0])
    )
    control = torch.stack(chance).mean(1)
    results.row(NAMES, "movers look from name to other name, inhibition exchanged", N, attention=mean(fall, control))
    assert float(mean_interval(fall)[1]) < float(control.min()) - 0.3


def moved(looks: Tensor, bound: Bound, movers: list[list[int]]) -> Tensor:
    """Attention of the movers to the name over that to the other name, mean over movers."""
    apart = toward(looks, bound.clean.ids == bound.answers[:, None]) - toward(
        looks, bound.clean.ids == bound.foils[:, None]
    )
    return torch.stack([apart[:, i, h] for i, h in movers]).mean(0)
