"""Heads: what single attention heads look at and copy, read from their patterns and weights."""

from cutaway.heads.card import HeadCard, card
from cutaway.heads.classify import HeadTypes, classify
from cutaway.heads.confirm import TypeEffects, confirm
from cutaway.heads.roles import HeadRoles, roles
from cutaway.heads.stream import StreamedAttention, stream
from cutaway.heads.types import TYPES, HeadType

__all__ = [
    "TYPES",
    "HeadCard",
    "HeadRoles",
    "HeadType",
    "HeadTypes",
    "StreamedAttention",
    "TypeEffects",
    "card",
    "classify",
    "confirm",
    "roles",
    "stream",
]
