"""Roles of axes in pictures, by name: one row per axis. An axis without a row is a list of named entries."""

from __future__ import annotations

from typing import Literal

#: place: positions of a prompt; depth: curves run along it; example: prompts; choice: ranked, of which pictures show
#: the first; unit: many parts of one layer
Role = Literal["place", "depth", "example", "choice", "unit"]

ROLES: dict[str, Role] = {
    "position": "place", "q_pos": "place", "k_pos": "place",
    "layer": "depth", "other_layer": "depth", "step": "depth",
    "decile": "depth", "bucket": "depth", "strength": "depth", "share": "depth",
    "batch": "example", "prompt": "example", "example": "example",
    "rank": "choice", "top": "choice", "choice": "choice",
    "head": "unit", "kv_head": "unit", "neuron": "unit", "latent": "unit", "d_model": "unit", "d_head": "unit",
    "expert": "unit", "node": "unit",
}  # fmt: skip


def has_role(axis: str, *roles: Role) -> bool:
    """Return True if an axis has one of the roles."""
    return ROLES.get(axis) in roles
