"""How does the answer's logit build up along depth, and at each position?

Accumulated residual (nostalgebraist 2020; Elhage et al. 2021): the residual stream after the embedding and after each
block, read through the final norm with its scale frozen at its value at the end of this run, and the unembedding. All
depths share one scale, so that the steps of the curve are the direct shares of `direct_attribution`: the logit lens
gives every depth a scale of its own, and its steps are no shares.

* `effect[layer]`: logit(answer) − logit(foil) of the stream at this depth, the final biases included, in logits, mean
  over prompts; `interval`: 95 %, over prompts. With `mid` also between attention and MLP of each block (`3.mid`; in
  parallel blocks, the stream that enters plus what the attention adds). Prompts alone have no foil: logit(answer), the
  answer being `answer` or what the model itself says next.
* With `each_position` [layer, position], toward the same answer and foil, with each position's own final scale.
* Closure: the last depth at the last position is the model's own logit difference (`total`); `residual` is what it
  misses of each prompt, and one beyond rounding is a refusal, as in `direct_attribution`.
* Control: the same streams read toward random pairs of vocabulary tokens, or random tokens without a foil (`null`).
* Assumption: later blocks do not undo what earlier ones have written, and the frozen scale belongs to the end: an early
  stream is shorter than the last one, and its logits are smaller than the lens's by that factor.
* Families that cap their logits: of the uncapped logits. Cost: one forward, and one more of prompts without `answer`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cutaway.core.method import method
from cutaway.core.refuse import Keyword, Refused
from cutaway.core.result import Result
from cutaway.core.stats import BOUNDS, mean_interval, one_prompt
from cutaway.interventions.components import positions
from cutaway.lenses.closure import check_closure, difference, drawn_pairs, uncapped
from cutaway.lenses.decode import question
from cutaway.lenses.places import names_of
from cutaway.models.access.reading import Measure, Reads, Seen
from cutaway.models.anatomy.residual import check_sum, logit_reader
from cutaway.models.anatomy.unembedding import unembedding
from cutaway.models.model import Model
from cutaway.models.tokens import Tokens
from cutaway.tasks.prompts import Prompts
from cutaway.tasks.task import Task


@dataclass(frozen=True, kw_only=True)
class AccumulatedResidual(Result, kind="accumulated_residual"):
    """The answer's logit over the foil's, or alone, in the residual stream along depth.

    Attributes:
        effect: the logit difference read at each depth, and at each position if asked.
        interval: of `effect`, 95 %, over prompts.
        null: `effect` toward random tokens.
        total: the model's own logit difference.
        residual: what the last depth misses of it.
    """

    effect: Float[Tensor, "*cell"]
    interval: Float[Tensor, "*cell bound"]
    null: Float[Tensor, "*cell sample"]
    total: Float[Tensor, "prompt"]
    residual: Float[Tensor, "prompt"]


@method(
    answers="How does the answer's logit build up along depth, and at each position?",
    paper="Elhage et al. 2021, transformer-circuits.pub/2021/framework",
    cost="prompts * 2 * F",
    control="random_tokens",
    rung="observational",
)
def accumulated_residual(
    model: Model,
    task: Task | Prompts,
    /,
    *,
    answer: str | None = None,
    mid: bool = False,
    each_position: bool = False,
    samples: int = 20,
    seed: int = 0,
) -> AccumulatedResidual:
    """Read logit(answer) − logit(foil) off the stream at every depth, with the scale of the end; of prompts alone,
    logit(answer).

    Args:
        answer: of prompts without a task, the answer whose logit is read [default: what the model itself says next].
        mid: read between attention and MLP of each block, too.
        each_position: read at each position that all prompts have, not at the last alone.
        samples: how many random tokens, or pairs of them, make the null.
        seed: of the random tokens.

    Raises:
        Refused: no exact sum exists for this model, `mid` in a model without attention, or a curve that misses the
            model's own logits.
    """
    check_sum(model)
    asked = question(model, task, answer)
    tokens, own = asked.prompts, asked.answers
    if own is None:
        own = model.run_last(tokens).argmax(-1)
    answers, foils = drawn_pairs(model, own, asked.foils, samples, seed)
    at = positions(tokens) if each_position else [-1]
    each, offset, total = read_along(model, tokens, answers, foils, mid=mid, at=at)
    # each: [prompt, pair, layer, position]
    missed = total.double() - each[:, 0, -1, -1]
    check_closure("accumulated residual", model, missed, total, each[:, 0, -1, -1].abs() + offset[0].abs())
    each = each.float() if each_position else each[..., 0].float()
    places = {"position": names_of(model, task, tokens)} if each_position else {}
    unit = "logits"
    return AccumulatedResidual(
        grid=("layer", "position") if each_position else ("layer",),
        effect=each[:, 0].mean(0).cpu(),
        interval=mean_interval(each[:, 0]),
        null=each[:, 1:].mean(0).movedim(0, -1).cpu(),
        total=total.float().cpu(),
        residual=missed.float().cpu(),
        labels={"layer": list(depths(model, mid)), "bound": BOUNDS, **places},
        units={"effect": unit, "interval": unit, "null": unit, "total": unit, "residual": unit},
        record={
            "final norm": "scale frozen at the end of this run, at each position; biases included at every depth",
            "closure": {"largest residual": float(missed.abs().max()), "mean total": float(total.mean())},
            "soft cap": "of the uncapped logits" if unembedding(model.anatomy).cap else "none",
            "logits of": "logit(answer)" if foils is None else "logit(answer) − logit(foil)",
            **asked.record,
        },
        reasons=one_prompt(len(tokens), "effect"),
    )


def depths(model: Model, mid: bool) -> dict[str, list[str]]:
    """Return the depths by name, each with the sites whose sum is the stream there: the embedding, then the middle and
    the end of each block.

    Raises:
        Refused: `mid` in a model without attention.
    """
    if mid and model.anatomy.family.ssm:
        why = "its blocks have no attention and no MLP"
        raise Refused(f"the middle of blocks of {model.name}", why, ("leave out ", Keyword("mid", True)))
    out = {"embed": ["resid_pre.0"]}
    for i in range(model.shape.n_layers):
        if mid:
            alone = model.anatomy.resid_mid_reader(i) is not None
            out[f"{i}.mid"] = [f"resid_mid.{i}"] if alone else [f"resid_pre.{i}", f"attn_out.{i}"]
        out[str(i)] = [f"resid_post.{i}"]
    return out


@torch.no_grad()
def read_along(
    model: Model,
    tokens: Tokens,
    answers: Int[Tensor, "pair prompt"],
    foils: Int[Tensor, "pair prompt"] | None,
    *,
    mid: bool,
    at: Sequence[int] = (-1,),
) -> tuple[Float[Tensor, "prompt pair layer position"], Float[Tensor, "pair prompt"], Float[Tensor, "prompt"]]:
    """Return logit differences of the stream along depth at some positions, with the scale of the end of each, in
    float64; the final biases' part in them; and the model's own logit difference at the end.

    Raises:
        Refused: `mid` in a model without attention.
    """
    final = model.anatomy.top("final")
    norm = model.anatomy.norm(final) if final is not None else None
    ones = torch.ones(len(tokens), device=answers.device)
    reader, offset = logit_reader(model, ones, answers, foils)  # [pair prompt d_model], [pair prompt]
    sites = depths(model, mid)
    last = f"resid_post.{model.shape.n_layers - 1}"

    def columns_of(seen: Seen, prompt: Tensor) -> Float[Tensor, "row number"]:
        acts, logits, found = seen.activations, seen.last_logits, list[Tensor]()
        assert acts is not None
        assert logits is not None
        for p in at:
            streams = [sum(acts[f"{n}@{p}"].double() for n in names) for names in sites.values()]
            x = torch.stack(streams, 1)  # type: ignore[arg-type]  # [row layer d_model]
            scale = norm.scale(x[:, -1].float()).double() if norm is not None else torch.ones_like(x[:, 0, 0])
            x = x / scale[:, None, None]
            found.append(torch.einsum("rld,prd->rpl", x, reader[:, prompt]) + offset[:, prompt].T[..., None])
        raw = uncapped(model, logits, acts[f"{last}@-1"])
        own = difference(raw, answers[0, prompt], None if foils is None else foils[0, prompt])
        return torch.cat([own.double()[:, None], torch.stack(found, -1).flatten(1)], dim=1)

    asked = model.places(list(dict.fromkeys(n for names in sites.values() for n in names)))
    whole = model.measure(tokens, Measure(columns_of, Reads(places=tuple(asked))))
    return whole[:, 1:].unflatten(1, (len(answers), len(sites), len(at))), offset, whole[:, 0]
