"""Measures of a dictionary on held-out activations, each beside its interval, its null and its controls.

evidence = judge.read_evidence(model, dictionary, "held_out.txt")
scores = judge.evaluate(dictionary, evidence)               # all that needs activations only
loss = judge.loss_recovered(model, dictionary, evidence)    # and what the model can still do with it
"""

# The functions are imported here, so that they and not their modules are what `judge.NAME` means.
from cutaway.dictionaries.evaluation.absorption import planted_absorption
from cutaway.dictionaries.evaluation.compare import Comparison, compare, comparison
from cutaway.dictionaries.evaluation.controls import (
    Judged,
    controls,
    judge,
    linear_map,
    mlp_neurons,
    neuron_sites,
    neurons,
    pca_dictionary,
    random_dictionary,
)
from cutaway.dictionaries.evaluation.evaluate import evaluate
from cutaway.dictionaries.evaluation.evidence import EncodedEvidence, Evidence, Text, encode_evidence
from cutaway.dictionaries.evaluation.features import Features, Passage, context, features, features_of
from cutaway.dictionaries.evaluation.firing import Firing, firing, firing_of, firing_scores
from cutaway.dictionaries.evaluation.geometry import Geometry, decoder_rows, geometry, geometry_scores
from cutaway.dictionaries.evaluation.letters import letter_absorption, letter_evidence, letter_scores
from cutaway.dictionaries.evaluation.loss import loss_recovered, splice_loss
from cutaway.dictionaries.evaluation.matching import mcc, mmcs, recovery, uniqueness
from cutaway.dictionaries.evaluation.probing import Probing, probing, probing_of
from cutaway.dictionaries.evaluation.quiver import Quiver, quiver
from cutaway.dictionaries.evaluation.reading import read_evidence
from cutaway.dictionaries.evaluation.reconstruction import fvu, reconstruction, reconstruction_scores
from cutaway.dictionaries.evaluation.scores import Scores, joined, over_seeds
from cutaway.dictionaries.evaluation.shift import Shift, shift, shift_of
from cutaway.dictionaries.evaluation.splitting import Splitting, splitting, splitting_of
from cutaway.dictionaries.evaluation.stability import Stability, stability, stability_of

__all__ = [
    "Comparison", "EncodedEvidence", "Evidence", "Features", "Firing", "Geometry", "Judged", "Passage", "Probing",
    "Quiver", "Scores", "Shift", "Splitting", "Stability", "Text", "compare", "comparison", "context", "controls",
    "decoder_rows",
    "encode_evidence", "evaluate", "features", "features_of", "firing", "firing_of", "firing_scores", "fvu",
    "geometry", "geometry_scores", "joined", "judge", "letter_absorption", "letter_evidence", "letter_scores",
    "linear_map", "loss_recovered", "mcc", "mlp_neurons", "mmcs", "neuron_sites", "neurons", "over_seeds",
    "pca_dictionary", "planted_absorption", "probing", "probing_of", "quiver", "random_dictionary", "read_evidence",
    "reconstruction", "reconstruction_scores", "recovery", "shift", "shift_of", "splice_loss", "splitting",
    "splitting_of", "stability", "stability_of", "uniqueness",
]  # fmt: skip
