"""The interface of fitted lenses: an affine map per depth, from the residual stream there to the last one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cutaway.core.address import Address
from cutaway.core.files import held, read_json, read_tensors, write_json, write_tensors
from cutaway.core.record import hash_tensors, note
from cutaway.core.refuse import Code, Refused
from cutaway.core.repeat import Made
from cutaway.models.anatomy.weights import logit_readers
from cutaway.models.model import Model

VERSION = 1
CONFIG, OWN = "config.json", "params.safetensors"


class Lens(ABC):
    """Maps of the residual stream, one per depth but the last, which the model unembeds itself.

    Attributes:
        kind: the name of the kind, as its files and refusals have it.
        weight: a matrix per depth [depth d_model d_model].
        about: the model that the lens was fitted to (`model`), and how, JSON-ready.
        made: how it can be opened again; None if it is in no file.
    """

    kind: ClassVar[str]
    weight: Float[Tensor, "depth d_model d_model"]
    about: Mapping[str, Any]
    made: Made | None

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Return what its file holds, by name."""

    @abstractmethod
    def mapped(self, depth: int, x: Float[Tensor, "*rest d_model"]) -> Float[Tensor, "*rest d_model"]:
        """Map streams of a depth that is not the last, in a dtype no narrower than that of the weights."""

    @abstractmethod
    def pulled(self, depth: int, readers: Float[Tensor, "*rest d_model"]) -> Float[Tensor, "*rest d_model"]:
        """Return the directions at a depth that the lens reads where these vectors read the last stream."""

    def identity(self) -> dict[str, Any]:
        """Return the hash of its numbers, and what it was fitted to."""
        return {"hash": hash_tensors(self.tensors()), **self.about}

    def sizes(self) -> dict[str, int]:
        """Return no sizes: no cost depends on a lens."""
        return {}

    def at(self, depth: int, x: Float[Tensor, "*rest d_model"]) -> Float[Tensor, "*rest d_model"]:
        """Map the stream of a depth (0 is the embedding); the last depth stays as it is."""
        wide = x.to(torch.promote_types(x.dtype, self.weight.dtype))
        return wide if depth == len(self.weight) else self.mapped(depth, wide)

    def translate(self, x: Float[Tensor, "layer *rest d_model"]) -> Float[Tensor, "layer *rest d_model"]:
        """Map the streams of all depths."""
        out = x.to(torch.promote_types(x.dtype, self.weight.dtype), copy=True)
        for depth in range(len(self.weight)):
            out[depth] = self.at(depth, x[depth])
        return out

    @torch.no_grad()
    def directions(self, model: Model, tokens: Int[Tensor, "token"]) -> Float[Tensor, "layer token d_model"]:
        """Return the direction at each depth that the lens reads as the logit of each token.

        Their dot product with the stream is the lens's logit times the scale of the final norm, up to a constant.

        Raises:
            Refused: another model, or an unembedding that is not linear behind the final norm.
        """
        self.check(model)
        readers = token_readers(model, tokens)
        return torch.stack([*(self.pulled(d, readers) for d in range(len(self.weight))), readers])

    def check(self, model: Model) -> None:
        """Check that the lens is one of this model.

        The weights of a model in another dtype than in the fit have another hash; the record says that they were not
        compared.

        Raises:
            Refused: another width or depth, or a lens of other weights.
        """
        what, shape = f"{self.kind} on {model.name}", (model.shape.n_layers, model.shape.d_model)
        if tuple(self.weight.shape[:2]) != shape:
            why = f"it is of {len(self.weight)} layers and width {self.weight.shape[-1]}, the model of {shape}"
            raise Refused(what, why, "give a lens that was trained on this model")
        trained = self.about.get("model")
        if trained is not None and trained["dtype"] != str(model.dtype).removeprefix("torch."):
            note(f"the lens was trained on {trained['name']} in {trained['dtype']}; weights were not compared")
        elif trained is not None and trained["weights"] != weights_hash(model):
            why = f"it was trained on {trained['name']} with other weights"
            raise Refused(
                what, why, ("give a lens that was trained on this model", Code(", or use lens.transferred()"))
            )

    def transferred(self) -> Self:
        """Return the same maps for any model of the same shape, such as a finetuned one."""
        kept = {n: v for n, v in self.about.items() if n not in ("model", "unembed_hash")}
        return replace(self, about={**kept, "transferred": self.about.get("model")}, made=None)  # type: ignore[type-var]

    def save(self, folder: str | Path) -> Path:
        """Write the lens as a folder of `config.json` and `params.safetensors`.

        Raises:
            Refused: the folder cannot be written.
        """
        write_tensors(Path(folder) / OWN, self.tensors(), {"kind": self.kind})
        about = {"kind": self.kind, "version": VERSION, "about": dict(self.about)}
        return write_json(Path(folder) / CONFIG, about).parent


@torch.no_grad()
def token_readers(model: Model, tokens: Int[Tensor, "token"]) -> Float[Tensor, "token d_model"]:
    """Return the vectors that read the logits of tokens off the last stream, with the final norm's scale left out.

    Raises:
        Refused: an unembedding that is not linear behind the final norm.
    """
    return logit_readers(model.anatomy, tokens.to(model.device), torch.promote_types(model.dtype, torch.float32))


def depth_address(depth: int) -> Address:
    """Return the place of the stream at a depth: the embedding's is 0, that after the first block 1."""
    return Address("resid_pre", 0) if depth == 0 else Address("resid_post", depth - 1)


def about_model(model: Model) -> dict[str, Any]:
    """Return what a lens remembers of the model that it is fitted to."""
    dtype = str(model.dtype).removeprefix("torch.")
    return {"name": model.name, "weights": weights_hash(model), "dtype": dtype}


def weights_hash(model: Model) -> str:
    """Return the hash of the parameters alone: the model's fingerprint changes with what is attached to its modules."""
    return hash_tensors(dict(model.hf.named_parameters()))


def read_own(folder: Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Return the tensors of a folder that `Lens.save` wrote, and what it remembers; None if it is another folder.

    Call it within `core.files.reading`.

    Raises:
        Refused: a folder of another kind of lens.
    """
    config = read_json(folder / CONFIG)
    own = isinstance(config, dict) and config.get("version") == VERSION
    if not own or config.get("kind") != kind:
        if own and isinstance(config.get("kind"), str):
            what = f"folder {str(folder)!r}"
            raise Refused(what, f"it holds a {config['kind']}, not a {kind}", "give a folder of the right kind of lens")
        return None
    return read_tensors(folder / OWN)[0], held(config, "about", dict)
