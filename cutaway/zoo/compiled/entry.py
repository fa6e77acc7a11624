"""Compiled programs as entries of the zoo."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cutaway.zoo.compiled.program import Program
from cutaway.zoo.compiled.programs import PROGRAMS
from cutaway.zoo.entry import Entry

COMPILED = "compiled/"


@dataclass(frozen=True)
class CompiledEntry(Entry):
    """A program of `PROGRAMS`, compiled each time that it is loaded."""

    @property
    def folder(self) -> Path:
        """The folder that `cutaway zoo train` writes it into, for other tools."""
        return Path("runs") / self.name

    @property
    def ready(self) -> bool:
        """True: the program is all it takes."""
        return True

    @property
    def origin(self) -> str:
        """The place that its weights are from."""
        return "compiled here"

    def program(self) -> Program:
        """Return the program."""
        return PROGRAMS[self.name.removeprefix(COMPILED)]

    def model(self) -> Any:
        """Return the model of transformers, a `GPT2LMHeadModel`, and its tokenizer."""
        return self.program().model()

    def world(self) -> None:
        """Return None: its texts are about no world."""

    def source(self, options: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Make it on the device and in the dtype that the options ask for; return the model and the other options.

        Raises:
            Refused: no such device or dtype.
        """
        import torch

        from cutaway.models.loading.sources import check_device, check_dtype

        left = dict(options)
        device, dtype, attention = (left.pop(n, None) for n in ("device", "dtype", "attention"))
        hf, tokenizer = self.model()
        if device is not None:
            check_device(str(device))
            hf.to(device)
        if dtype not in (None, "auto"):
            check_dtype(dtype)
            hf.to(getattr(torch, str(dtype).removeprefix("torch.")))
        if attention is not None:
            hf.set_attn_implementation(attention)
        return hf, {"tokenizer": tokenizer, **left}

    def train(self, out: Path, **options: Any) -> Path:
        """Compile it into a folder that transformers loads."""
        hf, tokenizer = self.model()
        hf.save_pretrained(out)
        tokenizer.save_pretrained(out)
        return out


def entries() -> dict[str, Entry]:
    """Return the entries of all programs, by name."""
    found = [CompiledEntry(COMPILED + p.name, f"a program: {p.says}") for p in PROGRAMS.values()]
    return {e.name: e for e in found}
