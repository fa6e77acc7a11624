"""Base classes of the two forms of a gate, frozen and in training."""
