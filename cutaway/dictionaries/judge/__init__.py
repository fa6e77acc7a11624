"""How good is a dictionary? Measures on held-out activations, each beside its interval, its null and its controls."""
