"""Modules that notebooks draw and download with, replaced alike on both sides: what they are called with is kept."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

STUBBED = (
    "IPython", "gdown", "graph_visualization", "neel_plotly", "nltk", "plotly", "plotly_express",
    "pysvelte", "sae_dashboard", "seaborn", "torchtyping", "wandb", "webbrowser",
)  # fmt: skip
MISSING = ("google.colab",)
SHOWN = list[Any]()  # arguments of the calls since it was last cleared


class Anything:
    """An object with every attribute, which can be called with anything, and keeps that in `SHOWN`."""

    def __init__(self, name: str):
        self.__dict__["_name"] = name

    def __call__(self, *args: Any, **named: Any) -> Anything:
        if len(args) == 1 and callable(args[0]) and not named and not isinstance(args[0], Anything):
            return args[0]  # a decorator
        SHOWN.append({"call": self._name, "args": list(args), "named": {k: named[k] for k in sorted(named)}})
        return Anything(f"{self._name}()")

    def __getattr__(self, name: str) -> Anything:
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything(f"{self._name}.{name}")

    def __setattr__(self, name: str, value: Any) -> None: ...

    def __getitem__(self, key: Any) -> Anything:
        return Anything(f"{self._name}[]")

    def __setitem__(self, key: Any, value: Any) -> None: ...

    def __iter__(self) -> Iterator[Any]:
        return iter(())

    def __len__(self) -> int:
        return 0

    def __bool__(self) -> bool:
        return True

    def __or__(self, other: Any) -> Any:
        return Any

    __ror__ = __or__

    def __enter__(self) -> Anything:
        return self

    def __exit__(self, *_: Any) -> None: ...

    def __mro_entries__(self, bases: Any) -> tuple[type, ...]:
        return (object,)

    def __repr__(self) -> str:
        return f"<{self._name}>"


class Stub(ModuleType):
    """A module with every attribute."""

    def __getattr__(self, name: str) -> Any:
        if name == "__all__":
            return []
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything(f"{self.__name__}.{name}")


class Stubs(MetaPathFinder, Loader):
    """A finder that knows `STUBBED` only, with all that lies below them, and denies `MISSING`."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name.startswith(MISSING):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return ModuleSpec(name, self, is_package=True) if name.partition(".")[0] in STUBBED else None

    def create_module(self, spec: ModuleSpec) -> Stub:
        return Stub(spec.name)

    def exec_module(self, module: ModuleType) -> None: ...


def install() -> None:
    """Put the stubs before everything else, once both libraries have imported what they need of the real modules."""
    for name in [n for n in sys.modules if n.partition(".")[0] in STUBBED]:
        del sys.modules[name]
    sys.meta_path.insert(0, Stubs())
