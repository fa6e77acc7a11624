"""Sets of directions, such as the rows of an unembedding or of a dictionary's decoder; the subject `directions`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from cutaway.core import repeat as again
from cutaway.core.files import read_tensors
from cutaway.core.record import hash_tensors
from cutaway.core.refuse import Keyword, Refused
from cutaway.core.repeat import Made
from cutaway.core.subject import Flag, Subject, register
from cutaway.models.model import Model

EMBED, UNEMBED = "embed", "unembed"


@dataclass(frozen=True, eq=False)
class Directions:
    """Directions in one space.

    Attributes:
        rows: the directions.
        names: the name of each.
        made: how they can be made again; None if made by hand.
    """

    rows: Float[Tensor, "direction d"]
    names: tuple[str, ...]
    made: Made | None = field(default=None, repr=False)

    def identity(self) -> dict[str, Any]:
        """Say in a record which data these are."""
        return {"directions": list(self.rows.shape), "hash": hash_tensors({"rows": self.rows}, fresh=True)}

    def sizes(self) -> dict[str, int]:
        """Return the sizes that declared costs are expressions of."""
        return {"directions": len(self.rows)}


def of_vocabulary(model: Model, which: str = UNEMBED) -> Directions:
    """Return the rows of a model's unembedding or embedding, named by their tokens.

    Raises:
        Refused: another word than unembed or embed, or an unembedding that is not linear.
    """
    if which not in (EMBED, UNEMBED):
        raise Refused(Keyword("directions", which), "a model has no such rows", f"use {UNEMBED} or {EMBED}")
    w = model.weights.unembed.T if which == UNEMBED else model.weights.embed
    source = again.made("model", model)
    python, needs = f"ca.geometry.of_vocabulary(model, {which!r})", {"model": source.python}
    how = Made(python, {"": which}, needs=needs, sources={"model": source})
    return Directions(w.detach().float().cpu(), tuple(model.text.token_texts(list(range(len(w))))), how)


def read_directions(path: str | Path, tensor: str | None = None) -> Directions:
    """Read the rows of a matrix [direction, d] in a safetensors file, such as the decoder of a dictionary.

    Args:
        path: the file.
        tensor: name of the matrix; of a file with one matrix it need not be named.

    Raises:
        Refused: no such matrix, or several and none named.
    """
    found = {n: t for n, t in read_tensors(path)[0].items() if t.ndim == 2 and t.is_floating_point()}
    if tensor is None and len(found) == 1:
        tensor = next(iter(found))
    if tensor not in found:
        why = f"its matrices are {', '.join(sorted(found)) or 'none'}"
        raise Refused(Keyword("directions", path), why, ("name one: ", Keyword("tensor", ..., of="directions")))
    rows, whole = found[tensor].float(), str(Path(path).absolute())
    how = Made(f"ca.geometry.read_directions({whole!r}, {tensor!r})", {"": whole, "tensor": tensor})
    return Directions(rows, tuple(map(str, range(len(rows)))), how)


def _accept(source: Any) -> Directions | None:
    """Take a matrix [direction, d] in the place of `Directions`."""
    if not isinstance(source, Tensor) or source.ndim != 2:
        return None
    return Directions(source.detach().float().cpu(), tuple(map(str, range(len(source)))))


def _open(flags: Mapping[str, Any], opened: Mapping[str, Any]) -> Directions:
    source, tensor = flags.values()
    if source in (EMBED, UNEMBED):
        if tensor is not None:
            raise Refused(Keyword("tensor", tensor, of="directions"), "only a file has tensors", "leave it out")
        return of_vocabulary(opened["model"], source)
    if not Path(source).is_file():
        use = f"use {UNEMBED}, {EMBED} or a .safetensors file"
        raise Refused(Keyword("directions", source), "there is no such file", use)
    return read_directions(source, tensor)


register(
    Subject(
        "directions",
        Directions,
        (
            Flag("directions", str, UNEMBED, f"{UNEMBED} or {EMBED}: rows of the model's; or a .safetensors file"),
            Flag("directions_tensor", str | None, None, "of a file: the name of the matrix [direction, d]"),
        ),
        _open,
        lambda opened: of_vocabulary(opened["model"]),
        needs=("model",),
        accept=_accept,
        advice="a matrix [direction, d]",
    )
)
