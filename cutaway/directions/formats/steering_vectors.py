"""Files of the steering-vectors library: what a `SteeringVector` holds, in PyTorch's own format.

That is `layer_activations`, a vector per layer, and `layer_type`, the module whose output it is added to. Whole objects
(`torch.save(vector)`) are read without their class, and no code in them is run; what is written here are the fields
alone: `SteeringVector(**torch.load(path, weights_only=True))`.
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
    with reading(path, "it is no steering vector"):
        site, layers = SITES[held(found, "layer_type", str, "decoder_block")], held(found, "layer_activations", dict)
        return {f"{site}.{int(i)}": v.reshape(-1).float() for i, v in sorted(layers.items())}, ""


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
