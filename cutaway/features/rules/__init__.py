"""Rules: explanations of latents that are code, so that their scores are exact."""
