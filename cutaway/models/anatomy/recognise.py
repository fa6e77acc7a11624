"""Recognise the family of a live model: by its type, or by probing its structure."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from cutaway.models.anatomy.families import FAMILIES, Family
from cutaway.models.anatomy.probe import probe


def family_of(hf: Any) -> Family:
    """Return the row for a live model, or one found by probing its structure.

    Raises:
        Refused: no row, and the structure is not one that can be read without guessing.
    """
    kind = hf.config.model_type
    if kind in FAMILIES:
        row = FAMILIES[kind]
        row = replace(row, root="") if not _has(hf, row.root) and _has(hf, row.layers) else row
        if row.pre_norm and not getattr(hf.config, row.pre_norm):
            row = replace(row, post_norm=True, ln1=None, ln2=None)
        return row
    return probe(hf)


def _has(module: nn.Module, path: str) -> bool:
    for name in path.split("."):
        if not isinstance(getattr(module, name, None), nn.Module):
            return False
        module = getattr(module, name)
    return True
