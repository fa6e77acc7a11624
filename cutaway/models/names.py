"""Foreign vocabularies, translated to the house's addresses. Foreign names occur in this file only."""

from __future__ import annotations

import re

from cutaway.core.address import Address, parse
from cutaway.core.refuse import Refused

# TransformerLens hook names inside a block; the layer is written before them.
_BLOCK = {
    "hook_resid_pre": "resid_pre",
    "hook_resid_mid": "resid_mid",
    "hook_resid_post": "resid_post",
    "hook_attn_in": "attn_in",
    "hook_mlp_in": "mlp_in",
    "hook_attn_out": "attn_out",
    "hook_mlp_out": "mlp_out",
    "attn.hook_rot_q": "q",
    "attn.hook_q": "q",
    "attn.hook_rot_k": "k",
    "attn.hook_k": "k",
    "attn.hook_v": "v",
    "attn.hook_attn_scores": "scores",
    "attn.hook_pattern": "pattern",
    "attn.hook_z": "z",
    "attn.hook_result": "head_out",
    "mlp.hook_post": "mlp_post",
    "ln1.hook_scale": "ln1.scale",
    "ln2.hook_scale": "ln2.scale",
}
_WHOLE = {"hook_embed": "embed", "hook_pos_embed": "pos_embed", "ln_final.hook_scale": "final.scale"}
_FORM = re.compile(r"blocks\.(\d+)\.(.+)")
# In gated MLPs TransformerLens calls the activation's argument "pre" and the linear branch "pre_linear".
_MLP = {"mlp.hook_pre": ("mlp_pre", "mlp_gate"), "mlp.hook_pre_linear": (None, "mlp_pre")}


def from_transformer_lens(name: str, gated: bool = False) -> Address:
    """The address of a TransformerLens hook name such as `blocks.5.attn.hook_z`.

    Raises:
        Refused: a name that has no counterpart here.
    """
    if name in _WHOLE:
        return parse(_WHOLE[name])
    found = _FORM.fullmatch(name)
    if found:
        layer, rest = int(found[1]), found[2]
        site = _MLP[rest][gated] if rest in _MLP else _BLOCK.get(rest)
        if site is not None:
            return Address(site, layer)
    raise Refused(f"hook name {name!r}", "it has no counterpart among the sites", "see docs/sites.md")


def to_transformer_lens(address: Address, gated: bool = False) -> str:
    """The TransformerLens hook name of a site at a layer.

    Raises:
        Refused: that vocabulary has no name for it.
    """
    if address.layer is None:
        found = {v: k for k, v in _WHOLE.items()}.get(address.site)
        if found is not None:
            return found
    else:
        pairs = {v[gated]: k for k, v in _MLP.items() if v[gated]} | {v: k for k, v in _BLOCK.items()}
        if address.site in pairs:
            return f"blocks.{address.layer}.{pairs[address.site]}"
    raise Refused(f"address {address}", "TransformerLens has no name for it", "use the address itself")
