"""Which words say where a latent is active, and do they say more than a rule does?

A language model reads windows of the explain half of the documents and writes a label; a judge (the same or another
model) scores it on windows of the other half, by detection, fuzzing and simulation (`judge`).

* `score[latent, measure]`: balanced accuracy of detection and of fuzzing, correlation of the simulation; `interval`:
  95 %, bootstrap over documents. Unreadable answers count as wrong; `failed` is their share.
* `precision`: of the judge's yes at the true share of active windows (detection) and tokens (fuzzing), ρ:
  ρ TPR / (ρ TPR + (1 − ρ) FPR). Balanced accuracy at equal numbers says little about rare latents.
* Control (`null`), the same judge on the same windows: the empty label, another latent's label (of like density), the
  best rule about single tokens, the label of the decoder's nearest neighbour (of the most frequent partner without the
  dictionary), and the own label beside activity in random order.
* `simulation[latent, reading]`: what else is read from simulations (`judge`), with interval and null.
* `rung_q[latent, sample]`: share of paired resamples of documents in which detection by the label does not lead that of
  a rung of the ladder, after Benjamini and Hochberg over latents.
* `lead`: detection by the label less detection by the latent's rule, which needs no judge, on the same windows;
  `q`: share of paired resamples of documents without a lead, after Benjamini and Hochberg over latents. With q ≤ 5 %
  the label is shown before the rule, and else behind it.
* Known failures: a judge knows words better than positions; scores compare labels of one judge only.
* Cost: with n windows of each kind, up to 3 + 5 (2 ⌈2n / 5⌉ + n) requests for each latent; `Client(dry=True)` counts
  them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from cutaway.core.progress import advance
from cutaway.core.record import counting, machine, versions
from cutaway.core.refuse import Refused
from cutaway.core.result import Result
from cutaway.core.stats import BOUNDS, false_discovery, generator
from cutaway.dictionaries.dictionary import Dictionary
from cutaway.features import effects, search
from cutaway.features.llm import prompts
from cutaway.features.llm.client import Client
from cutaway.features.llm.judge import LEAST, MEASURES, READINGS, Material, Verdict
from cutaway.features.llm.windows import WIDTH, Window, Windows
from cutaway.features.rules.families import Corpus
from cutaway.features.rules.mine import Miner, Rule
from cutaway.features.store.feature_store import FeatureStore
from cutaway.features.store.latents import StoredLatents
from cutaway.features.store.meta import LLM, Label

LADDER = ("empty label", "another latent's label", "token rule", "neighbour's label", "shuffled activity")
SHOWN = 10  # windows that the label is written from, at most: the largest, and random ones
LEVEL = 0.05  # of false discoveries among latents whose label leads
_RESAMPLES, _TRIED = 400, 8  # resamples of documents; other latents, of which one can be labelled


@dataclass(frozen=True, kw_only=True)
class Descriptions(Result, kind="feature_descriptions"):
    """Labels of latents by a language model, with their scores on held-out documents.

    Attributes:
        score: balanced accuracy of detection and fuzzing, and correlation of the simulation.
        interval: of `score`, 95 %, over documents.
        null: `score` of other labels, the rungs of the ladder.
        simulation: further readings of the simulation.
        rung_q: share of resamples without a lead over a rung, after Benjamini and Hochberg.
        precision: of the judge's yes at the true density.
        density: share of windows, and of tokens, that are active.
        failed: share of unreadable answers.
        lead: detection by the label less detection by the rule.
        lead_interval: of `lead`, 95 %, over documents.
        q: share of resamples without a lead, after Benjamini and Hochberg.
    """

    score: Float[Tensor, "latent measure"]
    interval: Float[Tensor, "latent measure bound"]
    null: Float[Tensor, "latent measure sample"]
    simulation: Float[Tensor, "latent reading"]
    simulation_interval: Float[Tensor, "latent reading bound"]
    simulation_null: Float[Tensor, "latent reading sample"]
    rung_q: Float[Tensor, "latent sample"]
    precision: Float[Tensor, "latent judged"]
    density: Float[Tensor, "latent judged"]
    failed: Float[Tensor, "latent measure"]
    lead: Float[Tensor, "latent"]
    lead_interval: Float[Tensor, "latent bound"]
    q: Float[Tensor, "latent"]


def describe(
    store: FeatureStore,
    latents: Sequence[int],
    writer: Client,
    *,
    judge: Client | None = None,
    source: Dictionary | None = None,
    dictionary: str | None = None,
    windows: int = 10,
    write: bool = True,
    seed: int = 0,
) -> Descriptions:
    """Label latents with a language model, score the labels, and write them into the store.

    Args:
        store: the store, with codes.
        latents: numbers of the latents.
        writer: the client of the model that writes labels.
        judge: that of the model that judges them; the writer if None.
        source: the dictionary, for neighbours.
        dictionary: its name in the store, where there are several.
        windows: number of windows with activity, and of windows without, that a label is judged on.
        write: False to leave the store as it is; so it is in a dry run.
        seed: of the windows that are drawn, the ladder and the resamples.

    Raises:
        Refused: no such latent, one with few windows, a spent budget, or a server that does not answer.
    """
    known = store.latents(dictionary)
    if source is not None:
        store.check_dictionary(source, known.name)
    work = _Work(store, known, writer, judge or writer, source, windows, seed)
    rows = list[_Row]()
    with counting() as spent:
        for i, latent in enumerate(latents):
            rows.append(work.row(latent))
            advance(i + 1, len(latents))
    if not rows:
        raise Refused("labels of latents", "none is named", "name at least one")
    q = false_discovery(torch.tensor([r.p for r in rows]))
    if write and not (writer.dry or work.judge.dry):
        store.meta.put(
            _label(known.name, n, r, float(x), writer.model) for n, r, x in zip(latents, rows, q, strict=True)
        )
    fields: dict[str, Any] = {n: torch.from_numpy(np.stack([getattr(r, n) for r in rows])).float() for n in _FIELDS}
    rungs = torch.tensor(np.stack([r.rung_p for r in rows]))
    return Descriptions(
        **fields,
        q=q,
        rung_q=torch.stack([false_discovery(p) for p in rungs.T], 1),
        labels={
            "latent": [f"{n}: {r.text}" for n, r in zip(latents, rows, strict=True)],
            "measure": list(MEASURES),
            "reading": list(READINGS),
            "judged": list(MEASURES[:2]),
            "sample": list(LADDER),
            "bound": BOUNDS,
        },
        units={"score": "balanced accuracy, or correlation", "null": "as the score", "lead": "balanced accuracy"}
        | dict.fromkeys(("simulation", "simulation_interval", "simulation_null"), "of 1")
        | dict.fromkeys(("precision", "density", "failed", "q", "rung_q"), "share"),
        reasons=dict.fromkeys(
            ("precision", "density", "failed", "q", "rung_q"), "it follows from the answers behind the score"
        ),
        record=work.record(spent.seconds),
    )


@dataclass(frozen=True, eq=False)
class _Row:
    """The label of one latent with its scores; see `Descriptions`."""

    text: str
    score: np.ndarray
    interval: np.ndarray
    null: np.ndarray
    precision: np.ndarray
    density: np.ndarray
    failed: np.ndarray
    lead: np.ndarray
    lead_interval: np.ndarray
    simulation: np.ndarray
    simulation_interval: np.ndarray
    simulation_null: np.ndarray
    p: float
    rung_p: np.ndarray


_FIELDS = ("score", "interval", "null", "precision", "density", "failed", "lead", "lead_interval")
_FIELDS += ("simulation", "simulation_interval", "simulation_null")


class _Work:
    """The windows, rules and clients that all latents share."""

    def __init__(
        self,
        store: FeatureStore,
        known: StoredLatents,
        writer: Client,
        judge: Client,
        source: Dictionary | None,
        most: int,
        seed: int,
    ):
        self.store, self.known, self.writer, self.judge, self.source = store, known, writer, judge, source
        self.most, self.seed, self.windows = most, seed, Windows(store)
        self.miner = Miner(Corpus.of(store), np.random.default_rng(seed))

    def record(self, seconds: float) -> dict[str, Any]:
        """Return the record of the result."""
        clients = {"writer": self.writer} | ({} if self.judge is self.writer else {"judge": self.judge})
        return {
            "method": "features.describe",
            "answers": "Which words say where a latent is active, and do they say more than a rule does?",
            "control": "ladder_of_labels",
            "subjects": {"store": self.store.identity()},
            "dictionary": self.known.name,
            "models": {n: {"model": c.model, "url": c.url} for n, c in clients.items()},
            "requests": {n: {"sent": c.sent, "tokens": c.tokens} for n, c in clients.items()},
            "dry": self.writer.dry,
            "windows": {"of each kind": self.most, "tokens": WIDTH},
            "seed": self.seed,
            "cost": {"forwards": 0.0, "backwards": 0.0, "seconds": seconds},
            "versions": versions(),
            "machine": machine(),
        }

    def row(self, latent: int) -> _Row:
        """Label a latent, and score its label beside the ladder."""
        g, known = np.random.default_rng([self.seed, latent]), self.known
        values = self.windows.values(known, known.check(latent))
        material, text = Material.of(self.windows, values, self.most, g), self.text(latent)
        if material is None or text is None:
            why = f"fewer than {LEAST} windows of a half of the documents have activity"
            raise Refused(f"a label of latent {latent}", why, "harvest more tokens, or leave it out")
        own = material.judged(self.judge, text)
        rungs = [material.judged(self.judge, label) for label in self._others(latent)]
        rungs.append({m: own[m].shuffled(g) for m in MEASURES})
        return self._scored(text, material, own, rungs, self._by_rule(latent, material), g)

    def text(self, latent: int) -> str | None:
        """Return the label that the writer gives a latent, "" if it cannot be read; None with few windows."""
        values, g = self.windows.values(self.known, latent), np.random.default_rng([self.seed, latent, 1])
        half = self.windows.explain
        active = half[np.isin(half, list(values))]
        if len(active) < LEAST:
            return None
        largest = np.array([values[int(i)].max() for i in active])
        top = active[np.argsort(-largest, kind="stable")]
        chosen = [*top[: SHOWN // 2], *g.permutation(top[SHOWN // 2 :])[: SHOWN - SHOWN // 2]]
        shown = [self.windows.window(int(i), values) for i in chosen]
        return prompts.label_of(self.writer.ask(prompts.describe(shown, float(largest.max())))) or ""

    def _others(self, latent: int) -> list[str]:
        """Return the labels of the ladder that are judged: empty, another latent's, token rule, neighbour's."""
        near = effects.of_like_density(self.known, latent, _TRIED, generator(self.seed + latent))
        another = next((t for i in near if (t := self.text(i)) is not None), "")
        rule = self.miner.rule(self.miner.corpus.active(self.known, latent), ["token"])
        said = "" if rule is None else rule.says(self.miner.corpus)
        beside = self._neighbour(latent)
        return ["", another, said, "" if beside is None else self.text(beside) or ""]

    def _neighbour(self, latent: int) -> int | None:
        if self.source is not None:
            hits = search.by_likeness(self.store, latent, self.source, self.known.name, 1)
            return hits[0].latent if hits else None
        return next((j for j, *_ in self.known.partners(latent)), None)

    def _by_rule(self, latent: int, material: Material) -> Verdict:
        """Return detection by the latent's rule, on the same windows."""
        rule = self.miner.rule(self.miner.corpus.active(self.known, latent))
        said = np.array([self._fires(rule, w) for w in material.detection])
        truth = np.array([bool(w.active.any()) for w in material.detection])
        return Verdict(truth, said, np.array([w.document for w in material.detection]), 0.0)

    def _fires(self, rule: Rule | None, w: Window) -> bool:
        if rule is None:
            return False
        context, number = divmod(w.number, self.windows.rows)
        first = context * self.store.width + number * self.windows.width
        rows = self.miner.corpus.row_of(first + np.flatnonzero(w.counted))
        return bool(self.miner.fires(rule, rows).any())

    def _scored(
        self,
        text: str,
        material: Material,
        own: dict[str, Verdict],
        rungs: Sequence[dict[str, Verdict]],
        rule: Verdict,
        g: np.random.Generator,
    ) -> _Row:
        score, bounds = list[float](), list[np.ndarray]()
        for m in MEASURES:
            score.append(_value(own[m]))
            bounds.append(_bounds(own[m].score(_weights(own[m], g)), score[-1]))
        precision = [_precision(own[m], density) for m, density in zip(MEASURES, material.density, strict=False)]
        told, density = own["simulation"], material.density[0]
        reading = _readings(told, density)
        w = _weights(rule, g)
        seen = own["detection"].score(w)
        leads, lead = seen - rule.score(w), _value(own["detection"]) - _value(rule)
        return _Row(
            text,
            np.array(score),
            np.stack(bounds),
            np.array([[_value(r[m]) for r in rungs] for m in MEASURES]),
            np.array(precision),
            np.array(material.density),
            np.array([own[m].failed for m in MEASURES]),
            np.array(lead),
            _bounds(leads, lead),
            reading,
            _bounds(told.readings(_weights(told, g), density), reading).T,
            np.stack([_readings(r["simulation"], density) for r in rungs], 1),
            _without_lead(leads),
            np.array([_without_lead(seen - r["detection"].score(w)) for r in rungs]),
        )


