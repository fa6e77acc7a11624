"""Geometry: how features and concepts lie in activation space, and how alike two models' spaces are."""

from cutaway.geometry.encoding import Encoding, encode, open_encoding, toy
from cutaway.geometry.properties import Properties, properties
from cutaway.geometry.toys import TOYS, Toy

__all__ = ["TOYS", "Encoding", "Properties", "Toy", "encode", "open_encoding", "properties", "toy"]
