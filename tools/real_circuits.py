"""Circuits of two behaviours of a real model, found and judged on different prompts: `python -m tools.real_circuits`.

Sentences of two names (IOI), and a word that stood behind another before (induction), from the templates of
`tasks.load`. A circuit is found and judged by `suites.discovered`; how often its edges are among the first when prompts
are drawn again, and whether other prompts find the same ones, stand beside it. Settings were tried on prompts of other
seeds. All is published in docs/real.md.
"""

from __future__ import annotations

import time
from typing import Any

import torch

import cutaway as ca
from bench.frame import machine
from cutaway.circuits.certify import TESTS
from cutaway.models.model import Model
from cutaway.suites.discovered import Discovered, discover
from tools import real, real_studies
from tools.real_lenses import rounded

MODEL = "smollm2"
TASKS, PROMPTS, SIDES, LARGEST = ("ioi", "induction"), 16, (0, 1), 12
DRAWS, STEPS, SAMPLES = 4, 0, 2


def main() -> None:
    """Find, judge, keep the numbers, and write the page."""
    chosen = real.options(__doc__).parse_args()
    torch.set_num_threads(1)
    model = ca.load(chosen.folder / MODEL)
    found = {"model": real.MODELS[MODEL], "prompts": PROMPTS, "steps": STEPS, "tests": TESTS}
    circuits = {name: measured(model, name) for name in TASKS}
    real.publish(found | {"circuits": circuits, "machine": machine()}, real_studies.CIRCUITS, write=not chosen.no_write)


def measured(model: Model, name: str) -> dict[str, Any]:
    """One circuit, with what was measured of it."""
    start = time.process_time()
    one, other = (ca.tasks.load(name, model, n=PROMPTS, seed=seed) for seed in SIDES)
    assert not {p.clean for p in one} & {p.clean for p in other}
    d = discover(model, one, other, draws=DRAWS, steps=STEPS, samples=SAMPLES)
    carried, certificate = d.carried, d.certificate
    assert carried.shuffled is not None
    assert carried.shuffled_interval is not None
    assert d.scores.agreement is not None
    assert d.scores.agreement_interval is not None
    return rounded({
        "prompt": one.pairs[0].clean,
        "metric": [float(carried.whole), float(carried.empty)],
        "all edges": int(carried.edges[-1]),
        "edges": int(carried.edges[0]),
        "carried": _spread(carried.faithfulness[0], carried.interval[0]),
        "random": carried.null[0].tolist(),
        "exchanged": _spread(carried.shuffled[0], carried.shuffled_interval[0]),
        "level": certificate.level,
        "exchanged level": certificate.shuffled_level,
        "random levels": list(certificate.null_levels),
        "deviation": [_spread(x, i) for x, i in zip(certificate.deviation, certificate.interval, strict=True)],
        "random deviation": certificate.null.amin(1).tolist(),
        "stability": stability(model, d, other),
        "agreement": _spread(d.scores.agreement[1], d.scores.agreement_interval[1]),
        "largest": [{"edge": r["edge"], "score": r["weight"]} for r in d.graph.top(LARGEST)],
        "CPU minutes": (time.process_time() - start) / 60,
    })  # fmt: skip


def stability(model: Model, d: Discovered, other: ca.Task) -> dict[str, Any]:
    """How often edges are among the first of resampled prompts, and how many of them other prompts find again."""
    names = {name: i for i, name in enumerate(d.scores.labels["edge"])}
    inside = torch.tensor([names[str(e)] for e in d.circuit.edges])
    assert d.scores.frequency is not None
    often = d.scores.frequency[inside]
    again = ca.circuits.eap_ig(model, other, audit=0, samples=1).score.abs().topk(len(inside)).indices
    return {
        "share": d.scores.record["options"]["share"],
        "frequency": float(often.mean()),
        "always": float((often == 1).float().mean()),
        "found again": float(torch.isin(inside, again).float().mean()),
        "by chance": len(inside) / len(names),
    }


def _spread(value: torch.Tensor, interval: torch.Tensor) -> dict[str, Any]:
    return {"value": float(value), "interval": interval.tolist()}


if __name__ == "__main__":
    main()