def _bounds(drawn: np.ndarray, value: np.ndarray | float) -> np.ndarray:
    """Return the 95 % interval of resamples [bound ...], with the value in it."""
    low, high = np.nanquantile(drawn, [0.025, 0.975], axis=0)
    return np.stack([np.minimum(low, value), np.maximum(high, value)])


def _without_lead(leads: np.ndarray) -> float:
    return float((1 + (leads <= 0).sum()) / (1 + len(leads)))


def _readings(v: Verdict, density: float) -> np.ndarray:
    return v.readings(np.ones((1, len(v.truth))), density)[0]


def _value(v: Verdict) -> float:
    return float(v.score(np.ones((1, len(v.truth))))[0])


def _weights(v: Verdict, g: np.random.Generator) -> np.ndarray:
    """Return how often each item is drawn [resample item], documents drawn with replacement."""
    numbers, of = np.unique(v.document, return_inverse=True)
    n = len(numbers)
    return g.multinomial(n, np.full(n, 1 / n), size=_RESAMPLES).astype(float)[:, of]


def _precision(v: Verdict, density: float) -> float:
    true, false = (float(v.rate(t, np.ones((1, len(v.truth))))[0]) for t in (True, False))
    called = density * true + (1 - density) * false
    return density * true / called if called else 0.0


def _label(dictionary: str, latent: int, row: _Row, q: float, model: str) -> Label:
    scores: dict[str, Any] = {m: float(v) for m, v in zip(MEASURES, row.score, strict=True)}
    scores |= {f"{m} interval": v.tolist() for m, v in zip(MEASURES, row.interval, strict=True)}
    for m, rungs in zip(MEASURES, row.null, strict=True):
        scores |= {f"{m} of {rung}": float(x) for rung, x in zip(LADDER, rungs, strict=True)}
    scores |= {m: float(v) for m, v in zip(READINGS, row.simulation, strict=True)}
    scores |= {"lead over the rule": float(row.lead), "lead over the rule interval": row.lead_interval.tolist()}
    details = {"model": model, "leads": q <= LEVEL and float(row.lead) > 0}
    return Label(dictionary, latent, LLM, row.text or "no label", scores, details)
