"""cutaway: mechanistic interpretability you can check.

    import cutaway as ca
    model = ca.load("miniworld")

Twelve names (`ca.load`, `ca.Task`, `ca.edits.Ablate`, `ca.explain`, …) and the rooms (`ca.lenses`, `ca.patching`, …);
whatever is heavy loads when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from cutaway.core.refuse import Refused
from cutaway.core.render import RENDERERS

if TYPE_CHECKING:
    from pathlib import Path

    from cutaway import (
        circuits,
        dictionaries,
        directions,
        editing,
        features,
        geometry,
        graphs,
        heads,
        interventions,
        lenses,
        models,
        neurons,
        patching,
        streams,
        suites,
        tasks,
        training,
        views,
        weights,
        zoo,
    )
    from cutaway.core.method import Method
    from cutaway.core.result import Result
    from cutaway.core.result import open_result as open
    from cutaway.models import edits
    from cutaway.models.model import Model
    from cutaway.models.self_check import self_check
    from cutaway.models.sweep.cache import resuming
    from cutaway.suites.explain import explain
    from cutaway.tasks.chat import chat
    from cutaway.tasks.pair import Pair
    from cutaway.tasks.task import Task

__version__ = "0.1.0"

#: the modules of rooms without methods that enter rows in the table of subjects
_SUBJECTS = ("cutaway.zoo.load", "cutaway.tasks", "cutaway.streams", "cutaway.dictionaries.opening")
#: every room that enters rows in the method table
METHOD_ROOMS = (
    "lenses", "heads", "weights", "neurons", "geometry", "patching", "dictionaries", "directions", "features",
    "circuits", "graphs", "editing",
)  # fmt: skip
_METHODS = {"dictionaries": "dictionaries.evaluation"}  # where a room's methods are, if not in the room itself
_ROOMS = (
    "models",
    "tasks",
    "streams",
    "zoo",
    "views",
    "interventions",
    "suites",
    "training",
    *METHOD_ROOMS,
)
_LAZY = {
    "Model": ("cutaway.models.model", "Model"),
    "Pair": ("cutaway.tasks.pair", "Pair"),
    "Result": ("cutaway.core.result", "Result"),
    "Task": ("cutaway.tasks.task", "Task"),
    "chat": ("cutaway.tasks.chat", "chat"),
    "edits": ("cutaway.models", "edits"),
    "explain": ("cutaway.suites.explain", "explain"),
    "open": ("cutaway.core.result", "open_result"),
    "resuming": ("cutaway.models.sweep.cache", "resuming"),
    "self_check": ("cutaway.models.self_check", "self_check"),
}

__all__ = [
    "Model",
    "Pair",
    "Refused",
    "Result",
    "Task",
    "chat",
    "circuits",
    "dictionaries",
    "directions",
    "editing",
    "edits",
    "explain",
    "features",
    "geometry",
    "graphs",
    "heads",
    "interventions",
    "lenses",
    "load",
    "methods",
    "models",
    "neurons",
    "open",
    "patching",
    "resuming",
    "self_check",
    "streams",
    "suites",
    "tasks",
    "training",
    "views",
    "weights",
    "zoo",
]


def load(x: str | Path | Any, **options: Any) -> Model:
    """The model meant by `x`: a zoo name, a local folder, a GGUF file, a Hugging Face id, or a live
    `PreTrainedModel`.

    A model of the zoo carries the truth about its world as `model.world`, or the program that it is as `model.program`.

    Raises:
        Refused: no such model, a broken folder, or an architecture that cannot be read.
    """
    from cutaway.zoo.load import load as load_model

    return load_model(x, **options)


def methods() -> dict[str, Method]:
    """The method table: every analysis of the house by name, in the order of its rooms.

    The subjects that the methods take are registered with it.
    """
    from pkgutil import walk_packages

    from cutaway.core.method import METHODS

    for name in _SUBJECTS:
        import_module(name)
    for room in METHOD_ROOMS:
        package = import_module(f"cutaway.{_METHODS.get(room, room)}")
        for module in walk_packages(package.__path__, f"{package.__name__}."):
            import_module(module.name)
    return dict(sorted(METHODS.items(), key=lambda item: METHOD_ROOMS.index(item[1].room)))


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return import_module(f"cutaway.{name}")
    if name in _LAZY:
        module, attribute = _LAZY[name]
        return getattr(import_module(module), attribute)
    raise AttributeError(f"module 'cutaway' has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


def _drawing(module: str, function: str) -> Any:
    def draw(*args: Any, **options: Any) -> Any:
        return getattr(import_module(module), function)(*args, **options)

    return draw


RENDERERS["figure"] = _drawing("cutaway.views.draw.figure", "figure")
RENDERERS["notebook"] = _drawing("cutaway.views.frame", "notebook")
