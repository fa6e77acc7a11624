"""The result of all methods that score edges: a number for each edge, with what chance alone makes of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cutaway.core.graph import Graph, graph
from cutaway.core.result import Result
from cutaway.core.stats import generator

_RESAMPLES = 200  # of the prompts, from which come the shares of edges


@dataclass(frozen=True, kw_only=True)
class EdgeScores(Result, kind="edge_scores"):
    """Scores of the edges of a model's wiring: large and positive where an edge's own value helps the answer.

    The score of an edge is the metric with the edge's value of the clean run less the metric with its alternative
    value, measured or estimated; methods without a metric say what theirs is. `graph()` draws the largest.

    Attributes:
        score: the mean over prompts of each edge's score.
        interval: of `score`, 95 %, over prompts.
        null: the scores that a method's control gives.
        frequency: the share of resamples of the prompts in which the edge is among the largest by |score|.
        writer: the index of each edge's writer among `writers`.
        reader: the index of each edge's reader among `readers`.
        clean: the metric per clean prompt.
        corrupt: the metric per corrupt prompt, where corrupt values stand in.
        exact: the measured score of audited edges, NaN elsewhere.
        exact_interval: of `exact`, 95 %, over prompts.
        agreement: how well scores and measured scores of all edges agree.
        agreement_interval: of `agreement`, 95 %.
        kept: True at the edges of the circuit that a search ends in.
        writers: names of the writers.
        readers: names of the readers.
    """

    score: Float[Tensor, "edge"]
    interval: Float[Tensor, "edge bound"]
    null: Float[Tensor, "edge sample"]
    frequency: Float[Tensor, "edge"] | None = None
    writer: Int[Tensor, "edge"]
    reader: Int[Tensor, "edge"]
    clean: Float[Tensor, "prompt"] | None = None
    corrupt: Float[Tensor, "prompt"] | None = None
    exact: Float[Tensor, "edge"] | None = None
    exact_interval: Float[Tensor, "edge bound"] | None = None
    agreement: Float[Tensor, "statistic"] | None = None
    agreement_interval: Float[Tensor, "statistic bound"] | None = None
    kept: Bool[Tensor, "edge"] | None = None
    writers: tuple[str, ...]
    readers: tuple[str, ...]

    def matrix(self) -> Float[Tensor, "writer reader"]:
        """Return the scores as writers × readers, NaN elsewhere."""
        out = torch.full((len(self.writers), len(self.readers)), torch.nan)
        out[self.writer, self.reader] = self.score.cpu()
        return out

    def mask(self, edges: int, signed: bool = False) -> Bool[Tensor, "writer reader"]:
        """Return the mask of the edges of largest |score|, or with `signed` of largest score."""
        chosen = (self.score if signed else self.score.abs()).topk(min(edges, len(self.score))).indices
        out = torch.zeros(len(self.writers), len(self.readers), dtype=torch.bool)
        out[self.writer[chosen], self.reader[chosen]] = True
        return out

    def graph(self, edges: int = 100) -> Graph:
        """Return the edges of largest |score| as a graph."""
        chosen = self.score.abs().topk(min(edges, len(self.score))).indices
        names = [self.labels["edge"][i] for i in chosen.tolist()]
        unit, interval, null = self.units.get("score", ""), self.interval[chosen], self.null[chosen]
        return graph(names, self.score[chosen], interval=interval, null=null, unit=unit)


def inclusion(each: Float[Tensor, "prompt edge"], share: float, seed: int) -> Float[Tensor, "edge"]:
    """Return the share of resamples of the prompts in which each edge is among the `share` of all edges that are
    largest by |mean score|.
    """
    top = max(1, round(share * each.shape[1]))
    return frequency(each, seed, lambda mean: torch.zeros_like(mean).index_fill(0, mean.abs().topk(top).indices, 1.0))


def frequency(
    each: Float[Tensor, "prompt edge"], seed: int, chosen: Callable[[Tensor], Float[Tensor, "edge"]]
) -> Float[Tensor, "edge"]:
    """Return the share of resamples of the prompts whose mean scores have each edge `chosen` (1, others 0)."""
    prompts, chance, counts = len(each), generator(seed), torch.zeros(each.shape[1])
    draws = _RESAMPLES if prompts > 1 else 1
    for _ in range(draws):
        drawn = torch.randint(prompts, (prompts,), generator=chance)
        counts += chosen(torch.bincount(drawn, minlength=prompts).to(each) @ each / prompts)
    return counts / draws
