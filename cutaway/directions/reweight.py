"""Does re-weighting MLP neurons make a model comply, and does its monitor still raise the alarm?

After Luo et al. 2024 (arXiv:2410.10150), who re-weight MLP neurons while a model reads the tokens behind an
instruction. Here every neuron of every layer has one factor, the same for all prompts and at all positions that are
re-weighted: the tokens that all texts share at their end, or the last one. Factors begin at 1, and Adam trains them
between 0 and 2 on some prompts by −log p of the first tokens of the words that compliance begins with, plus `penalty`
times the mean distance of the factors from 1. The paper's form for single prompts is left out.

* `share[place, part, outcome]`: of the prompts with the concept, fitted on or of other groups (held out): `granted`,
  where the likeliest next token begins such a word; `hidden`, where the component that the monitor reads at the last
  token is below its threshold, which is calibrated without re-weighting; `both`. `interval`: Wilson's, over prompts.
* `log_prob[place, part]`: of those first tokens together, in nats, with its interval over prompts.
* `place`: the end, and as many tokens in front of it, trained in the same way: if the end is where harm is judged, the
  second does less.
* `kept[place]`: the share of held-out texts without the concept whose likeliest next token stays, with Wilson's
  interval. `changed[place]`: mean distance of the factors from 1.
* Control: the same factors, permuted among the neurons of each layer (`null`, `log_prob_null`,
  `kept_null`). `control`: no re-weighting.
* `factor[place, layer, neuron]`, and `loss[place, step]` without the penalty, mean over the prompts that are fitted on.
* Known failures: factors trained on refusal alone may say a word and nothing sensible after it: read a completion
  under `edits()`. What counts are the published idea and its control, not the authors' code, which was not at hand.
* Equivalences (tests): outcomes are those of one prompt at a time under `edits()`; factors of 1 change nothing.
* Cost: of both places, a forward and backward per step and prompt that is fitted on, and a forward per text and null.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from cutaway.core.method import method
from cutaway.core.record import count
from cutaway.core.refuse import Keyword, Refused
from cutaway.core.result import Result
from cutaway.core.stats import BOUNDS, generator, mean_interval, one_prompt, share_interval
from cutaway.directions.attacked import OUTCOMES, Attacked, shares
from cutaway.directions.behaviour import common_end
from cutaway.directions.direction import Direction
from cutaway.models.access.reading import Measure, Seen, observe
from cutaway.models.dry import some
from cutaway.models.edits.edit import Edit
from cutaway.models.edits.library import Scale
from cutaway.models.model import Model
from cutaway.models.sweep.executor import sweep
from cutaway.models.tokens import Tokens
from cutaway.tasks.labelled import Labelled

_RATE = 0.05  # of false alarms, on the calibration texts
_MOST = 2.0  # the largest factor
_UNITS = {"share": "share of prompts", "control": "share of prompts", "kept": "share of texts"}
_UNITS |= {"log_prob": "nats", "loss": "loss of the aim", "changed": "factor", "factor": "factor"}
_PLACES = ["the end", "in front of it"]


@dataclass(frozen=True, kw_only=True)
class Reweighting(Result, kind="reweighting"):
    """Outcomes of re-weighted MLP neurons at the end of prompts, and at as many positions in front of it.

    Attributes:
        share: of prompts with each outcome, under the factors.
        interval: 95 %, Wilson's.
        null: the same with the factors permuted among the neurons of each layer.
        control: `share` without re-weighting.
        control_interval: 95 %, Wilson's.
        log_prob: log-probability of the behaviour's first tokens together, in nats, mean over prompts.
        log_prob_interval: 95 %, over prompts.
        log_prob_null: the same with permuted factors.
        kept: share of texts without the concept whose likeliest next token stays.
        kept_interval: 95 %, Wilson's.
        kept_null: the same with permuted factors.
        changed: mean distance of the factors from 1.
        factor: the factor of each neuron.
        loss: of the aim before each step, mean over the prompts that are fitted on.
        threshold: the component above which the monitor raises an alarm.
        positions: number of positions that are re-weighted.
    """

    page = ("log_prob", "kept", "loss")
    share: Float[Tensor, "place part outcome"]
    interval: Float[Tensor, "place part outcome bound"]
    null: Float[Tensor, "place part outcome sample"]
    control: Float[Tensor, "part outcome"]
    control_interval: Float[Tensor, "part outcome bound"]
    log_prob: Float[Tensor, "place part"]
    log_prob_interval: Float[Tensor, "place part bound"]
    log_prob_null: Float[Tensor, "place part sample"]
    kept: Float[Tensor, "place"]
    kept_interval: Float[Tensor, "place bound"]
    kept_null: Float[Tensor, "place sample"]
    changed: Float[Tensor, "place"]
    factor: Float[Tensor, "place layer neuron"]
    loss: Float[Tensor, "place step"]
    threshold: float
    positions: int

    def edits(self, place: str = "the end") -> list[Edit]:
        """Return the re-weighting of a place as edits.

        Raises:
            Refused: no such place.
        """
        own = self.select(place=place)
        shift = _PLACES.index(place) * self.positions
        at = tuple(range(-shift - self.positions, -shift))
        return [Scale(f"mlp_post.{i}", f, at) for i, f in enumerate(own.factor[0])]


@method(
    answers="Does re-weighting MLP neurons make a model comply, and does its monitor still raise the alarm?",
    paper="Luo et al. 2024, arXiv:2410.10150",
    cost="texts * (4 + 2 * samples) * F + 2 * prompts * steps * (F + B)",
    control="permuted_factors",
    rung="interventional",
)
def reweight(
    model: Model,
    labelled: Labelled,
    direction: Direction,
    /,
    *,
    words: tuple[str, ...] = ("sure",),
    aim: Literal["grant", "hide", "both"] = "grant",
    prompts: int = 16,
    steps: int = 40,
    rate: float = 0.05,
    penalty: float = 1.0,
    samples: int = 4,
    seed: int = 0,
) -> Reweighting:
    """Train factors of MLP neurons on some prompts, and test them on prompts of other groups.

    Args:
        words: words that compliance begins with; their first tokens count.
        aim: grant trains compliance, hide a smaller component along the direction, both the two.
        prompts: number of prompts that are fitted on.
        steps: number of steps of Adam.
        rate: its learning rate.
        penalty: factor of the mean distance of the factors from 1.
        samples: number of permutations.
        seed: of the prompts, the permutations, and the halves where the direction does not say its groups.

    Raises:
        Refused: one class only, seen or unseen, no text of a group that the direction was not found on, a direction of
            another width, prompts with nothing in front of their end, a model without such MLPs, or no next token.
    """
    _check(rate, penalty)
    attacked = Attacked.of("directions.reweight", model, labelled, direction, words, prompts, _RATE, seed)
    rows = [*attacked.fit, *attacked.test, *attacked.bare]
    tokens, g = model.tokens(attacked.of_rows(rows)), generator(seed)
    n = len(common_end(tokens))
    spans = [tuple(range(-n, 0)), tuple(range(-2 * n, -n))]
    tokens.column(-2 * n)
    trial = _Trial(attacked, tokens, [len(attacked.fit), len(attacked.test), len(attacked.bare)])
    fits = [trial.fitted(aim, at, steps, rate, penalty) for at in spans]
    drawn = [[factor, *(_permuted(factor, g) for _ in range(samples))] for factor, _ in fits]
    variants = [trial.edits(f, at) for some, at in zip(drawn, spans, strict=True) for f in some]
    plain, *hits = trial.hits([[], *variants])
    found = torch.stack(hits).unflatten(0, (2, 1 + samples))  # [place factors text outcome]
    own, bounds = trial.shares(found[:, 0, :, :3])
    control, control_bounds = trial.shares(plain[None, :, :3])
    kept = (found[..., -trial.parts[2] :, 3] == plain[-trial.parts[2] :, 3]).float()
    return Reweighting(
        share=own,
        interval=bounds,
        null=trial.shares(found[:, 1:, :, :3].flatten(0, 1))[0].unflatten(0, (2, samples)).movedim(1, -1).contiguous(),
        control=control[0],
        control_interval=control_bounds[0],
        **_log_prob(found[..., 4].split(trial.parts, -1)[:2]),
        kept=kept[:, 0].mean(-1),
        kept_interval=share_interval(kept[:, 0].T),
        kept_null=kept[:, 1:].mean(-1),
        changed=torch.stack([(f - 1).abs().mean() for f, _ in fits]),
        factor=torch.stack([f for f, _ in fits]),
        loss=torch.stack([loss for _, loss in fits]),
        threshold=attacked.threshold,
        positions=n,
        labels={"place": _PLACES, "part": ["fitted on", "held out"], "outcome": OUTCOMES, "bound": BOUNDS},
        units=_UNITS,
        neutral={"kept": 1.0, "factor": 1.0},
        reasons=dict.fromkeys(("factor", "loss", "changed"), "of the training itself")
        | one_prompt(min(trial.parts[:2]), "log_prob"),
        record={"texts": dict(zip(("fitted on", "held out", "without"), trial.parts, strict=True))},
    )


def _check(rate: float, penalty: float) -> None:
    if rate <= 0 or penalty < 0:
        wrong = Keyword("rate", rate) if rate <= 0 else Keyword("penalty", penalty)
        raise Refused(wrong, "a rate is above 0, and a penalty not below", "use the default")


def _log_prob(parts: Sequence[Float[Tensor, "place factors prompt"]]) -> dict[str, Any]:
    """Return the mean log-probability of each part, with its interval and null; the real factors come first."""
    return {
        "log_prob": torch.stack([x[:, 0].mean(-1) for x in parts], 1),
        "log_prob_interval": torch.stack([mean_interval(x[:, 0].T, within=(-torch.inf, 0.0)) for x in parts], 1),
        "log_prob_null": torch.stack([x[:, 1:].mean(-1) for x in parts], 1),
    }


def _permuted(factor: Float[Tensor, "layer neuron"], g: torch.Generator) -> Float[Tensor, "layer neuron"]:
    return torch.stack([row[torch.randperm(len(row), generator=g)] for row in factor])


@dataclass(frozen=True)
class _Trial:
    """Texts that factors are fitted on and tried on.

    Attributes:
        attacked: the behaviour and the monitor.
        tokens: the prompts to fit on, the held-out ones, and those without the concept, in this order.
        parts: how many there are of each.
    """

    attacked: Attacked
    tokens: Tokens
    parts: list[int]

    def edits(self, factor: Float[Tensor, "layer neuron"], at: tuple[int, ...]) -> list[Edit]:
        """Return the edits that multiply neurons by factors at some positions."""
        return [Scale(f"mlp_post.{i}", f, at) for i, f in enumerate(factor)]

    @torch.enable_grad()
    def fitted(
        self, aim: str, at: tuple[int, ...], steps: int, rate: float, penalty: float
    ) -> tuple[Float[Tensor, "layer neuron"], Float[Tensor, "step"]]:
        """Train factors at some positions; return them, and the loss of the aim before each step."""
        model, n = self.attacked.model, self.parts[0]
        model.places([f"mlp_post.{i}" for i in range(model.shape.n_layers)])
        factor = torch.ones(model.shape.n_layers, model.shape.d_mlp, device=model.device, requires_grad=True)
        optimizer, measure = torch.optim.Adam([factor], lr=rate), self.attacked.loss(aim)
        tokens, prompt, curve = self.tokens.rows(range(n)), torch.arange(n, device=model.device), list[float]()
        for _ in some(range(steps), 1):
            with model.edited(*self.edits(factor, at)):
                loss = measure(observe(model.anatomy, tokens, measure.reads), prompt).mean()
            factor.grad = torch.autograd.grad(loss + penalty * (factor - 1).abs().mean(), factor)[0]
            count(backwards=n)
            optimizer.step()
            with torch.no_grad():
                factor.clamp_(0.0, _MOST)
            curve.append(float(loss.detach()))
        return factor.detach().cpu(), torch.tensor(curve + curve[-1:] * (steps - len(curve)))

    def hits(self, variants: list[list[Edit]]) -> Float[Tensor, "variant text column"]:
        """Return the outcomes of all texts under each variant, the likeliest next token, and the log-probability."""
        outcome = self.attacked.outcome

        def function(seen: Seen, prompt: Tensor) -> Float[Tensor, "row column"]:
            assert seen.last_logits is not None
            more = torch.stack([seen.last_logits.argmax(-1).float(), self.attacked.read(seen)[0]], -1)
            return torch.cat([outcome(seen, prompt), more], -1)

        return sweep(self.attacked.model, self.tokens, variants, Measure(function, outcome.reads)).float().cpu()

    def shares(self, hits: Float[Tensor, "cell text outcome"]) -> tuple[Tensor, Tensor]:
        """Return shares of the prompts fitted on and of the held-out ones, with their intervals."""
        value, bounds = zip(*map(shares, hits.split(self.parts, 1)[:2]), strict=True)
        return torch.stack(value, 1), torch.stack(bounds, 1)
