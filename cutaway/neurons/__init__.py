"""Neurons: what single units of MLPs read, write and do."""

from cutaway.neurons.triggers import NeuronTriggers, triggers
from cutaway.neurons.values import NeuronTokens, values

__all__ = ["NeuronTokens", "NeuronTriggers", "triggers", "values"]
