"""At which sites and positions does a variable stand, so that exchanging it there changes the answer?

An interchange intervention (Geiger et al. 2021, arXiv:2106.02997) runs the corrupt prompt of a pair (the base) with the
values that the clean prompt (the source) has at a site. If the site carries the variable in which the two differ, the
answer becomes the source's, which is the counterfactual label.

* `margin[way, address, span]`: logit of the label − that of the foil under the exchange, mean over held-out pairs.
  `iia`: interchange-intervention accuracy, the share of these pairs whose top prediction of all tokens is the label.
  `preferred`: the share where the label beats the foil, which chance alone may reach.
* Ways: `whole` exchanges the whole vector. `difference of means` exchanges the component along the line through the
  class means of other pairs, the classes being the answers' tokens; of more than two classes it is the line along which
  their means differ most. `subspace`: within a saved one, at every address that is as wide.
* `floor`, `ceiling`: the same three of the bases as they are, and of the sources. `interval`: 95 %, over held-out
  groups where three are held out, else over pairs.
* Control (`null`): of `whole`, a random step as long as that from base to source; else random subspaces of that rank.
* Known failures: a value that is exchanged whole carries all else in which the prompts differ, so pairs should differ
  in the variable alone. High accuracy says where a variable is sufficient, not that nothing else carries it.
* Equivalence (test): `whole` is `patching.activation` with the metric accuracy.
* Cost: of each pair, a few forwards, and one per way, address, span and null sample, from that layer and position on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from cutaway.core.address import Address, Pattern
from cutaway.core.method import method
from cutaway.core.record import note
from cutaway.core.result import Result
from cutaway.core.stats import BOUNDS, generator, one_prompt, rotation
from cutaway.directions.subspace import Subspace, open_subspace
from cutaway.interventions.interchange import (
    OUTCOMES,
    Exchange,
    HeldOut,
    bind_exchanges,
    class_means,
    exchanges,
    outcome_fields,
    outcomes,
    same,
    tried,
)
from cutaway.models.access.reading import Measure
from cutaway.models.dry import some
from cutaway.models.model import Model
from cutaway.tasks.task import Task

_WHOLE, _MEANS, _SUBSPACE = "whole", "difference of means", "subspace"
_NAMED = 8  # places without a difference that a note names


@dataclass(frozen=True, kw_only=True)
class InterchangeAccuracy(Result, kind="interchange_accuracy"):
    """Accuracy of interchange interventions by way, address and span of positions.

    Attributes:
        margin: logit of the counterfactual label − that of the foil; NaN of a line where both are the same.
        interval: 95 %.
        null: the same of random exchanges.
        iia: share of held-out pairs whose top prediction becomes the label.
        iia_interval: 95 %.
        iia_null: the same of random exchanges.
        preferred: share of held-out pairs in which the label beats the foil.
        preferred_interval: 95 %.
        preferred_null: the same of random exchanges.
        floor: the three of the bases without an exchange.
        ceiling: the three of the sources.
    """

    page = ("iia", "preferred")
    margin: Float[Tensor, "way address span"]
    interval: Float[Tensor, "way address span bound"]
    null: Float[Tensor, "way address span sample"]
    iia: Float[Tensor, "way address span"]
    iia_interval: Float[Tensor, "way address span bound"]
    iia_null: Float[Tensor, "way address span sample"]
    preferred: Float[Tensor, "way address span"]
    preferred_interval: Float[Tensor, "way address span bound"]
    preferred_null: Float[Tensor, "way address span sample"]
    floor: Float[Tensor, "outcome"]
    ceiling: Float[Tensor, "outcome"]


@method(
    answers="At which sites and positions does a variable stand, so that exchanging it there changes the answer?",
    paper="Geiger et al. 2021, arXiv:2106.02997",
    cost="prompts * (2 + 3 * span + address * span * way * (1 + samples)) * F",
    control="random_exchanges",
    rung="interventional",
)
def interchange(
    model: Model,
    task: Task,
    /,
    *,
    sites: tuple[Pattern, ...] = ("resid_post",),
    spans: tuple[str, ...] = ("changed", "last"),
    subspace: Path | None = None,
    samples: int = 4,
    seed: int = 0,
) -> InterchangeAccuracy:
    """Exchange values between the prompts of each pair, whole and along a line, at all addresses.

    Args:
        sites: addresses or sites whose values are vectors.
        spans: positions that are exchanged: last, changed, subject or all.
        subspace: file of a saved subspace or direction that is exchanged, too.
        samples: number of random exchanges.
        seed: of the random exchanges and of what is held out.

    Raises:
        Refused: answers of several tokens, unknown sites or spans, a site without vectors, or another kind of file.
    """
    bound = bind_exchanges(model, task)
    given = None if subspace is None else open_subspace(subspace)
    places, held = model.places(sites), HeldOut.of(bound, seed)
    ways = [_WHOLE, _MEANS, *([] if given is None else [_SUBSPACE])]
    cells = _Cells(outcomes(bound, model), given, samples, generator(seed))
    each, drawn = list[Tensor](), list[Tensor]()
    for span in spans:
        fit, test = (exchanges(model, bound, places, span, rows) for rows in (held.fit, held.test))
        _note_same(span, places, test)
        todo = [(way, *pair) for way in ways for pair in zip(fit, test, strict=True)]
        done = [cells.of(*one) for one in todo]
        for out, part in zip((each, drawn), zip(*done, strict=True), strict=True):
            out.append(torch.stack(part).unflatten(0, (len(ways), len(places))))
    found, null = (torch.stack(t, 2) for t in (each, drawn))  # way address span (pair or sample) outcome
    part = bound.rows(held.test)
    ends = [model.measure(t, outcomes(part, model)).float().mean(0).cpu() for t in (part.corrupt, part.clean)]
    labels = {"way": ways, "address": list(map(str, places)), "span": list(spans), "outcome": OUTCOMES}
    return InterchangeAccuracy(
        **outcome_fields(found.mean(-2), held.interval(found.movedim(-2, 0)), null),
        floor=ends[0],
        ceiling=ends[1],
        labels=labels | {"bound": BOUNDS},
        units=dict.fromkeys(("iia", "preferred", "floor", "ceiling"), "share of pairs") | {"margin": "logits"},
        reasons=one_prompt(len(held.test), "margin", "iia", "preferred")
        | dict.fromkeys(("floor", "ceiling"), "no values are exchanged"),
        record=held.record(),
    )


_Cell = tuple[Float[Tensor, "pair outcome"], Float[Tensor, "sample outcome"]]


@dataclass(frozen=True)
class _Cells:
    """Exchanges of every way at one place, and their controls."""

    measure: Measure
    subspace: Subspace | None
    samples: int
    g: torch.Generator

    def of(self, way: str, fit: Sequence[Exchange], test: Sequence[Exchange]) -> _Cell:
        """Return the outcomes of each held-out pair, and their means under each random exchange."""
        if way == _WHOLE:
            return self._tried(test, lambda e: e.step, self._step)
        width = test[0].step.shape[-1]
        basis = class_means(fit) if way == _MEANS else self.subspace.basis  # type: ignore[union-attr]
        if len(basis) != width or same(fit):
            n = sum(len(e.rows) for e in test)
            return torch.full((n, 3), torch.nan), torch.full((self.samples, 3), torch.nan)
        return self._tried(test, lambda e: e.within(basis), lambda: self._random(width, basis.shape[1]))

    def _tried(
        self,
        test: Sequence[Exchange],
        change: Callable[[Exchange], Tensor],
        drawn: Callable[[], Callable[[Exchange], Tensor]],
    ) -> _Cell:
        null = [tried(test, drawn(), self.measure).mean(0) for _ in some(range(self.samples), 1)]
        null += null[-1:] * (self.samples - len(null))  # those that a dry run leaves out
        return tried(test, change, self.measure), torch.stack(null)

    def _step(self) -> Callable[[Exchange], Tensor]:
        """Draw a random step for each position, as long as its own."""

        def change(e: Exchange) -> Tensor:
            drawn = normalize(torch.randn(e.step.shape, generator=self.g), dim=-1).to(e.step.device)
            return drawn * e.step.norm(dim=-1, keepdim=True)

        return change

    def _random(self, width: int, rank: int) -> Callable[[Exchange], Tensor]:
        """Draw a random subspace."""
        basis = rotation(width, self.g, columns=rank)
        return lambda e: e.within(basis)


def _note_same(span: str, places: Sequence[Address], test: Sequence[Sequence[Exchange]]) -> None:
    """Tell readers of places where base and source have the same values."""
    names = [str(a) for a, batches in zip(places, test, strict=True) if same(batches)]
    if names:
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        note(f"zero difference: base and source are the same at {', '.join(names[:_NAMED])}{more} ({span})")
