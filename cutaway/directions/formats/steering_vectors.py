"""Files of the steering-vectors library: what a `SteeringVector` holds, in PyTorch's own format.

That is `layer_activations`, a vector per layer, and `layer_type`, the module whose output it is added to. Whole objects
(`torch.save(vector)`) are read without their class, and no code in them is run; what is written here are the fields
alone: `SteeringVector(**torch.load(path, weights_only=True))`.

A bare tensor is a persona vector (Chen et al. 2025, arXiv:2507.21509), [layers + 1, d_model], with a row per hidden
state. Row 0 is the embedding, and row ℓ + 1 what leaves block ℓ. Behind the last block stands the final norm, so that
row is left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from cutaway.core.address import Address
from cutaway.core.files import held, reading
from cutaway.core.pt import read_pt, write_pt
from cutaway.core.refuse import Refused

#: the site that the output of a module is, by the library's name of it
SITES = {
    "decoder_block": "resid_post",
    "self_attn": "attn_out",
    "mlp": "mlp_out",
    "input_layernorm": "attn_in",
    "post_attention_layernorm": "mlp_in",
}


def read(path: Path) -> tuple[dict[str, Tensor], str]:
    """Return the vectors of a file by address; it does not say of which model.

    Raises:
        Refused: a damaged file, or one of something else.
    """
    found = read_pt(path, objects=True)
    if isinstance(bare := found.get(""), Tensor):
        return _persona(path, bare)
    with reading(path, "it is no steering vector"):
        site, layers = SITES[held(found, "layer_type", str, "decoder_block")], held(found, "layer_activations", dict)
        return {f"{site}.{int(i)}": v.reshape(-1).float() for i, v in sorted(layers.items())}, ""


def _persona(path: Path, rows: Tensor) -> tuple[dict[str, Tensor], str]:
    if rows.ndim != 2 or len(rows) < 3:
        why = f"its tensor is {list(rows.shape)}, and persona vectors are [layers + 1, d_model]"
        raise Refused(f"file {str(path)!r}", why, "give the file of one persona vector")
    names = ("resid_pre.0", *(f"resid_post.{i}" for i in range(len(rows) - 2)))
    return {name: row.float() for name, row in zip(names, rows[:-1], strict=True)}, ""


def write(vectors: Mapping[Address, Tensor], path: Path, family: str) -> Path:
    """Write the vectors of one site by layer.

    Raises:
        Refused: several sites, or one that the library has no name for.
    """
    sites = {a.site for a in vectors}
    kind = next((name for name, site in SITES.items() if {site} == sites), None)
    if kind is None or any(a.unit is not None for a in vectors):
        why = f"it holds one of {', '.join(SITES.values())}, and there is {', '.join(map(str, vectors))}"
        raise Refused(f"file {str(path)!r}", why, "select the addresses of one such site, or write .safetensors")
    layers = {a.layer: v.detach().float().cpu().clone() for a, v in vectors.items()}
    return write_pt(path, {"layer_activations": layers, "layer_type": kind})
