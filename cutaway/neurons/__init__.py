"""Neurons: what single units of MLPs read, write and do."""

from cutaway.neurons.importance import NeuronImportance, importance
from cutaway.neurons.triggers import NeuronTriggers, triggers
from cutaway.neurons.values import NeuronTokens, values

__all__ = ["NeuronImportance", "NeuronTokens", "NeuronTriggers", "importance", "triggers", "values"]
