"""An entry of the zoo: a model by name."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Entry:
    """A model of the zoo; its room offers `path()` and a recipe `train.train`, and where it has them `World` and
    `dictionaries`.
    """

    name: str
    says: str

    @property
    def folder(self) -> Path:
        """The folder that transformers loads."""
        return self._module().path()

    @property
    def ready(self) -> bool:
        """True if its weights are present."""
        return (self.folder / "model.safetensors").exists()

    @property
    def way(self) -> str:
        """The command that makes it ready."""
        return f"cutaway zoo train {self.name}"

    @property
    def origin(self) -> str:
        """The place that its weights are from."""
        return "ships with the package"

    def world(self) -> Any:
        """Return the truth of its world; None if its texts are about none."""
        world = getattr(self._module(), "World", None)
        return None if world is None else world.load()

    def train(self, out: Path, **options: Any) -> Path:
        """Train it again from its recipe."""
        return self._module(".train").train(out, **options)

    def _module(self, part: str = "") -> Any:
        return import_module(f"cutaway.zoo.{self.name}{part}")
