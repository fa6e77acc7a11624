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
from cutaway.circuits.edge_pruning import edge_pruning
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
from cutaway.circuits.scrubbing import Scrubbed, scrub
from cutaway.circuits.subnetwork_probing import subnetwork_probing
from cutaway.circuits.truth import truth
from cutaway.circuits.uniform_gradient_sampling import uniform_gradient_sampling

__all__ = [
    "Certificate",
    "Circuit",
    "CircuitOverlap",
    "Completeness",
    "EdgeScores",
    "Faithfulness",
    "Minimality",
    "Scrubbed",
    "acdc",
    "certify",
    "clean_corrupted",
    "compare",
    "completeness",
    "eap",
    "eap_ig",
    "eap_ig_activations",
    "edge_pruning",
    "exact",
    "faithfulness",
    "information_flow",
    "mask_gradients",
    "minimality",
    "open",
    "random",
    "relp",
    "scrub",
    "subnetwork_probing",
    "truth",
    "uniform_gradient_sampling",
    "write_mib",
]
