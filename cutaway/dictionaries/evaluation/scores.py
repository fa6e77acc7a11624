"""Scores: named numbers about a dictionary, each with its interval, its null and what the controls reach."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from cutaway.core.record import machine, versions
from cutaway.core.refuse import Refused, nearest
from cutaway.core.result import Result
from cutaway.core.stats import BOUNDS, generator

NO_INTERVAL = (math.nan, math.nan)


@dataclass(frozen=True, kw_only=True)
class Scores(Result, kind="dictionary_scores"):
    """Scores of one dictionary. NaN in `interval` or `null` means that there is none; `reasons` says why.

    `null`: the same score of random dictionaries with the same norms (or of shuffled labels, where the record says so).
    `control`: the score of other ways to do the same; their names are the labels of the axis.
    """

    score: Float[Tensor, "score"]
    interval: Float[Tensor, "score bound"]
    null: Float[Tensor, "score sample"]
    control: Float[Tensor, "score control"]

    def __getitem__(self, name: str) -> Score:
        """Return one score: `scores["FVU"].value`, `.interval`, `.unit`, `.null` and `.control` by name.

        Raises:
            Refused: no score has that name.
        """
        i = self.row(name)
        low, high = self.interval[i].tolist()
        null = self.null[i][~self.null[i].isnan()].tolist()
        control = dict(zip(self.labels["control"], self.control[i].tolist(), strict=True))
        control = {n: v for n, v in control.items() if not math.isnan(v)}
        return Score(name, float(self.score[i]), (low, high), self.units.get(name, ""), null, control)

    def row(self, name: str) -> int:
        """Return the index of a score along the axis `score`.

        Raises:
            Refused: no score has that name.
        """
        names = [str(n) for n in self.labels["score"]]
        if name not in names:
            near = nearest(name, names)
            why = "it was not measured" + (f"; near: {near}" if near else "")
            raise Refused(f"score {name!r}", why, f"measured: {', '.join(names)}")
        return names.index(name)


@dataclass(frozen=True)
class Score:
    """A single score, before it goes into `Scores` or as `scores[name]` gives it back.

    Attributes:
        name: what is measured.
        value: the score.
        interval: its lower and upper bound; NaN where there is none.
        unit: the unit of the value.
        null: the same score of random dictionaries, one value per draw.
        control: the same score of other ways to do the same, by their names.
    """

    name: str
    value: float
    interval: tuple[float, float] = NO_INTERVAL
    unit: str = ""
    null: Sequence[float] = ()
    control: Mapping[str, float] = field(default_factory=dict)

    def against(self, null: Sequence[Score], control: Mapping[str, Score]) -> Score:
        """Return the score with the values of random and other dictionaries beside it."""
        return replace(self, null=[s.value for s in null], control={n: s.value for n, s in control.items()})


def control_seed(seed: int) -> int:
    """Return the seed of a control, so that it draws other numbers than what it is a control of."""
    return (seed * 0x9E3779B1 + 0x5EED5EED) % (1 << 32)


def control_generator(seed: int) -> torch.Generator:
    """Return the random source of a control."""
    return generator(control_seed(seed))


def collect(found: Sequence[Score], record: Mapping[str, Any], reasons: Mapping[str, str] | None = None) -> Scores:
    """Make one result of scores; `reasons` says by name why a score has no interval."""
    controls = list(dict.fromkeys(n for s in found for n in s.control))
    width = max([len(s.null) for s in found], default=0)
    null = [[*s.null, *[math.nan] * (width - len(s.null))] for s in found]
    return Scores(
        score=torch.tensor([s.value for s in found], dtype=torch.float32),
        interval=torch.tensor([s.interval for s in found], dtype=torch.float32).reshape(-1, 2),
        null=torch.tensor(null, dtype=torch.float32).reshape(len(found), width),
        control=torch.tensor(
            [[s.control.get(c, math.nan) for c in controls] for s in found], dtype=torch.float32
        ).reshape(len(found), len(controls)),
        labels={"score": [s.name for s in found], "control": controls, "bound": BOUNDS},
        units=dict.fromkeys(("score", "interval", "null", "control"), "each in its own unit")
        | {s.name: s.unit for s in found if s.unit},
        reasons=dict(reasons or {}),
        record={"versions": versions(), "machine": machine(), **record},
    )


def joined(parts: Iterable[Scores]) -> Scores:
    """Join several results of one dictionary. Where their records differ, each is kept beside its scores' names."""
    rows: list[Score] = []
    record: dict[str, Any] = {}
    parts = list(parts)
    differ = {k for p in parts for k in p.record if any(o.record.get(k, p.record[k]) != p.record[k] for o in parts)}
    for p in parts:
        for i, name in enumerate(p.labels["score"]):
            low, high = p.interval[i].tolist()
            control = dict(zip(p.labels["control"], p.control[i].tolist(), strict=True))
            rows.append(Score(name, float(p.score[i]), (low, high), p.units.get(name, ""), p.null[i].tolist(), control))
        for k, v in p.record.items():
            named = v if isinstance(v, dict) else {", ".join(str(n) for n in p.labels["score"]): v}
            record[k] = {**record.get(k, {}), **named} if k in differ else v
    named = {r.name for r in rows}
    return collect(rows, record, {n: why for p in parts for n, why in p.reasons.items() if n in named})


def over_seeds(runs: Sequence[Scores], level: float = 0.95) -> Scores:
    """Average every score over dictionaries that differ in their seed, with Student's interval of that mean.

    Raises:
        Refused: no runs, or runs with other scores.
    """
    from scipy import stats

    if not runs or any(r.labels["score"] != runs[0].labels["score"] for r in runs):
        raise Refused(f"scores of {len(runs)} runs", "they do not hold the same scores", "judge all of them alike")
    values = torch.stack([r.score for r in runs]).double()
    mean, n = values.mean(0), len(runs)
    reach = values.std(0) / n**0.5 * stats.t.ppf((1 + level) / 2, n - 1) if n > 1 else torch.full_like(mean, math.nan)
    how = f"Student's interval of the mean over {n} seeds" if n > 1 else "one seed has no interval over seeds"
    return replace(
        runs[0],
        score=mean.float(),
        interval=torch.stack([mean - reach, mean + reach], -1).float(),
        null=torch.cat([r.null for r in runs], 1),
        control=torch.stack([r.control for r in runs]).mean(0),
        reasons={} if n > 1 else dict.fromkeys(runs[0].labels["score"], how),
        record=runs[0].record | {"seeds": n, "interval": how},
    )
