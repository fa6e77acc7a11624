"""The site table: every place in the forward pass that has a name.

One frozen row per site. Everything that must know about sites (addresses, taps, figures, docs, the self-check)
derives from this one table.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from cutaway.core.refuse import Refused, nearest

Scope = Literal["model", "layer"]


@dataclass(frozen=True)
class Site:
    """A named place in the forward pass.

    Attributes:
        name: the site's name in addresses.
        scope: "layer" if there is one per layer, "model" if there is one.
        axes: axis names of a captured tensor, in order.
        writable: True if edits may change it.
        note: short description for the docs.
    """

    name: str
    scope: Scope
    axes: str
    writable: bool
    note: str

    @property
    def head_axis(self) -> str | None:
        """`head`, `kv_head` or None: the axis that an address's head index selects."""
        return next((a for a in self.axes.split() if a in ("head", "kv_head")), None)

    @property
    def has_position(self) -> bool:
        """True if a position in the address selects along one axis of this site."""
        return "position" in self.axes.split()


_RESID = "batch position d_model"
_ATTN = "batch head q_pos k_pos"
_NEURON = "batch position neuron"
_CHANNEL = "batch position channel"
_GROUP = "batch position group state"

SITES: tuple[Site, ...] = (
    Site("embed", "model", _RESID, True, "token embedding, after the family's own scaling"),
    Site("pos_embed", "model", _RESID, True, "learned absolute position embedding (absent with rope or ALiBi)"),
    Site("resid_pre", "layer", _RESID, True, "residual stream entering the block"),
    Site("attn_in", "layer", _RESID, True, "what the attention reads: output of its norm, or the raw stream"),
    Site("q_in", "layer", "batch position head d_model", True, "attn_in as each head's W_Q reads it"),
    Site("k_in", "layer", "batch position kv_head d_model", True, "attn_in as each key-value head's W_K reads it"),
    Site("v_in", "layer", "batch position kv_head d_model", True, "attn_in as each key-value head's W_V reads it"),
    Site("q", "layer", "batch position head d_head", True, "queries as the scores see them (after rope and q-norm)"),
    Site("k", "layer", "batch position kv_head d_head", True, "keys as the scores see them (after rope and k-norm)"),
    Site("v", "layer", "batch position kv_head d_head", True, "values"),
    Site("scores", "layer", _ATTN, True, "attention logits, scaled, soft-capped and masked: the softmax's argument"),
    Site("pattern", "layer", _ATTN, True, "attention probabilities"),
    Site("z", "layer", "batch position head d_head", True, "pattern-weighted values, before W_O"),
    Site("head_out", "layer", "batch position head d_model", True, "z of one head through W_O, no bias, no post-norm"),
    Site("attn_out", "layer", _RESID, True, "what attention adds to the residual stream"),
    Site("resid_mid", "layer", _RESID, True, "residual stream between attention and MLP (absent in parallel blocks)"),
    Site("mlp_in", "layer", _RESID, True, "what the MLP reads: output of its norm, or the raw stream"),
    Site("mlp_pre", "layer", _NEURON, True, "W_in x: the activation's argument, or the linear branch of a gated MLP"),
    Site("mlp_gate", "layer", _NEURON, True, "W_gate x: the activation's argument in a gated MLP"),
    Site("mlp_post", "layer", _NEURON, True, "neuron activations: what W_out reads"),
    Site("router", "layer", "batch position expert", False, "router logits of a mixture of experts"),
    Site("mlp_out", "layer", _RESID, True, "what the MLP adds to the residual stream"),
    Site("ssm.in", "layer", _RESID, True, "what a state-space layer reads: output of its norm"),
    Site("ssm.x", "layer", _CHANNEL, True, "its input projection's x: what the convolution reads"),
    Site("ssm.gate", "layer", _CHANNEL, True, "its input projection's z: the gate's argument"),
    Site("ssm.conv", "layer", _CHANNEL, True, "x after convolution and activation: what the states take in"),
    Site("ssm.dt", "layer", "batch position ssm_head", True, "step size Δ of the recurrence, after softplus"),
    Site("ssm.B", "layer", _GROUP, True, "what each position writes into the states with"),
    Site("ssm.C", "layer", _GROUP, True, "what each position reads the states with"),
    Site("ssm.state", "layer", "batch position channel state", True, "recurrent state after each position"),
    Site("ssm.y", "layer", _CHANNEL, True, "output of the recurrence, D-skip included, before the gate"),
    Site("ssm.post", "layer", _CHANNEL, True, "y through the gate (and its norm): what the output projection reads"),
    Site("ssm.out", "layer", _RESID, True, "what a state-space layer adds to the residual stream"),
    Site("resid_post", "layer", _RESID, True, "residual stream leaving the block"),
    Site("ln1.scale", "layer", "batch position", True, "divisor of the norm before attention or state-space layer"),
    Site("ln2.scale", "layer", "batch position", True, "divisor of the norm before the MLP"),
    Site("final.scale", "model", "batch position", True, "divisor of the final norm"),
    Site("logits", "model", "batch position token", True, "unembedded output, after any softcap"),
)  # fmt: skip

WRITERS = ("attn_out", "mlp_out", "ssm.out")  # what layers add to the residual stream
BY_NAME: dict[str, Site] = {s.name: s for s in SITES}


def site(name: str) -> Site:
    """Return the row called `name`.

    Raises:
        Refused: no site has that name.
    """
    if name not in BY_NAME:
        bare = next((n for n in sorted(BY_NAME, key=len, reverse=True) if name.startswith((f"{n}.", f"{n}@"))), None)
        if bare is not None:
            why = "a site's bare name is needed here; layers, units and positions are all taken"
            raise Refused(f"site {name!r}", why, f"use {bare}")
        close = nearest(name, BY_NAME)
        raise Refused(
            f"site {name!r}",
            "no site has that name" + (f"; did you mean {close}?" if close else ""),
            f"use one of: {', '.join(BY_NAME)}",
        )
    return BY_NAME[name]
