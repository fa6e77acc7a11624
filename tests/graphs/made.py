"""Tiny models in float64 and dictionaries of their MLPs, and the frozen model that interventions measure by hand."""

from __future__ import annotations

from functools import cache

import torch

import cutaway as ca
from cutaway.core.address import Address
from cutaway.core.node import Error, Latent, parse_node
from cutaway.dictionaries.dictionary import Dictionary
from cutaway.models.anatomy.norms import measure
from cutaway.models.edits.library import Add, Freeze
from cutaway.models.model import Model
from tests.dictionaries.common import dictionary
from tests.models.tiny import build

IDS = torch.tensor([[5, 9, 2, 11, 7, 3]])
#: families that differ in what a linear map of the stream goes through
FAMILIES = ("gpt2", "gpt_neox_parallel", "llama_gqa", "qwen3", "gemma2", "olmo2", "granite")


class Exact(torch.nn.Module):
    """A root-mean-square norm in the dtype of its input: transformers' own compute in float32."""

    def __init__(self, norm: torch.nn.Module):
        super().__init__()
        found = measure(norm, len(norm.weight))
        self.weight, self.eps = torch.nn.Parameter(found.weight, requires_grad=False), found.eps

    def forward(self, x):
        return self.weight * x * (x.pow(2).mean(-1, keepdim=True) + self.eps).rsqrt()


@cache
def model(name: str) -> Model:
    """A tiny model in float64, its norms too."""
    hf = build(name).double()
    for parent in list(hf.modules()):
        for key, child in list(parent.named_children()):
            if type(child).__name__.endswith("RMSNorm"):
                setattr(parent, key, Exact(child))
    return ca.load(hf)


@cache
def transcoders(name: str, kind: str = "per layer", gate: str = "relu") -> Dictionary:
    """Random transcoders of every MLP: per layer with a skip or "plain", or cross-layer with skips within and between
    layers.
    """
    n, width = model(name).shape.n_layers, model(name).shape.d_model
    ins, outs = [f"mlp_in.{i}" for i in range(n)], [f"mlp_out.{i}" for i in range(n)]
    widths = dict.fromkeys([*ins, *outs], width)
    if kind in ("per layer", "plain"):
        skips = [(ins[1], outs[1])] if kind == "per layer" else []
        return dictionary([(12, [ins[i]], [outs[i]]) for i in range(n)], widths, gate, skips)
    blocks = [(12, [ins[i]], outs[i:]) for i in range(n)]
    return dictionary(blocks, widths, gate, [(ins[0], outs[1]), (ins[1], outs[1])])


SITES = ["resid_pre", "mlp_in", "mlp_out", "pattern", "mlp_pre", "mlp_gate", "mlp_post"]


class FrozenByHand:
    """The model with hooks that hold norms' divisors, patterns and MLP outputs as they are in the plain run.

    Only a skip of the dictionary still follows what its MLP reads. Knows nothing of sweeps. In place of patterns it
    may hold another site of attention.
    """

    def __init__(self, m: Model, skips: dict[tuple[str, str], torch.Tensor], leading: int, held: str = "pattern"):
        self.model, self.skips, self.leading, self.site = m, skips, leading, held
        gated, hooks = m.anatomy.part(0, "gate") is not None, []
        self.held: dict[torch.nn.Module, torch.Tensor] = {}  # what each norm of the stream read in the plain run
        for module in self._norm_modules():
            hooks.append(module.register_forward_hook(lambda n, args, out: self.held.update({n: args[0]})))
        self.acts = m.capture(IDS, [s for s in {*SITES, held} if gated or s != "mlp_gate"])
        for h in hooks:
            h.remove()
        self.before = self.reads({})

    def _norm_modules(self):
        a, n = self.model.anatomy, self.model.shape.n_layers
        found = [a.part(i, name) for i in range(n) for name in ("ln1", "ln2", "ln1_post", "ln2_post")]
        found += [getattr(a.part(i, "attn"), name, None) for i in range(n) for name in ("q_norm", "k_norm")]
        return list(dict.fromkeys(m for m in (*found, a.top("final")) if m is not None))

    def reads(self, added: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """What every MLP and the unembedding read, with vectors added at `resid_pre.0@q` or `mlp_out.i@q`."""
        a, hooks, inputs = self.model.anatomy, [], {}

        def norm(module, args, out):
            form = measure(module, self.held[module].shape[-1])
            y = form.linear(args[0], form.scale(self.held[module])) + form.bias
            inputs.update({"final": y} if module is a.top("final") else {})
            return y

        def mlp_in(module, args, i):
            inputs[f"mlp_in.{i}"] = args[0]

        def mlp_out(module, args, out, i):
            y = self.acts[f"mlp_out.{i}"].clone()
            for (read, write), matrix in self.skips.items():
                if write == f"mlp_out.{i}":
                    step = (inputs[read] - self.acts[read]) @ matrix.T
                    step[:, : self.leading] = 0.0
                    y = y + step
            for q in range(IDS.shape[1]):
                y[0, q] += added.get(f"mlp_out.{i}@{q}", 0.0)
            y = y / a.multiplier
            return (y, *out[1:]) if isinstance(out, tuple) else y

        for module in self._norm_modules():
            hooks.append(module.register_forward_hook(norm))
        for i in range(self.model.shape.n_layers):
            mlp, last = a.part(i, "mlp"), a.part(i, "ln2_post") or a.part(i, "mlp")
            hooks.append(mlp.register_forward_pre_hook(lambda m, args, i=i: mlp_in(m, args, i)))
            hooks.append(last.register_forward_hook(lambda m, args, out, i=i: mlp_out(m, args, out, i)))
        patterns = [Freeze(f"{self.site}.{i}", self.acts) for i in range(self.model.shape.n_layers)]
        embeds = [Add(where, v) for where, v in added.items() if where.startswith("resid_pre")]
        try:
            self.seen = self.model.capture(IDS, ["q", "k"], [*patterns, *embeds])
        finally:
            for h in hooks:
                h.remove()
        return {n: x[0] for n, x in inputs.items()}

    def moved(self, added: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """By how much the reads move."""
        now = self.reads(added)
        return {n: x - self.before[n] for n, x in now.items()}


def contribution(g, m, d, by_hand, s):
    """What a source writes, by place."""
    node, act = parse_node(g.labels["node"][s]), g.activation[s]
    acts = by_hand.acts
    if isinstance(node, Address) and node.site == "embed":
        pos = m.capture(IDS, "pos_embed")["pos_embed"][0, node.position] if m.anatomy.top("pos") is not None else 0.0
        return {f"resid_pre.0@{node.position}": acts["resid_pre.0"][0, node.position] - pos}
    if isinstance(node, Latent):
        written = d.decoder[node.block]
        return {f"{site}@{node.position}": act * rows[node.index] for site, rows in written.items()}
    if isinstance(node, Error):
        built = d.forward({r: acts[r][0] for r in d.reads})
        site, q = f"mlp_out.{node.block}", node.position
        return {f"{site}@{q}": acts[site][0, q] - built[site][q]}
    post = acts[f"mlp_post.{node.layer}"][0, node.position]
    out, behind = act * m.weights.mlp_out[node.layer][node.unit].detach(), m.anatomy.part(node.layer, "ln2_post")
    if behind is not None:
        norm = m.anatomy.norm(behind)
        whole = post @ m.weights.mlp_out[node.layer].detach() + m.weights.mlp_out_bias[node.layer].detach()
        out = norm.linear(out, norm.scale(whole))
    return {f"mlp_out.{node.layer}@{node.position}": m.anatomy.multiplier * out}
