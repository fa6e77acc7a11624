"""Does one layer's MLP hold the fact, so that a change of rank one makes the model say another?

Rank-one model editing (ROME, Meng et al. 2022, arXiv:2202.05262), in the form that uses one key throughout (r-ROME,
Gupta et al. 2024, arXiv:2403.07175): the published code takes the key of its denominator from the bare prompt and that
of its numerator from the mean over contexts, which can leave a tiny denominator and ruin the model.

1. The key k*: what the output matrix of the layer's MLP reads at the subject's last token, the mean over the bare
   prompt and prompts behind other texts.
2. The value v* = v₀ + δ: δ is found by gradients (`values.py`), at the same place in the MLP's output.
3. W ← W + C⁻¹k* (k*ᵀC⁻¹k*)⁻¹ (v* − Wᵀk* − b)ᵀ, inputs first: k* is mapped to v* exactly, at the least mean change of
   other keys. C is their second moment over the first half of `prompts`, with `ridge` times its mean diagonal added.

* Each request is an edit of its own, of the model as it is: its rewrite is made, its prompts are asked, and it is taken
  back. The model is never changed. `rewrites` come back beside the result, one per request: make the one you want
  (`rewritten`, `RewriteStack`).
* `share[measure]`: of prompts with the answer that they ought to have: `efficacy` of the request's own prompt, then
  every kind of probe (`request.py`). `kl`: drift on texts of the second half of `prompts`.
* `layer=None` takes the layer at which the first requests, edited one by one at every layer, do best: the harmonic mean
  of the shares. They are among those measured, which flatters the shares: to judge a layer, name it. The record has
  the means of all layers. Where causal tracing (`patching.causal_trace`) finds a fact says
  little about it (Hase et al. 2023, arXiv:2301.04213).
* Control (`null`): random rewrites of rank one and the same norm.
* Known failures: probes about the same subject fail first, then those about similar names. Steps that are too long
  (`rate`) overshoot: the same efficacy at a larger drift.
* Equivalences (tests): W′ maps k* to v*; MEMIT of one request with weight 0 at this layer is the same change.
* Cost: per request, a forward and backward per context and step; all layers of `layer=None` do it for four requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from cutaway.core.method import method
from cutaway.core.progress import part
from cutaway.editing.covariance import of_texts
from cutaway.editing.evaluation import answered, asked
from cutaway.editing.knowledge_edit import Edit, KnowledgeEdit, halves, knowledge_edit
from cutaway.editing.places import CONTEXTS, Case, Layer, cases, contexts
from cutaway.editing.request import Requests
from cutaway.editing.solve import Equality, regularised, solve
from cutaway.editing.values import Found, Search, values
from cutaway.models.edits.rewrite_set import Rewrites
from cutaway.models.edits.rewrites import Rewrite, rewritten
from cutaway.models.model import Model
from cutaway.models.moments import Moments
from cutaway.tasks.prompts import Prompts

_SWEPT = 4  # requests that every layer is tried on


@method(
    answers="Does one layer's MLP hold the fact, so that a change of rank one makes the model say another?",
    paper="Meng et al. 2022, arXiv:2202.05262; Gupta et al. 2024, arXiv:2403.07175",
    cost="(requests + layers * min(4, requests)) * (2 + min(4, prompts)) * ((steps + 1) * (F + B) + 2 * F)"
    " + (2 * layers + 2 * samples + 4) * asked * F + (1 + samples) * requests * min(16, prompts) * F"
    " + (prompts + 4 * layers) * F",
    control="random_rewrites",
    rung="interventional",
)
def rome(
    model: Model,
    requests: Requests,
    prompts: Prompts,
    /,
    *,
    layer: int | None = None,
    steps: int = 30,
    rate: float = 0.2,
    kl: float = 0.0625,
    clamp: float = 4.0,
    ridge: float = 0.01,
    samples: int = 4,
    seed: int = 0,
) -> tuple[KnowledgeEdit, Rewrites]:
    """Edit each request alone by a change of rank one; `prompts` are ordinary texts.

    Args:
        layer: the layer whose MLP is edited; None tries all on the first requests.
        steps: the most steps of the search for a value.
        rate: size of a step, in units of the root mean square of the value.
        kl: weight of the KL divergence on "{subject} is a".
        clamp: the longest change of a value, in units of its norm.
        ridge: added to the diagonal of the second moment, in units of its mean.
        samples: number of random rewrites.
        seed: of the contexts and random rewrites.

    Raises:
        Refused: a subject that is not in its prompt, a layer that is not there, or a family whose MLPs have no output
            matrix.
    """
    fitted, held_out = halves(prompts)
    search = Search(steps, rate, kl, clamp)
    found = cases(model, list(requests), contexts(fitted, CONTEXTS, seed))
    layers = range(model.shape.n_layers) if layer is None else (layer,)
    places = {n: Layer(model, n) for n in layers}
    moments = of_texts(model, layers, fitted)
    swept: dict[str, float] = {}
    if layer is None:
        some = requests.take(_SWEPT)
        for i, n in enumerate(layers):
            with part(i, len(layers)):
                swept[str(n)] = _success(
                    model, some, rank_one(places[n], found[: len(some)], moments[n], ridge, search)[0]
                )
        layer = int(max(swept, key=lambda n: swept[n]))
    rewrites, values_, record = rank_one(places[layer], found, moments[layer], ridge, search)
    record |= {
        "layer": layer,
        "log-probability of the new object": [round(p, 4) for p in values_.log_prob.tolist()],
        **({"harmonic mean of shares by layer": swept, "requests that chose it": _SWEPT} if swept else {}),
    }
    edits = [Edit((r,), (i,)) for i, r in enumerate(rewrites)]
    return knowledge_edit(model, requests, held_out, edits, samples, seed, record)


def rank_one(
    place: Layer, cases: Sequence[Case], moments: Moments, ridge: float, search: Search
) -> tuple[list[Rewrite], Found, dict[str, Any]]:
    """Return the rewrite of each request alone, the values found, and the condition of C for records."""
    found = values(place.model, cases, place.writes, search)
    keys = place.keys(cases).cpu()
    second, before, after = regularised(moments.second, ridge)
    now = place.through(keys.T.to(place.matrix.device)).cpu()
    wanted = (found.start + found.delta - now).T
    rewrites = []
    for i, case in enumerate(cases):
        u, v = solve(keys[:, i : i + 1], wanted[:, i : i + 1], Equality(second))
        record = {"request": case.request.identity()}
        rewrites.append(Rewrite(place.weight, factors=(u.float(), v.float()), record=record))
    condition = {"condition of C": before, "condition with the ridge": after, "keys in C": moments.count}
    return rewrites, found, condition


def _success(model: Model, requests: Requests, rewrites: Sequence[Rewrite]) -> float:
    """Return the harmonic mean of the shares of all measures, each request edited alone."""
    what = asked(model, requests)
    values_ = torch.full((len(what.request),), torch.nan)
    for i, rewrite in enumerate(rewrites):
        rows = what.of([i])
        with rewritten(model, rewrite):
            values_[rows] = answered(model, what, rows)[:, 0]
    share = what.means(values_, len(requests)).nanmean(0)
    return float(len(share) / (1 / share.clamp_min(1e-3)).sum())
