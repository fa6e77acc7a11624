"""Directions: vectors of activation space, found, probed, saved, and used in edits."""

from cutaway.directions.direction import Direction, direction
from cutaway.directions.erase import Erasure, erase
from cutaway.directions.find import find
from cutaway.directions.finders import FINDERS, Finder
from cutaway.directions.found import FoundDirections
from cutaway.directions.opening import open_direction as open
from cutaway.directions.opening import write_direction as write
from cutaway.directions.orthogonalise import orthogonalised
from cutaway.directions.pairs import activation_addition, causal_difference
from cutaway.directions.probe import Probes, probe
from cutaway.directions.propagate import Propagation, propagate
from cutaway.directions.steer import DoseResponse, steer
from cutaway.directions.threshold import Threshold, threshold

__all__ = [
    "FINDERS",
    "Direction",
    "DoseResponse",
    "Erasure",
    "Finder",
    "FoundDirections",
    "Probes",
    "Propagation",
    "Threshold",
    "activation_addition",
    "causal_difference",
    "direction",
    "erase",
    "find",
    "open",
    "orthogonalised",
    "probe",
    "propagate",
    "steer",
    "threshold",
    "write",
]
