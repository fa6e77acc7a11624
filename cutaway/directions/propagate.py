"""How does a perturbation along a direction grow from layer to layer?

The stream is moved along a unit direction v at one place, by sizes that are shares of its own length there, and the
change δ is followed through the layers behind. A direction that later layers read grows more than a random one; a map
with a positive Lyapunov exponent would separate any two streams exponentially, so that steering stopped being
predictable (a claim of theory: openreview fetTz1Xs2l, 2025). Trained models rather have stable regions with plateaus
(Janiak et al. 2024, arXiv:2409.17113).

* `gain[size, layer]` = ‖δ‖ behind the layer / ‖δ‖ at the start, mean over prompts; `relative_gain` divides it by how
  the stream itself grows. `interval`: 95 %, over prompts. The first size, 0, is the limit: the tangent ‖J v‖, with J
  the Jacobian of the layer's stream by the start's (a Jacobian-vector product, no finite difference).
* `exponent[size]` = ln gain at the last layer / number of blocks between: the finite-time Lyapunov exponent along v,
  per layer, mean over prompts. Two prompts apart by ε keep apart by ε · exp(exponent · blocks) as long as it holds.
* `cosine`: of δ and v. `aligned`: of δ and the direction's own vector at that layer, where it has one.
* `linear_range[layer]`: the largest size up to which the gain stays within a tenth of the tangent's; 0 if none does.
* `kl[size]`: KL(unchanged ‖ changed) of the next token, in nats.
* δ is made and read at the last position; with `everywhere` it is made at all positions.
* Control (`null`): isotropic random directions. `control_gain`, `control_exponent`, `control_kl`,
  `control_linear_range` beside them: means over isotropic directions, over random ones with the covariance of the
  streams at the start, over real differences between two streams there, and the direction itself in a model that has
  learned nothing (the same weights in random order: `ca.models.shuffled`).
* It starts at the first address of the direction, which must be one of the residual stream with a block behind it.
* Known failures: a finite depth has no asymptotics, so a positive exponent is amplification, not chaos; where it falls
  with size the map saturates, which chaos does not. Sizes below 1e-3 measure rounding in float32: the tangent stands
  for them. The stream's largest coordinates, which hold no content, decide what isotropic and covariance mean.
* Equivalences (tests): gains of small sizes tend to the tangent's, which is that of central differences; where no block
  writes anything, all gains are 1 and all exponents 0.
* Cost: of each direction, a tangent, an unchanged run and one forward per size, from the start on; there are
  2 + 3 · samples directions. A tangent counts as one forward and takes about three.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from cutaway.core.address import Address
from cutaway.core.method import method
from cutaway.core.refuse import Keyword, Refused
from cutaway.core.result import Result
from cutaway.core.stats import BOUNDS, generator, mean_interval, one_prompt
from cutaway.directions.direction import Direction
from cutaway.interventions.tangent import Tangent, tangents
from cutaway.models.access.reading import Measure, Reads, Seen
from cutaway.models.edits.library import Add
from cutaway.models.loading.shuffle import shuffled
from cutaway.models.model import Model
from cutaway.models.sweep.executor import sweep
from cutaway.models.tokens import Tokens
from cutaway.tasks.answers import check_predicts
from cutaway.tasks.prompts import Prompts

_LINEAR = 0.1  # by how much of the tangent's a gain may differ within the linear range
_DRAWN = ("isotropic", "covariance", "difference")
_UNLEARNED = "shuffled weights"


@dataclass(frozen=True, kw_only=True)
class Propagation(Result, kind="propagation"):
    """Growth of a perturbation along a direction through the layers behind it.

    Attributes:
        gain: the length of the change, as a multiple of its length at the start.
        interval: 95 %, over prompts.
        null: the same along isotropic random directions.
        relative_gain: `gain` divided by how the stream itself grows.
        cosine: of the change and the direction.
        cosine_interval: 95 %, over prompts.
        cosine_null: of random directions, each with itself.
        aligned: cosine of the change and the direction's own vector at that layer; NaN where it has none.
        exponent: the finite-time Lyapunov exponent along the direction, per layer.
        exponent_interval: 95 %, over prompts.
        exponent_null: the same along isotropic random directions.
        kl: from the next token's unchanged distribution to the changed one, in nats.
        kl_interval: 95 %, over prompts.
        kl_null: the same along isotropic random directions.
        linear_range: the largest size up to which gains are within a tenth of the tangent's.
        control_gain: `gain` of each control, mean over its directions.
        control_exponent: `exponent` likewise.
        control_kl: `kl` likewise.
        control_linear_range: `linear_range` of the mean gain of each control.
    """

    gain: Float[Tensor, "size layer"]
    interval: Float[Tensor, "size layer bound"]
    null: Float[Tensor, "size layer sample"]
    relative_gain: Float[Tensor, "size layer"]
    cosine: Float[Tensor, "size layer"]
    cosine_interval: Float[Tensor, "size layer bound"]
    cosine_null: Float[Tensor, "size layer sample"]
    aligned: Float[Tensor, "size layer"]
    exponent: Float[Tensor, "size"]
    exponent_interval: Float[Tensor, "size bound"]
    exponent_null: Float[Tensor, "size sample"]
    kl: Float[Tensor, "size"]
    kl_interval: Float[Tensor, "size bound"]
    kl_null: Float[Tensor, "size sample"]
    linear_range: Float[Tensor, "layer"]
    control_gain: Float[Tensor, "control size layer"]
    control_exponent: Float[Tensor, "control size"]
    control_kl: Float[Tensor, "control size"]
    control_linear_range: Float[Tensor, "control layer"]


@method(
    answers="How does a perturbation along a direction grow from layer to layer?",
    paper="Janiak et al. 2024, arXiv:2409.17113",
    cost="prompts * (4 + (2 + 3 * samples) * (1 + size)) * F",
    control="isotropic_directions",
    rung="interventional",
)
def propagate(
    model: Model,
    prompts: Prompts,
    direction: Direction,
    /,
    *,
    sizes: tuple[float, ...] = (0.03, 0.1, 0.3, 1.0, 2.0),
    everywhere: bool = False,
    samples: int = 4,
    seed: int = 0,
) -> Propagation:
    """Follow a perturbation along a direction through the layers behind it.

    Args:
        sizes: lengths of the perturbation, as shares of the stream's own length at the start.
        everywhere: perturb all positions, not the last one alone.
        samples: number of directions of each drawn control.
        seed: of the drawn controls and of the shuffled weights.

    Raises:
        Refused: a start outside the residual stream or behind the last block, a direction of another width, sizes
            that are not positive and ascending, or a model that predicts no next token.
    """
    _check(sizes)
    check_predicts(model)
    start, places = _way(model, direction)
    v = normalize(direction.vector[0].to(model.device, torch.float32), dim=0)
    base = _Base.of(model, prompts, start, places, sizes, everywhere)
    known = _known(direction, places)
    own = base.grown(v, known)
    drawn = [[base.grown(u) for u in some] for some in _drawn(base, samples, seed)]
    unlearned = _Base.of(shuffled(model, seed), prompts, start, places, sizes, everywhere).grown(v)
    controls = [*(_mean(some) for some in drawn), unlearned]
    linear = _linear_range(own.gain.mean(-1), sizes)
    names = [str(p) for p in places]
    return Propagation(
        **_beside("gain", own, drawn[0], ""),
        relative_gain=(own.gain / base.growth).mean(-1),
        **_beside("cosine", own, drawn[0], "cosine_", (-1.0, 1.0)),
        aligned=own.aligned.mean(-1).where(known.any(-1), torch.nan),
        **_beside("exponent", own, drawn[0], "exponent_"),
        **_beside("kl", own, drawn[0], "kl_", (0.0, torch.inf)),
        linear_range=linear,
        control_gain=torch.stack([c.gain.mean(-1) for c in controls]),
        control_exponent=torch.stack([c.exponent.mean(-1) for c in controls]),
        control_kl=torch.stack([c.kl.mean(-1) for c in controls]),
        control_linear_range=torch.stack([_linear_range(c.gain.mean(-1), sizes) for c in controls]),
        labels={
            "size": ["0 (tangent)", *map(str, sizes)],
            "layer": names,
            "control": [*_DRAWN, _UNLEARNED],
            "bound": BOUNDS,
        },
        units=dict.fromkeys(("gain", "relative_gain"), "ratio of lengths")
        | dict.fromkeys(("cosine", "aligned"), "cosine")
        | dict.fromkeys(("linear_range", "control_linear_range"), "share of the stream's length")
        | {"control_gain": "ratio of lengths", "exponent": "per layer", "control_exponent": "per layer"}
        | dict.fromkeys(("kl", "control_kl"), "nats"),
        record={
            "start": str(start),
            "positions": "all" if everywhere else "the last",
            "finding": _finding(own, controls[0], float(linear[-1]), sizes),
        },
        reasons=one_prompt(len(base.tokens), "gain", "cosine", "exponent", "kl"),
    )


def _check(sizes: tuple[float, ...]) -> None:
    if sizes[0] <= 0 or list(sizes) != sorted(set(sizes)):
        raise Refused(Keyword("sizes", ",".join(map(str, sizes))), "they are not positive and ascending", "use 0.1,1")


def _way(model: Model, direction: Direction) -> tuple[Address, list[Address]]:
    """Return the first address of a direction, and the residual stream behind every block from there on."""
    direction.check(model)
    start, last = direction.places[0], model.shape.n_layers
    if start.site not in ("resid_pre", "resid_mid", "resid_post") or start.unit is not None:
        raise Refused(
            f"propagation from {start}", "it is not the residual stream", "use resid_pre, resid_mid or resid_post"
        )
    first = (start.layer or 0) + (start.site == "resid_post")
    if first >= last:
        raise Refused(f"propagation from {start}", "no block follows it", f"start at resid_post.{last - 2} or before")
    return start, model.places([f"resid_post.{i}" for i in range(first, last)])


@dataclass(frozen=True)
class _Growth:
    """A perturbation behind each layer, for the tangent and each size.

    Attributes:
        gain: its length as a multiple of that at the start.
        cosine: with its direction at the start.
        aligned: with the vectors that are known of each layer.
        kl: divergence of the next token, 0 for the tangent.
    """

    gain: Float[Tensor, "size layer prompt"]
    cosine: Float[Tensor, "size layer prompt"]
    aligned: Float[Tensor, "size layer prompt"]
    kl: Float[Tensor, "size prompt"]

    @property
    def exponent(self) -> Float[Tensor, "size prompt"]:
        """The finite-time Lyapunov exponent of each prompt, per layer."""
        return self.gain[:, -1].log() / self.gain.shape[1]


def _mean(some: Sequence[_Growth]) -> _Growth:
    """Return the mean over directions; of gains the geometric one would hide those that one prompt magnifies."""
    return _Growth(*(torch.stack([getattr(g, f.name) for g in some]).mean(0) for f in fields(_Growth)))


def _beside(
    name: str, own: _Growth, null: Sequence[_Growth], prefix: str, within: tuple[float, float] = (-torch.inf, torch.inf)
) -> dict[str, Any]:
    """Return the mean of a field over prompts with its interval, and its null from random directions."""
    each = getattr(own, name)
    return {
        name: each.mean(-1),
        f"{prefix}interval": mean_interval(each.movedim(-1, 0), within=within),
        f"{prefix}null": torch.stack([getattr(g, name).mean(-1) for g in null], -1),
    }


@dataclass(frozen=True)
class _Base:
    """A model's unchanged run of the prompts, from which perturbations are measured.

    Attributes:
        start: where the stream is perturbed.
        places: the streams that are read behind it.
        sizes: lengths of perturbations, as shares of the stream's.
        everywhere: True if all positions are perturbed.
        pool: streams at the start, at all positions but each prompt's first.
        norm: the stream's length at the start, at the last position.
        streams: the streams behind it, at the last position.
        logits: the next token's.
    """

    model: Model
    tokens: Tokens
    start: Address
    places: list[Address]
    sizes: tuple[float, ...]
    everywhere: bool
    pool: Float[Tensor, "row d_model"]
    norm: Float[Tensor, "prompt"]
    streams: Float[Tensor, "prompt layer d_model"]
    logits: Float[Tensor, "prompt token"]

    @staticmethod
    def of(
        model: Model,
        prompts: Prompts,
        start: Address,
        places: list[Address],
        sizes: tuple[float, ...],
        everywhere: bool,
    ) -> _Base:
        tokens = prompts.bind(model)
        acts = model.capture(tokens, [start, *places], logits=False)
        inner = tokens.mask & ((tokens.mask.cumsum(-1) > 1) | (tokens.lengths == 1)[:, None].to(tokens.mask.device))
        here = acts[str(start)][inner.to(model.device)].float()
        norm = acts[f"{start}@-1"].float().norm(dim=-1)
        streams = torch.stack([acts[f"{p}@-1"] for p in places], 1).float()
        return _Base(
            model, tokens, start, places, sizes, everywhere, here, norm, streams, model.run_last(tokens).float()
        )

    @property
    def growth(self) -> Float[Tensor, "layer prompt"]:
        """Length of the stream behind each layer, as a multiple of that at the start."""
        return (self.streams.norm(dim=-1) / self.norm[:, None]).T.cpu()

    def grown(self, v: Float[Tensor, "d_model"], known: Float[Tensor, "layer d_model"] | None = None) -> _Growth:
        """Follow perturbations along a unit vector, and compare their direction with one known of each layer."""
        v = v.to(self.model.device)
        targets = v.expand(len(self.places), -1) if known is None else known.to(v)
        step = v.expand(len(self.tokens), -1)
        at, step = (None, step[:, None]) if self.everywhere else ((-1,), step)
        tangent = tangents(self.model, self.tokens, Tangent(self.start, step, at), self.places).float()
        norm = self.norm.reshape(-1, *[1] * (step.ndim - 1))
        edits = [[Add(self.start, step * norm, size, at)] for size in self.sizes]

        def measured(seen: Seen, prompt: Tensor) -> Tensor:
            assert seen.activations is not None
            assert seen.last_logits is not None
            now = torch.stack([seen.activations[f"{p}@-1"] for p in self.places], 1).float()
            own = self.logits[prompt].log_softmax(-1)
            kl = (own.exp() * (own - seen.last_logits.float().log_softmax(-1))).sum(-1)
            return torch.cat([_described(now - self.streams[prompt], v, targets).flatten(1), kl[:, None]], 1)

        found = sweep(self.model, self.tokens, edits, Measure(measured, Reads(places=tuple(self.places)))).cpu()
        lengths = torch.tensor(self.sizes)[:, None, None] * self.norm.cpu()[:, None]
        sized = found[..., :-1].unflatten(-1, (3, -1))
        gain, cosine, aligned = torch.cat([_described(tangent, v, targets).cpu()[None], sized]).unbind(2)
        gain[1:] /= lengths
        kl = torch.cat([torch.zeros_like(found[:1, :, -1]), found[..., -1]])
        return _Growth(gain.movedim(1, -1), cosine.movedim(1, -1), aligned.movedim(1, -1), kl)


def _described(
    change: Float[Tensor, "row layer d_model"], v: Float[Tensor, "d_model"], known: Float[Tensor, "layer d_model"]
) -> Float[Tensor, "row 3 layer"]:
    """Return the length of changes, and their cosines with a vector and with one of each layer."""
    return torch.stack([change.norm(dim=-1), cosine_similarity(change, v, -1), cosine_similarity(change, known, -1)], 1)


def _known(direction: Direction, places: Sequence[Address]) -> Float[Tensor, "layer d_model"]:
    """Return the direction's own vectors of some places, zero where it has none."""
    own = dict(zip(direction.places, direction.vector, strict=True))
    return torch.stack([own.get(p, torch.zeros_like(direction.vector[0])) for p in places])


