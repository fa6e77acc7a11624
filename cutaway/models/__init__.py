"""Any Hugging Face model, live: families, sites, capture, edits, weights, residual decomposition, tokens."""
