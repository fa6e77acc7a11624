"""Components: the embeddings, heads and MLPs, each a writer with the readers whose values it is made of."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Bool
from torch import Tensor, tensor, zeros_like

from cutaway.core.address import Address
from cutaway.core.refuse import Refused
from cutaway.models.edits.wiring import Wiring


def components(wiring: Wiring) -> list[str]:
    """Return the name of each writer's component: the writer's own."""
    return [str(u) for u in wiring.writers]


def heads_per_group(wiring: Wiring) -> int:
    """Return how many heads share keys and values."""
    heads = sum(u.place == Address("z", 0) for u in wiring.writers)
    return heads // sum(v.place == Address("k_in", 0) for v in wiring.readers)


def belongs(wiring: Wiring) -> Bool[Tensor, "writer reader"]:
    """Return True where a reader is of the component that writes: a head's queries, its group's keys and values, the
    same MLP's input.
    """
    share = heads_per_group(wiring)

    def own(u: Address, v: Address) -> bool:
        if u.layer is None or u.layer != v.layer:
            return False
        if u.site == "mlp_out" or v.site == "mlp_in":
            return (u.site, v.site) == ("mlp_out", "mlp_in")
        return v.unit == u.unit if v.site == "q_in" else v.unit == (u.unit or 0) // share

    return tensor([[own(u, v) for v in wiring.readers] for u in wiring.writers])


def inside(wiring: Wiring, mask: Bool[Tensor, "writer reader"]) -> list[int]:
    """Return the heads and MLPs that a circuit hears, as indices of writers.

    Raises:
        Refused: it hears none.
    """
    members = [u for u, on in enumerate(mask.any(1).tolist()) if on and u]
    if not members:
        raise Refused("circuit of no component", "no edge of it leaves a head or MLP", "give a larger circuit")
    return members


def touching(of: Bool[Tensor, "writer reader"], component: int) -> Bool[Tensor, "writer reader"]:
    """Return all pairs of which a component is the writer or has the reader."""
    out = zeros_like(of)
    out[component] = True
    out[:, of[component]] = True
    return out


def without(
    of: Bool[Tensor, "writer reader"], mask: Bool[Tensor, "writer reader"], cut: Sequence[int]
) -> Bool[Tensor, "writer reader"]:
    """Return a circuit without the edges into and out of some components.

    Keys and values that heads share are cut where all of these heads are.
    """
    out = mask.clone()
    out[list(cut)] = False
    users = of.sum(0)
    out[:, (of[list(cut)].sum(0) == users) & (users > 0)] = False
    return out
