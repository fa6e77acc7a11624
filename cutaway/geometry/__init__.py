"""Geometry: how features and concepts lie in activation space, and how alike two models' spaces are."""

from cutaway.geometry.concepts import ConceptDirections, concepts
from cutaway.geometry.dimensionality import Dimensionality, dimensionality
from cutaway.geometry.directions import Directions, of_vocabulary, read_directions
from cutaway.geometry.encoding import Encoding, encode, open_encoding, toy
from cutaway.geometry.properties import Properties, properties
from cutaway.geometry.similarity import Similarity, similarity
from cutaway.geometry.texts import Texts, read_texts
from cutaway.geometry.toys import TOYS, Toy

__all__ = [
    "TOYS",
    "ConceptDirections",
    "Dimensionality",
    "Directions",
    "Encoding",
    "Properties",
    "Similarity",
    "Texts",
    "Toy",
    "concepts",
    "dimensionality",
    "encode",
    "of_vocabulary",
    "open_encoding",
    "properties",
    "read_directions",
    "read_texts",
    "similarity",
    "toy",
]
