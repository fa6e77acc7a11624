"""Dictionaries and evidence whose scores are known."""

from __future__ import annotations

import torch
from torch.nn.functional import normalize

from cutaway.core.stats import generator
from cutaway.dictionaries import Dictionary, autoencoder
from cutaway.dictionaries.benchmarks import SyntheticRecipe, Truth
from cutaway.dictionaries.evaluation.evidence import Evidence
from cutaway.dictionaries.gates import AbsTopK, JumpRelu, TopK

SITE = "resid_post.1"


def truth() -> Truth:
    """A small truth with a forest and without superposition."""
    return SyntheticRecipe(30, 32, roots=4, branching=2, depth=2, most=0.3, least=0.02, rank=3).make()


def evidence(of: Truth, tokens: int = 3000, seed: int = 1) -> Evidence:
    """Held-out activations with their true code."""
    return Evidence.gather(of.batches(500, seed=seed), tokens)


def oracle(of: Truth, threshold: float = 2.0) -> Dictionary:
    """True directions read by least squares: it finds what fires."""
    read = torch.linalg.pinv(of.directions.double()).T.float()
    gate = JumpRelu(torch.full((len(read),), threshold))
    zero = torch.zeros(len(read))
    return autoencoder(SITE, read, of.directions, zero, of.bias, gate, subtract_b_dec=True)


def random_autoencoder(latents: int = 24, d: int = 8, k: int = 3, seed: int = 0, signed: bool = False) -> Dictionary:
    """Random weights around a bias that is not zero."""
    g = generator(seed)
    rows = normalize(torch.randn(latents, d, generator=g), dim=-1)
    bias = torch.randn(d, generator=g) + 3
    gate = AbsTopK(k) if signed else TopK(k)
    return autoencoder(SITE, rows * 1.1, rows * 0.9, torch.zeros(latents), bias, gate, subtract_b_dec=True)


def activations(tokens: int = 300, d: int = 8, seed: int = 5) -> torch.Tensor:
    """Activations far from zero, some coordinates louder."""
    return torch.randn(tokens, d, generator=generator(seed)) * torch.linspace(0.5, 2, d) + 3
