"""Which subspace of a site carries a variable, so that exchanging it alone gives the counterfactual answer?

Distributed alignment search (Geiger et al. 2023, arXiv:2303.02536) trains an orthonormal R [width, rank] with the cross
entropy of counterfactual labels, by Adam, where the run of the corrupt prompt (the base) gets h + (h_source − h) R Rᵀ
and the source is the clean prompt. It is fitted on some groups of pairs and tested on the others. With `boundless` the
rank is learned too (Wu et al. 2023, arXiv:2305.08809): a boundary b, with the penalty b, of a whole rotation.

* `margin`: logit of the label − that of the foil under the exchange, mean over held-out pairs. `iia`:
  interchange-intervention accuracy, the share of these pairs whose top prediction of all tokens is the label.
  `preferred`: the share where the label beats the foil. `interval`: 95 %, over held-out groups where three are held
  out, else over pairs.
* Control (`null`): random subspaces of the same rank. `control`: no exchange, the whole vector, the line through the
  class means, a subspace trained in the same way on shuffled labels, and the same training on a copy of the model with
  its weights shuffled (`untrained`), with its own runs without an exchange and with the whole vector beside it.
* `loss[fit, step]`: cross entropy in nats of the three trainings, the true labels first. `slope`: of its last fifth.
  A training whose loss still falls there by 5 % of its whole fall is noted as not converged.
* `subspace()` is the subspace as a saved object with edits; of rank 1 it is a direction.
* Assumption: the two prompts of a pair differ in the variable alone, and the site has the whole of it: look at the
  whole vector's accuracy first (`directions.interchange`).
* Known failures: training finds subspaces that steer an answer without being what the model uses (Makelov et al. 2023,
  arXiv:2311.17030), also in untrained models, whose `preferred` counts then; more dimensions find them more easily. A
  line cannot carry a variable of many values.
* Equivalence (tests): of full rank it is the exchange of the whole vector. In a model whose variable stands along a
  known direction it finds that direction.
* Cost: of each pair, a few forwards, one per control and null sample, and one forward and backward per step of three
  trainings, from the site's layer and position on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from cutaway.core.address import Address
from cutaway.core.method import method
from cutaway.core.record import note
from cutaway.core.refuse import Keyword, Refused
from cutaway.core.result import Result
from cutaway.core.stats import BOUNDS, generator, one_prompt, rotation
from cutaway.directions.subspace import NO_MEASUREMENT, Subspace
from cutaway.interventions.alignment import Alignment, align
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
    vectors_of,
)
from cutaway.models.loading.shuffle import shuffled
from cutaway.models.model import Model
from cutaway.tasks.bound import Bound
from cutaway.tasks.task import Task

_FITS = ("true labels", "shuffled labels", "untrained")
_CONTROLS = (
    "no exchange", "whole vector", "difference of means", "shuffled labels",
    "untrained", "untrained, no exchange", "untrained, whole vector",
)  # fmt: skip

_UNITS: dict[str, str] = dict.fromkeys(("iia", "preferred", "control"), "share of pairs")
_UNITS |= {"margin": "logits", "loss": "nats", "slope": "nats per step"}
_TRAINED = ("loss", "slope", "boundary", "basis", "apart")
_OF_TRAINING: dict[str, str] = dict.fromkeys(_TRAINED, "of the training, on the other pairs")


@dataclass(frozen=True, kw_only=True)
class AlignedSubspace(Result, kind="aligned_subspace"):
    """A subspace trained on counterfactual labels, its accuracy on held-out pairs, and its controls.

    Attributes:
        margin: logit of the counterfactual label − that of the foil, under the exchange.
        interval: 95 %.
        null: the same of random subspaces of that rank.
        iia: share of held-out pairs whose top prediction becomes the label.
        iia_interval: 95 %.
        iia_null: the same of random subspaces.
        preferred: share of held-out pairs in which the label beats the foil.
        preferred_interval: 95 %.
        preferred_null: the same of random subspaces.
        control: the three under each control.
        control_interval: 95 %.
        loss: cross entropy of the labels in nats before each step of each training.
        slope: of the loss over the last fifth of the steps, in nats per step.
        boundary: share of coordinates within the learned boundary, at each step.
        basis: the orthonormal directions, in columns.
        apart: distance of the class means along the first direction, where a task has two classes.
        address: the place.
        positions: the positions that were exchanged.
        positive: of two classes, the one that the first direction points to.
        negative: the one that it points away from.
        task: the name of the task.
        family: the family of the model.
        converged: True if the loss of the true labels is level at the end.
    """

    page = ("iia", "preferred")
    margin: Float[Tensor, ""]
    interval: Float[Tensor, "bound"]
    null: Float[Tensor, "sample"]
    iia: Float[Tensor, ""]
    iia_interval: Float[Tensor, "bound"]
    iia_null: Float[Tensor, "sample"]
    preferred: Float[Tensor, ""]
    preferred_interval: Float[Tensor, "bound"]
    preferred_null: Float[Tensor, "sample"]
    control: Float[Tensor, "control outcome"]
    control_interval: Float[Tensor, "control outcome bound"]
    loss: Float[Tensor, "fit step"]
    slope: Float[Tensor, "fit"]
    boundary: Float[Tensor, "step"] | None
    basis: Float[Tensor, "width rank"]
    apart: Float[Tensor, ""] | None
    address: str
    positions: str
    positive: str
    negative: str
    task: str
    family: str
    converged: bool

    def subspace(self) -> Subspace:
        """Return the subspace with the record of what it was trained on."""
        about = {n: self.record[n] for n in ("subjects", "options", "versions") if n in self.record}
        return Subspace(
            basis=self.basis,
            apart=self.apart,
            address=self.address,
            positions=self.positions,
            positive=self.positive,
            negative=self.negative,
            name=self.task,
            family=self.family,
            reasons=NO_MEASUREMENT,
            record=about,
        )


@method(
    answers="Which subspace of a site carries a variable, so that exchanging it alone gives the counterfactual answer?",
    paper="Geiger et al. 2023, arXiv:2303.02536",
    cost="prompts * (14 + samples + 3 * steps) * F + 3 * prompts * steps * B",
    control="random_subspaces",
    rung="interventional",
)
def das(
    model: Model,
    task: Task,
    /,
    *,
    site: str | None = None,
    positions: str = "last",
    rank: int = 1,
    boundless: bool = False,
    steps: int = 200,
    rate: float = 1e-3,
    samples: int = 8,
    seed: int = 0,
) -> AlignedSubspace:
    """Train a subspace on some groups of pairs, and test it on the others beside its controls.

    Args:
        site: the address; None means the stream behind the middle block.
        positions: positions that are exchanged: last, changed, subject or all.
        rank: number of dimensions; with `boundless` it is learned.
        boundless: True to learn the rank, by a boundary.
        steps: number of steps of each training.
        rate: learning rate of Adam.
        samples: number of random subspaces.
        seed: of what is held out, the first subspace, the shuffled labels and weights, and the random subspaces.

    Raises:
        Refused: answers of several tokens, a site without vectors or where base and source are the same, several
            addresses, no such positions, or a rank that the site does not have.
    """
    bound = bind_exchanges(model, task)
    place = _place(model, site)
    held = HeldOut.of(bound, seed)
    own, other = (_Trial(m, bound, place, positions, held) for m in (model, shuffled(model, seed)))
    width = own.test[0].step.shape[-1]
    if not 1 <= rank <= width:
        raise Refused(Keyword("rank", rank), f"the site is {width} wide", "give a rank from 1 to that")
    mixed = relabelled(bound, held.fit, torch.randperm(len(held.fit), generator=generator(seed)).tolist())

    def fitted(trial: _Trial, labels: Bound) -> Alignment:
        with trial.model.edited():
            return align(trial.fit, labels.measure, rank, steps, rate, generator(seed), boundless)

    fits = [fitted(own, bound), fitted(own, mixed), fitted(other, bound)]
    _note_warnings(bound, held, fits)
    random = _random(width, fits[0].basis.shape[1], samples, seed)
    real, *null = own.tried([_within(fits[0].basis), *map(_within, random)])
    controls = _controls(own, other, fits)
    basis, apart, classes = _signed(fits[0].basis, own.fit, bound)
    return AlignedSubspace(
        **outcome_fields(real.mean(0), held.interval(real), torch.stack([n.mean(0) for n in null])),
        control=controls.mean(0),
        control_interval=held.interval(controls),
        loss=torch.stack([f.loss for f in fits]),
        slope=torch.tensor([f.slope for f in fits]),
        boundary=fits[0].boundary,
        basis=basis,
        apart=apart,
        address=str(place),
        positions=positions,
        positive=classes[0],
        negative=classes[1],
        task=task.name,
        family=model.family.name,
        converged=fits[0].converged,
        labels={"control": list(_CONTROLS), "fit": list(_FITS), "outcome": OUTCOMES, "bound": BOUNDS},
        units=_UNITS,
        reasons=one_prompt(len(held.test), "margin", "iia", "preferred", "control") | _OF_TRAINING,
        record=held.record(),
    )


def _place(model: Model, site: str | None) -> Address:
    """Return the address that is meant; without one, the stream behind the middle block."""
    found = model.places(site if site is not None else f"resid_post.{(model.shape.n_layers - 1) // 2}")
    if len(found) != 1:
        raise Refused(Keyword("site", site), f"it means {len(found)} addresses", "name one, such as resid_post.3")
    return found[0]


def relabelled(bound: Bound, rows: Sequence[int], order: Sequence[int]) -> Bound:
    """Return pairs of which some have the counterfactual labels of others, in a given order."""
    to = list(range(len(bound)))
    for i, j in enumerate(order):
        to[rows[i]] = rows[j]
    sets = None if bound.answer_sets is None else bound.answer_sets[to]
    return replace(bound, answers=bound.answers[to], answer_sets=sets)


_Change = Callable[[Exchange], Tensor]


def _nothing(e: Exchange) -> Tensor:
    return torch.zeros_like(e.step)


def _whole(e: Exchange) -> Tensor:
    return e.step


def _within(basis: Float[Tensor, "width rank"]) -> _Change:
    return lambda e: e.within(basis)


def _random(width: int, rank: int, samples: int, seed: int) -> list[Float[Tensor, "width rank"]]:
    g = generator(seed)
    return [rotation(width, g, columns=rank) for _ in range(samples)]


class _Trial:
    """Pairs of one model at the place, to fit on and to test on, with the measurement of labels."""

    def __init__(self, model: Model, bound: Bound, place: Address, positions: str, held: HeldOut):
        self.model, self.measure = model, outcomes(bound, model)
        self.fit, self.test = (exchanges(model, bound, [place], positions, rows)[0] for rows in (held.fit, held.test))
        if same(self.fit) or same(self.test):
            why = f"base and source have the same values there, at the positions {positions!r}"
            raise Refused(f"interchange at {place}", why, "choose a later site, or the positions that changed")

    def tried(self, changes: Sequence[_Change]) -> list[Float[Tensor, "pair outcome"]]:
        """Return the outcomes of each held-out pair under each change."""
        return [tried(self.test, change, self.measure) for change in changes]


def _controls(own: _Trial, other: _Trial, fits: Sequence[Alignment]) -> Float[Tensor, "pair control outcome"]:
    """Return the outcomes of each held-out pair under every control, in the order of their names."""
    found = own.tried([_nothing, _whole, _within(class_means(own.fit)), _within(fits[1].basis)])
    return torch.stack(found + other.tried([_within(fits[2].basis), _nothing, _whole]), 1)


def _note_warnings(bound: Bound, held: HeldOut, fits: Sequence[Alignment]) -> None:
    """Tell readers of trainings whose loss still falls, and of pairs to fit on whose labels are all the same."""
    late = [f"{name} ({f.slope:.1g} nats per step)" for name, f in zip(_FITS, fits, strict=True) if not f.converged]
    if late:
        note(f"did not converge: the loss still falls at the end, with {', '.join(late)}; give more steps")
    if len(held.fit) > 1 and len(bound.answers[held.fit].unique()) == 1:
        note(
            "one label: all pairs that are fitted on have the same counterfactual label, so that what raises it in any "
            "prompt fits, and shuffled labels are the true ones; add the same pairs the other way round"
        )


def _signed(
    basis: Float[Tensor, "width rank"], fit: Sequence[Exchange], bound: Bound
) -> tuple[Float[Tensor, "width rank"], Float[Tensor, ""] | None, tuple[str, str]]:
    """Return the basis with its first direction from one class to the other, their distance along it, and their names.

    The positive class is the answer of the first pair. Without two classes nothing turns.
    """
    x, y = vectors_of(fit)
    if len(y.unique()) != 2:
        return basis, None, ("", "")
    first, token = bound.pairs[0], int(bound.answers[0])
    along = (x[y == token].mean(0) - x[y != token].mean(0)) @ basis[:, 0]
    basis = basis * torch.where(torch.arange(basis.shape[1]) == 0, along.sign(), 1.0)
    return basis, along.abs(), (first.answer.strip(), first.foil.strip())
