"""Chapter 3. Any transformers model: here a tiny random Llama, checked, captured and split into an exact sum."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import cutaway as ca

config = LlamaConfig(vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4)
model = ca.load(LlamaForCausalLM(config))  # a live model, a folder, or a Hugging Face id

failed = [o.name for o in ca.self_check(model) if not o.passed]
print("identities that fail:", failed or "none")

ids = torch.tensor([[5, 17, 42, 8]])
parts = ca.models.decompose(model, ids)
gap = (parts.contribution.sum(1) - parts.total).abs().max()
print(f"{len(parts.labels['component'])} components sum to the residual stream up to {float(gap):.0e}")
