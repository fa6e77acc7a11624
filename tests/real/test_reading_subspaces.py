"""A subspace of a real model that carries a variable: the gender of a name, trained on one template, tested on another.

Every pair runs in both orders, so that both labels are as frequent. The layer is the first of
five at which exchanging the whole vector of the last position gives most labels, of these same pairs.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

import cutaway as ca
from cutaway.tasks import Pair, Task
from tests.real import sets
from tests.real.written import Measure

SECTION = "subspaces that carry a variable"
SITE = "resid_post.27"

pytestmark = pytest.mark.parametrize("name", ["smollm2"], indirect=True)


def both_orders(task: Task, most: int) -> Task:
    """The first pairs of every template, each in both orders; a group is a template."""
    chosen: dict[str, list[Pair]] = {}
    for p in task:
        chosen.setdefault(p.group.rsplit("_", 1)[0], []).append(p)
    turned = [
        q
        for group, pairs in chosen.items()
        for p in pairs[:most]
        for q in (
            replace(p, group=group),
            replace(p, clean=p.corrupt, corrupt=p.clean, answer=p.foil, foil=p.answer, subject=None, group=group),
        )
    ]
    return replace(task, pairs=tuple(turned))


def test_a_line_carries_the_gender_of_a_name_to_another_template(model, results):
    task = both_orders(sets.task(model, "gender", 48), 8)
    found = ca.directions.das(model, task, site=SITE, rate=0.02, steps=40, samples=4)
    rows = {"trained line": _cells(found.iia, found.iia_interval, found.preferred, found.preferred_interval)}
    rows["trained line"]["IIA"]["control"] = [float(found.iia_null.min()), float(found.iia_null.max())]
    rows["trained line"]["label beats foil"]["control"] = [
        float(found.preferred_null.min()), float(found.preferred_null.max())
    ]  # fmt: skip
    for i, control in enumerate(found.labels["control"]):
        share, bounds = found.control[i], found.control_interval[i]
        rows[control] = _cells(share[1], bounds[1], share[2], bounds[2])
    for what, cells in rows.items():
        results.row(SECTION, f"gender of a name, {what}", found.record["pairs"]["tested"], **cells)
    by_name = dict(zip(found.labels["control"], found.control, strict=True))
    assert float(found.preferred_interval[0]) > float(by_name["no exchange"][2])
    assert float(found.iia) > float(by_name["untrained"][1])
    assert found.subspace().direction().places[0].layer == 27


def _cells(iia, interval, preferred, preferred_interval) -> dict[str, Measure]:
    return {
        "IIA": {"value": float(iia), "interval": interval.tolist()},
        "label beats foil": {"value": float(preferred), "interval": preferred_interval.tolist()},
    }
