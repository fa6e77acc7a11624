"""From products at edges to a result: intervals, control, inclusion under resampled prompts, and the exact audit."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cutaway.circuits.alternatives import Alternatives, alternatives
from cutaway.circuits.edge_effects import measured
from cutaway.circuits.edge_estimates import Estimates, Gradients, estimated
from cutaway.circuits.edge_scores import EdgeScores, inclusion
from cutaway.core.stats import BOUNDS, generator, mean_interval, one_prompt
from cutaway.interventions.ablation_values import Baseline
from cutaway.interventions.audit import STATISTICS, Audit, audit, rounding
from cutaway.interventions.paired_runs import Direction
from cutaway.models.edits.edge_mask import places_written
from cutaway.models.edits.wiring import Wiring
from cutaway.models.model import Model
from cutaway.tasks.task import Task


def scored(
    model: Model,
    task: Task,
    wiring: Wiring,
    gradients: Gradients,
    how: Baseline,
    direction: Direction,
    audits: int,
    share: float,
    samples: int,
    seed: int,
    copies: int = 1,
) -> EdgeScores:
    """Return estimated scores of all edges, audited."""
    given = alternatives(model, task.bind(model), places_written(wiring), how, direction, task.corruption, seed)
    found = estimated(model, wiring, given, gradients, copies)
    return result(model, wiring, given, found, audits, share, samples, seed)


def result(
    model: Model,
    wiring: Wiring,
    given: Alternatives,
    found: Estimates,
    audits: int,
    share: float,
    samples: int,
    seed: int,
) -> EdgeScores:
    """Return estimates as a result, with a control drawn from their variance, audited."""
    null = found.variance.sqrt()[:, None] * torch.randn(len(found.variance), samples, generator=generator(seed))
    return audited(model, wiring, given, given.sign * found.each, null, found.values, audits, share, seed)


def audited(
    model: Model,
    wiring: Wiring,
    given: Alternatives,
    each: Float[Tensor, "prompt edge"],
    null: Float[Tensor, "edge sample"],
    values: Float[Tensor, "prompt"],
    audits: int,
    share: float,
    seed: int,
) -> EdgeScores:
    """Return estimated scores as a result, with an audit of some edges."""
    fields, said = dict[str, Any](), "none was asked for"
    if audits:
        done = _audit(model, wiring, given, each.mean(0), values, audits, seed)
        fields = {"exact": done.exact, "exact_interval": done.exact_interval(each.shape[1])}
        fields |= {"agreement": done.agreement, "agreement_interval": done.interval}
        said = str(done.sample)
    record = {"score is": "an estimate", "agreement": said}
    return scores(wiring, given, each, null, share, seed, record, values=values, **fields)


def scores(
    wiring: Wiring,
    given: Alternatives,
    each: Float[Tensor, "prompt edge"],
    null: Float[Tensor, "edge sample"],
    share: float,
    seed: int,
    record: dict[str, Any],
    values: Float[Tensor, "prompt"],
    edges: Int[Tensor, "edge"] | None = None,
    **fields: Any,
) -> EdgeScores:
    """Return the scores of every prompt and edge as a result; of all edges, or of some."""
    unit, side = given.bound.unit, "corrupt" if given.direction == "denoise" else "clean"
    in_unit = ["score", "interval", "null", side, *(n for n in ("exact", "exact_interval") if n in fields)]
    names = named(wiring, torch.arange(len(wiring.pairs)) if edges is None else edges)
    names["labels"] |= {"statistic": STATISTICS} if "agreement" in fields else {}
    return EdgeScores(
        score=each.mean(0),
        interval=mean_interval(each),
        null=null,
        frequency=inclusion(each, share, seed),
        units=dict.fromkeys(in_unit, unit) | {"frequency": "share of resamples"},
        reasons=one_prompt(len(each), "score", "exact"),
        record=given.record() | record,
        **{side: values},
        **names,
        **fields,
    )


def named(wiring: Wiring, edges: Int[Tensor, "edge"]) -> dict[str, Any]:
    """Return the fields of a result that say which edges it is about."""
    writers, readers = (tuple(map(str, places)) for places in (wiring.writers, wiring.readers))
    writer, reader = wiring.pairs[edges].T.contiguous()
    names = [f"{writers[u]}→{readers[v]}" for u, v in zip(writer.tolist(), reader.tolist(), strict=True)]
    labels = {"edge": names, "bound": BOUNDS}
    return {"writer": writer, "reader": reader, "writers": writers, "readers": readers, "labels": labels}


def _audit(
    model: Model,
    wiring: Wiring,
    given: Alternatives,
    score: Float[Tensor, "edge"],
    values: Float[Tensor, "prompt"],
    audits: int,
    seed: int,
) -> Audit:
    def exactly(chosen: list[int]) -> Float[Tensor, "chosen prompt"]:
        return measured(model, wiring, given, chosen)[0]

    return audit(exactly, score, audits, rounding(model, values[None]), seed=seed)
