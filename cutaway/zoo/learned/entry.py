"""Models that learned programs, as entries of the zoo."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cutaway.zoo.compiled.entry import CompiledEntry
from cutaway.zoo.compiled.program import Program
from cutaway.zoo.compiled.programs import PROGRAMS
from cutaway.zoo.entry import Entry

LEARNED = "learned/"
DATA = Path(__file__).parent / "data"


@dataclass(frozen=True)
class LearnedEntry(CompiledEntry):
    """A model that learned a program of `PROGRAMS`, whose weights ship as one file."""

    @property
    def weights(self) -> Path:
        """The file of its weights."""
        return DATA / f"{self.name.removeprefix(LEARNED)}.safetensors"

    @property
    def ready(self) -> bool:
        """True if its weights are present."""
        return self.weights.is_file()

    @property
    def origin(self) -> str:
        """The place that its weights are from."""
        return "ships with the package"

    def program(self) -> Program:
        """Return the program that it learned."""
        return PROGRAMS[self.name.removeprefix(LEARNED)]

    def model(self) -> Any:
        """Return the model of transformers, a `GPT2LMHeadModel`, and its tokenizer."""
        from safetensors.torch import load_file

        from cutaway.zoo.learned.train import Settings, initial_model

        hf = initial_model(self.program(), Settings()).eval().requires_grad_(False)
        hf.load_state_dict(load_file(self.weights), strict=False)  # the unembedding is the embedding
        return hf, self.program().tokenizer()

    def train(self, out: Path, **options: Any) -> Path:
        """Train it again from its recipe, into a folder that transformers loads."""
        from cutaway.zoo.learned.train import train

        return train(out, self.program(), **options)


def entries() -> dict[str, Entry]:
    """Return the entries of all programs, by name."""
    found = [LearnedEntry(LEARNED + p.name, f"learned the program: {p.says}") for p in PROGRAMS.values()]
    return {e.name: e for e in found}
