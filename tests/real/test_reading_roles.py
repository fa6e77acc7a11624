"""Roles of heads on indirect object identification in a real model, found and removed in one call.

Nothing is tuned. `test_reading_heads` finds the same heads by hand, and exchanges them on other prompts.
"""

from __future__ import annotations

import pytest

import cutaway as ca
from tests.real import sets
from tests.real.test_reading_memories import passages
from tests.real.written import measure

ROLES = "roles of heads on a task"
SUCCESSOR, SUPPRESSION = "successor heads", "copy suppression"
N = 16


@pytest.mark.parametrize("name", ["smollm2"], indirect=True)
def test_the_heads_of_indirect_object_identification_have_their_roles(model, results):
    got = ca.heads.roles(model, sets.task(model, "ioi", N), samples=4)
    role = {name: r for r, name in enumerate(got.labels["role"])}
    for name, heads in got.record["heads"].items():
        r = role[name]
        for head in sorted(heads, key=got.named(name).index)[:3]:
            at = tuple(map(int, head.split(".")))
            results.row(ROLES, f"{name}: {head}, of {len(heads)}", N,
                        attention=measure(got.score[r][at], got.interval[r][at], got.null[r][at]),
                        direct=measure(got.direct[at], got.direct_interval[at], got.direct_null[at]))  # fmt: skip
        below = {"looks": measure(got.looks[r], got.looks_interval[r], got.looks_null[r])} if got.looks[r] else {}
        results.row(ROLES, f"{name}: all {len(heads)} removed", N,
                    logits=measure(got.change[r], got.change_interval[r], got.change_null[r]), **below)  # fmt: skip
    assert got.named("name mover")[0] == "23.0"
    assert got.record["heads"]["negative name mover"] == ["24.4"]
    assert got.record["heads"]["foil suppressor"] == ["23.3"]
    assert got.record["heads"]["S-inhibition"] == ["19.2", "20.0"]
    assert {"8.0", "8.1"} <= set(got.record["heads"]["duplicate token"])
    for name in ("S-inhibition", "duplicate token", "foil suppressor"):
        assert float(got.change_interval[role[name], 1]) < float(got.change_null[role[name]].min()) - 1, name
    for name in ("S-inhibition", "duplicate token", "induction"):
        assert float(got.looks_interval[role[name], 1]) < float(got.looks_null[role[name]].min()), name
    grown = got.grown_interval[24, 4]
    results.row(ROLES, "24.4 writes more without the name movers", N,
                direct=measure(got.grown[24, 4], grown, got.grown_null[24, 4]))  # fmt: skip
    assert float(grown[0]) > float(got.grown_null[24, 4].max())
    low, high = got.change_interval[role["name mover"]].tolist()
    assert low < 0 < high, "the name mover can be removed without loss"
    assert not got.named("backup name mover"), "what makes up for the movers is the negative mover, which lowers less"


@pytest.mark.parametrize("name", ["smollm2"], indirect=True)
def test_successor_heads_by_their_weights(model, results):
    got = ca.heads.successor(model, samples=8)
    n = got.record["words that one follows"]
    for i in got.overall.flatten().argsort(descending=True)[:3].tolist():
        at = divmod(i, got.overall.shape[1])
        orders = {name: {"value": float(got.score[o][at])} for o, name in enumerate(got.labels["order"])}
        overall = measure(got.overall[at], got.overall_interval[at], got.overall_null[at])
        results.row(SUCCESSOR, f"{at[0]}.{at[1]}", n, overall=overall, **orders)
    assert divmod(int(got.overall.argmax()), got.overall.shape[1]) == (23, 3)
    assert float(got.overall.max()) < 0.3
    assert not got.named(), "no output circuit turns even a third of the words into the next"


@pytest.mark.parametrize("name", ["smollm2"], indirect=True)
def test_negative_heads_lower_what_they_look_at_but_not_what_was_predicted(model, results):
    """An induction head, and two heads that lower names: among the keys predicted most, and among all keys."""
    texts = passages(model, 32)
    for top in (0.05, 1.0):
        got = ca.heads.copy_suppression(model, texts, heads=("17.3", "23.3", "24.4"), top=top, samples=2)
        held = int(got.record["split"].split()[-1])
        for i, head in enumerate(got.labels["head"]):
            parts = {
                way: measure(got.explained[w, i], got.interval[w, i], got.null[w, i])
                for w, way in enumerate(got.labels["way"])
            }
            effect = measure(got.effect[i], got.effect_interval[i])
            what = f"{head}, {'all keys' if top == 1 else 'keys predicted most'}"
            results.row(SUPPRESSION, what, held, **parts, effect=effect)
    assert float(got.interval[0, -1, 0]) > float(got.null[0, -1].max()), "24.4 lowers the tokens that it looks at"
    assert float(got.explained[1, -1]) < 0.01, "and raises none"
