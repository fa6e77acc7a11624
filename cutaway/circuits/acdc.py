"""Which edges are left when every edge that costs the answer less than a threshold is cut, one after the other?

Automatic circuit discovery (ACDC; Conmy et al. 2023, arXiv:2304.14997). A greedy search that ends in a circuit: edges
are visited from the logits back, by reader, and of a reader from its last writer to its first. Each is cut in the
circuit that the earlier decisions left; if the mean metric falls by less than `threshold`, it stays cut.

* `score` of u → v: what the metric lost when the edge was cut, in the circuit as it was then; the mean over prompts,
  by which it was decided. An edge into a head or MLP that nobody hears any more has 0 and is cut without a run (where a
  norm divides the heads of a layer together, into a layer of which nobody hears a head).
* `kept`: the edges of the circuit: those with a score of at least `threshold`.
* The metric is the task's own. With `--metric kl` (minus the divergence from the model's prediction) the search is the
  paper's first choice.
* `interval`: 95 %, over prompts, of the loss in the states that all prompts led to. `frequency`: the share of resamples
  of the prompts whose mean loss reaches the threshold in these states. Control (`null`): scores of steps of each
  writer's length in random directions, drawn from their distribution to first order as in `circuits.clean_corrupted`.
* Audit: `exact` is the score of `circuits.exact` of `audit` edges: the same cut in the clean run, alone. `agreement`
  says how far what is lost in the end differs from what is lost at the beginning.
* Known failures: of edges that stand in for each other the first visited is cut and the last kept; many small losses
  add up (hold the circuit against `circuits.faithfulness`); another threshold or value gives another circuit.
* Equivalences (tests): a loop of masked runs, one edge at a time; with a threshold above all effects nothing is kept.
* Cost: a forward a visited edge from its reader's block on, at most 3 with those in vain: the cuts ahead run in one
  batch under the guess that each stays cut, or is taken back as the guess before found; behind a wrong guess they run
  again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from cutaway.circuits.clean_corrupted import both_gradients
from cutaway.circuits.components import belongs
from cutaway.circuits.edge_estimates import estimated
from cutaway.circuits.edge_scores import EdgeScores, frequency
from cutaway.circuits.evaluation import Evaluation
from cutaway.circuits.scoring import audited
from cutaway.core.method import method
from cutaway.core.refuse import Keyword, Refused
from cutaway.core.stats import generator
from cutaway.interventions.ablation_values import Baseline
from cutaway.models.access.reading import Measure
from cutaway.models.dry import planned
from cutaway.models.edits.wiring import Wiring
from cutaway.models.model import Model
from cutaway.models.sweep.masks import PlainRuns, sweep_masks
from cutaway.models.tokens import Tokens
from cutaway.tasks.task import Task

_AHEAD = 128  # cuts of one batch, at most
Values = Callable[[Sequence[Bool[Tensor, "writer reader"]]], Float[Tensor, "mask prompt"]]


@method(
    answers="Which edges are left when every edge that costs the answer less than a threshold is cut, one after the"
    " other?",
    paper="Conmy et al. 2023, arXiv:2304.14997",
    cost="prompts * ((10 + (4 if how == 'resample' else 1) * (layers + 1 + 3 * cells + min(audit, cells))) * F"
    " + 2 * B)",
    control="random_direction",
    rung="interventional",
    fills=("frequency", "clean", "exact", "agreement", "kept"),
)
def acdc(
    model: Model,
    task: Task,
    /,
    *,
    threshold: float = 0.05,
    how: Baseline = "corrupt",
    audit: int = 24,
    samples: int = 4,
    seed: int = 0,
) -> EdgeScores:
    """Cut edges from the logits back, each that costs less than the threshold.

    Args:
        threshold: the loss of the mean metric, in its unit, from which on an edge is kept.
        how: what stands in for a writer's value.
        audit: at how many edges the score of the edge alone is measured beside that within the circuit.
        samples: how many random steps of equal length make the null of each edge.
        seed: of the resamples, the random steps, the donors and the audit's edges.

    Raises:
        Refused: a threshold that is not above 0, a model without such a wiring, or alternative values that these
            prompts do not allow.
    """
    if not threshold > 0:
        why = "cutting an edge that nobody hears costs nothing"
        raise Refused(Keyword("threshold", threshold), why, ("use ", Keyword("threshold", 0.01), " or more"))
    x = Evaluation.of(model, task, how, "noise", "all", seed)
    found = _search(x.wiring, _speakers(model, x.wiring), _measurement(x), threshold)
    spread = estimated(model, x.wiring, x.given, both_gradients(model, x.given.places), copies=2).variance.sqrt()
    null = spread[:, None] * torch.randn(len(spread), samples, generator=generator(seed))
    result = audited(model, x.wiring, x.given, found.lost.T, null, found.whole, audit, 1.0, seed)
    kept = found.circuit[x.wiring.pairs[:, 0], x.wiring.pairs[:, 1]]
    often = frequency(found.lost.T, seed, lambda mean: (mean >= threshold).float())
    record = {
        "score is": "measured within the circuit",
        "split": "decided and measured on the same prompts",
        "edges kept": int(kept.sum()),
        "metric of the circuit": float(found.left.mean()),
    }
    return replace(result, frequency=often, kept=kept, record=result.record | record)


@dataclass(eq=False)
class _Found:
    """The circuit so far.

    Attributes:
        circuit: the edges that are not cut.
        whole: the metric of each prompt without a cut.
        left: the metric of each prompt in the circuit.
        lost: what each edge's cut took.
    """

    circuit: Bool[Tensor, "writer reader"]
    whole: Float[Tensor, "prompt"]
    left: Float[Tensor, "prompt"]
    lost: Float[Tensor, "edge prompt"]


def _measurement(x: Evaluation) -> Values:
    """Return the metric of circuits as a function, which keeps the alternative values and the plain runs."""
    parts = list[Callable[[list[Tensor]], Tensor]]()

    def keep(tokens: Tokens, donors: list[dict[Any, Tensor]], measure: Measure) -> None:
        plain = PlainRuns()

        def run(masks: list[Tensor]) -> Tensor:
            each = [sweep_masks(x.model, x.wiring, tokens, masks, d, measure, plain=plain)[..., 0] for d in donors]
            return torch.stack(each).mean(0).float().cpu()

        parts.append(run)

    x.parts(keep)
    return lambda circuits: torch.cat([run([x.mask(c) for c in circuits]) for run in parts], dim=1)


def _speakers(model: Model, w: Wiring) -> Bool[Tensor, "writer reader"]:
    """Return True where what a reader reads can change what a writer writes by itself: in one component, and among the
    heads of a layer whose outputs one norm divides together.
    """
    of = belongs(w)
    for place in {u.place for u in w.writers if u.site == "z" and model.anatomy.part(u.layer or 0, "ln1_post")}:
        heads = torch.tensor([u.place == place for u in w.writers])
        of[heads] = of[heads].any(0)
    return of


def _search(w: Wiring, of: Bool[Tensor, "writer reader"], values: Values, threshold: float) -> _Found:
    """Visit every edge: guess ahead, measure the guesses in one batch, and go on behind the first wrong one."""
    order = sorted(range(len(w.pairs)), key=lambda e: (-int(w.pairs[e, 1]), -int(w.pairs[e, 0])))
    whole = values([w.heard])[0]
    found = _Found(w.heard.clone(), whole, whole, torch.zeros(len(order), len(whole)))
    at, ahead = 0, 1
    stays = set[int]() if planned() is None else set(order)  # a dry run visits all
    while at < len(order):
        cuts = list(_guesses(w, of, found.circuit, order, at, stays, ahead))
        if not cuts:
            u, v = w.pairs[order[at:]].T
            found.circuit[u, v] = False
            break
        right = _decide(found, cuts, values([c.mask for c in cuts]), order, stays, threshold, w)
        at, ahead = cuts[right - 1].at + 1, min(_AHEAD, 2 * right)
    return found


@dataclass(frozen=True, eq=False)
class _Cut:
    """A cut that is measured: the place in the order, and the circuit without the edge, if the guesses hold."""

    at: int
    mask: Bool[Tensor, "writer reader"]


def _guesses(
    w: Wiring,
    of: Bool[Tensor, "writer reader"],
    circuit: Bool[Tensor, "writer reader"],
    order: Sequence[int],
    at: int,
    stays: set[int],
    count: int,
) -> Iterator[_Cut]:
    """Yield the next cuts of edges into what is still heard; edges in `stays` are guessed to be taken back."""
    state, reader, heard = circuit.clone(), -1, False
    for i in range(at, len(order)):
        u, v = w.pairs[order[i]].tolist()
        if v != reader:
            reader, heard = v, _heard(of, state, v)
        cut = state.clone()
        cut[u, v] = False
        if heard:
            yield _Cut(i, cut)
            count -= 1
            if not count:
                return
        if not heard or order[i] not in stays:
            state = cut


def _heard(of: Bool[Tensor, "writer reader"], circuit: Bool[Tensor, "writer reader"], reader: int) -> bool:
    """Return True if an edge leaves a writer that a reader speaks through, or if it is the logits."""
    return reader == of.shape[1] - 1 or bool(circuit[of[:, reader]].any())


def _decide(
    found: _Found,
    cuts: Sequence[_Cut],
    values: Float[Tensor, "cut prompt"],
    order: Sequence[int],
    stays: set[int],
    threshold: float,
    w: Wiring,
) -> int:
    """Enter what the cuts took, up to the first that was guessed wrong, and return how many that are.

    The others are guessed by what they seem to take.
    """
    for n, (cut, value) in enumerate(zip(cuts, values, strict=True), 1):
        e = order[cut.at]
        found.lost[e] = found.left - value
        keep, guess = float(found.lost[e].mean()) >= threshold, e in stays
        found.circuit = cut.mask.clone()
        found.circuit[w.pairs[e, 0], w.pairs[e, 1]] = keep
        if keep != guess and planned() is None:
            _guess_again(found.left if guess else value, cuts[n:], values[n:], order, stays, threshold)
        found.left = found.left if keep else value
        if keep != guess and planned() is None:
            return n
    return len(cuts)


def _guess_again(
    before: Float[Tensor, "prompt"],
    cuts: Sequence[_Cut],
    values: Float[Tensor, "cut prompt"],
    order: Sequence[int],
    stays: set[int],
    threshold: float,
) -> None:
    """Guess the cuts behind a wrong one by their steps in its chain, in which the metric was `before` them."""
    for cut, value in zip(cuts, values, strict=True):
        e = order[cut.at]
        kept = float((before - value).mean()) >= threshold
        before = before if e in stays else value
        (stays.add if kept else stays.discard)(e)
