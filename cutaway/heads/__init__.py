"""Heads: what single attention heads look at and copy, read from their patterns and weights."""

from cutaway.heads.card import HeadCard, card
from cutaway.heads.classify import HeadTypes, classify
from cutaway.heads.confirm import TypeEffects, confirm
from cutaway.heads.copy_suppression import CopySuppression, copy_suppression
from cutaway.heads.function_vectors import FunctionVectors, function_vectors
from cutaway.heads.headvis import HeadMetrics, HeadTree, read_headvis
from cutaway.heads.headvis_sampling import write_headvis
from cutaway.heads.retrieval import RetrievalHeads, retrieval
from cutaway.heads.roles import HeadRoles, roles
from cutaway.heads.stream import StreamedAttention, stream
from cutaway.heads.successor import SuccessorHeads, successor
from cutaway.heads.types import TYPES, HeadType

__all__ = [
    "TYPES",
    "CopySuppression",
    "FunctionVectors",
    "HeadCard",
    "HeadMetrics",
    "HeadRoles",
    "HeadTree",
    "HeadType",
    "HeadTypes",
    "RetrievalHeads",
    "StreamedAttention",
    "SuccessorHeads",
    "TypeEffects",
    "card",
    "classify",
    "confirm",
    "copy_suppression",
    "function_vectors",
    "read_headvis",
    "retrieval",
    "roles",
    "stream",
    "successor",
    "write_headvis",
]
