"""Activations whose true features are known: directions, a bias, and the law by which the features fire."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from cutaway.core.cursor import check_same
from cutaway.core.files import read_tensors, write_tensors
from cutaway.core.refuse import Refused
from cutaway.core.stats import generator
from cutaway.dictionaries.benchmarks.generative import Law
from cutaway.dictionaries.code import SparseCode

SPREAD = 0x9E3779B97F4A7C15  # an odd number that scatters seeds over 64 bits


@dataclass(frozen=True)
class Truth:
    """True features: `activation = bias + Σ magnitude · direction`, and when which feature fires.

    A row of `directions` is a feature, as a row of a dictionary is a latent. `about` says how it was made.
    """

    directions: Float[Tensor, "feature d"]
    bias: Float[Tensor, "d"]
    law: Law = field(repr=False)
    about: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        if len(self.law) != len(self.directions):
            n, m = len(self.directions), len(self.law)
            raise Refused(f"a truth of {n} directions", f"its law has {m} features", "give one direction a feature")

    @property
    def n_features(self) -> int:
        """Number of true features."""
        return len(self.directions)

    @property
    def d(self) -> int:
        """The width of the activations."""
        return self.directions.shape[1]

    def draw(self, tokens: int, seed: int) -> tuple[Float[Tensor, "token d"], SparseCode]:
        """Return the activations of `tokens` tokens and the true code that they were made from; the same for the
        same seed.
        """
        active = self.law.draw(tokens, generator(seed))
        code = SparseCode.of_entries(active.row, active.feature, active.value, (tokens, self.n_features))
        return self.activations(code), code

    def activations(self, code: SparseCode) -> Float[Tensor, "token d"]:
        """Return the activations of a true code."""
        return code.times(self.directions) + self.bias

    def batches(self, tokens: int, *, seed: int = 0) -> Batches:
        """Return an endless, resumable stream of batches; another seed is another stream (held-out data)."""
        return Batches(self, tokens, seed)

    def save(self, path: str | Path) -> Path:
        """Write the truth as one safetensors file."""
        flags = {"exclusive": self.law.exclusive, "scaled": self.law.scaled, "uniform": self.law.uniform}
        tensors = {f.name: t for f in fields(Law) if isinstance(t := getattr(self.law, f.name), Tensor)}
        header = {"kind": "truth", "flags": flags, "about": self.about}
        return write_tensors(path, {**tensors, "directions": self.directions, "bias": self.bias}, header)

    @classmethod
    def open(cls, path: str | Path) -> Truth:
        """Return the truth saved at `path`.

        Raises:
            Refused: the file holds something else.
        """
        tensors, header = read_tensors(path)
        if header.get("kind") != "truth":
            raise Refused(f"file {str(path)!r}", "it holds no truth", "give a file that Truth.save wrote")
        directions, bias = tensors.pop("directions"), tensors.pop("bias")
        return cls(directions, bias, Law(**tensors, **header["flags"]), header["about"])


class Batches:
    """Batches of a truth: each is a function of the seed and its number, so the cursor is one number."""

    def __init__(self, truth: Truth, tokens: int, seed: int):
        if tokens < 1:
            raise Refused(f"batches of {tokens} tokens", "a batch has at least one", "give a positive number")
        self.truth, self.tokens, self.seed = truth, tokens, seed
        self.number = 0

    def __iter__(self) -> Iterator[tuple[Float[Tensor, "token d"], SparseCode]]:
        while True:
            number, self.number = self.number, self.number + 1
            yield self.batch(number)

    def batch(self, number: int) -> tuple[Float[Tensor, "token d"], SparseCode]:
        """Return the batch of a number, wherever the cursor is."""
        # 32 bits are what torch's generator keeps of a seed; numbers of one stream never meet
        return self.truth.draw(self.tokens, ((self.seed * SPREAD >> 16) + number) % (1 << 32))

    def state(self) -> dict[str, int]:
        """Return the cursor."""
        return {"number": self.number, "tokens": self.tokens, "seed": self.seed}

    def restore(self, state: dict[str, int]) -> None:
        """Go on where a cursor was taken.

        Raises:
            Refused: the cursor of another stream.
        """
        check_same(state, {"tokens": self.tokens, "seed": self.seed})
        self.number = state["number"]
