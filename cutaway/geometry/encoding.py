"""Encodings: values of features beside the activations that carry them; the subject `encoding`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from cutaway.core.files import held, read_tensors, reading, write_tensors
from cutaway.core.record import hash_tensors
from cutaway.core.refuse import Keyword, Refused, nearest
from cutaway.core.repeat import Made
from cutaway.core.stats import generator
from cutaway.core.subject import REQUIRED, Flag, Subject, register
from cutaway.geometry.toys import TOYS
from cutaway.models.model import Model
from cutaway.tasks.prompts import Prompts

EXAMPLES = 600


@dataclass(frozen=True, eq=False)
class Encoding:
    """Activations of which it is known which features, with which values, they were made from.

    Attributes:
        values: the features' values; 0 where a feature is off.
        activations: what carries them.
        features: the names of the features.
        about: where they come from, for records.
        made: how it can be made again; None if made by hand.
    """

    values: Float[Tensor, "example feature"]
    activations: Float[Tensor, "example d"]
    features: tuple[str, ...]
    about: Mapping[str, Any] = field(default_factory=dict)
    made: Made | None = field(default=None, repr=False)

    def __post_init__(self):
        n, width = self.values.shape
        if n != len(self.activations) or width != len(self.features):
            sizes = f"{list(self.values.shape)} values, {list(self.activations.shape)} activations"
            raise Refused(f"an encoding of {len(self.features)} features", sizes, "give a row of each per example")
        if not bool(self.values.isfinite().all() and self.activations.isfinite().all()):
            raise Refused("an encoding", "some of its numbers are infinite or undefined", "leave those examples out")

    def identity(self) -> dict[str, Any]:
        """Say in a record which data these are."""
        whole = hash_tensors({"values": self.values, "activations": self.activations}, fresh=True)
        return {"features": list(self.features), "examples": len(self.values), "hash": whole, **self.about}

    def sizes(self) -> dict[str, int]:
        """Return the sizes that declared costs are expressions of."""
        return {"examples": len(self.values), "features": len(self.features)}

    def save(self, path: str | Path) -> Path:
        """Write values and activations as safetensors, which `open_encoding` reads."""
        tensors = {"values": self.values, "activations": self.activations}
        return write_tensors(path, tensors, {"features": list(self.features), "about": dict(self.about)})


def toy(name: str, seed: int = 0, examples: int = EXAMPLES) -> Encoding:
    """Draw one of the toys of which the truth is known.

    Raises:
        Refused: no toy has that name.
    """
    if name not in TOYS:
        near = nearest(name, TOYS)
        why = "there is no such toy" + (f"; near: {near}" if near else "")
        raise Refused(f"encoding {name!r}", why, f"use one of {', '.join(TOYS)}, or a .safetensors file")
    values, activations = TOYS[name].draw(examples, generator(seed))
    features = tuple(f"f{i}" for i in range(values.shape[1]))
    flags = {"": name, **({"seed": seed} if seed else {}), **({"examples": examples} if examples != EXAMPLES else {})}
    how = Made(f"ca.geometry.toy({name!r}, {seed}, {examples})", flags)
    return Encoding(values, activations, features, {"toy": name, "says": TOYS[name].says}, how)


def encode(model: Model, prompts: Prompts, values: Mapping[str, Sequence[float]], site: str) -> Encoding:
    """Capture activations of prompts at one address, at each last token, beside the values of features.

    Args:
        model: the model that reads the prompts.
        prompts: the prompts, one example each.
        values: one number per prompt for each feature, by the feature's name.
        site: an address of one layer, such as resid_post.6.

    Raises:
        Refused: an address that is not a single vector per token, or another number of values than of prompts.
    """
    wrong = [name for name, column in values.items() if len(column) != len(prompts)]
    if wrong or not values:
        why = (
            f"{wrong[0]!r} has {len(values[wrong[0]])} values for {len(prompts)} prompts" if wrong else "there is none"
        )
        raise Refused("values of features", why, "give one value per prompt to each feature")
    places = model.places(site)
    if len(places) != 1:
        raise Refused(Keyword("site", site), f"it means {len(places)} places", "name one layer, such as resid_post.6")
    tokens = prompts.bind(model)
    every = model.capture(tokens, [places[0]], logits=False)[str(places[0])]
    if every.ndim != 3:
        why = f"its activations are {list(every.shape)}, which is not [batch, position, width]"
        raise Refused(Keyword("site", site), why, "use a site of vectors, such as resid_post")
    rows = every[torch.arange(len(tokens), device=every.device), tokens.last.to(every.device)].float().cpu()
    columns = torch.tensor([list(map(float, column)) for column in values.values()]).T
    about = {"model": model.identity(), "site": str(places[0]), "prompts": prompts.identity()}
    return Encoding(columns, rows, tuple(values), about)


def open_encoding(path: str | Path) -> Encoding:
    """Open a file of values and activations, written by `Encoding.save`.

    Raises:
        Refused: a file without them.
    """
    tensors, header = read_tensors(path)
    if missing := {"values", "activations"} - set(tensors):
        why = f"it has no {' and no '.join(sorted(missing))}"
        raise Refused(f"encoding {str(path)!r}", why, "write it with Encoding.save")
    with reading(path):
        values, activations = tensors["values"].float(), tensors["activations"].float()
        names = held(header, "features", list, [f"f{i}" for i in range(values.shape[1])])
        whole = str(Path(path).absolute())
        how = Made(f"ca.geometry.open_encoding({whole!r})", {"": whole})
        return Encoding(values, activations, tuple(map(str, names)), held(header, "about", dict, {}), how)


def _open(flags: Mapping[str, Any], opened: Mapping[str, Any]) -> Encoding:
    source, seed, examples = flags.values()
    if source in TOYS or not Path(source).is_file():
        return toy(source, seed or 0, examples or EXAMPLES)
    if seed is not None or examples is not None:
        raise Refused(Keyword("encoding", source), "a file is read as it is", "leave out seed and examples")
    return open_encoding(source)


def _example(opened: Mapping[str, Any]) -> Encoding:
    return replace(toy("identity", examples=120), about={})


register(
    Subject(
        "encoding",
        Encoding,
        (
            Flag("encoding", str, REQUIRED, f"a toy ({', '.join(TOYS)}), or .safetensors with values and activations"),
            Flag("encoding_seed", int | None, None, "of a toy: the seed [default: 0]"),
            Flag("encoding_examples", int | None, None, f"of a toy: the number of examples [default: {EXAMPLES}]"),
        ),
        _open,
        _example,
        advice="ca.geometry.toy(name), or ca.geometry.encode(model, prompts, values, site)",
    )
)
