"""Neurons: what single units of MLPs read, write and do."""

from cutaway.neurons.arithmetic import ArithmeticStudy, arithmetic
from cutaway.neurons.card import NeuronCard, card
from cutaway.neurons.composition import LayerComposition, composition
from cutaway.neurons.frequency import FrequencyNeurons, frequency
from cutaway.neurons.importance import NeuronImportance, importance
from cutaway.neurons.polysemanticity import Polysemanticity, polysemanticity
from cutaway.neurons.statistics import NeuronStatistics, statistics
from cutaway.neurons.triggers import NeuronTriggers, triggers
from cutaway.neurons.values import NeuronTokens, values

__all__ = [
    "ArithmeticStudy",
    "FrequencyNeurons",
    "LayerComposition",
    "NeuronCard",
    "NeuronImportance",
    "NeuronStatistics",
    "NeuronTokens",
    "NeuronTriggers",
    "Polysemanticity",
    "arithmetic",
    "card",
    "composition",
    "frequency",
    "importance",
    "polysemanticity",
    "statistics",
    "triggers",
    "values",
]
