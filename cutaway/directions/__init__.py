"""Directions: vectors of activation space, found, probed, saved, and used in edits."""

from cutaway.directions.complete import Completions, complete
from cutaway.directions.das import AlignedSubspace, das
from cutaway.directions.direction import Direction, direction
from cutaway.directions.erase import Erasure, erase
from cutaway.directions.find import find
from cutaway.directions.finders import FINDERS, Finder
from cutaway.directions.found import FoundDirections
from cutaway.directions.interchange import InterchangeAccuracy, interchange
from cutaway.directions.intervene import Interventions, intervene
from cutaway.directions.monitor import Monitor, monitor
from cutaway.directions.opening import open_direction as open
from cutaway.directions.opening import write_direction as write
from cutaway.directions.orthogonalise import orthogonalised
from cutaway.directions.pairs import activation_addition, causal_difference
from cutaway.directions.probe import Probes, probe
from cutaway.directions.propagate import Propagation, propagate
from cutaway.directions.reweight import Reweighting, reweight
from cutaway.directions.select import select
from cutaway.directions.selected import SelectedDirection
from cutaway.directions.steer import DoseResponse, steer
from cutaway.directions.steering import ConditionalSteering, Steering
from cutaway.directions.subspace import Subspace, open_subspace
from cutaway.directions.suffix import SuffixAttack, suffix
from cutaway.directions.threshold import Threshold, threshold

__all__ = [
    "FINDERS",
    "AlignedSubspace",
    "Completions",
    "ConditionalSteering",
    "Direction",
    "DoseResponse",
    "Erasure",
    "Finder",
    "FoundDirections",
    "InterchangeAccuracy",
    "Interventions",
    "Monitor",
    "Probes",
    "Propagation",
    "Reweighting",
    "SelectedDirection",
    "Steering",
    "Subspace",
    "SuffixAttack",
    "Threshold",
    "activation_addition",
    "causal_difference",
    "complete",
    "das",
    "direction",
    "erase",
    "find",
    "interchange",
    "intervene",
    "monitor",
    "open",
    "open_subspace",
    "orthogonalised",
    "probe",
    "propagate",
    "reweight",
    "select",
    "steer",
    "suffix",
    "threshold",
    "write",
]
