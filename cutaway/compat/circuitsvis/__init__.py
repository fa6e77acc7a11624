"""Pictures of circuitsvis, drawn by the house's views: all numbers beside them, no script, nothing from the network."""

from cutaway.compat.circuitsvis import activations, attention, examples, logits, tokens, topk_tokens

__all__ = ["activations", "attention", "examples", "logits", "tokens", "topk_tokens"]
