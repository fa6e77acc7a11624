"""The subjects of attribution graphs: transcoders of a model's MLPs, or the neurons themselves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from cutaway.core.repeat import Made
from cutaway.core.subject import REQUIRED, Flag, Subject, register
from cutaway.dictionaries.dictionary import Dictionary
from cutaway.dictionaries.gates import Relu
from cutaway.dictionaries.opening import HELP, open_named
from cutaway.dictionaries.transforms import one_block, together
from cutaway.models.model import Model


@dataclass(frozen=True)
class Neurons:
    """The neurons of a model's MLPs, in place of a dictionary."""

    @property
    def made(self) -> Made:
        """Recipe that means them again."""
        return Made("ca.graphs.Neurons()", {"": True})

    def identity(self) -> dict[str, Any]:
        """Say in a record that the units are neurons."""
        return {"units": "neurons of the MLPs"}

    def sizes(self) -> dict[str, int]:
        """Return no sizes: no cost depends on them."""
        return {}


def random_transcoders(model: Model, seed: int, n: int = 16) -> Dictionary:
    """Make transcoders of random latents of every MLP, about half of them active on a token."""
    g, width = torch.Generator().manual_seed(seed), model.shape.d_model

    def transcoder(i: int) -> Dictionary:
        rows, written = (torch.nn.functional.normalize(torch.randn(n, width, generator=g), dim=1) for _ in range(2))
        reads, writes = f"mlp_in.{i}", f"mlp_out.{i}"
        return one_block({reads: rows}, {writes: written}, torch.zeros(n), {writes: torch.zeros(width)}, Relu())

    return together([transcoder(i) for i in range(model.shape.n_layers)])


def _neurons(source: Any) -> Neurons | None:
    return Neurons() if source == "neurons" else None


def _opened(flags: Mapping[str, Any], given: Mapping[str, Any]) -> Neurons:
    return Neurons()


TRANSCODERS = register(
    Subject(
        "transcoders",
        Dictionary,
        (Flag("transcoders", str, REQUIRED, HELP.replace("a sparse dictionary", "transcoders of the MLPs")),),
        open_named,
        lambda given: random_transcoders(given["model"], 24),
        advice='a dictionary of transcoders, or "neurons"',
    )
)
NEURONS = register(
    Subject(
        "neurons",
        Neurons,
        (Flag("neurons", bool, False, "the neurons of the MLPs themselves, in place of transcoders"),),
        _opened,
        lambda given: Neurons(),
        accept=_neurons,
        advice='"neurons"',
    )
)
