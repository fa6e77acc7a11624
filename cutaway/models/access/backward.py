"""The backward pass: gradients of a metric at named places, and local gradients replaced by other coefficients.

`gradients` is one forward with several backwards on its graph, each with nothing flowing back through some places.
`sever` is one forward whose graph is cut at some places, so that gradients flow from each only to the places before.
With `relevance` every activation keeps its bits, and what autograd multiplies with changes: norms, activation
functions, gates and attention hand back the coefficients of layer-wise relevance propagation (Ali et al. 2022, Jafari
et al. 2024).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cutaway.core.address import Address
from cutaway.core.finite import notice
from cutaway.core.out_of_memory import raising_out_of_memory
from cutaway.core.record import count
from cutaway.core.refuse import Refused
from cutaway.models.access import forward, taps
from cutaway.models.access.capture import Activations, Collector
from cutaway.models.access.ports import port
from cutaway.models.access.reading import Measure, Reads, depth, observe
from cutaway.models.anatomy.anatomy import Anatomy
from cutaway.models.anatomy.linear import packed
from cutaway.models.anatomy.norms import measure, wide
from cutaway.models.dry import keep, some
from cutaway.models.tokens import Tokens

Attention = Literal["gradient", "constant", "half"]
Cut = Sequence[Address]
_ATTENTION: dict[str, dict[str, float]] = {
    "gradient": {},
    "constant": {"q": 0.0, "k": 0.0},
    "half": {"q": 0.25, "k": 0.25, "v": 0.5},  # queries and keys stand in two products
}


def gradients(
    anatomy: Anatomy,
    tokens: Tokens,
    places: Sequence[Address],
    metric: Measure | Callable[[Float[Tensor, "batch token"]], Float[Tensor, "batch"]],
    cuts: Sequence[Cut] = ((),),
    relevance: Attention | None = None,
) -> tuple[Float[Tensor, "batch"], list[Activations], Activations]:
    """Return the metric of each prompt, its gradients at `places` for every cut, and the activations there.

    The metric takes the last logits [batch token], or is a `Measure` of whatever it reads. Behind everything that it
    reads its gradients are zero. One forward, and one backward per cut: a set of places through which nothing flows
    back. The gradient at a cut place itself is zero. With `relevance` they are relevance coefficients:

    * norms: the divisor is a constant (LN-rule);
    * activation functions: f(x) hands back f(x) / x instead of f′(x) (identity rule);
    * gates: each factor of a product gets half of what flows back (half rule);
    * attention: `gradient` leaves it alone, `constant` holds the pattern fixed (AH-rule), `half` applies the half rule
      to its two products.

    Raises:
        Refused: the metric does not depend on an asked place, or not on the logits at all; too little memory; with
            `relevance`, an MLP whose activation function cannot be seen, or a norm of another form.
    """
    closed: set[Address] = set()
    reads, layers = metric.reads if isinstance(metric, Measure) else Reads(), anatomy.shape.n_layers
    deepest = reads.deepest(layers)
    factors = _ATTENTION[relevance or "gradient"]
    weights = {Address(site, i): f for i in range(layers) for site, f in factors.items()}
    weights |= {a.place: 1.0 for cut in cuts for a in cut}
    weights = {a: w for a, w in weights.items() if depth(a, layers) <= deepest}
    collector = Collector(anatomy, places, live=True)
    with fitting(tokens), torch.enable_grad(), forward.rooted(anatomy), ExitStack() as stack:
        if relevance is not None:
            stack.enter_context(_propagating(anatomy, range(min(deepest + 1, layers))))
        # Weights come after the collector, so that what is collected counts what its reader's rule takes away.
        stack.enter_context(taps.attached(anatomy, {p: collector.see(p) for p in collector.places}, gradient=True))
        with taps.attached(anatomy, {p: _weighted(p, w, closed) for p, w in weights.items()}, gradient=True):
            seen = observe(anatomy, tokens, reads)
            if isinstance(metric, Measure):
                values = metric(seen, torch.arange(len(tokens), device=tokens.ids.device))
            else:
                assert seen.last_logits is not None
                values = metric(seen.last_logits)
        if values.shape != (len(tokens),) or not values.requires_grad:
            form = f"it gave {tuple(values.shape)}" + ("" if values.requires_grad else " without a gradient")
            raise Refused("metric", form, f"return one number per prompt ([{len(tokens)}]) computed from what it reads")
        wanted, slopes = [collector.found[a] for a in collector.asked], []
        for n, cut in some(list(enumerate(cuts))):
            closed.clear()
            closed.update(a.place for a in cut)
            found = torch.autograd.grad(values.sum(), wanted, retain_graph=n + 1 < len(cuts), allow_unused=True)
            count(backwards=len(tokens))
            for g in found:
                if g is not None:
                    notice(g)
            given_slopes = _all(anatomy, collector.asked, found, wanted, reads.early)
            slopes.append(Activations(dict(zip(collector.asked, given_slopes, strict=True)), tokens))
        if len(slopes) < len(cuts):  # the others are left out of a dry run
            keep((len(cuts) - len(slopes)) * sum(x.nbytes for x in given_slopes))
            slopes += slopes[-1:] * (len(cuts) - len(slopes))
    given = {a: x.detach() for a, x in zip(collector.asked, wanted, strict=True)}
    return values.detach(), slopes, Activations(given, tokens)


@dataclass(frozen=True, eq=False)
class SeveredForward:
    """A forward whose graph is cut at some places: what arrives there goes on as a leaf.

    Attributes:
        tokens: the prompts.
        values: the metric of each prompt.
        arriving: the tensors that arrive at the places, functions of the leaves before them; those beside the cuts too.
        leaves: the tensors that go on from the places.
    """

    tokens: Tokens
    values: Float[Tensor, "batch"]
    arriving: dict[Address, Tensor]
    leaves: dict[Address, Tensor]

    def products(self, cotangents: Mapping[Address, Tensor]) -> dict[Address, Tensor]:
        """Return the gradient at every leaf of Σ cotangent · arriving, along paths that pass no other cut."""
        outputs = {a: self.arriving[a] for a in cotangents if self.arriving[a].requires_grad}
        return self._gradients(list(outputs.values()), [cotangents[a].to(x.dtype) for a, x in outputs.items()])

    def direct(self) -> dict[Address, Tensor]:
        """Return the gradient at every leaf of the metric, along paths that pass no other cut."""
        return self._gradients([self.values.sum()], None)

    def _gradients(self, outputs: list[Tensor], given: list[Tensor] | None) -> dict[Address, Tensor]:
        leaves = list(self.leaves.values())
        found: Sequence[Tensor | None] = [None] * len(leaves)
        if outputs:
            found = torch.autograd.grad(outputs, leaves, given, retain_graph=True, allow_unused=True)
            count(backwards=len(self.tokens))
        each = zip(self.leaves.items(), found, strict=True)
        return {a: torch.zeros_like(x) if g is None else g for (a, x), g in each}


def sever(
    anatomy: Anatomy, tokens: Tokens, places: Sequence[Address], measure: Measure, beside: Sequence[Address] = ()
) -> SeveredForward:
    """Run a forward whose graph is cut at `places`; `beside` are further places whose arriving tensors are kept."""
    arriving, leaves = dict[Address, Tensor](), dict[Address, Tensor]()

    def keep_arriving(place: Address) -> Callable[[Tensor], Tensor]:
        def see(x: Tensor) -> Tensor:
            arriving[place] = x
            return x

        return see

    def cut(place: Address) -> Callable[[Tensor], Tensor]:
        def see(x: Tensor) -> Tensor:
            arriving[place] = x
            leaves[place] = x.detach().requires_grad_(True)
            return leaves[place].clone()  # a model may write into what goes on

        return see

    sees = {a: keep_arriving(a) for a in beside} | {a: cut(a) for a in places}
    with fitting(tokens), torch.enable_grad(), taps.attached(anatomy, sees, gradient=True):
        seen = observe(anatomy, tokens, measure.reads)
        values = measure(seen, torch.arange(len(tokens), device=tokens.ids.device))
    return SeveredForward(tokens, values, arriving, leaves)


def fitting(tokens: Tokens) -> AbstractContextManager[None]:
    """Within the block, memory that runs out is a refusal that names the batch, as it is in a forward."""
    return raising_out_of_memory(f"a batch of {len(tokens)} × {tokens.ids.shape[1]} tokens, with its gradients")


def _all(
    anatomy: Anatomy, asked: Sequence[Address], found: Sequence[Tensor | None], wanted: Sequence[Tensor], early: bool
) -> list[Tensor]:
    """Return every gradient; zeros behind what a metric of early activations reads, if it depends on some place."""
    if early and any(g is not None for g in found):
        return [torch.zeros_like(x) if g is None else g for g, x in zip(found, wanted, strict=True)]
    for a, g in zip(asked, found, strict=True):
        if g is None and any(map(packed, anatomy.hf.parameters())):
            why = "no gradient arrives there, and quantised weights may pass none on"
            raise Refused(f"gradient at {a}", why, "load the model unquantised, or patch (`patching.activation`)")
        if g is None:
            raise Refused(f"gradient at {a}", "the metric does not depend on it", "choose an earlier site")
    return [g for g in found if g is not None]


def _weighted(place: Address, weight: float, closed: set[Address]) -> Callable[[Tensor], Tensor]:
    """Multiply the gradient of a place by `weight`, or by zero while the place is closed."""

    def see(x: Tensor) -> Tensor:
        if x.requires_grad:
            x.register_hook(lambda g: g * (0.0 if place in closed else weight))
        return x

    return see


@contextmanager
def _propagating(anatomy: Anatomy, layers: range) -> Iterator[None]:
    """Within the block, norms, and the activation functions and gates of these layers, hand back relevance."""
    if anatomy.family.post_norm:
        raise Refused(
            f"relevance in a {anatomy.family.name} model", "its residual stream itself is normed", "use plain gradients"
        )
    rules = {p: see for i in layers for p, see in _activation_rules(anatomy, i).items()}
    with ExitStack() as stack:
        for module in _norms(anatomy):
            stack.callback(module.register_forward_hook(_constant_scale, with_kwargs=True).remove)
        stack.enter_context(taps.attached(anatomy, rules, gradient=True))
        yield


def _norms(anatomy: Anatomy) -> list[nn.Module]:
    """Return every norm of the blocks (those of queries and keys included), and the final one; none where it was
    taken out.
    """
    found = [anatomy.part(i, n) for i in range(len(anatomy.blocks)) for n in ("ln1", "ln2", "ln1_post", "ln2_post")]
    leaves = [m for b in anatomy.blocks for m in b.modules() if not any(True for _ in m.children())]
    found += [m for m in leaves if (p := list(m.parameters())) and all(t.ndim == 1 for t in p)]
    return [m for m in dict.fromkeys([*found, anatomy.top("final")]) if m is not None and type(m) is not nn.Identity]


def _constant_scale(module: nn.Module, args: Any, kw: Any, out: Tensor) -> Tensor | None:
    """Run a norm, with the gradient of its linear part only."""
    x = args[0] if args else kw["hidden_states"]
    if not (torch.is_grad_enabled() and x.requires_grad):
        return None
    norm = measure(module, x.shape[-1])
    step = wide(x) - wide(x).detach()  # zero, with a gradient
    return out.detach() + norm.linear(step, norm.scale(x.detach())).to(out.dtype)


def _activation_rules(anatomy: Anatomy, layer: int) -> dict[Address, Callable[[Tensor], Tensor]]:
    """Identity rule for the activation function, half rule for a gate: both at the neurons of one layer."""
    sources = [a for n in ("mlp_pre", "mlp_gate") if port(anatomy, a := Address(n, layer)) is not None]
    neurons = Address("mlp_post", layer)
    if not sources or port(anatomy, neurons) is None:
        raise Refused(
            f"relevance through the MLP of layer {layer}",
            "its activation function is not at a named place",
            "use patching.attribution, which needs only gradients",
        )
    seen: dict[Address, Tensor] = {}

    def note(place: Address) -> Callable[[Tensor], Tensor]:
        def see(x: Tensor) -> Tensor:
            seen[place] = x
            return x

        return see

    def spread(y: Tensor) -> Tensor:
        new = y.detach()
        for x in (seen.pop(a) for a in sources):
            ratio = (wide(y) / wide(x)).nan_to_num(0.0, 0.0, 0.0).detach()
            new = new + (ratio * wide(x - x.detach()) / len(sources)).to(y.dtype)
        return new

    return {**{a: note(a) for a in sources}, neurons: spread}
