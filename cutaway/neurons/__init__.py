"""Neurons: what single units of MLPs read, write and do."""

from cutaway.neurons.arithmetic import ArithmeticStudy, arithmetic
from cutaway.neurons.importance import NeuronImportance, importance
from cutaway.neurons.statistics import NeuronStatistics, statistics
from cutaway.neurons.triggers import NeuronTriggers, triggers
from cutaway.neurons.values import NeuronTokens, values

__all__ = [
    "ArithmeticStudy",
    "NeuronImportance",
    "NeuronStatistics",
    "NeuronTokens",
    "NeuronTriggers",
    "arithmetic",
    "importance",
    "statistics",
    "triggers",
    "values",
]
