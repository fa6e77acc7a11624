"""Does a circuit keep its answer whatever subset of the rest is cut, and not only when all of it is?

An adversarial certificate of faithfulness (Wang et al. 2023, arXiv:2211.00593). Cutting the whole complement of a
circuit, as faithfulness does, can be passed by a circuit from which parts are missing that cancel each other. Let v(r)
be the mean metric with the parts r of the complement left intact and its other parts cut, the same r for all prompts;
v(M) is the model's, v(∅) that with all edges cut.

* `deviation` = |v(r) − v(M)| / |v(M) − v(∅)|: with the complement cut; its mean over `draws` random subsets that leave
  each part intact with probability 0.1, 0.5 or 0.9; and the largest found, among all of these and the subsets to
  which projected gradient ascent leads from 4 random starts, two of them up and two down, rounded.
* Level C: the first is at most `tolerance`; B: the three means are; A: the largest found is, and so the others are.
  Each must hold at the upper end of its interval, and what all edges are worth must differ from 0; else there is no
  level. A says what a search did not find; a worse subset may exist. Without a search (`steps` 0) it is not given.
* `unit`: parts are the edges of the complement that leave one writer (writers), or single edges (edges), of which
  random subsets average out.
* `interval`: 95 %, resampling prompts with the subsets held. Controls. `null`: the deviations of random circuits of as
  many edges between each two sites of each two layers, without a search. `shuffled`: those of this circuit with each
  prompt read at the answers of another, as a share of what all edges are worth there; `shuffled_level` should be none.
* `weakest`: the edges that the worst subset cuts.
* Known failures: a circuit of nearly all edges passes. The tolerance is a share of the answer, so that a weak answer
  needs a large circuit. Few prompts give wide intervals and low levels.
* Equivalences (tests): with all cut, |1 − faithfulness| of the set; all subsets of a small complement; two heads that
  cancel, left out, pass C and fail B.
* Cost: 3 + 3 draws forwards a circuit, of which there are 1 + samples, and 4 steps of a forward and a backward.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from cutaway.circuits.circuit import Circuit, matched
from cutaway.circuits.evaluation import Evaluation
from cutaway.core.method import method
from cutaway.core.record import count
from cutaway.core.refuse import Refused
from cutaway.core.result import Result
from cutaway.core.stats import BOUNDS, generator, mean_interval, one_prompt
from cutaway.interventions.ablation_values import Baseline
from cutaway.interventions.paired_runs import Direction
from cutaway.models.access.reading import Measure, observe
from cutaway.models.dry import some
from cutaway.models.edits.edge_mask import MaskedForward, Written, removed_by
from cutaway.models.edits.wiring import Wiring
from cutaway.models.model import Model
from cutaway.models.tokens import Tokens
from cutaway.tasks.task import Task

Unit = Literal["writers", "edges"]
INTACT = (0.1, 0.5, 0.9)  # the probabilities with which a random subset leaves a part intact
_STARTS = 4
_RESAMPLES = 1000
TESTS = ["all cut", *(f"{1 - q:.1f} cut at random" for q in INTACT), "worst found"]


@dataclass(frozen=True, kw_only=True)
class Certificate(Result, kind="circuit_certificate"):
    """Deviations of the answer under cuts of a circuit's complement, and the level that they earn.

    Attributes:
        deviation: the change of the answer, as a share of what all edges are worth.
        interval: of `deviation`, 95 %, over prompts.
        null: the deviations of random circuits.
        shuffled: those of the circuit at the answers of other prompts.
        weakest: True at the edges that the worst subset cuts.
        level: A, B and C, B, C or none.
        shuffled_level: the level at the answers of other prompts.
        null_levels: those of the random circuits.
        whole: the metric of the model.
        empty: the metric with all edges cut.
        parts: how many parts the complement has.
    """

    page: ClassVar[tuple[str, ...]] = ("shuffled",)
    deviation: Float[Tensor, "test"]
    interval: Float[Tensor, "test bound"]
    null: Float[Tensor, "test sample"]
    shuffled: Float[Tensor, "test"] | None = None
    shuffled_interval: Float[Tensor, "test bound"] | None = None
    weakest: Bool[Tensor, "edge"]
    whole: Float[Tensor, ""]
    empty: Float[Tensor, ""]
    level: str
    shuffled_level: str
    null_levels: tuple[str, ...]
    parts: int


@method(
    answers="Does a circuit keep its answer whatever subset of the rest is cut, and not only when all of it is?",
    paper="Wang et al. 2023, arXiv:2211.00593",
    cost="prompts * ((4 if how == 'resample' else 1) * (4 + 3 * draws) * (1 + samples) * F + (4 if how == 'resample' "
    "else 1) * (4 * (steps + 2) * F + 4 * steps * B) + 4 * F)",
    control="random_circuits",
    rung="interventional",
)
def certify(
    model: Model,
    task: Task,
    circuit: Circuit,
    /,
    *,
    how: Baseline = "corrupt",
    direction: Direction = "noise",
    unit: Unit = "writers",
    tolerance: float = 0.2,
    draws: int = 8,
    steps: int = 20,
    samples: int = 4,
    seed: int = 0,
) -> Certificate:
    """Cut subsets of a circuit's complement: all of it, random ones, and the worst that a search finds.

    Args:
        how: what stands in for a writer's value where an edge is cut.
        direction: noise keeps the circuit in the clean run, denoise gives it its clean values in the corrupt run.
        unit: parts are all edges of the complement that leave a writer, or single edges.
        tolerance: the largest deviation that is let pass, as a share of the answer.
        draws: how many random subsets are cut for each probability.
        steps: how many steps the search takes from each start; 0 for no search.
        samples: how many random circuits are certified beside it, without a search.
        seed: of the subsets, the random circuits and the exchanged answers.

    Raises:
        Refused: an edge that the model does not have, a circuit of no or of all edges, or a metric that is the same
            with all edges cut.
    """
    x = Evaluation.of(model, task, how, direction, "all", seed)
    inside = circuit.scores(x.wiring).isfinite()
    rest = _Complement.of(x.wiring, inside, unit, circuit.name)
    drawn = _drawn(rest.parts, draws, seed)
    found = [*drawn, *_search(x, rest, steps, seed)]
    others = [
        _Complement.of(x.wiring, _edges(x.wiring, matched(x.wiring, rest.kept, seed + s)), unit, "chance")
        for s in range(samples)
    ]
    null = [o.masks(_drawn(o.parts, draws, seed + 1 + s)) for s, o in enumerate(others)]
    values = x.values([*x.whole_and_empty(), *rest.masks(found), *(m for own in null for m in own)])
    return _result(x, rest, found, values, draws, tolerance)


@dataclass(frozen=True, eq=False)
class _Complement:
    """The edges outside of a circuit, in parts.

    Attributes:
        kept: the circuit.
        part: the part of each edge of the wiring; −1 inside the circuit.
        parts: how many there are.
    """

    wiring: Wiring
    kept: Bool[Tensor, "writer reader"]
    part: Any
    parts: int

    @staticmethod
    def of(wiring: Wiring, inside: Bool[Tensor, "edge"], unit: Unit, name: str) -> _Complement:
        if bool(inside.all()) or not bool(inside.any()):
            why = "it has every edge" if bool(inside.all()) else "it has no edge"
            raise Refused(f"certificate of {name}", why, "give a circuit, or the first edges of a ranking")
        ends, part = wiring.pairs, torch.full((len(inside),), -1)
        key = ends[~inside, 0] if unit == "writers" else torch.arange(int((~inside).sum()))
        part[~inside] = key.unique(return_inverse=True)[1]
        kept = torch.zeros_like(wiring.heard)
        kept[ends[inside, 0], ends[inside, 1]] = True
        return _Complement(wiring, kept, part, int(part.max()) + 1)

    def mask(self, intact: Float[Tensor, "part"]) -> Float[Tensor, "writer reader"]:
        """Return the mask that leaves the circuit and parts of the rest intact, with its gradient."""
        u, v = self.wiring.pairs[self.part >= 0].T
        out = self.kept.to(intact.dtype)
        return out.index_put((u, v), intact[self.part[self.part >= 0]])

    def masks(self, subsets: list[Tensor]) -> list[Tensor]:
        """Return the mask of each subset."""
        return [self.mask(s) for s in subsets]


def _edges(wiring: Wiring, mask: Bool[Tensor, "writer reader"]) -> Bool[Tensor, "edge"]:
    return mask[wiring.pairs[:, 0], wiring.pairs[:, 1]]


def _drawn(parts: int, draws: int, seed: int) -> list[Tensor]:
    """Return the empty subset and random ones, of each probability to be intact."""
    chance = generator(seed)
    return [
        torch.zeros(parts),
        *((torch.rand(parts, generator=chance) < q).float() for q in INTACT for _ in range(draws)),
    ]


def _search(x: Evaluation, rest: _Complement, steps: int, seed: int) -> list[Tensor]:
    """Return the subsets to which projected gradient ascent leads, and descent, from random starts."""
    if not steps:
        return []
    chance = generator(seed + 1)
    starts = torch.rand(_STARTS, rest.parts, generator=chance)
    up = torch.tensor([1.0 if i % 2 else -1.0 for i in range(_STARTS)])[:, None]
    for step in some(range(steps), 1):
        slope = _slope(x, rest, starts)
        size = slope.abs().amax(1, keepdim=True).clamp_min(1e-12)
        rate = 1 - step / steps
        starts = (starts + rate * up * (0.5 * slope.sign() + 0.5 * slope / size)).clamp(0, 1)
    return list(starts.round())


def _slope(x: Evaluation, rest: _Complement, at: Float[Tensor, "start part"]) -> Float[Tensor, "start part"]:
    """Return the gradient of the mean metric in the parts that are intact, for each start."""
    out = torch.zeros_like(at)

    def work(tokens: Tokens, donors: list[dict[Any, Tensor]], measure: Measure) -> None:
        for alternative in donors:
            for i, point in enumerate(at):
                out[i] += _gradient(x, rest, point, tokens, alternative, measure) / (len(x) * len(donors))

    x.parts(work)
    return out


def _gradient(
    x: Evaluation,
    rest: _Complement,
    point: Float[Tensor, "part"],
    tokens: Tokens,
    alternative: Written,
    measure: Measure,
) -> Float[Tensor, "part"]:
    with torch.enable_grad(), x.model.edited():
        intact = point.clone().requires_grad_(True)
        mask = x.mask(rest.mask(intact))[None].to(x.model.device)
        with MaskedForward(x.model, x.wiring, removed_by(x.wiring, mask), alternative).attached():
            seen = observe(x.model.anatomy, tokens, measure.reads)
        values = measure(seen, torch.arange(len(tokens), device=tokens.ids.device))[:, 0]
        (slope,) = torch.autograd.grad(values.sum(), intact)
    count(backwards=len(tokens))
    return slope


def _result(
    x: Evaluation,
    rest: _Complement,
    subsets: list[Tensor],
    values: Float[Tensor, "mask prompt metric"],
    draws: int,
    tolerance: float,
) -> Certificate:
    own, n, each = values[..., 0], len(subsets), 1 + len(INTACT) * draws
    whole, empty = own[:2]
    x.gap(whole, empty)
    deviation, interval = _deviations(own[2 : 2 + n], whole, empty, draws)
    null = [_deviations(part, whole, empty, draws) for part in own[2 + n :].split(each)]
    worst = subsets[int((own[2 : 2 + n].mean(1) - whole.mean()).abs().argmax())]
    given: dict[str, Any] = {}
    if x.columns == 2:
        other = values[..., 1]
        given["shuffled"], given["shuffled_interval"] = _deviations(other[2 : 2 + n], other[0], other[1], draws)
    searched = n > each
    level = _level(interval, whole - empty, tolerance, searched)
    shuffled = "not measured"
    if given:
        shuffled = _level(given["shuffled_interval"], other[0] - other[1], tolerance, searched)
    fields = ["deviation", "interval", "null", *given]
    return Certificate(
        deviation=deviation,
        interval=interval,
        null=torch.stack([d for d, _ in null], -1),
        weakest=(rest.part >= 0) & (worst[rest.part] == 0),
        whole=whole.mean(),
        empty=empty.mean(),
        level=level,
        shuffled_level=shuffled,
        null_levels=tuple(_level(bounds, whole - empty, tolerance, False) for _, bounds in null),
        parts=rest.parts,
        labels={"test": TESTS, "bound": BOUNDS},
        units=dict.fromkeys(fields, "share of |m(M) − m(∅)|") | dict.fromkeys(("whole", "empty"), x.given.bound.unit),
        reasons=one_prompt(len(x), "deviation", "shuffled"),
        record=x.record() | {"edges": int(rest.kept.sum()), "subsets": n},
        **given,
    )


def _deviations(
    values: Float[Tensor, "subset prompt"], whole: Float[Tensor, "prompt"], empty: Float[Tensor, "prompt"], draws: int
) -> tuple[Float[Tensor, "test"], Float[Tensor, "test bound"]]:
    """Return the deviation under every test, and its interval under resampled prompts."""
    change, gap = (values - whole).double(), (whole - empty).double()
    n = len(gap)

    def tests(weights: Float[Tensor, "resample prompt"]) -> Float[Tensor, "resample test"]:
        off = (weights @ change.T).abs() / (weights @ gap).abs()[:, None]
        random = off[:, 1 : 1 + len(INTACT) * draws].unflatten(1, (len(INTACT), draws)).mean(2)
        return torch.cat([off[:, :1], random, off.amax(1, keepdim=True)], 1)

    found = tests(torch.full((1, n), 1 / n, dtype=torch.double))[0].float()
    if n < 2:
        return found, torch.full((len(found), 2), torch.nan)
    drawn = torch.randint(n, (_RESAMPLES, n), generator=generator(0))
    weights = torch.zeros(_RESAMPLES, n, dtype=torch.double).scatter_add_(1, drawn, torch.ones_like(drawn).double()) / n
    bounds = tests(weights).quantile(torch.tensor([0.025, 0.975], dtype=torch.double), dim=0).T
    return found, bounds.float()


def _level(
    interval: Float[Tensor, "test bound"], gap: Float[Tensor, "prompt"], tolerance: float, searched: bool
) -> str:
    """Return the level that the upper ends of the intervals earn; none where the answer may be worth nothing."""
    low, high = mean_interval(gap).tolist()
    if not (low > 0 or high < 0):
        return "none"
    passed = interval[:, 1] <= tolerance
    c, b, a = bool(passed[0]), bool(passed[1:4].all()), searched and bool(passed[4])
    return "A" if a else "B and C" if b and c else "B" if b else "C" if c else "none"
