"""Circuits: which edges between heads and MLPs make an answer, and what holds of them when the others are cut."""

from cutaway.circuits.acdc import acdc
from cutaway.circuits.certify import Certificate, certify
from cutaway.circuits.circuit import Circuit
from cutaway.circuits.clean_corrupted import clean_corrupted
from cutaway.circuits.compare import CircuitOverlap, compare
from cutaway.circuits.completeness import Completeness, completeness
from cutaway.circuits.eap import eap
from cutaway.circuits.eap_ig import eap_ig
from cutaway.circuits.eap_ig_activations import eap_ig_activations
from cutaway.circuits.edge_scores import EdgeScores
from cutaway.circuits.exact import exact
from cutaway.circuits.faithfulness import Faithfulness, faithfulness
from cutaway.circuits.formats.mib import write_mib
from cutaway.circuits.information_flow import information_flow
from cutaway.circuits.mask_gradients import mask_gradients
from cutaway.circuits.minimality import Minimality, minimality
from cutaway.circuits.opening import open_circuit as open
from cutaway.circuits.random import random
from cutaway.circuits.relp import relp

__all__ = [
    "Certificate",
    "Circuit",
    "CircuitOverlap",
    "Completeness",
    "EdgeScores",
    "Faithfulness",
    "Minimality",
    "acdc",
    "certify",
    "clean_corrupted",
    "compare",
    "completeness",
    "eap",
    "eap_ig",
    "eap_ig_activations",
    "exact",
    "faithfulness",
    "information_flow",
    "mask_gradients",
    "minimality",
    "open",
    "random",
    "relp",
    "write_mib",
]
