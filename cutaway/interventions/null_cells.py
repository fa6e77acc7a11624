"""Cells that make the null of a sweep: all of a small one, of a large one some drawn at random.

A null takes several forwards a cell, so that on a model of hundreds of heads it would cost most of a method's time. The
band beside a picture is pooled over cells anyway (`core.stats.null_band`), and holds every cell against those drawn.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

NULL_CELLS = 64


def draw_cells(cells: Sequence[int], count: int, chance: torch.Generator) -> list[int]:
    """Return the cells that get random steps, in order: `count` drawn at random, or all if that is 0 or more than there
    are.
    """
    if not 0 < count < len(cells):
        return list(cells)
    return sorted(cells[i] for i in torch.randperm(len(cells), generator=chance)[:count].tolist())


def random_steps(drawn: Sequence[int], of: int, samples: int, seed: int) -> list[tuple[int, int, int]]:
    """Return the cell, the sample and the own seed of every random step of the cells drawn, sample by sample."""
    return [(i, s, (seed * samples + s) * of + i) for s in range(samples) for i in drawn]


def null_of_steps(
    values: Float[Tensor, "step *rest"], drawn: Sequence[int], of: int, samples: int
) -> Float[Tensor, "sample cell *rest"]:
    """Return the values of `random_steps` by sample and cell; NaN at the cells that were not drawn."""
    null = torch.full((samples, of, *values.shape[1:]), math.nan)
    null[:, list(drawn)] = values.unflatten(0, (samples, len(drawn)))
    return null


def null_cells_record(drawn: int, of: int) -> dict[str, str]:
    """Return the entry of the record that says how many cells made the null; none if all did."""
    return {"null": f"of {drawn} of {of} cells, drawn at random"} if drawn < of else {}
