"""At which layer and component does the prediction turn from the expected token to the actual one?

A prediction is followed back (nostalgebraist 2020; Elhage et al. 2021): logit(expected) − logit(actual) along depth
says where it turns, direct shares say which components turn it, and each of these is then removed to see if the
prediction returns (Wang et al. 2023, arXiv:2211.00593).

* `difference[layer]`: logit(expected) − logit(actual) read off the stream at the last position, in logits, mean over
  prompts, after the attention (`3.mid`) and the MLP (`3`) of each block, all with the final norm's scale at the end of
  the run (see `accumulated_residual`); `difference_interval`: 95 %, over prompts. Control: random pairs of
  tokens (`difference_null`).
* `turn`: the first depth from which the actual token stays ahead; if it is ahead at every depth, the depth of the
  largest step toward it, which the record has in any case.
* `share[component]`: direct shares of the difference, in logits, of the `top` components with the largest shares toward
  the actual token, with `share_interval`.
* `effect[component]`: what the difference gains without the component at the last position, with `interval`.
  Control (`null`): the same with random components of its kind (heads for a head, MLPs for an MLP) that are not
  among the `top`, as far as there are others; the record says which they are. `returned[component]`: share of prompts
  that then prefer the expected token. What stands in is zero, the `mean` over tokens, or with `reference` its
  value at the end of another prompt.
* `suspect`: of these components, the one without which the difference gains most. `confirmed`: True if most prompts
  then prefer the expected token, and the effect is above every number of the control, that of the other components
  included (the suspect is the largest of several, and so is what it is held against).
* Assumption: what turns the prediction writes at the last position. A component that acts through later ones has no
  share of its own: then a suspect is not confirmed, and `patching.activation` looks further up.
* Known failures: several components may turn it together, so that none alone brings it back. Zeros lie outside what
  later layers have seen. Without names, the runner-up is expected: then why the top token won is asked, not an error.
* Cost: up to 5 forwards, and one a component and random component.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cutaway.core.address import Address
from cutaway.core.method import method
from cutaway.core.refuse import Keyword, Refused
from cutaway.core.result import Result
from cutaway.core.stats import BOUNDS, generator, mean_interval, one_prompt
from cutaway.interventions.ablation_values import ordinary, stand_in
from cutaway.lenses.accumulated_residual import depths, read_along
from cutaway.lenses.closure import difference, drawn_pairs
from cutaway.lenses.decode import question
from cutaway.models.anatomy.residual import check_sum, last_stream, logit_shares
from cutaway.models.edits.edit import Edit
from cutaway.models.edits.library import Replace
from cutaway.models.model import Model
from cutaway.models.sweep.executor import sweep
from cutaway.models.tokens import Tokens
from cutaway.tasks.prompts import Prompts, as_prompts

_OTHERS = "of its kind, none of the top"
StandIn = Literal["zero", "mean"]
_UNITS = {**dict.fromkeys(("effect", "interval", "null", "share", "difference"), "logits"), "returned": "of prompts"}


@dataclass(frozen=True, kw_only=True)
class Debug(Result, kind="debug"):
    """A prediction's turn along depth, the components that turn it, and what it is without them.

    Attributes:
        effect: what the difference gains without each of the components that write most toward the actual token.
        interval: of `effect`, 95 %, over prompts.
        null: what it gains without random components of the same kind.
        returned: share of prompts that prefer the expected token without the component.
        share: its direct share of the difference.
        difference: logit(expected) − logit(actual) at each depth.
        difference_null: the same of random pairs of tokens.
        turn: the depth at which the prediction turns.
        suspect: the component without which the difference gains most.
        confirmed: True if the prediction returns without it.
    """

    effect: Float[Tensor, "component"]
    interval: Float[Tensor, "component bound"]
    null: Float[Tensor, "component sample"]
    returned: Float[Tensor, "component"]
    share: Float[Tensor, "component"]
    share_interval: Float[Tensor, "component bound"]
    difference: Float[Tensor, "layer"]
    difference_interval: Float[Tensor, "layer bound"]
    difference_null: Float[Tensor, "layer sample"]
    turn: str
    suspect: str
    confirmed: bool


@method(
    answers="At which layer and component does the prediction turn from the expected token to the actual one?",
    paper="Wang et al. 2023, arXiv:2211.00593",
    cost="prompts * (5 + top * (1 + samples)) * F + F",
    control="random_components",
    rung="interventional",
)
def debug(
    model: Model,
    prompts: Prompts,
    /,
    *,
    expected: str | None = None,
    actual: str | None = None,
    how: StandIn = "zero",
    reference: str | None = None,
    top: int = 6,
    samples: int = 20,
    seed: int = 0,
) -> Debug:
    """Find the layer and component at which a prediction turns, and see if it returns without the component.

    Args:
        expected: the token that should have been predicted [default: the model's second choice].
        actual: the token that was [default: what the model says next].
        how: what stands in for a component at the last position: zero, or its mean over the prompts' tokens.
        reference: a prompt whose components at its last position stand in instead, such as one that is answered right.
        top: how many components are removed, one at a time.
        samples: how many random components, and pairs of tokens, make the nulls.
        seed: of these.

    Raises:
        Refused: the model already prefers the expected token, an expected or actual word of several tokens, or no exact
            sum exists for this model.
    """
    check_sum(model)
    if not top:
        raise Refused(Keyword("top", 0), "nothing would be removed, and nothing confirmed", "use 1 or more")
    tokens, good, bad = _asked(model, prompts, expected, actual)
    answers, foils = drawn_pairs(model, good, bad, samples, seed)
    along, _, total = read_along(model, tokens, answers, foils, mid=not model.anatomy.family.ssm)
    each = along[:, :, :, 0].float()  # [prompt pair layer]
    _check_behind(model, float(total.mean()))
    layers, turn = list(depths(model, not model.anatomy.family.ssm)), _turn(each[:, 0].mean(0).tolist())
    by_name = _shares(model, tokens, good, bad)
    worst = sorted(by_name, key=lambda a: float(by_name[a].mean()))[:top]
    suspects = [a for a in by_name if a in worst]  # in order of depth
    drawn, which = _drawn(suspects, list(by_name), samples, seed)
    edits = _edits(model, tokens, list(by_name), how, reference)
    effects, null, returned = _without(model, tokens, (good, bad), edits, drawn)
    best, mean = int(effects.mean(0).argmax()), each[:, 0].mean(0)
    share = torch.stack([by_name[a] for a in suspects], 1)
    return Debug(
        effect=effects.mean(0),
        interval=mean_interval(effects),
        null=null,
        returned=returned,
        share=share.mean(0).cpu(),
        share_interval=mean_interval(share),
        difference=mean.cpu(),
        difference_interval=mean_interval(each[:, 0]),
        difference_null=each[:, 1:].mean(0).T.cpu(),
        turn=layers[turn],
        suspect=_name(suspects[best]),
        confirmed=bool(returned[best] > 0.5) and bool((effects[:, best].mean() > null).all()),
        labels={"layer": layers, "component": [_name(a) for a in suspects], "bound": BOUNDS},
        units=_UNITS,
        record={
            "expected": model.text.token_texts(good),
            "actual": model.text.token_texts(bad),
            "stands in": "the value at the end of the reference" if reference is not None else how,
            "random components": which,
            "the actual token is ahead": "at every depth" if bool((mean < 0).all()) else "from the turn on",
            "largest step toward it": layers[_largest_fall(mean.tolist())],
        },
        reasons=one_prompt(len(tokens), "effect", "share", "difference"),
    )


def _asked(
    model: Model, prompts: Prompts, expected: str | None, actual: str | None
) -> tuple[Tokens, Int[Tensor, "prompt"], Int[Tensor, "prompt"]]:
    """Return the prompts as tokens, with the expected and the actual token of each."""
    asked, wrong = question(model, prompts, expected), question(model, prompts, actual)
    good, bad = asked.answers, wrong.answers
    if good is None or bad is None:
        logits = model.run_last(asked.prompts)
        bad = logits.argmax(-1) if bad is None else bad
        if good is None:
            good = logits.scatter(1, bad[:, None], -torch.inf).argmax(-1)
    if bool((good == bad).any()):
        what = f"the expected token {model.text.token_texts(good[good == bad][:1])[0]!r}"
        raise Refused(what, "it is the actual one, so nothing turns", "name another")
    return asked.prompts, good, bad


def _check_behind(model: Model, difference: float) -> None:
    """Refuse an expected token that is ahead at the end."""
    if difference >= 0:
        why = f"it is ahead by {difference:.2g} logits, and nothing turns"
        raise Refused(f"the expected token on {model.name}", why, "name an actual token that is ahead of it")


def _turn(difference: Sequence[float]) -> int:
    """Return the first depth from which the difference stays negative, or that of its largest fall if it always is."""
    ahead = [i for i, d in enumerate(difference) if d >= 0]
    return ahead[-1] + 1 if ahead else _largest_fall(difference)


def _largest_fall(difference: Sequence[float]) -> int:
    return min(range(1, len(difference)), key=lambda i: difference[i] - difference[i - 1])


def _shares(
    model: Model, tokens: Tokens, good: Int[Tensor, "prompt"], bad: Int[Tensor, "prompt"]
) -> dict[Address, Float[Tensor, "prompt"]]:
    """Return the direct share of every component that can be removed, in order of depth."""
    names, shares, _ = logit_shares(model, last_stream(model, tokens), good[None], bad[None])
    return {a: s for n, s in zip(names, shares[0].T, strict=True) if (a := _removable(n)) is not None}


def _removable(name: str) -> Address | None:
    """Return the place of a component that can be removed; None for embeddings and biases."""
    site, *numbers = name.rsplit(".", 2) if name.startswith("head_out") else name.rsplit(".", 1)
    if site not in ("head_out", "mlp_out", "ssm.out"):
        return None
    return Address("z" if site == "head_out" else site, int(numbers[0]), *map(int, numbers[1:]), position=-1)


def _name(a: Address) -> str:
    """Return the name of a component: a head by its layer and number, an MLP by its site."""
    return f"{a.layer}.{a.unit}" if a.unit is not None else f"{a.site}.{a.layer}"


def _drawn(
    suspects: Sequence[Address], pool: Sequence[Address], samples: int, seed: int
) -> tuple[dict[Address, list[Address]], str]:
    """Return random components for each suspect, and what they are: of its kind and none of the suspects, or where
    there are no such others, the next that there are.

    Raises:
        Refused: the model has one component.
    """
    g, out, says = generator(seed), dict[Address, list[Address]](), dict[str, None]()
    for a in suspects:
        kind = [b for b in pool if b.site == a.site and b != a]
        ways = {
            _OTHERS: [b for b in kind if b not in suspects],
            "of its kind, among the top too": kind,
            "of any kind": [b for b in pool if b != a],
        }
        way = next((w for w, there in ways.items() if there), None)
        if way is None:
            raise Refused(f"random components beside {_name(a)}", "the model has no other", "use patching.ablate")
        says[way] = None
        out[a] = [ways[way][i] for i in torch.randint(len(ways[way]), (samples,), generator=g).tolist()]
    return out, "; ".join(says)


def _without(
    model: Model,
    tokens: Tokens,
    pair: tuple[Int[Tensor, "prompt"], Int[Tensor, "prompt"]],
    edits: dict[Address, Edit],
    drawn: dict[Address, list[Address]],
) -> tuple[Float[Tensor, "prompt component"], Float[Tensor, "component sample"], Float[Tensor, "component"]]:
    """Return what the difference gains without each suspect, the same without random others (mean over prompts), and
    the share of prompts that then prefer the expected token.
    """
    others = list(dict.fromkeys(b for row in drawn.values() for b in row if b not in drawn))

    def metric(logits: Float[Tensor, "row token"], prompt: Int[Tensor, "row"]) -> Float[Tensor, "row"]:
        return difference(logits.float(), pair[0][prompt], pair[1][prompt])

    # In sweeps of their own: what is drawn must not change a bit of what is measured.
    found = sweep(model, tokens, [[], *([edits[a]] for a in drawn)], metric).float().cpu()  # [variant prompt]
    gains = {a: row - found[0] for a, row in zip(drawn, found[1:], strict=True)}
    if others:
        chance = sweep(model, tokens, [[edits[a]] for a in others], metric).float().cpu()
        gains |= {a: row - found[0] for a, row in zip(others, chance, strict=True)}
    null = torch.stack([torch.stack([gains[b].mean() for b in row]) for row in drawn.values()])
    returned = torch.stack([(row > 0).float().mean() for row in found[1:]])
    return torch.stack([gains[a] for a in drawn], 1), null, returned


def _edits(
    model: Model, tokens: Tokens, places: Sequence[Address], how: StandIn, reference: str | None
) -> dict[Address, Edit]:
    """Return, for each component, the edit that removes it at the last position."""
    whole = list(dict.fromkeys(a.place for a in places))
    if reference is not None:
        acts = model.capture(as_prompts(reference).bind(model), whole, logits=False)
        return {a: Replace(a, acts[a][0]) for a in places}
    acts, where = model.capture(tokens, whole, logits=False), ordinary(model, tokens) if how == "mean" else tokens.mask
    own = {a: acts[a.place].select(2, a.unit) if a.unit is not None else acts[a.place] for a in places}
    return {a: Replace(a, stand_in(x, where, how)) for a, x in own.items()}
