"""Jacobian lenses: the mean Jacobian of the last residual stream with respect to that of each depth, and their files.

The stream `h` of a depth is read as `weight @ h`. Entry [i, j] of `weight` is the mean over contexts, and over their
positions p, of Σ over p' ≥ p of ∂ last[p', i] / ∂ h[p, j]; the last stream is that before the final norm. Both p and p'
leave out the first positions of a context and its last. A lens is a folder as that of a tuned lens; files of
Anthropic's `jlens` library, as Neuronpedia publishes them, are read too, without running any code in them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from cutaway.core.files import held, reading
from cutaway.core.pt import read_pt
from cutaway.core.refuse import Refused
from cutaway.core.repeat import Made, called
from cutaway.core.stats import generator
from cutaway.core.subject import REQUIRED, Flag, Subject, register
from cutaway.lenses.lens import CONFIG, Lens, about_model, read_own


@dataclass(frozen=True, eq=False)
class JacobianLens(Lens):
    """Mean Jacobians of the last residual stream, one per depth but the last, where it is the identity.

    Attributes:
        weight: the mean Jacobian of each depth [depth d_model d_model].
        error: the standard error of each, from halves of the contexts, as a share of its norm [depth]; NaN of one, and
            of files that do not say it.
        same_position: the share of each that is the effect on the position itself (p' = p), the rest being that on
            later ones [depth]; it may be negative.
        same_position_interval: 95 %, over contexts [depth bound].
        about: the model that the lens was estimated on (`model`), and on how many contexts of what, JSON-ready.
        made: how it can be opened again; None if it is in no file.
    """

    kind = "Jacobian lens"
    weight: Float[Tensor, "depth d_model d_model"]
    error: Float[Tensor, "depth"]
    same_position: Float[Tensor, "depth"]
    same_position_interval: Float[Tensor, "depth bound"]
    about: Mapping[str, Any] = field(default_factory=dict)
    made: Made | None = field(default=None, repr=False)

    def tensors(self) -> dict[str, Tensor]:
        return {n: getattr(self, n) for n in _shapes(0, 0)}

    def mapped(self, depth: int, x: Float[Tensor, "*rest d_model"]) -> Float[Tensor, "*rest d_model"]:
        return torch.nn.functional.linear(x, self.weight[depth].to(x.device, x.dtype))

    def pulled(self, depth: int, readers: Float[Tensor, "*rest d_model"]) -> Float[Tensor, "*rest d_model"]:
        return readers @ self.weight[depth].to(readers.device, readers.dtype)


def open_jacobian_lens(folder: str | Path) -> JacobianLens:
    """Open a folder that `JacobianLens.save` wrote, or a `.pt` file of the `jlens` library.

    Such a file has no Jacobian of the embedding, which is then read by the logit lens, and says nothing of errors.

    Raises:
        Refused: no such folder or file, another kind of file, one with code, or one that leaves out layers.
    """
    folder = Path(folder).expanduser()
    published = folder.suffix == ".pt"
    with reading(folder if published else folder / CONFIG):
        lens = _published(folder) if published else _own(folder)
    whole = str(folder.absolute())
    return replace(lens, made=Made(called("ca.lenses.open_jacobian_lens", repr(whole)), {"": whole}).of(lens, _look))


def _own(folder: Path) -> JacobianLens:
    """Read a folder that `JacobianLens.save` wrote."""
    if (own := read_own(folder, JacobianLens.kind)) is None:
        raise ValueError("it describes no Jacobian lens")
    tensors, about = own
    shapes = {n: tuple(tensors[n].shape) for n in _shapes(0, 0)}
    if shapes != _shapes(*shapes["weight"][:2]):
        raise ValueError(f"its numbers have the shapes {shapes}")
    weight, error, share, interval = (tensors[n] for n in shapes)
    return JacobianLens(weight, error, share, interval, about)


def _published(path: Path) -> JacobianLens:
    """Read a file of the `jlens` library: `J`, a matrix per block whose output it reads, and on how much it was fitted.

    The last block has none, as its output is the last stream itself.
    """
    found = read_pt(path)
    each, width = held(found, "J", dict), held(found, "d_model", int)
    if sorted(each) != [*range(len(each))] or not each:
        layers = f"has Jacobians of the layers {', '.join(map(str, each)) or 'none'}"
        raise Refused(f"lens {str(path)!r}", f"it {layers}, not of all up to one", "give a lens that leaves out none")
    if any(tuple(t.shape) != (width, width) for t in each.values()):
        raise Refused(f"lens {str(path)!r}", f"its matrices are not {width} × {width}", "give one of a single stream")
    weight = torch.stack([torch.eye(width), *(each[i].float() for i in range(len(each)))])
    unknown, said = torch.full((len(weight),), math.nan), {"format": "jlens", "embedding": "read by the logit lens"}
    about = {"estimation": said | {"contexts": held(found, "n_prompts", int)}}
    return JacobianLens(weight, unknown, unknown.clone(), unknown[:, None].repeat(1, 2), about)


def _shapes(depth: int, width: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the numbers of a lens, by name and in order."""
    return {
        "weight": (depth, width, width),
        "error": (depth,),
        "same_position": (depth,),
        "same_position_interval": (depth, 2),
    }


def _look(lens: JacobianLens) -> dict[str, Any]:
    return {n: (t.data_ptr(), t._version) for n, t in lens.tensors().items()}


def _open(flags: Mapping[str, Any], opened: Mapping[str, Any]) -> JacobianLens:
    return open_jacobian_lens(flags["jacobian"])


def _example(opened: Mapping[str, Any]) -> JacobianLens:
    """Return matrices drawn at random, not far from the identity."""
    model, g = opened["model"], generator(7)
    depth, width = model.shape.n_layers, model.shape.d_model
    weight = torch.eye(width) + 0.1 * torch.randn(depth, width, width, generator=g) / width**0.5
    share = torch.rand(depth, generator=g)
    bounds = torch.stack([share - 0.1, share + 0.1], -1)
    return JacobianLens(weight, 0.1 * torch.ones(depth), share, bounds, {"model": about_model(model)})


register(
    Subject(
        "jacobian",
        JacobianLens,
        (
            Flag(
                "jacobian",
                str,
                REQUIRED,
                "a Jacobian lens: a folder of `cutaway lenses estimate`, or a .pt file of `jlens`",
            ),
        ),
        _open,
        _example,
        needs=("model",),
        advice="ca.lenses.open_jacobian_lens(folder)",
    )
)
