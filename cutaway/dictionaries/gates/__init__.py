"""Gates: from pre-activations to the active latents. A gate is one file here and one row of `GATES`.

The file of a gate holds its frozen form (`TopK`), its form in training (`TrainTopK`) with the usual losses, the choice
over shards of latents and the flags of the command line. Dictionaries, training, controls and the command line ask
`GATES` and the properties of the two forms; none of them knows a gate by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from cutaway.core.refuse import Refused

if TYPE_CHECKING:
    from torch import Tensor

    from cutaway.dictionaries.gates.abstopk import AbsTopK, TrainAbsTopK
    from cutaway.dictionaries.gates.batchtopk import BatchTopK, TrainBatchTopK
    from cutaway.dictionaries.gates.gate import EncoderGate, Gate, GreedyGate
    from cutaway.dictionaries.gates.gated import Gated, TrainGated
    from cutaway.dictionaries.gates.groupmax import GroupMax, TrainGroupMax
    from cutaway.dictionaries.gates.jumprelu import JumpRelu, TrainJumpRelu
    from cutaway.dictionaries.gates.matching_pursuit import MatchingPursuit, TrainMatchingPursuit
    from cutaway.dictionaries.gates.relu import Relu, TrainRelu
    from cutaway.dictionaries.gates.topk import TopK, TrainTopK
    from cutaway.dictionaries.gates.train_gate import Chosen, Flags, TrainGate


@dataclass(frozen=True)
class Row:
    """A row of the table of gates: its frozen class and the module that holds it, loaded when a form is first used."""

    name: str
    module: str

    @property
    def flag(self) -> str:
        """The gate's name on the command line."""
        return self.name.lower()

    @property
    def frozen(self) -> type[Gate]:
        """The class of the frozen gate."""
        return getattr(import_module(self.module), self.name)

    @property
    def train(self) -> type[TrainGate]:
        """The class of the gate in training."""
        return getattr(import_module(self.module), f"Train{self.name}")


_HERE = "cutaway.dictionaries.gates"
GATES: dict[str, Row] = {
    name: Row(name, f"{_HERE}.{file}")
    for name, file in (
        ("TopK", "topk"),
        ("BatchTopK", "batchtopk"),
        ("AbsTopK", "abstopk"),
        ("GroupMax", "groupmax"),
        ("MatchingPursuit", "matching_pursuit"),
        ("Relu", "relu"),
        ("JumpRelu", "jumprelu"),
        ("Gated", "gated"),
    )
}
_MORE = {"EncoderGate": "gate", "Gate": "gate", "GreedyGate": "gate",
         "Chosen": "train_gate", "Flags": "train_gate", "TrainGate": "train_gate"}  # fmt: skip

__all__ = [
    "GATES", "AbsTopK", "BatchTopK", "Chosen", "EncoderGate", "Flags", "Gate", "Gated", "GreedyGate", "GroupMax",
    "JumpRelu", "MatchingPursuit", "Relu", "Row", "TopK", "TrainAbsTopK", "TrainBatchTopK", "TrainGate", "TrainGated",
    "TrainGroupMax", "TrainJumpRelu", "TrainMatchingPursuit", "TrainRelu", "TrainTopK", "gate_of", "row_of",
    "train_gate_of",
]  # fmt: skip


def row_of(name: Any) -> Row:
    """Return the row of a gate.

    Raises:
        Refused: no gate has that name.
    """
    if name not in GATES:
        raise Refused(f"gate {name!r}", "no gate has that name", f"use one of: {', '.join(GATES)}")
    return GATES[name]


def gate_of(numbers: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Gate:
    """Rebuild the gate that `numbers_of` and `tensors_of` described.

    Raises:
        Refused: no gate of that kind.
    """
    settings = {n: v for n, v in numbers.items() if n != "kind"}
    return row_of(numbers.get("kind")).frozen(**settings, **tensors)


def train_gate_of(numbers: Mapping[str, Any]) -> TrainGate:
    """Rebuild the gate in training that `TrainGate.as_dict` described.

    Raises:
        Refused: no gate of that kind.
    """
    return row_of(numbers.get("kind")).train(**{n: v for n, v in numbers.items() if n != "kind"})


def __getattr__(name: str) -> Any:
    if name in _MORE:
        return getattr(import_module(f"{_HERE}.{_MORE[name]}"), name)
    if (frozen := name.removeprefix("Train")) in GATES:
        return getattr(import_module(GATES[frozen].module), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
