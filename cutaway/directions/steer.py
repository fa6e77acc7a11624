"""How does the output change with the strength of a direction, and at what cost?

Steering adds strength · vector at the addresses of a direction, at all positions (Rimsky et al. 2023,
arXiv:2312.06681). A mean effect can hide prompts that move the wrong way, so slopes are reported per prompt (Tan et al.
2024, arXiv:2407.12404), beside random directions of the same length, what neutral text loses, and an instruction in the
prompt, which often does better (Wu et al. 2025, arXiv:2501.17148).

* `effect[strength]` = metric(steered) − metric(plain), mean over the task's prompts, in the metric's unit; `interval`:
  95 %, over prompts. Strength 0 is the plain run. Positive strengths move towards the direction's positive class.
* `slope[prompt]`: least squares of a prompt's changes on the strengths, through 0, per unit of strength. `mean_slope`,
  and `anti_steerable`: the share of prompts whose slope is negative (Wilson's interval).
* `perplexity[strength]`: of the neutral texts (`prompts`), as a multiple of the plain one: exp of the mean change of
  the loss per token. `loss[text, strength]`: that change of each text, in nats.
* `prompted`: the change of the metric where `instruction` stands in front of each prompt instead, unsteered. Write its
  own last space. It is put before whatever a chat template made.
* `form`: monotone, or the strengths at which the mean effect turns; and the ends where it is flat, where a step brings
  less than a quarter of the steepest one.
* Control (`null`, `mean_slope_null`, `perplexity_null` …): random directions of the same length at each address.
* Known failures: the metric is of the first token; a text may fall apart behind it, and perplexity of neutral text does
  not measure that. The length of a direction says nothing of its natural scale: compare strengths of several directions
  by their perplexity. Slopes over strengths that saturate are too small.
* Equivalences (tests): strength 0 gives the same bits; steering equals a bias that a hook adds at the same place.
* Cost: of each prompt and each text, a plain forward and one per strength and direction, from the first address on; of
  each prompt, one more for the instruction.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from cutaway.core.method import method
from cutaway.core.refuse import Keyword, Refused
from cutaway.core.result import Result
from cutaway.core.stats import BOUNDS, mean_interval, one_prompt, ratio_interval, share_interval
from cutaway.directions.steering import Steering
from cutaway.interventions.span_losses import continued, span_losses
from cutaway.models.edits.edit import Edit
from cutaway.models.model import Model
from cutaway.models.sweep.executor import sweep
from cutaway.models.tokens import Tokens
from cutaway.tasks.answers import check_predicts
from cutaway.tasks.prompts import Prompts
from cutaway.tasks.task import Task

_FLAT = 0.25  # of the steepest step: a step that brings less is flat


@dataclass(frozen=True, kw_only=True)
class DoseResponse(Result, kind="dose_response"):
    """Effects of a direction by strength, per prompt and in the mean, and what they cost.

    Attributes:
        effect: the mean change of the metric.
        interval: 95 %, over prompts.
        null: the same with random directions of the same length.
        perplexity: of neutral text, as a multiple of the plain one.
        perplexity_interval: 95 %, over texts.
        perplexity_null: the same with the random directions.
        slope: change of the metric per unit of strength, of each prompt.
        mean_slope: its mean.
        mean_slope_interval: 95 %, over prompts.
        mean_slope_null: the same with the random directions.
        anti_steerable: share of prompts with a negative slope.
        anti_steerable_interval: 95 %, Wilson's.
        anti_steerable_null: the same with the random directions.
        prompted: the mean change of the metric by the instruction; NaN without one.
        prompted_interval: 95 %, over prompts.
        loss: change of the mean loss per token of each text, in nats.
        clean: the metric of each prompt without steering.
        form: the shape of the mean effect over strengths, in words.
    """

    effect: Float[Tensor, "strength"]
    interval: Float[Tensor, "strength bound"]
    null: Float[Tensor, "strength sample"]
    perplexity: Float[Tensor, "strength"]
    perplexity_interval: Float[Tensor, "strength bound"]
    perplexity_null: Float[Tensor, "strength sample"]
    slope: Float[Tensor, "prompt"]
    mean_slope: Float[Tensor, ""]
    mean_slope_interval: Float[Tensor, "bound"]
    mean_slope_null: Float[Tensor, "sample"]
    anti_steerable: Float[Tensor, ""]
    anti_steerable_interval: Float[Tensor, "bound"]
    anti_steerable_null: Float[Tensor, "sample"]
    prompted: Float[Tensor, ""]
    prompted_interval: Float[Tensor, "bound"]
    loss: Float[Tensor, "text strength"]
    clean: Float[Tensor, "prompt"]
    form: str


@method(
    answers="How does the output change with the strength of a direction, and at what cost?",
    paper="Tan et al. 2024, arXiv:2407.12404; Rimsky et al. 2023, arXiv:2312.06681",
    cost="(prompt + text) * (2 + strength * (1 + samples)) * F",
    control="random_directions",
    rung="interventional",
)
def steer(
    model: Model,
    task: Task,
    direction: Steering,
    prompts: Prompts,
    /,
    *,
    strengths: tuple[float, ...] = (-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0),
    last: bool = False,
    instruction: str = "",
    samples: int = 8,
    seed: int = 0,
) -> DoseResponse:
    """Steer a task's prompts and neutral texts (`prompts`) with a direction at several strengths.

    Args:
        strengths: factors of the direction's vectors.
        last: steer the last position alone, not all.
        instruction: text in front of each prompt, as the other way to the same end.
        samples: number of random directions.
        seed: of the random directions.

    Raises:
        Refused: a direction of another width, strengths that do not ascend or are one alone, a text of one token, or
            a model that predicts no next token.
    """
    check_predicts(model)
    direction.check(model)
    if list(strengths) != sorted(set(strengths)) or len(strengths) < 2:
        raise Refused(
            Keyword("strengths", ",".join(map(str, strengths))), "they do not ascend", "use for example -1,0,1"
        )
    every = [direction, *direction.random(samples, seed)]
    variants = [_steered(d, s, last) for d in every for s in strengths]
    bound = task.bind(model)
    plain, *values = sweep(model, bound.clean, [[], *variants], bound.measure).float().cpu()
    change = torch.stack(values).unflatten(0, (len(every), -1)) - plain
    lost, tokens = _losses(model, prompts.bind(model), variants)
    lost = lost.unflatten(0, (len(every), -1))
    dose = torch.tensor(strengths)
    slope = (change * dose[:, None]).sum(1) / dose.square().sum()
    prompted = _prompted(model, task, instruction) - plain
    wrong = (slope < 0).float()
    rise = lost.sum(-1) / tokens.sum()
    return DoseResponse(
        effect=change[0].mean(-1),
        interval=mean_interval(change[0].T),
        null=change[1:].mean(-1).T.contiguous(),
        perplexity=rise[0].exp(),
        perplexity_interval=ratio_interval(lost[0].T, tokens[:, None].expand_as(lost[0].T)).exp(),
        perplexity_null=rise[1:].exp().T.contiguous(),
        slope=slope[0],
        mean_slope=slope[0].mean(),
        mean_slope_interval=mean_interval(slope[0]),
        mean_slope_null=slope[1:].mean(-1),
        anti_steerable=wrong[0].mean(),
        anti_steerable_interval=share_interval(wrong[0]),
        anti_steerable_null=wrong[1:].mean(-1),
        prompted=prompted.mean(),
        prompted_interval=mean_interval(prompted),
        loss=(lost[0] / tokens).T.contiguous(),
        clean=plain,
        form=_form(strengths, change[0].mean(-1)),
        labels={"strength": list(map(str, strengths)), "bound": BOUNDS},
        units=dict.fromkeys(("effect", "clean", "prompted"), bound.unit)
        | dict.fromkeys(("slope", "mean_slope"), f"{bound.unit} per unit of strength")
        | {"perplexity": "ratio", "anti_steerable": "share of prompts", "loss": "nats per token"},
        record={"positions": "the last" if last else "all", "amounts": direction.amounts()},
        reasons=_reasons(len(plain), len(tokens), instruction),
    )


def _reasons(prompts: int, texts: int, instruction: str) -> dict[str, str]:
    """Say why fields have no interval or no value."""
    none = {} if instruction else {"prompted": "no instruction was given"}
    return (
        one_prompt(prompts, "effect", "mean_slope", "anti_steerable", "prompted")
        | one_prompt(texts, "perplexity")
        | none
    )


def _steered(direction: Steering, strength: float, last: bool) -> list[Edit]:
    """Return the edits of a strength; those of 0 are none, so that its run is the plain one."""
    return list(direction.add(strength, (-1,) if last else None)) if strength else []


def _losses(
    model: Model, tokens: Tokens, variants: Sequence[Sequence[Edit]]
) -> tuple[Float[Tensor, "variant text"], Float[Tensor, "text"]]:
    """Return the change of each text's loss under edits, in nats, and the number of its tokens but the first."""
    if int(tokens.lengths.min()) < 2:
        raise Refused("neutral texts", "one has a single token, and no loss", "give texts of two tokens or more")
    sums = span_losses(model, tokens, continued, [[], *variants])[:, :, 0]
    return sums[1:, :, 0] - sums[0, :, 0], sums[0, :, 2]


