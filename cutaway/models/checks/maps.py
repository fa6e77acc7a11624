"""Identities of the circuits that weights form: values, queries and keys are what the views make of a layer's input.

A convolution after a projection, normed queries or a scale that grows with the position break them; the self-check then
disables the circuit.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import torch
from torch import Tensor

from cutaway.core.refuse import Refused
from cutaway.models.access.capture import Activations
from cutaway.models.anatomy.weights import OV, QK
from cutaway.models.model import Model


def values(model: Model, acts: Activations, i: int) -> float:
    """Compare W_V x + b_V with the values."""
    made = torch.einsum("bpd,hde->bphe", acts[f"attn_in.{i}"], model.weights.v[i]) + model.weights.v_bias[i]
    return _apart(made, acts[f"v.{i}"])


def products(model: Model, acts: Activations, i: int) -> float:
    """(W_Q x + b_Q) · (W_K x + b_K) against queries and keys of one position, where rotary positions cancel; times any
    one number."""
    model.weights.qk(i, 0)  # refused where queries and keys are known to be normed
    x, w = acts[f"attn_in.{i}"], model.weights
    q, k = (torch.einsum("bpd,hde->bphe", x, m) + c for m, c in ((w.q[i], w.q_bias[i]), (w.k[i], w.k_bias[i])))
    made, seen = _diagonal(q, k), _diagonal(acts[f"q.{i}"], acts[f"k.{i}"])
    return _apart(made * ((made * seen).sum() / (made * made).sum().clamp_min(1e-30)), seen)


def worst(
    error: Callable[[Model, Activations, int], float], sites: tuple[str, ...], model: Model, acts: Activations
) -> float | None:
    """Return the largest error of the layers at which these sites were captured; None if no view is to be had."""
    found: list[float] = []
    for i in range(model.shape.n_layers):
        if all(f"{s}.{i}" in acts for s in sites):
            with suppress(Refused):
                found.append(error(model, acts, i))
    return max(found, default=None)


#: what each is called, what its failure disables, its error and the sites it compares
IDENTITIES: tuple[tuple[str, str, Callable[[Model, Activations, int], float], tuple[str, ...]], ...] = (
    ("W_V x + b_V = v", OV, values, ("attn_in", "v")),
    ("W_Q x · W_K x ∝ q · k", QK, products, ("attn_in", "q", "k")),
)


def _diagonal(q: Tensor, k: Tensor) -> Tensor:
    k = k.repeat_interleave(q.shape[2] // k.shape[2], dim=2)
    return (q.double() * k.double()).sum(-1)


def _apart(a: Tensor, b: Tensor) -> float:
    a, b = a.double(), b.double()
    if a.shape != b.shape:
        return float("inf")
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-9))
