"""Tuned lenses: an affine translator per depth, between the residual stream and the final norm, and their files.

The stream `x` of a depth is read as `x + weight @ x + bias` (Belrose et al. 2023, arXiv:2303.08112), so that zeros are
the logit lens. A lens is a folder with `config.json` and `params.safetensors`; folders of EleutherAI's tuned-lens
library, with `params.pt` instead, are read too, without running any code in them.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from cutaway.core.files import held, read_json, reading
from cutaway.core.pt import read_pt
from cutaway.core.record import note
from cutaway.core.repeat import Made, called
from cutaway.core.stats import generator
from cutaway.core.subject import REQUIRED, Flag, Subject, register
from cutaway.lenses.lens import CONFIG, Lens, about_model, read_own
from cutaway.models.model import Model

FOREIGN = "params.pt"
LOGIT = "logit"  # what the command line calls the lens that translates nothing
_PART = re.compile(r"(\d+)\.(weight|bias)")  # of a parameter in a foreign file


@dataclass(frozen=True, eq=False)
class TunedLens(Lens):
    """Affine translators of the residual stream, one per depth but the last, which the model unembeds itself.

    Attributes:
        weight: what is added per unit of the stream [depth d_model d_model]; zeros leave it as it is.
        bias: what is added to it in any case [depth d_model].
        about: the model that the lens was trained on (`model`), or the hash of its unembedding (`unembed_hash`), and
            how it was trained, JSON-ready.
        made: how it can be opened again; None if it is in no file.
    """

    kind = "tuned lens"
    weight: Float[Tensor, "depth d_model d_model"]
    bias: Float[Tensor, "depth d_model"]
    about: Mapping[str, Any] = field(default_factory=dict)
    made: Made | None = field(default=None, repr=False)

    def tensors(self) -> dict[str, Tensor]:
        return {"weight": self.weight, "bias": self.bias}

    def mapped(self, depth: int, x: Float[Tensor, "*rest d_model"]) -> Float[Tensor, "*rest d_model"]:
        return translated(x, self.weight[depth], self.bias[depth])

    def pulled(self, depth: int, readers: Float[Tensor, "*rest d_model"]) -> Float[Tensor, "*rest d_model"]:
        return readers + readers @ self.weight[depth].to(readers.device, readers.dtype)

    def check(self, model: Model) -> None:
        super().check(model)
        ours = _unembed_hash(model) if self.about.get("unembed_hash") else None
        if ours != self.about.get("unembed_hash"):
            note(
                "the hash of the unembedding is not the one the lens was trained with: another model, or another dtype"
            )


def translated(
    x: Float[Tensor, "*rest d_model"], weight: Float[Tensor, "d_model d_model"], bias: Float[Tensor, "d_model"]
) -> Float[Tensor, "*rest d_model"]:
    """Return streams of one depth as its translator gives them on, where they are and in their dtype."""
    return x + torch.nn.functional.linear(x, weight.to(x.device, x.dtype), bias.to(x.device, x.dtype))


def identity_lens(model: Model) -> TunedLens:
    """Return the lens that translates nothing, with which training begins; it reads what the logit lens reads."""
    layers, width = model.shape.n_layers, model.shape.d_model
    lens = TunedLens(torch.zeros(layers, width, width), torch.zeros(layers, width), {"model": about_model(model)})
    needs = {"model": model.made.python if model.made is not None else ""}
    how = Made(called("ca.lenses.identity_lens", "model"), {"": LOGIT}, needs=needs)
    return replace(lens, made=how.of(lens, _look))


def open_lens(folder: str | Path) -> TunedLens:
    """Open a folder that `TunedLens.save` or EleutherAI's tuned-lens library wrote.

    Raises:
        Refused: no such folder, another kind of file, or parameters that are code.
    """
    folder = Path(folder).expanduser()
    config = read_json(folder / CONFIG)
    with reading(folder / CONFIG):
        if (own := read_own(folder, TunedLens.kind)) is not None:
            tensors, about = own
        elif isinstance(config, dict) and config.get("lens_type", "linear_tuned_lens") == "linear_tuned_lens":
            tensors, about = _foreign(folder, config)
        else:
            raise ValueError("it describes no tuned lens")
        lens = TunedLens(tensors["weight"], tensors["bias"], about)
        if lens.weight.shape != (*lens.bias.shape, lens.bias.shape[-1]):
            raise ValueError(f"weights {list(lens.weight.shape)} with biases {list(lens.bias.shape)}")
    whole = str(folder.absolute())
    return replace(lens, made=Made(called("ca.lenses.open_lens", repr(whole)), {"": whole}).of(lens, _look))


def _foreign(folder: Path, config: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read EleutherAI's layout: parameters `LAYER.weight` and `LAYER.bias`, in a pickle that may hold only tensors."""
    width, layers = held(config, "d_model", int), held(config, "num_hidden_layers", int)
    found = read_pt(folder / FOREIGN)
    names = {f"{i}.{n}" for i in range(layers) for n in ("weight", "bias")[: 1 + held(config, "bias", bool, True)]}
    if odd := sorted(names ^ found.keys()):
        raise ValueError(f"{FOREIGN} and the numbers of layers differ: {', '.join(map(str, odd[:3]))}")
    weight = [found[f"{i}.weight"] for i in range(layers)]
    bias = [found.get(f"{i}.bias", torch.zeros(width)) for i in range(layers)]
    known = ("base_model_name_or_path", "base_model_revision", "unembed_hash")
    about = {n: config[n] for n in known if config.get(n)} | {"format": "EleutherAI tuned-lens"}
    return {"weight": torch.stack(weight).float(), "bias": torch.stack(bias).float()}, about


def _unembed_hash(model: Model) -> str:
    """Return the hash that EleutherAI's library gives the unembedding; empty for a dtype that it has no bytes of."""
    weight = getattr(model.anatomy.unembed, "weight", None)
    if weight is None or weight.is_meta or weight.dtype == torch.bfloat16:
        return ""
    return hashlib.sha256(weight.detach().cpu().contiguous().numpy().tobytes()).hexdigest()


def _look(lens: TunedLens) -> dict[str, Any]:
    return {n: (t.data_ptr(), t._version) for n, t in (("weight", lens.weight), ("bias", lens.bias))}


def _open(flags: Mapping[str, Any], opened: Mapping[str, Any]) -> TunedLens:
    return identity_lens(opened["model"]) if flags["lens"] == LOGIT else open_lens(flags["lens"])


def _example(opened: Mapping[str, Any]) -> TunedLens:
    """Return translators drawn at random, not far from the identity."""
    lens, g = identity_lens(opened["model"]), generator(6)
    weight, bias = (0.1 * torch.randn(t.shape, generator=g) / t.shape[-1] ** 0.5 for t in (lens.weight, lens.bias))
    return replace(lens, weight=weight, bias=bias)


register(
    Subject(
        "lens",
        TunedLens,
        (Flag("lens", str, REQUIRED, "a folder of `cutaway lenses train` or of EleutherAI's library, or `logit`"),),
        _open,
        _example,
        needs=("model",),
        advice="ca.lenses.open_lens(folder)",
    )
)
