"""Heads: what single attention heads look at and copy, read from their patterns and weights."""

from cutaway.heads.classify import HeadTypes, classify
from cutaway.heads.confirm import TypeEffects, confirm
from cutaway.heads.stream import StreamedAttention, stream
from cutaway.heads.types import TYPES, HeadType

__all__ = ["TYPES", "HeadType", "HeadTypes", "StreamedAttention", "TypeEffects", "classify", "confirm", "stream"]
