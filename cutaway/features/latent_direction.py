"""Latents as a direction: some of a dictionary's latents amplified and others suppressed, saved in one object.

found = ca.features.contrast(model, dictionary, texts).direction(dictionary)
model.generate(prompt, edits=found.add(2.0))
found.save("happy.safetensors")  # ca.directions.open("happy.safetensors") finds the dictionary again
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cutaway.core.address import parse
from cutaway.core.record import hash_tensors
from cutaway.core.refuse import Keyword, Refused
from cutaway.core.repeat import Made
from cutaway.core.result import Result
from cutaway.core.stats import generator
from cutaway.dictionaries.dictionary import Dictionary, place_of
from cutaway.dictionaries.norms import FixedNorm
from cutaway.dictionaries.opening import open_dictionary
from cutaway.dictionaries.splice import Splice, add_to_latents
from cutaway.directions.direction import Direction, check_widths, direction
from cutaway.directions.steering import Steering
from cutaway.features.latents import encoded
from cutaway.models.model import Model

NEAREST = 8  # latents among which one is drawn
_NAMED = 8  # latents that a record names


@dataclass(frozen=True, kw_only=True)
class LatentDirection(Result, Steering, kind="latent_direction"):
    """Latents of a dictionary that are amplified and suppressed together: f becomes f + strength · weight.

    No latent is pushed below 0: an active one that is suppressed falls silent at most, a silent one stays silent. The
    reconstruction error is kept. With nothing to suppress, it adds the same vector everywhere (`vector`); what it
    suppresses depends on what is active.

    Attributes:
        weight: what strength 1 adds to each latent's activation; a negative latent is suppressed.
        index: the number of each latent.
        matched: the latents that may take the place of each in a random control, the most alike first.
        dictionary: the words that open the dictionary; empty if they are not known.
        fingerprint: the hash of the dictionary.
        name: the name.
        positive: the class that it leads to.
        negative: the class that it leads away from.
        family: the family of the model that it was found in.
        source: the dictionary itself; None until it is opened.
        made: how it can be opened again; None if it is in no file.
    """

    weight: Float[Tensor, "latent"]
    index: Int[Tensor, "latent"]
    matched: Int[Tensor, "latent match"]
    dictionary: str
    fingerprint: str
    name: str = ""
    positive: str = ""
    negative: str = ""
    family: str = ""
    source: Dictionary | None = field(default=None, repr=False, compare=False)
    made: Made | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not bool(self.weight.isfinite().all()) or not bool(self.weight.all()) or not len(self.weight):
            raise Refused(self._what, "a weight is 0 or undefined, or there is none", "name the latents that change")
        if len(self.index.unique()) < len(self.index):
            raise Refused(self._what, "a latent is there twice", "name each once")
        if self.matched.shape[1] < len(self.index):  # else the last one may find all of its own taken
            why = f"{self.matched.shape[1]} others of each are too few for a control without repeats"
            raise Refused(self._what, why, f"match {len(self.index)} or more others to each")

    @property
    def _what(self) -> str:
        return f"latents {self.name!r}" if self.name else "latents as a direction"

    def facts(self) -> dict[str, Any]:
        return {n: value for n, value in super().facts().items() if n not in ("made", "source")}

    def identity(self) -> dict[str, Any]:
        """Return the name, the dictionary, and the hash of latents and weights, for records."""
        hashed = hash_tensors({"index": self.index, "weight": self.weight, "matched": self.matched})
        return {"name": self.name, "dictionary": self.fingerprint, "latents": len(self.index), "hash": hashed}

    # --- the dictionary

    def opened(self, dictionary: str | None = None, device: torch.device | str = "cpu") -> Self:
        words = dictionary or self.dictionary
        if not words:
            raise Refused(self._what, "the file does not say where its dictionary is", Keyword("direction_dictionary"))
        found = open_dictionary(words)
        return self.of(found.to(device, torch.promote_types(found.dtype, torch.float32)))

    def of(self, dictionary: Dictionary) -> Self:
        """Return it with its dictionary.

        Raises:
            Refused: it is another dictionary.
        """
        if dictionary.to("cpu").fingerprint() != self.fingerprint:
            why = f"they are of the dictionary {self.fingerprint[:8]}, and this one is {dictionary.fingerprint()[:8]}"
            raise Refused(self._what, why, "give the dictionary that they were found with")
        return replace(self, source=dictionary)

    @property
    def _dictionary(self) -> Dictionary:
        if self.source is None:
            raise Refused(self._what, "its dictionary is not open", "open their file, or give the dictionary")
        return self.source

    @property
    def _blocks(self) -> list[int]:
        return sorted({place_of(self._dictionary, i)[0] for i in self.index.tolist()})

    @property
    def writes(self) -> tuple[str, ...]:
        """The sites that the latents write."""
        return tuple(dict.fromkeys(w for b in self._blocks for w in self._dictionary.blocks[b].writes))

    # --- steering

    @property
    def reads(self) -> tuple[str, ...]:
        """The sites that the dictionary reads."""
        return self._dictionary.reads

    def check(self, model: Model) -> None:
        d = self._dictionary
        model.places(list({*d.reads, *d.writes}))
        plain = [s for s in dict.fromkeys([*d.reads, *d.writes]) if len(parse(s).row.axes.split()) == 3]
        check_widths(self._what, model, {s: d.width(s) for s in plain})

    def add(self, strength: float = 1.0, positions: Sequence[int] | None = None) -> list[Splice]:
        """Amplify and suppress the latents by `strength` times their weights; negative strengths exchange the two."""
        where = None if positions is None else tuple(positions)
        shifts = tuple((strength * self.weight).tolist())
        change = add_to_latents(*self.index.tolist(), value=shifts, positions=where, silencing=True)
        return [Splice(self._dictionary, error=True, changes=(change,) if strength else (), writes=self.writes)]

    def random(self, samples: int, seed: int = 0) -> list[LatentDirection]:
        """Return other latents with the same weights, each drawn among the eight most alike that are left."""
        g = generator(seed)
        return [replace(self, index=self._drawn(g), name="random", labels={}, made=None) for _ in range(samples)]

    def _drawn(self, g: torch.Generator) -> Int[Tensor, "latent"]:
        taken, out = set[int](), torch.empty_like(self.index)
        for n in torch.randperm(len(self.index), generator=g).tolist():
            left = [i for i in self.matched[n].tolist() if i not in taken][:NEAREST]
            out[n] = left[int(torch.randint(len(left), (), generator=g))]
            taken.add(int(out[n]))
        return out

    def along(self, acts: Mapping[str, Float[Tensor, "text position *rest"]]) -> Float[Tensor, "text position"]:
        """Return the component of the latents' activations along the weights, in units of strength 1: f·w / w·w."""
        code = encoded(self._dictionary, acts)
        shape, w = acts[self.reads[0]].shape[:2], self.weight.to(self._dictionary.device)
        return (code.columns(self.index.tolist()).float() @ w / (w @ w)).reshape(shape)

    def amounts(self) -> dict[str, float]:
        """Return the weights of the latents that change most, and the number of the others."""
        most = self.weight.abs().argsort(descending=True)[:_NAMED].tolist()
        named = {f"latent {int(self.index[n])}": round(float(self.weight[n]), 4) for n in most}
        return named | ({"others": len(self.index) - _NAMED} if len(self.index) > _NAMED else {})

    def vector(self) -> Direction:
        """Return the vector that the weights write, as if every latent that is suppressed were active: Σ w d.

        Raises:
            Refused: a written site is normalised by each token, where no vector is the same everywhere.
        """
        d, found = self._dictionary, dict[str, Tensor]()
        for i, w in zip(self.index.tolist(), self.weight.tolist(), strict=True):
            for site in d.blocks[place_of(d, i)[0]].writes:
                if site in d.writing and not isinstance(d.writing[site], FixedNorm):
                    raise Refused(self._what, f"the scale of {site} is another at each token", "steer the latents")
                found[site] = found.get(site, 0) + w * d.direction(i, site)
        return direction(found, self.name, self.positive, self.negative, self.family)