def _prompted(model: Model, task: Task, instruction: str) -> Float[Tensor, "prompt"]:
    """Return the metric with an instruction in front of each prompt; NaN if there is none."""
    if not instruction:
        return torch.full((len(task),), torch.nan)
    pairs = [replace(p, clean=instruction + p.clean, corrupt=instruction + p.corrupt) for p in task]
    bound = replace(task, pairs=tuple(pairs), made=None).bind(model)
    return model.measure(bound.clean, bound.measure).float().cpu()


def _form(strengths: Sequence[float], effect: Float[Tensor, "strength"]) -> str:
    """Say if the effect is monotone, where it turns, and at which ends it is flat."""
    steps = effect.diff() / torch.tensor(strengths).diff()
    up = (steps > 0).tolist()
    turns = [f"{s:g}" for s, (a, b) in zip(strengths[1:], pairwise(up), strict=False) if a != b]
    flat = (steps.abs() < _FLAT * steps.abs().max()).tolist()
    ends = [f"below {strengths[1]:g}"] * flat[0] + [f"above {strengths[-2]:g}"] * flat[-1]
    words = f"turns at {', '.join(turns)}" if turns else "rises throughout" if up[0] else "falls throughout"
    return words + (f"; flat {' and '.join(ends)}" if ends else "")
