"""Circuits: which edges between heads and MLPs make an answer, and what holds of them when the others are cut."""

from cutaway.circuits.clean_corrupted import clean_corrupted
from cutaway.circuits.eap import eap
from cutaway.circuits.eap_ig import eap_ig
from cutaway.circuits.eap_ig_activations import eap_ig_activations
from cutaway.circuits.edge_scores import EdgeScores
from cutaway.circuits.exact import exact
from cutaway.circuits.information_flow import information_flow
from cutaway.circuits.mask_gradients import mask_gradients
from cutaway.circuits.random import random
from cutaway.circuits.relp import relp

__all__ = [
    "EdgeScores",
    "clean_corrupted",
    "eap",
    "eap_ig",
    "eap_ig_activations",
    "exact",
    "information_flow",
    "mask_gradients",
    "random",
    "relp",
]
