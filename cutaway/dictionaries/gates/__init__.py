"""Gates: from pre-activations to the active latents. A gate is one file here.

The file `top_k.py` or `topk.py` of a gate holds its frozen form (`TopK`), its form in training (`TrainTopK`) with the
usual losses, the choice over shards of latents and the flags of the command line. Dictionaries, training, controls and
the command line ask `names`, `forms_of` and the properties of the two forms; none of them knows a gate by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any

from cutaway.core.refuse import Refused

if TYPE_CHECKING:
    from torch import Tensor

    from cutaway.dictionaries.gates.abstopk import AbsTopK, TrainAbsTopK
    from cutaway.dictionaries.gates.batchtopk import BatchTopK, TrainBatchTopK
    from cutaway.dictionaries.gates.gated import Gated, TrainGated
    from cutaway.dictionaries.gates.groupmax import GroupMax, TrainGroupMax
    from cutaway.dictionaries.gates.jumprelu import JumpRelu, TrainJumpRelu
    from cutaway.dictionaries.gates.matching_pursuit import MatchingPursuit, TrainMatchingPursuit
    from cutaway.dictionaries.gates.relu import Relu, TrainRelu
    from cutaway.dictionaries.gates.shared.gate import EncoderGate, Gate, GreedyGate
    from cutaway.dictionaries.gates.shared.train_gate import Chosen, Flags, TrainGate
    from cutaway.dictionaries.gates.topk import TopK, TrainTopK


@dataclass(frozen=True)
class Forms:
    """The two forms of a gate: frozen, as a dictionary holds it, and in training."""

    frozen: type[Gate]
    train: type[TrainGate]


_SHARED = {
    "gate": ("EncoderGate", "Gate", "GreedyGate"),
    "train_gate": ("Chosen", "Flags", "TrainGate"),
}

__all__ = [
    "AbsTopK", "BatchTopK", "Chosen", "EncoderGate", "Flags", "Forms", "Gate", "Gated", "GreedyGate", "GroupMax",
    "JumpRelu", "MatchingPursuit", "Relu", "TopK", "TrainAbsTopK", "TrainBatchTopK", "TrainGate", "TrainGated",
    "TrainGroupMax", "TrainJumpRelu", "TrainMatchingPursuit", "TrainRelu", "TrainTopK", "forms_of", "gate_of", "names",
    "train_gate_of",
]  # fmt: skip


def names() -> list[str]:
    """Return the name of every gate on the command line: the files of this folder, without underscores."""
    return list(_files())


def forms_of(name: Any) -> Forms:
    """Return both forms of a gate, by the name of its frozen class (`TopK`) or its name on the command line (`topk`).

    Raises:
        Refused: no gate has that name.
    """
    file = _files().get(name.lower()) if isinstance(name, str) else None
    if file is None:
        raise Refused(f"gate {name!r}", "no gate has that name", f"use one of: {', '.join(names())}")
    module = import_module(f"{__name__}.{file}")
    train = next(v for n, v in vars(module).items() if n.lower() == f"train{name.lower()}")
    return Forms(getattr(module, train.__name__.removeprefix("Train")), train)


def _files() -> dict[str, str]:
    return {m.name.replace("_", ""): m.name for m in iter_modules(__path__) if not m.ispkg}


def gate_of(numbers: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Gate:
    """Rebuild the gate that `numbers_of` and `tensors_of` described.

    Raises:
        Refused: no gate of that kind.
    """
    settings = {n: v for n, v in numbers.items() if n != "kind"}
    return forms_of(numbers.get("kind")).frozen(**settings, **tensors)


def train_gate_of(numbers: Mapping[str, Any]) -> TrainGate:
    """Rebuild the gate in training that `TrainGate.as_dict` described.

    Raises:
        Refused: no gate of that kind.
    """
    return forms_of(numbers.get("kind")).train(**{n: v for n, v in numbers.items() if n != "kind"})


def __getattr__(name: str) -> Any:
    shared = next((file for file, held in _SHARED.items() if name in held), None)
    if shared is not None:
        return getattr(import_module(f"{__name__}.shared.{shared}"), name)
    if (file := _files().get(name.removeprefix("Train").lower())) is not None:
        return getattr(import_module(f"{__name__}.{file}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
