"""How much of what each reader reads does each writer make up?

Information-flow routes (Ferrando & Voita 2024, arXiv:2403.00824). No metric, no other prompt and no gradient: a writer
counts by how much nearer it brings the stream that a reader reads, in the 1-norm.

* `score` of u → v: max(0, ‖x_v‖₁ − ‖x_v − a_u‖₁) over its sum over all writers that v hears, mean over the tokens of a
  prompt but its first (the one token of a prompt of one); x_v is the stream before v's norm, a_u what u adds to it.
  Readers of one stream (a layer's heads) have the same scores, and those of a reader add up to 1.
* `interval`: 95 %, over prompts. `frequency`: the share of resamples of the prompts in which the edge is among the
  `share` of all edges with the largest score. Control (`null`): the scores where each a_u has a random direction and
  the same length, and the stream stays as it is.
* Known failures: it says what is there, not what is used, so that large writers lead everywhere; constants that
  attention adds take no part.
* Equivalences (tests): the definition by hand, edge by edge; the scores of each reader add up to 1.
* Cost: one forward.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from cutaway.circuits.edge_estimates import reader_groups
from cutaway.circuits.edge_scores import EdgeScores, inclusion
from cutaway.circuits.scoring import named
from cutaway.core.method import method
from cutaway.core.out_of_memory import in_halves
from cutaway.core.stats import generator, mean_interval, one_prompt
from cutaway.models.access.reader_gradients import stream_read
from cutaway.models.edits.edge_mask import places_written, written
from cutaway.models.edits.wiring import Wiring, wiring
from cutaway.models.model import Model
from cutaway.models.tokens import Tokens
from cutaway.tasks.prompts import Prompts

_PART_BYTES = 1 << 28  # of what all writers add, for one part of the prompts
_UNIT = "share of the stream"


@method(
    answers="How much of what each reader reads does each writer make up?",
    paper="Ferrando & Voita 2024, arXiv:2403.00824",
    cost="prompts * F",
    control="random_direction",
    rung="observational",
    fills=("frequency",),
)
def information_flow(
    model: Model, prompts: Prompts, /, *, share: float = 0.05, samples: int = 4, seed: int = 0
) -> EdgeScores:
    """Score every edge by the writer's part in what the reader reads.

    Args:
        share: the share of all edges whose inclusion under resampled prompts is counted.
        samples: how many random directions make the null of each edge.
        seed: of the resamples and the random directions.

    Raises:
        Refused: a model without such a wiring.
    """
    w, tokens, chance, done = wiring(model), prompts.bind(model), generator(seed), list[Tensor]()
    one = 4 * tokens.ids.shape[1] * model.shape.d_model * len(w.writers)

    def work(rows: Sequence[int]) -> None:
        done.append(_parts(model, w, tokens.rows(rows), samples, chance))

    in_halves(range(len(tokens)), max(1, _PART_BYTES // one), work)
    each, *null = torch.cat(done, dim=1)
    return EdgeScores(
        score=each.mean(0),
        interval=mean_interval(each, within=(0.0, 1.0)),
        null=torch.stack(null, -1).mean(0),
        frequency=inclusion(each, share, seed),
        units={"score": _UNIT, "interval": _UNIT, "null": _UNIT, "frequency": "share of resamples"},
        reasons=one_prompt(len(each), "score"),
        record={"score is": "a share of what is read"},
        **named(w, torch.arange(len(w.pairs))),
    )


@torch.no_grad()
def _parts(
    model: Model, w: Wiring, tokens: Tokens, samples: int, chance: torch.Generator
) -> Float[Tensor, "run prompt edge"]:
    """Return each writer's part in what each reader reads, and those of random directions."""
    groups = [(stream_read(model.anatomy, reader), columns) for reader, columns in reader_groups(w)]
    places = places_written(w)
    acts = model.capture(tokens, list(dict.fromkeys([*places, *(stream for stream, _ in groups)])), logits=False)
    adds = written(model, {str(a): acts[str(a)] for a in places}).values()
    own = torch.cat([x.flatten(2, -2) if x.ndim == 4 else x.unsqueeze(2) for x in adds], 2).float()
    out = torch.zeros(1 + samples, len(tokens), *w.heard.shape, device=own.device)
    for run in out:
        for stream, columns in groups:
            heard = int(w.heard[:, columns.start].sum())
            part = _nearness(acts[str(stream)].float(), own[:, :, :heard], counted(tokens))
            run[:, :heard, columns] = part[:, :, None]
        noise = torch.randn(own.shape, generator=chance).to(own)
        own = noise * (own.norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True))
    u, v = w.pairs.T
    return out[:, :, u, v].cpu()


def _nearness(
    x: Float[Tensor, "batch position d_model"],
    adds: Float[Tensor, "batch position writer d_model"],
    where: Bool[Tensor, "batch position"],
) -> Float[Tensor, "batch writer"]:
    """Return how much nearer each writer brings the stream, as a share, mean over some tokens."""
    near = (x.abs().sum(-1, keepdim=True) - (x.unsqueeze(2) - adds).abs().sum(-1)).clamp_min(0)
    part = (near / near.sum(-1, keepdim=True).clamp_min(torch.finfo(near.dtype).tiny)) * where[..., None]
    return part.sum(1) / where.sum(1, keepdim=True)


def counted(tokens: Tokens) -> Bool[Tensor, "batch position"]:
    """Return the tokens but each prompt's first one, or all of a prompt of one."""
    first = torch.zeros_like(tokens.mask).scatter_(1, tokens.column(0)[:, None], True)
    return tokens.mask & ~(first & (tokens.lengths > 1)[:, None])
