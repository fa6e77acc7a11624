"""Singular vectors of weights, read through the unembedding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cutaway.compat.transformer_lens.factored_matrix import FactoredMatrix
from cutaway.compat.transformer_lens.utils import Mismatch


class SVDInterpreter:
    """Singular vectors of the OV, W_in and W_out matrices of a HookedTransformer."""

    def __init__(self, model: Any):
        self.model, self.cfg = model, model.cfg

    def get_singular_vectors(
        self, vector_type: str, layer_index: int, num_vectors: int = 10, head_index: int | None = None
    ) -> Tensor:
        """Return the logits [d_vocab 1 num_vectors] of the largest right singular vectors ("OV", "w_in" or "w_out")."""
        heads = [None, *range(self.cfg.n_heads)][vector_type == "OV" :]
        there = vector_type in ("OV", "w_in", "w_out") and layer_index in range(self.cfg.n_layers)
        if not there or head_index not in heads:
            asked = f"get_singular_vectors({vector_type!r}, {layer_index}, head_index={head_index})"
            raise Mismatch(asked, "it is OV of a head, w_in or w_out of a layer of this model", "name one of these")
        block = self.model.blocks[layer_index]
        if vector_type == "OV":
            vectors = FactoredMatrix(block.attn.W_V[head_index], block.attn.W_O[head_index]).V.mT
        else:
            matrix = block.mlp.W_out if vector_type == "w_out" else block.mlp.W_in.T * getattr(block.ln2, "w", 1.0)
            vectors = torch.linalg.svd(matrix).Vh
        return (vectors[:num_vectors].float() @ self.model.W_U).T.unsqueeze(1)
