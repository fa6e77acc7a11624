"""An entry of the zoo: a model by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from cutaway.core.refuse import Refused


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

    def program(self) -> Any:
        """Return the program that its weights are or that it learned; None if it is about something else."""
        return None

    def source(self, options: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Return what `models.load` loads, and the options that are left for it.

        Raises:
            Refused: its weights are not there.
        """
        if not self.ready:
            raise Refused(
                f"zoo model {self.name!r}", f"its weights are not in {self.folder}", f"make it ready: {self.way}"
            )
        return self.folder, dict(options)

    def train(self, out: Path, **options: Any) -> Path:
        """Train it again from its recipe."""
        return self._module(".train").train(out, **options)

    def _module(self, part: str = "") -> Any:
        return import_module(f"cutaway.zoo.{self.name}{part}")
