"""Which tokens does each head bring the answer from?

Direct logit attribution by source (Elhage et al. 2021): what a head writes at the last position is the sum over source
positions of attention times the value there, through W_O. Each summand, through the final norm with its scale frozen
at its value in this run and the unembedding, has a share of logit(answer) − logit(foil). Prompts alone have no foil:
then each has a share of logit(answer), the answer being `answer` or what the model itself says next.

* `effect[head, position]`: mean over prompts, in logits; positive writes the answer. `interval`: 95 %, over prompts.
  Positions count from the end where prompts differ in length; `earlier[head]` are those before the shortest begins.
* Closure: each head's shares sum to `contribution[head]`, its share in `direct_attribution`; `residual` is the most
  that any head misses of it in a prompt. One beyond rounding (of all heads' shares of a prompt) is a refusal: there,
  what heads write is not attention times values.
* With `top`, the other heads are one row: their sum.
* Control: the same summands read toward random pairs of vocabulary tokens, or random tokens without a foil (`null`).
* Assumption: direct paths only, and patterns as they are: why a head looks there is not asked. A value at a position
  holds what earlier layers have brought to it, which need not be its own token's.
* Families that cap their logits: shares are of the uncapped logits. Cost: one forward, and one more of prompts without
  `answer`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cutaway.core.method import method
from cutaway.core.refuse import Refused
from cutaway.core.result import Result
from cutaway.core.stats import BOUNDS, mean_interval, one_prompt
from cutaway.interventions.components import positions
from cutaway.lenses.closure import check_closure, drawn_pairs, with_others
from cutaway.lenses.decode import question
from cutaway.lenses.places import names_of
from cutaway.models.access.reading import Measure, Reads, Seen
from cutaway.models.anatomy.residual import check_sum, head_readers, logit_reader
from cutaway.models.model import Model
from cutaway.models.tokens import Tokens
from cutaway.tasks.prompts import Prompts
from cutaway.tasks.task import Task


@dataclass(frozen=True, kw_only=True)
class SourceAttribution(Result, kind="source_attribution"):
    """Shares of the answer's logit over the foil's, or alone, by head and source position.

    Attributes:
        effect: the share that a head brings from a position.
        interval: of `effect`, 95 %, over prompts.
        null: `effect` toward random tokens.
        contribution: the head's share from all positions together.
        earlier: its share from positions that the shortest prompt does not have.
        residual: the most that the shares of any head miss of its contribution.
    """

    effect: Float[Tensor, "head position"]
    interval: Float[Tensor, "head position bound"]
    null: Float[Tensor, "head position sample"]
    contribution: Float[Tensor, "head"]
    earlier: Float[Tensor, "head"]
    residual: Float[Tensor, "prompt"]


@method(
    answers="Which tokens does each head bring the answer from?",
    paper="Elhage et al. 2021, transformer-circuits.pub/2021/framework",
    cost="prompts * 2 * F",
    control="random_tokens",
    rung="observational",
)
def source_attribution(
    model: Model,
    task: Task | Prompts,
    /,
    *,
    answer: str | None = None,
    top: int = 0,
    samples: int = 20,
    seed: int = 0,
) -> SourceAttribution:
    """Split every head's share of logit(answer) − logit(foil) by source position; of prompts alone, of logit(answer).

    Args:
        answer: of prompts without a task, the answer whose logit is split [default: what the model itself says next].
        top: keep only this many heads, those of the largest share at any position; the rest as one sum (0 keeps all).
        samples: how many random tokens, or pairs of them, make the null.
        seed: of the random tokens.

    Raises:
        Refused: no exact sum exists for this model, it has no attention, or the shares miss those of the heads.
    """
    check_sum(model)
    if model.anatomy.family.ssm:
        why = "it has no attention"
        raise Refused(f"source attribution on {model.name}", why, "use direct_attribution, which splits it by layer")
    asked = question(model, task, answer)
    tokens, own = asked.prompts, asked.known(model)
    answers, foils = drawn_pairs(model, own, asked.foils, samples, seed)
    shares, whole = _shares(model, tokens, answers, foils)  # [prompt, pair, head, earlier and position], [prompt, head]
    missed = shares[:, 0].sum(-1) - whole
    sizes = whole.pow(2).sum(-1).sqrt()
    check_closure("source attribution", model, missed.abs().amax(-1), sizes, shares[:, 0].abs().sum((-1, -2)))
    names = [f"{i}.{h}" for i in range(model.shape.n_layers) for h in range(model.shape.n_heads)]
    if top and top < len(names):
        names, shares = with_others(names, shares, shares[:, 0].mean(0).abs().amax(-1), top, 2)
    shares = shares.float()
    each = shares[:, 0, :, 1:].contiguous()
    return SourceAttribution(
        effect=each.mean(0).cpu(),
        interval=mean_interval(each),
        null=shares[:, 1:, :, 1:].mean(0).movedim(0, -1).cpu().contiguous(),
        contribution=shares[:, 0].sum(-1).mean(0).cpu(),
        earlier=shares[:, 0, :, 0].mean(0).cpu(),
        residual=missed.abs().amax(-1).float().cpu(),
        labels={"head": names, "position": names_of(model, task, tokens), "bound": BOUNDS},
        units=dict.fromkeys(("effect", "interval", "null", "contribution", "earlier", "residual"), "logits"),
        record={
            "final norm": "scale frozen at its value in this run; centring and weight applied to every summand",
            "closure": {"largest residual": float(missed.abs().max()), "largest share": float(whole.abs().max())},
            "shares of": "logit(answer)" if foils is None else "logit(answer) − logit(foil)",
            **asked.record,
        },
        reasons=one_prompt(len(tokens), "effect"),
    )


@torch.no_grad()
def _shares(
    model: Model, tokens: Tokens, answers: Int[Tensor, "pair prompt"], foils: Int[Tensor, "pair prompt"] | None
) -> tuple[Float[Tensor, "prompt pair head source"], Float[Tensor, "prompt head"]]:
    """Return the shares by source, those of earlier positions together in front, and each head's share of its `z`."""
    final, n = model.anatomy.top("final"), model.shape.n_layers
    norm = model.anatomy.norm(final) if final is not None else None
    ones, at = torch.ones(len(tokens), device=answers.device), positions(tokens)
    reader, _ = logit_reader(model, ones, answers, foils)  # [pair prompt d_model]
    group = model.shape.n_heads // model.shape.n_kv_heads

    def columns_of(seen: Seen, prompt: Tensor) -> Float[Tensor, "row number"]:
        acts, split, whole = seen.activations, list[Tensor](), list[Tensor]()
        assert acts is not None
        rows, last = torch.arange(len(prompt), device=answers.device), acts.tokens.last
        columns = torch.stack([acts.tokens.column(p) for p in at], 1)  # [row position]
        x = acts[f"resid_post.{n - 1}@-1"].float()
        scale = norm.scale(x).double() if norm is not None else torch.ones_like(x[:, 0]).double()
        mine = reader[:, prompt] / scale[:, None]
        for i in range(n):
            z = acts[f"z.{i}@-1"]
            seen_by = head_readers(model, i, z, mine)  # [pair row head d_head]
            pattern = acts[f"pattern.{i}"][rows, :, last].double()  # [row head k_pos]
            values = acts[f"v.{i}"].double().repeat_interleave(group, 2)  # [row k_pos head d_head]
            read = torch.einsum("rkhd,prhd->rphk", values, seen_by) * pattern[:, None]
            kept = read.gather(-1, columns[:, None, None].expand(*read.shape[:3], -1))
            earlier = read.sum(-1, keepdim=True) - kept.sum(-1, keepdim=True)
            earlier = earlier if tokens.uneven else torch.zeros_like(earlier)
            split.append(torch.cat([earlier, kept], -1))
            whole.append(torch.einsum("rhd,rhd->rh", z.double(), seen_by[0]))
        return torch.cat([torch.cat(whole, 1), torch.cat(split, 2).flatten(1)], 1)

    places = model.places(["z", "v", "pattern", f"resid_post.{n - 1}"])
    both = model.measure(tokens, Measure(columns_of, Reads(last_logits=False, places=tuple(places))))
    heads = n * model.shape.n_heads
    return both[:, heads:].unflatten(1, (len(answers), heads, 1 + len(at))), both[:, :heads]
