"""What the tests of this room share: tiny models built once a session, batches of tokens, and comparisons."""

from __future__ import annotations

from collections.abc import Container, Iterable
from functools import cache
from typing import Any

import pytest
import torch

from cutaway.models.anatomy.unembedding import unembedding
from cutaway.models.model import Model
from cutaway.models.tokens import Tokens, batch
from tests.models.tiny import CONFIGS, build

ALL = list(CONFIGS)
CAUSAL = [n for n in ALL if n != "bert"]
#: one of each way in which attention, norms and MLP can be wired; for what does not depend on the rest of a family
KINDS = ["gpt2", "gptj", "bloom", "llama_gqa", "falcon_7b", "gemma2", "olmo2", "phi3", "mixtral", "granite", "opt"]
ALIBI = ("bloom", "falcon_alibi")
#: the sites that need the eager form of attention
FORMED = ("scores", "pattern")

LONG, SHORT = [5, 6, 7, 8, 9, 10, 11], [21, 22, 23]
IDS = batch([LONG, [31, 32, 33, 34, 35, 36, 37]])
PADDED = {side: batch([LONG, SHORT], side=side) for side in ("left", "right")}


def widely(names: Iterable[str], core: Container[str] = tuple(KINDS)) -> list[Any]:
    """The names as parameters of a test; those beyond the core are `wide`: `make wide` runs them."""
    return [pytest.param(name, marks=() if name in core else pytest.mark.wide) for name in names]


def by_turns_widely(names: list[str]) -> list[Any]:
    """`by_turns`; the families beyond the core are `wide`."""
    return [pytest.param(*pair, marks=() if pair[0] in KINDS else pytest.mark.wide) for pair in by_turns(names)]


def by_turns(names: list[str]) -> list[tuple[str, str]]:
    """Each family with one side of padding, left and right by turns: what breaks on one breaks in many families."""
    return [(name, ("left", "right")[i % 2]) for i, name in enumerate(names)]


@cache
def model(name: str, dtype: torch.dtype = torch.float32, attention: str | None = None) -> Model:
    """A tiny model of a row of `tiny.CONFIGS`; tests leave it as it was."""
    hf = build(name, dtype=dtype, attention=attention)
    hf.requires_grad_(False)
    return Model(hf, name=name)


def bare(hf: Any, t: Tokens = IDS) -> torch.Tensor:
    """Logits of the transformers model itself."""
    with torch.no_grad():
        return hf(t.ids).logits


@cache
def sites(m: Model, *without: str) -> list[str]:
    """The sites a model offers."""
    return [s for s, can in m.sites().items() if can.startswith("read") and s not in without]


def gap(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference, relative to the largest value of the second."""
    return float((a.double() - b.double()).abs().max() / b.double().abs().max().clamp_min(1e-9))


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    """Fixed normal numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def metric(logits: torch.Tensor) -> torch.Tensor:
    """A smooth number a prompt, of several logits."""
    return logits[:, 3] - 0.5 * logits[:, 7] + 0.1 * logits[:, 11]


def uncapped(m: Model, logits: torch.Tensor) -> torch.Tensor:
    """Logits before the family's soft cap."""
    cap = unembedding(m.anatomy).cap
    return cap * torch.atanh(logits.double() / cap) if cap else logits
