"""Import aliases: modules of other packages, found in the façades whatever they were called in each version."""

from __future__ import annotations

import re
import sys
from collections import Counter
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from itertools import islice
from pathlib import Path
from traceback import walk_stack
from types import ModuleType
from typing import Any

from cutaway.core.files import read_json
from cutaway.core.refuse import Refused, nearest

FACADES = ("transformer_lens", "sae_lens", "circuit_tracer", "circuitsvis")
_HERE = Path(__file__).parent
#: what names of modules, models and transcoders mean elsewhere; `modules` is the module here, and the names of those
#: there that it stands for, with all that lies below them
NAMES: dict[str, dict[str, str]] = read_json(_HERE / "names.json")
MOVED = {f"{here.partition('.')[0]}.{old}": here for here, names in NAMES["modules"].items() for old in names.split()}


def facade_of(name: str) -> str | None:
    """Return the façade's module for a module of another package; None if there is none."""
    snake = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()
    for found in (snake, MOVED.get(".".join(name.split(".")[:2]), "")):
        path = _HERE.joinpath(*found.split("."))
        if found and (path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()):
            return f"{__package__}.{found}"
    return None


class Aliases(MetaPathFinder, Loader):
    """A finder of the façades under the other packages' names.

    Attributes:
        used: how often each name of a module was looked up.
        refused: the refusal of each name that a façade does not have.
    """

    def __init__(self) -> None:
        self.used, self.refused = Counter[str](), dict[str, Refused]()

    def __str__(self) -> str:
        names = {p: [(n, k) for n, k in self.used.most_common() if n.startswith(f"{p}.")] for p in FACADES}
        said = [f"{p}: {', '.join(f'{n[len(p) + 1 :]} {k}' for n, k in found)}" for p, found in names.items() if found]
        return "\n".join([*said, *(f"refused: {refusal}" for refusal in self.refused.values())])

    @staticmethod
    def running() -> Aliases | None:
        """Return the finder that is installed, if one is."""
        return next((f for f in sys.meta_path if isinstance(f, Aliases)), None)

    def install(self) -> Aliases:
        """Find the façades from now on.

        Raises:
            Refused: one of the packages itself is imported already.
        """
        for name in FACADES:
            if not isinstance(sys.modules.get(name), Alias | None):
                why = "the package itself is imported already, and would be mixed with its façade"
                raise Refused(f"an alias of {name}", why, "start a new process, and import nothing of it before")
        if self not in sys.meta_path:
            sys.meta_path.insert(0, self)
        return self

    def remove(self) -> None:
        """Find the façades no more; what was imported stays usable."""
        sys.meta_path.remove(self)
        for name in [n for n, module in sys.modules.items() if isinstance(module, Alias)]:
            del sys.modules[name]

    def refuse(self, name: str) -> str:
        """Record that a façade does not have a name, and return the refusal as text."""
        package, _, short = name.rpartition(".")
        close = nearest(short, dir(sys.modules.get(package)))
        instead = f"use {close}" if close else f"see what there is: dir({package})"
        return str(self.refused.setdefault(name, Refused(name, "its façade does not have it", instead)))

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name.partition(".")[0] not in FACADES:
            return None
        if facade_of(name) is None:  # notebooks that try several names catch an ImportError
            raise ImportError(self.refuse(name))
        return ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: ModuleSpec) -> Alias:
        return Alias(spec.name, self)

    def exec_module(self, module: ModuleType) -> None: ...


class Alias(ModuleType):
    """A module of another package by name; its attributes are those of the façade's module."""

    def __init__(self, name: str, aliases: Aliases):
        super().__init__(name)
        self.__dict__.update(_here=import_module(facade_of(name) or name), _aliases=aliases)

    def __dir__(self) -> list[str]:
        own = (
            n for n, value in vars(self._here).items() if str(getattr(value, "__module__", "")).startswith("cutaway")
        )
        return [name for name in own if not name.startswith("_")]

    def __getattr__(self, name: str) -> Any:
        value, full = getattr(self._here, name, self), f"{self.__name__}.{name}"
        if name.startswith("_"):
            found = dir(self) if name == "__all__" else value
            if found is self:
                raise AttributeError(name)
            return found
        if isinstance(value, ModuleType) and facade_of(full):
            return import_module(full)
        if value is self:
            raise AttributeError(self._aliases.refuse(full))
        callers = (frame.f_code.co_name for frame, _ in islice(walk_stack(sys._getframe()), 6))
        self._aliases.used[full] += "_handle_fromlist" not in callers  # which looks before each `from … import`
        return value

    def __call__(self, *_: Any, **__: Any) -> Any:
        """Refuse: `from PACKAGE.MODULE import NAME` takes what the façade does not have for a module of its own."""
        raise TypeError(self._aliases.refuse(self.__name__))

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("__"):
            super().__setattr__(name, value)
        elif not isinstance(value, Alias):  # a module must not hide the class of its name
            setattr(self._here, name, value)
