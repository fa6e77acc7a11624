"""Foreign vocabularies, translated to the house's addresses. Foreign names occur in this file only."""

from __future__ import annotations

import re

from cutaway.core.address import Address, parse
from cutaway.core.refuse import Keyword, Refused

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
_ANY_FORM = re.compile(r"(?:blocks\.(\d+|\*)\.)?(.*)", re.DOTALL)
# In gated MLPs TransformerLens calls the activation's argument "pre" and the linear branch "pre_linear".
_MLP = {"mlp.hook_pre": ("mlp_pre", "mlp_gate"), "mlp.hook_pre_linear": (None, "mlp_pre")}


def from_transformer_lens(name: str, gated: bool = False) -> Address:
    """Return the address of a TransformerLens hook name such as `blocks.5.attn.hook_z`.

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


def meant(name: str, gated: bool = False) -> str:
    """Return the address that a TransformerLens name stands for; empty if it is none.

    `blocks.3.hook_resid_post@-1` is `resid_post.3@-1`; a name without its block, `hook_z`, is the site alone.
    """
    body, at, position = name.partition("@")
    layer, rest = _ANY_FORM.fullmatch(body).groups()  # type: ignore[union-attr]
    bare = {k.rpartition(".")[2]: v for k, v in _BLOCK.items() if k not in ("ln1.hook_scale", "ln2.hook_scale")}
    site = _WHOLE.get(body) or (_MLP[rest][gated] if rest in _MLP else _BLOCK.get(rest) or bare.get(rest)) or ""
    return site and f"{site}{f'.{layer}' if layer else ''}{at}{position}"


def parsed(text: str | Address, gated: bool = False) -> Address:
    """Return the address written as `text`; a name that another tool gives to a site is refused with the site meant.

    Raises:
        Refused: unknown site, a missing or surplus index, or an asterisk.
    """
    try:
        return parse(text)
    except Refused as refusal:
        raise foreign(refusal, text, gated) from None


def foreign(refusal: Refused, text: object, gated: bool = False) -> Refused:
    """Return a refusal of an address, in better words where `text` is the name that another tool gives to a site."""
    site = meant(text, gated) if isinstance(text, str) else ""
    if not site:
        return refusal
    return Refused(f"site {text!r}", f"TransformerLens calls it so; here it is {site}", f"write {site}")


def to_transformer_lens(address: Address, gated: bool = False) -> str:
    """Return the TransformerLens hook name of a site at a layer.

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


# --- words in the files of other tools' dictionaries

FLATTENED_HEADS = "hook_z"  # said of a dictionary that reads all heads of z side by side
SITE_IN, SITE_OUT, SITES_IN, SITES_OUT, SITES_BOTH = (
    "hook_point_in", "hook_point_out", "hook_points_in", "hook_points_out", "hook_points",
)  # fmt: skip
# circuit-tracer wraps MLPs: HookedTransformer's `hook_mlp_in` is the stream before the norm, and runs only on request.
WRAPPED = {"mlp_in": "mlp.hook_in"}
OLDER_KEYS = {
    "hook_point": "hook_name",
    "hook_point_head_index": "hook_head_index",
    "activation_fn_str": "activation_fn",
}
# What a norm hands on before its weight is multiplied in; no site, but an affine function of one.
_BEFORE_WEIGHT = {"ln1.hook_normalized": "attn_in", "ln2.hook_normalized": "mlp_in"}
_SAME_PLACE = {
    "hook_mlp_in": "mlp_in", "mlp.hook_in": "mlp_in", "mlp.hook_out": "mlp_out", "attn.hook_in": "attn_in",
    "attn.hook_out": "attn_out",
}  # fmt: skip
_MODULE = re.compile(r"(?:.*\.)?(\d+)(?:\.(\w+))?")
_OUTPUTS = {None: "resid_post", "mlp": "mlp_out", "attn": "attn_out", "self_attn": "attn_out", "attention": "attn_out"}


def site_of_hook(name: str) -> tuple[Address, bool]:
    """Return the site that a dictionary's file names, and whether it is meant before the norm's weight is multiplied
    in.

    Raises:
        Refused: a name that has no counterpart here.
    """
    found = _FORM.fullmatch(name)
    if found and found[2] in _BEFORE_WEIGHT:
        return Address(_BEFORE_WEIGHT[found[2]], int(found[1])), True
    if found and found[2] in _SAME_PLACE:
        return Address(_SAME_PLACE[found[2]], int(found[1])), False
    return from_transformer_lens(name), False


def hook_in_layer(layer: int, name: str) -> str:
    """Return the full name of a hook inside a block."""
    return f"blocks.{layer}.{name}"


def hook_of_site(site: str | Address) -> str:
    """Return the name under which a site is entered in a dictionary's file.

    Raises:
        Refused: that vocabulary has no name for it.
    """
    address = parse(site)
    return to_transformer_lens(Address(address.site, address.layer))


def site_of_module(path: str) -> Address:
    """Return the site that the output of a Hugging Face module is: `layers.10` the stream after it, `layers.10.mlp` its
    MLP.

    Raises:
        Refused: another module.
    """
    found = _MODULE.fullmatch(path)
    if found and found[2] in _OUTPUTS:
        return Address(_OUTPUTS[found[2]], int(found[1]))
    raise Refused(f"module {path!r}", "its output is no site known by that name", ("give ", Keyword("site")))


# Ends of edges as ACDC and TransformerLens name them, with the site that each is: of heads a tensor's last index.
_LAYER, _INDEX = r"blocks\.(?P<layer>\d+)\.", r"\[(?::, ?)*(?P<head>\d+)\]"
EDGE_SOURCES = (
    (r"(?:blocks\.0\.)?hook_resid_pre(?:\[:\])?|hook_embed(?:\[:\])?", "embed"),
    (rf"{_LAYER}attn\.hook_(?:result|z){_INDEX}", "z"),
    (rf"{_LAYER}hook_mlp_out(?:\[:\])?", "mlp_out"),
)
EDGE_TARGETS = (
    (r"blocks\.\d+\.hook_resid_post(?:\[:\])?", "logits"),
    (rf"{_LAYER}hook_(?P<letter>[qkv])_input{_INDEX}", "_in"),
    (rf"{_LAYER}hook_mlp_in(?:\[:\])?", "mlp_in"),
)