def _drawn(base: _Base, samples: int, seed: int) -> list[list[Float[Tensor, "d_model"]]]:
    """Return unit vectors of each drawn control: isotropic, with the streams' covariance, differences."""
    g, pool = generator(seed), base.pool.cpu()
    isotropic = torch.randn(samples, pool.shape[1], generator=g)
    if len(pool) < 2:
        why = "there is one position behind the first tokens, and no difference of two"
        raise Refused(f"{len(base.tokens)} prompts", why, "give longer prompts, or more of them")
    covariance = torch.randn(samples, len(pool), generator=g) @ (pool - pool.mean(0))
    pairs = torch.stack([torch.randperm(len(pool), generator=g)[:2] for _ in range(samples)])
    difference = pool[pairs[:, 0]] - pool[pairs[:, 1]]
    return [list(normalize(drawn, dim=-1)) for drawn in (isotropic, covariance, difference)]


def _linear_range(gain: Float[Tensor, "size layer"], sizes: Sequence[float]) -> Float[Tensor, "layer"]:
    """Return the largest size up to which gains are within a tenth of the tangent's, 0 if none is."""
    near = ((gain[1:] / gain[0] - 1).abs() < _LINEAR).long().cumprod(0).sum(0)
    return torch.tensor([0.0, *sizes])[near]


def _finding(own: _Growth, isotropic: _Growth, linear: float, sizes: Sequence[float]) -> str:
    """Say in a sentence what was found at the last layer."""
    gain, chance = (float(g.gain[0, -1].mean()) for g in (own, isotropic))
    small, large = (float(own.exponent[i].mean()) for i in (0, -1))
    trend = "falls" if large < small else "does not fall"
    return (
        f"small perturbations grow {gain:.2g} times (random ones {chance:.2g}) and keep a cosine of "
        f"{float(own.cosine[0, -1].mean()):.2f}; linear up to {linear:g} of the stream's length; the exponent {trend} "
        f"from {small:.3f} per layer in the limit to {large:.3f} at {sizes[-1]:g}"
    )
