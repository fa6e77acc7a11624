"""What does the model say instead, if something inside it is changed?

Interventions (Vig et al. 2020, arXiv:2004.12265; activation addition: Turner et al. 2023, arXiv:2308.10248) written as
texts, several at once, on the clean prompts of a task; the next-token distribution before and
after, and what the same changes do elsewhere. A change is `KIND ADDRESS [NUMBER [FILE]]`:

    zero z.4.0         mean z.4.0          resample mlp_out.2@-1      scale z.3.* 0.5
    patch resid_post.3@5                   steer resid_post.3 4 sentiment.safetensors

* An address without position means all positions; a pattern (`z.4.*`) means each of its addresses.
* `mean`, `resample`: the mean over the tokens of the prompts, or the value at another of them, drawn at random; each
  prompt's first token and special tokens are neither drawn from nor replaced. `patch`: the value at the same position
  of the corrupt prompt. These leave generated tokens alone. `scale` multiplies, `steer` adds a number of times a saved
  direction (what `Direction.save` or `directions.find` wrote).
* `change[token]` = probability after − before, `logit_change[token]` likewise, mean over prompts, of the `top` tokens
  of either run (and of answer and foil that all prompts share); `effect` = change of the task's metric; `divergence` =
  KL(before ‖ after) in nats. `interval`s: 95 %, over prompts.
* Control (`null`s): the same changes at random other places of the same site and layer (another head, neuron or expert
  where one is left); elsewhere, a step as long in a random direction at the same place.
* Known failures: zeros, and long steps, lie outside what later layers have seen. A component whose removal does nothing
  may have a stand-in. Random heads of a layer may include ones that matter as well.
* Equivalences (tests): `model.run_last` under the same edits; one `patch` is activation patching, with its effect.
* Cost: 6 + samples forwards a prompt, and two continuations of `words` tokens of the first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cutaway.core.address import Address, component_axis
from cutaway.core.method import method
from cutaway.core.refuse import Keyword, Refused
from cutaway.core.result import Result, open_result
from cutaway.core.stats import BOUNDS, generator, mean_interval, one_prompt
from cutaway.interventions.ablation_values import RandomStep, ordinary, stand_in
from cutaway.models.access.capture import Activations
from cutaway.models.access.reading import Measure, Reads, Seen
from cutaway.models.edits.batch_slice import BatchSlice
from cutaway.models.edits.edit import Edit
from cutaway.models.edits.library import Ablate, Add, Freeze, Scale
from cutaway.models.model import Model
from cutaway.models.sweep.executor import sweep
from cutaway.tasks.bound import Bound
from cutaway.tasks.task import Task

SIDES = ["before", "after"]
_FORMS = {
    "zero": "zero ADDRESS",
    "mean": "mean ADDRESS",
    "resample": "resample ADDRESS",
    "patch": "patch ADDRESS",
    "scale": "scale ADDRESS FACTOR",
    "steer": "steer ADDRESS STRENGTH FILE",
}
_WORDS = {"scale": 3, "steer": 4}  # all others have two


@dataclass(frozen=True, kw_only=True)
class Intervention(Result, kind="intervention"):
    """Next tokens of a model before and after changes inside it, beside the same changes elsewhere.

    Attributes:
        effect: the change of the task's metric.
        change: the change of each token's probability.
        logit_change: the change of each token's logit.
        probability: of each token before and after.
        logit: of each token before and after.
        divergence: KL(before ‖ after), in nats.
        text: the greedy continuation of the first prompt before; "" if none was asked for.
        edited_text: the same after.
    """

    effect: Float[Tensor, ""]
    interval: Float[Tensor, "bound"]
    null: Float[Tensor, "sample"]
    change: Float[Tensor, "token"]
    change_interval: Float[Tensor, "token bound"]
    change_null: Float[Tensor, "token sample"]
    logit_change: Float[Tensor, "token"]
    logit_change_interval: Float[Tensor, "token bound"]
    logit_change_null: Float[Tensor, "token sample"]
    probability: Float[Tensor, "side token"]
    logit: Float[Tensor, "side token"]
    divergence: Float[Tensor, ""]
    divergence_interval: Float[Tensor, "bound"]
    divergence_null: Float[Tensor, "sample"]
    text: str = ""
    edited_text: str = ""


@method(
    answers="What does the model say instead, if something inside it is changed?",
    paper="Vig et al. 2020, arXiv:2004.12265; Turner et al. 2023, arXiv:2308.10248",
    cost="prompts * (6 + samples) * F + 2 * words * F",
    control="random_places",
    rung="interventional",
)
def intervene(
    model: Model,
    task: Task,
    /,
    *,
    edits: tuple[str, ...] = (),
    top: int = 10,
    words: int = 0,
    samples: int = 20,
    seed: int = 0,
) -> Intervention:
    """Change something inside a model, and compare the next token.

    Args:
        edits: the changes, such as zero z.4.0,patch resid_post.3@5,scale z.3.* 0.5.
        top: how many of the most likely tokens, before or after, are reported.
        words: how many tokens the first prompt is continued with, before and after.
        samples: how many random other places, or directions, make the null.
        seed: of the null and of resampled values.

    Raises:
        Refused: no change, one that cannot be read or made, or a metric of whole answers.
    """
    bound = task.bind(model)
    if bound.readout.whole_answer:
        why = "it reads whole answers behind the prompts, and this compares what comes next"
        raise Refused(f"metric {bound.readout.name!r} of an intervention", why, "use logit_diff")
    made = _Changes(model, bound, [c for text in edits for c in parsed(model, text)], seed)
    if not made.changes:
        raise Refused(
            Keyword("edits", ""), "nothing is changed", ("write for example ", Keyword("edits", "zero z.0.0"))
        )
    both = sweep(model, bound.clean, [[], made.edits()], lambda logits, prompt: logits).float()
    ids = _reported(both, bound, top)
    chance = generator(seed)
    variants = [[], made.edits(), *(made.elsewhere(chance) for _ in range(samples))]
    plain, *values = sweep(model, bound.clean, variants, _reading(bound, both[0].log_softmax(-1), ids)).float().cpu()
    return _result(model, made, ids.cpu(), plain, torch.stack(values), made.said(words))


def parsed(model: Model, text: str) -> list[Change]:
    """Return the changes that a text means, one for each address.

    Raises:
        Refused: another form, an address that the model does not have, or a file that holds no direction for it.
    """
    kind, *rest = text.split(maxsplit=3) or [""]
    if len(rest) + 1 != _WORDS.get(kind, 2) or kind not in _FORMS:
        forms = [_FORMS[kind]] if kind in _FORMS else list(_FORMS.values())
        raise Refused(f"change {text!r}", "it cannot be read", f"write {' or '.join(forms)}")
    try:
        number = float(rest[1]) if len(rest) > 1 else 0.0
    except ValueError:
        raise Refused(f"change {text!r}", f"{rest[1]!r} is no number", f"write {_FORMS[kind]}") from None
    return [Change(kind, a, number, _vector(rest[2], a) if kind == "steer" else None) for a in model.places(rest[0])]


@dataclass(frozen=True)
class Change:
    """A change at one address.

    Attributes:
        kind: zero, mean, resample, patch, scale or steer.
        address: the place.
        number: the factor or the strength.
        vector: the direction that is added.
    """

    kind: str
    address: Address
    number: float = 0.0
    vector: Float[Tensor, "width"] | None = None


@dataclass(frozen=True)
class _Changes:
    """Changes on the prompts of a task, with the activations that they need."""

    model: Model
    bound: Bound
    changes: Sequence[Change]
    seed: int

    def edits(self) -> list[Edit]:
        """Return the edits that make the changes."""
        return [self._edit(c) for c in self.changes]

    def elsewhere(self, chance: torch.Generator) -> list[Edit]:
        """Return the same changes at random other places, or as long steps in random directions."""
        taken = {c.address for c in self.changes}
        return [self._moved(c, taken, chance) for c in self.changes]

    def said(self, words: int) -> tuple[str, str]:
        """Return the continuations of the first prompt without and with the changes."""
        if not words:
            return "", ""
        first = BatchSlice.of(self.bound.clean, (0,), True)
        prompt = first.tokens(self.bound.clean)
        edits = [e.select_prompts(first) for e in self.edits()]
        return self.model.generate(prompt, words)[0], self.model.generate(prompt, words, edits)[0]

    @cached_property
    def _own(self) -> Activations:
        """The activations of the clean prompts, at the places that are changed."""
        return self.model.capture(self.bound.clean, [c.address.place for c in self.changes], logits=False)

    @cached_property
    def _other(self) -> Activations:
        """The activations of the corrupt prompts, at the places that are patched."""
        places = [c.address.place for c in self.changes if c.kind == "patch"]
        return self.model.capture(self.bound.corrupt, places, logits=False)

    def _edit(self, c: Change) -> Edit:
        match c.kind:
            case "zero":
                return Ablate(c.address)
            case "scale":
                return Scale(c.address, c.number)
            case "steer":
                assert c.vector is not None
                return Add(c.address, c.vector.to(self.model.device), c.number)
        return Freeze(c.address, self._source(c))

    def _source(self, c: Change) -> Activations:
        """Return the values that stand at a place instead."""
        place = c.address.place
        if c.kind == "patch":
            return Activations({place: self._other[str(place)]}, self.bound.clean)
        where, x = ordinary(self.model, self.bound.clean), self._own[str(place)].clone()
        tokens = x[where.to(x.device)]
        order = torch.randperm(len(tokens), generator=generator(self.seed)).to(x.device)
        x[where.to(x.device)] = stand_in(x, where, "mean") if c.kind == "mean" else tokens[order]
        return Activations({place: x}, self.bound.clean)

    def _moved(self, c: Change, taken: set[Address], chance: torch.Generator) -> Edit:
        axis, a = component_axis(c.address.row), c.address
        if c.vector is not None:
            step = torch.randn(c.vector.shape, generator=chance)
            return self._edit(replace(c, vector=step * c.vector.norm().cpu() / step.norm()))
        others = range(self.model.sizes()[axis]) if axis is not None and a.unit is not None else ()
        free = [b for n in others if (b := replace(a, unit=n)) not in taken]
        if free:
            return self._edit(replace(c, address=free[int(torch.randint(len(free), (1,), generator=chance))]))
        own = self._own[str(a)]
        stands = {"zero": 0.0 * own, "scale": c.number * own}
        new = stands[c.kind] if c.kind in stands else self._source(c)[str(a)]
        return RandomStep(a, own, new, int(torch.randint(1 << 31, (1,), generator=chance)))


def _vector(file: str, address: Address) -> Float[Tensor, "width"]:
    """Return the direction of a file at an address: the one found there, or its only one.

    Raises:
        Refused: no such file, or no direction for this address.
    """
    found = open_result(Path(file).expanduser())
    found = found.direction() if hasattr(found, "direction") else found  # type: ignore[attr-defined]
    vectors, names = getattr(found, "vector", None), list(map(str, found.labels.get("address", [])))
    if not isinstance(vectors, Tensor) or vectors.ndim != 2 or len(names) != len(vectors):
        raise Refused(
            f"file {file!r}", f"it holds a {found.kind}", "give a saved direction, or what directions.find saved"
        )
    if len(names) > 1 and str(address.place) not in names:
        raise Refused(f"direction {file!r} at {address}", "none was found there", f"use {', '.join(names)}")
    return vectors[names.index(str(address.place)) if len(names) > 1 else 0]


def _reported(both: Float[Tensor, "side prompt token"], bound: Bound, top: int) -> Int[Tensor, "some"]:
    """Return the tokens that are reported, the most likely before first."""
    likely = both.softmax(-1).mean(1)
    most = likely.topk(min(max(top, 1), likely.shape[-1])).indices.flatten()
    asked = [t for ids in (bound.answers, bound.foils) if len(t := ids.unique()) == 1]
    ids = torch.cat([most, *(t.to(most.device) for t in asked)])
    ids = ids[ids >= 0].unique()
    return ids[likely[0, ids].argsort(descending=True, stable=True)]


def _reading(bound: Bound, before: Float[Tensor, "prompt token"], ids: Int[Tensor, "some"]) -> Measure:
    """Return the metric, the divergence from a distribution, and probability and logit of some tokens, as columns."""
    metric = replace(bound.measure, columns=None)

    def read(seen: Seen, prompt: Tensor) -> Tensor:
        assert seen.last_logits is not None
        logits = seen.last_logits.float()
        now, then = logits.log_softmax(-1), before[prompt.to(before.device)].to(logits.device)
        apart = (then.exp() * (then - now)).sum(-1)
        first = torch.stack([metric(seen, prompt).float().to(logits.device), apart], -1)
        return torch.cat([first, now[:, ids].exp(), logits[:, ids]], -1)

    return Measure(read, Reads() | metric.reads)


def _result(
    model: Model,
    made: _Changes,
    ids: Int[Tensor, "some"],
    plain: Float[Tensor, "prompt column"],
    values: Float[Tensor, "run prompt column"],
    said: tuple[str, str],
) -> Intervention:
    """Return the result from what was read without, with the changes, and with those elsewhere."""
    bound, n = made.bound, len(ids)
    change = values - plain
    null = change[1:].mean(1).T
    interval = mean_interval(change[0])
    mean = change[0].mean(0)
    sides = torch.stack([plain.mean(0), values[0].mean(0)])
    chance, logits = slice(2, 2 + n), slice(2 + n, None)
    units = {"change": "probability", "logit_change": "logits", "divergence": "nats"}
    return Intervention(
        effect=mean[0],
        interval=interval[0],
        null=null[0].contiguous(),
        change=mean[chance],
        change_interval=interval[chance],
        change_null=null[chance].contiguous(),
        logit_change=mean[logits],
        logit_change_interval=interval[logits],
        logit_change_null=null[logits].contiguous(),
        probability=sides[:, chance].contiguous(),
        logit=sides[:, logits].contiguous(),
        divergence=mean[1],
        divergence_interval=interval[1],
        divergence_null=null[1].contiguous(),
        text=said[0],
        edited_text=said[1],
        labels={"side": SIDES, "token": model.text.token_texts(ids.tolist()), "bound": BOUNDS},
        units=dict.fromkeys(("effect", "interval", "null"), bound.unit)
        | {f"{f}{end}": u for f, u in units.items() for end in ("", "_interval", "_null")}
        | {"probability": "probability", "logit": "logits"},
        reasons=one_prompt(len(bound), "effect", "change", "logit_change", "divergence")
        | dict.fromkeys(("probability", "logit"), "its change has interval and null"),
        record={"changes": [f"{c.kind} {c.address}" for c in made.changes], "tokens": ids.tolist()},
    )
