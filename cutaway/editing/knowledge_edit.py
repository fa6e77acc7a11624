"""The result of every edit of knowledge: answers before and after, beside random rewrites of the same size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from cutaway.core.result import Result
from cutaway.core.stats import BOUNDS, generator, mean_interval, one_prompt, wilson_interval
from cutaway.editing.evaluation import Drift, answered, asked, random_twin
from cutaway.editing.request import Requests
from cutaway.models.edits.rewrite_set import Rewrites, changes
from cutaway.models.edits.rewrites import Rewrite, rewritten
from cutaway.models.model import Model
from cutaway.tasks.prompts import Prompts

_TEXTS = 16  # on which drift is measured


@dataclass(frozen=True, kw_only=True)
class KnowledgeEdit(Result, kind="knowledge_edit"):
    """Answers to requests and to their probes under an edit, and its drift on other text.

    Attributes:
        share: of prompts that have the answer they ought to have, the mean over requests, by kind of prompt.
        interval: 95 %, Wilson's over requests; conservative where a request has several prompts of a kind.
        null: the same under random rewrites of the same weights, ranks and norms.
        before: `share` without the edit.
        preferred: share of prompts with more log-probability for that answer than for the other object.
        preferred_interval: 95 %, as `interval`.
        preferred_null: as `null`.
        each: `share` of every request; NaN without such a prompt.
        kl: KL(before ‖ after) per token on other texts, in nats, the mean over texts and over edits made alone.
        kl_interval: 95 %, over texts.
        kl_null: as `null`.
        size: ‖Δ‖ / ‖W‖ of each rewrite.
        rounding: ‖(W′ − W) − Δ‖ / ‖Δ‖ of each rewrite, for the dtype of the weight.
    """

    page = ("before", "preferred")
    share: Float[Tensor, "measure"]
    interval: Float[Tensor, "measure bound"]
    null: Float[Tensor, "measure sample"]
    before: Float[Tensor, "measure"]
    preferred: Float[Tensor, "measure"]
    preferred_interval: Float[Tensor, "measure bound"]
    preferred_null: Float[Tensor, "measure sample"]
    each: Float[Tensor, "request measure"]
    kl: Float[Tensor, ""]
    kl_interval: Float[Tensor, "bound"]
    kl_null: Float[Tensor, "sample"]
    size: Float[Tensor, "rewrite"]
    rounding: Float[Tensor, "rewrite"]


@dataclass(frozen=True)
class Edit:
    """Rewrites that are made together, for some of the requests.

    Attributes:
        rewrites: the rewrites.
        requests: the indices of the requests that they are for.
    """

    rewrites: tuple[Rewrite, ...]
    requests: tuple[int, ...]


def halves(texts: Prompts) -> tuple[Prompts, Prompts]:
    """Return every second text, for what is fitted, and the others, on which drift is measured; one text is both."""
    parts = [Prompts(tuple(texts)[i::2], texts.name) if len(texts) > 1 else texts for i in (0, 1)]
    return parts[0], parts[1].take(_TEXTS)


def knowledge_edit(
    model: Model,
    requests: Requests,
    texts: Prompts,
    edits: Sequence[Edit],
    samples: int,
    seed: int,
    record: dict[str, Any],
) -> tuple[KnowledgeEdit, Rewrites]:
    """Measure edits, each made alone, beside random twins, and return the result with the rewrites.

    Raises:
        Refused: rewrites that do not fit the model, or answers that merge with their prompts.
    """
    what, drift, n = asked(model, requests), Drift.on(model, texts), len(requests)

    def under(twin: Callable[[Rewrite], Rewrite]) -> tuple[Tensor, Tensor]:
        """Return the answers [request measure 2] and the KL of each text, under all edits made alone."""
        values = torch.full((len(what.request), 2), torch.nan)
        moved = torch.zeros(len(drift.tokens))
        for edit in edits:
            rows = what.of(edit.requests)
            with rewritten(model, *map(twin, edit.rewrites)):
                values[rows] = answered(model, what, rows)
                moved += drift.divergence() / len(edits)
        return torch.stack([what.means(values[:, i], n) for i in (0, 1)], -1), moved

    plain = what.means(answered(model, what, what.of(range(n)))[:, 0], n)
    (found, moved), generators = under(lambda r: r), [generator(seed + 1 + s) for s in range(samples)]
    chance = [under(lambda r, g=g: random_twin(model, r, g)) for g in generators]
    null = torch.stack([f.nanmean(0) for f, _ in chance], -1)
    share, trials = found.nanmean(0), (~found.isnan()).sum(0)
    intervals = torch.stack(
        [_interval(share[m, i], int(trials[m, i])) for m in range(len(share)) for i in (0, 1)]
    ).unflatten(0, (-1, 2))
    sizes = [c for e in edits for c in changes(model, *e.rewrites)]
    result = KnowledgeEdit(
        share=share[:, 0],
        interval=intervals[:, 0],
        null=null[:, 0],
        before=plain.nanmean(0),
        preferred=share[:, 1],
        preferred_interval=intervals[:, 1],
        preferred_null=null[:, 1],
        each=found[..., 0],
        kl=moved.mean(),
        kl_interval=mean_interval(moved),
        kl_null=torch.stack([m.mean() for _, m in chance]),
        size=torch.tensor([c.size for c in sizes]),
        rounding=torch.tensor([c.rounding for c in sizes]),
        labels={
            "measure": list(what.measures),
            "request": [f"{i}: {r.prompt} → {r.new}" for i, r in enumerate(requests)],
            "rewrite": [f"{i}: {c.weight}" for i, c in enumerate(sizes)],
            "bound": BOUNDS,
        },
        units=dict.fromkeys(("share", "before", "preferred", "each"), "share of prompts")
        | dict.fromkeys(("size", "rounding"), "ratio of norms")
        | {"kl": "nats per token"},
        reasons=one_prompt(n, "share", "preferred") | one_prompt(len(drift.tokens), "kl"),
        record=record,
    )
    made = tuple(r for e in edits for r in e.rewrites)
    about = {"requests": [r.identity() for r in requests], "model": model.identity(), **record}
    return result, Rewrites(made, about)


def _interval(share: Float[Tensor, ""], trials: int) -> Float[Tensor, "bound"]:
    """Return Wilson's interval; NaN of fewer than two requests."""
    if trials < 2:
        return torch.full((2,), torch.nan)
    return wilson_interval(share.double(), trials).float()
