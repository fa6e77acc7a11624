"""Neurons of MLPs as units of an attribution graph: a graph without a dictionary, and without error."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cutaway.core.address import Address
from cutaway.core.refuse import Refused
from cutaway.graphs.frozen import Behind, Frozen
from cutaway.graphs.units import Table, Units, Written, neuron_node
from cutaway.models.anatomy.norms import wide
from cutaway.models.model import Model

_CANDIDATES = 1 << 15  # most neurons that are columns of the graph; the others are sources all together


@dataclass(frozen=True)
class _Mlp:
    """The neurons of one layer in one run.

    Attributes:
        post: their activations.
        pre: argument of the activation function, or output of the linear branch of a gated MLP.
        gate: argument of the activation function of a gated MLP; None of a plain one.
        behind: the norm behind the MLP.
        rows: what a unit of each neuron's activation adds to the stream, but for `behind.factor`.
    """

    post: Float[Tensor, "position neuron"]
    pre: Float[Tensor, "position neuron"]
    gate: Float[Tensor, "position neuron"] | None
    behind: Behind
    rows: Float[Tensor, "neuron d_model"]

    def slopes(self) -> tuple[Float[Tensor, "position neuron"], Float[Tensor, "position neuron"] | None]:
        """Return the factors with which activations follow `pre` and `gate`: half of a / u and of a / g, or a / pre."""
        return _ratio(self.post, self.pre, self.gate), None if self.gate is None else 0.5 * _over(self.post, self.gate)


def _over(a: Tensor, b: Tensor) -> Tensor:
    return torch.where(b == 0, 0.0, a / torch.where(b == 0, 1.0, b))


def _ratio(post: Tensor, pre: Tensor, gate: Tensor | None) -> Tensor:
    return _over(post, pre) * (1.0 if gate is None else 0.5)


def neuron_sites(model: Model) -> tuple[str, ...]:
    """Return the sites that a graph over neurons reads.

    Raises:
        Refused: an MLP's neurons cannot be read.
    """
    what = f"attribution graph over the neurons of {model.name}"
    for i in range(model.shape.n_layers):
        if model.anatomy.part(i, "down") is None:
            raise Refused(what, f"the MLP of layer {i} has none that can be read", "give transcoders")
    sites = ["mlp_post", "mlp_pre", *(["mlp_gate"] if model.anatomy.part(0, "gate") is not None else [])]
    for name in (*sites, "weights.mlp_in", "weights.mlp_gate"):
        if why := model.disabled.get(name):
            raise Refused(what, f"{name} is disabled: {why}", "give transcoders")
    return tuple(sites)


class ActiveNeurons(Units):
    """The active neurons of one run.

    Of more than `_CANDIDATES`, those of the largest relevance for the targets are in the table: |activation · what a
    target reads of it| with all neurons linear (RelP), one pass down the layers.
    """

    def __init__(self, frozen: Frozen, leading: int, target: Float[Tensor, "d_model"]):
        """Set up neurons; `target` reads the stream behind the last layer at the last position."""
        self.frozen, self.leading = frozen, leading
        self._mlps = [self._mlp(i) for i in range(frozen.layers)]
        active = torch.stack([m.post != 0 for m in self._mlps])  # [layer, position, neuron]
        active[:, :leading] = False
        if int(active.sum()) > _CANDIDATES:
            active = self._relevant(active, target)
        self.table = Table.sorted([self._part(i, active[i]) for i in range(frozen.layers)])
        starts = self.table.starts(frozen.layers, frozen.width).tolist()
        self.written = [self._written(i, active[i], starts) for i in range(frozen.layers)]

    def readers(self, units: Int[Tensor, "row"]) -> Float[Tensor, "row d_model"]:
        t = self.table
        out = torch.empty(len(units), self.frozen.model.shape.d_model).to(t.value)
        for layer in t.layer[units].unique().tolist():
            mine = units[t.layer[units] == layer]
            rows = sum(s[:, None] * w[:, t.index[mine]].T for s, w, _ in self._branches(layer, mine))
            assert isinstance(rows, Tensor)
            out[t.layer[units] == layer] = self.frozen.mlp_readers(layer, rows, t.position[mine])
        return out

    def constants(self, units: Int[Tensor, "row"]) -> Float[Tensor, "row"]:
        t = self.table
        out = torch.empty(len(units)).to(t.value)
        for layer in t.layer[units].unique().tolist():
            mine, shift = units[t.layer[units] == layer], self.frozen.mlp_shift(layer)
            out[t.layer[units] == layer] = sum(
                s * (b[t.index[mine]] + shift @ w[:, t.index[mine]]) for s, w, b in self._branches(layer, mine)
            )
        return out

    def node(self, layer: int, index: int, position: int) -> Address:
        return neuron_node(layer, index, position)

    def _branches(self, layer: int, units: Int[Tensor, "row"]) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Return what the values of some neurons of a layer follow: a factor each, a matrix and a bias per branch."""
        t, m, w = self.table, self._mlps[layer], self.frozen.model.weights
        own = wide(w.mlp_in[layer].detach()), wide(w.mlp_in_bias[layer].detach())
        if m.gate is None:
            return [(torch.ones_like(t.value[units]), *own)]
        into, along = m.slopes()
        assert along is not None
        at = t.position[units], t.index[units]
        gate = wide(w.mlp_gate[layer].detach()), wide(w.mlp_gate_bias[layer].detach())
        return [(into[at], *own), (along[at], *gate)]

    def _mlp(self, i: int) -> _Mlp:
        f = self.frozen
        post, w = f.at(f"mlp_post.{i}"), f.model.weights
        gate = f.at(f"mlp_gate.{i}") if f.anatomy.part(i, "gate") is not None else None
        out = wide(w.mlp_out[i].detach())
        behind = f.behind_mlp(i, post @ out + wide(w.mlp_out_bias[i].detach()))
        return _Mlp(post, f.at(f"mlp_pre.{i}"), gate, behind, behind.rows(out))

    def _part(self, i: int, active: Bool[Tensor, "position neuron"]) -> Table:
        m = self._mlps[i]
        position, index = active.nonzero(as_tuple=True)
        value = (m.pre if m.gate is None else m.post)[position, index]
        return Table(torch.full_like(position, i), position, index, m.post[position, index], value)

    def _written(self, i: int, active: Bool[Tensor, "position neuron"], starts: list[list[int]]) -> Written:
        f, m, lead = self.frozen, self._mlps[i], self.leading
        inside = (torch.arange(f.width, device=active.device) >= lead)[:, None]
        own = m.behind.rows(wide(f.model.weights.mlp_out_bias[i].detach())[None])[0]
        others = (m.post * (~active)) @ m.rows * m.behind.factor[:, None]
        constant = own * m.behind.factor[:, None] + m.behind.constant
        vectors = [self._vectors(m, q, slice(starts[q][i], starts[q][i + 1])) for q in range(f.width)]
        whole = f.at(f"mlp_out.{i}")[:lead]
        return Written(i, i, vectors, torch.zeros_like(others), others * inside, constant * inside, whole)

    def _vectors(self, m: _Mlp, q: int, units: slice) -> Float[Tensor, "_ d_model"]:
        return m.rows[self.table.index[units]] * (self.table.activation[units, None] * m.behind.factor[q])

    def _relevant(
        self, active: Bool[Tensor, "layer position neuron"], target: Float[Tensor, "d_model"]
    ) -> Bool[Tensor, "layer position neuron"]:
        """Return the neurons of the largest relevance for the target, among the active ones."""
        f, w = self.frozen, self.frozen.model.weights
        g = torch.zeros(1, f.width, len(target)).to(target)
        g[0, -1] = target
        size = torch.zeros(active.shape).to(target)
        every = torch.arange(f.width, device=g.device)
        for i in reversed(range(f.layers)):
            m = self._mlps[i]
            seen = (g[0] * m.behind.factor[:, None]) @ m.rows.T  # [position, neuron]
            size[i] = (m.post * seen).abs()
            into, along = m.slopes()
            rows = (seen * into) @ wide(w.mlp_in[i].detach()).T
            if along is not None:
                rows = rows + (seen * along) @ wide(w.mlp_gate[i].detach()).T
            through = f.mlp_readers(i, rows, every)
            if f.anatomy.parallel:
                f.through_attention(i, g, 1)
                g[0] += through
            else:
                g[0] += through
                f.through_attention(i, g, 1)
        size = size.masked_fill(~active, -1.0)
        kept = torch.zeros_like(active).flatten()
        kept[size.flatten().topk(_CANDIDATES).indices] = True
        return kept.view_as(active)
