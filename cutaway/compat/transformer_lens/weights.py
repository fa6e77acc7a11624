"""Weights of a model under TransformerLens' names: stacks over layers, circuits, loading and processing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from cutaway.compat.transformer_lens import bridged, bridged_weights, native, utils, weight_processing
from cutaway.compat.transformer_lens.factored_matrix import Circuits
from cutaway.compat.transformer_lens.hook_points import HookedRootModule
from cutaway.core.refuse import Refused

_STACKED = {n: f"attn.{n}" for n in ("W_Q", "W_K", "W_V", "W_O", "b_Q", "b_K", "b_V", "b_O")} | {
    n: f"mlp.{n}" for n in ("W_in", "W_gate", "W_out", "b_in", "b_out")
}
_SINGLE = {"W_E": "embed", "W_pos": "pos_embed", "W_U": "unembed", "b_U": "unembed"}


class Weights(Circuits, HookedRootModule):
    """The methods of a model that read or write its weights."""

    cfg: Any
    house: Any

    def _process(self, **which: bool) -> None:
        """Fold and centre the weights by `weight_processing.STEPS`, changed as said."""
        asked = weight_processing.STEPS | which
        if not any(asked.values()):
            return
        state = weight_processing.process(self._weights(), self.cfg, asked)
        if self.house is not None:
            bridged_weights.store(self, state)
        else:
            super().load_state_dict(state, strict=False)  # norms that are folded are gone, and buffers stay
        if asked["fold_ln"] and self.cfg.normalization_type is not None:
            if self.house is not None:
                bridged_weights.clear_norms(self)
            self.cfg.normalization_type = f"{self.cfg.normalization_type.removesuffix('Pre')}Pre"
            self._regrow_norms()

    def _regrow_norms(self) -> None:
        """Take the weights from the norms, which are folded."""
        for name, module in list(self.mod_dict.items()):
            if name.rpartition(".")[2] in ("ln1", "ln2", "ln_final", "ln"):
                module.__dict__.update(pre=True, **({"weights": {}} if self.house is not None else {}))
                for weight in ("w", "b"):
                    module._parameters.pop(weight, None)
        self.setup()

    def load_and_process_state_dict(self, state_dict: Mapping[str, Tensor], **which: bool) -> None:
        """Load a state dict, folded and centred as asked."""
        self.load_state_dict(dict(state_dict))
        self._process(**which)

    def init_weights(self) -> None:
        """Draw all weights."""
        native.initialise(self, self.cfg)

    def _weights(self, detached: bool = True) -> dict[str, Tensor]:
        """Return the weights under TransformerLens' names, without buffers."""
        if self.house is None:
            return {n: p.detach() for n, p in self.named_parameters()}
        return {n: read().detach() if detached else read() for n, read in bridged.reads(self).items()}

    def named_parameters(self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True) -> Any:
        """Yield the weights under TransformerLens' names: of a bridged model, as they are read off it."""
        own = super().named_parameters(prefix, recurse, remove_duplicate) if self.house is None else None
        yield from own if own is not None else self._weights(detached=False).items()

    def parameters(self, recurse: bool = True) -> Any:
        """Yield the parameters that an optimiser takes: of a bridged model, those of its Hugging Face model."""
        yield from super().parameters(recurse) if self.house is None else self.house.hf.parameters(recurse)

    def state_dict(self, *args: Any, **options: Any) -> dict[str, Tensor]:
        """Return the weights under TransformerLens' names."""
        return super().state_dict(*args, **options) if self.house is None else self._weights()

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load weights under TransformerLens' names; tables of masks and rotations are the model's own.

        Raises:
            Refused: weights of a bridged model are missing, or there are others, unless `strict` is False.
        """
        own = {n: t for n, t in state_dict.items() if not n.endswith((".mask", ".rotary_sin", ".rotary_cos"))}
        if self.house is None:
            return super().load_state_dict(dict(self.named_buffers()) | own, strict, assign)
        own = {n: t for n, t in own.items() if not n.endswith(".IGNORE")}
        known = self._weights().keys()
        if wrong := sorted((known ^ own.keys()) if strict else own.keys() - known):
            why = f"{wrong[0]} is {'missing' if wrong[0] in known else 'none of its weights'}"
            raise Refused(f"a state dict for {self.cfg.model_name}", why, "give the names of model.state_dict()")
        return bridged_weights.store(self, own)

    def __getattr__(self, name: str) -> Any:
        if name in _STACKED and "blocks" in self._modules:
            part, weight = _STACKED[name].split(".")
            return torch.stack([getattr(getattr(b, part), weight) for b in self.blocks], dim=0)
        if name in _SINGLE:
            return getattr(super().__getattr__(_SINGLE[name]), name)
        return super().__getattr__(name)

    def tokens_to_residual_directions(self, tokens: Any) -> Float[Tensor, "*token d_model"]:
        """Return the columns of W_U of tokens: of one, a list, or a tensor of them."""
        if isinstance(tokens, Tensor) and tokens.numel() > 1:
            return self.W_U[:, tokens].moveaxis(0, -1)
        if isinstance(tokens, str):
            tokens = self.to_single_token(tokens)
        return self.W_U[:, int(tokens)]

    def accumulated_bias(
        self, layer: int, mlp_input: bool = False, include_mlp_biases: bool = True
    ) -> Float[Tensor, "d_model"]:
        """Return the sum of all biases written into the stream before a layer (and its attention, with `mlp_input`)."""
        total = torch.zeros(self.cfg.d_model, device=self.cfg.device)
        for block in self.blocks[:layer]:
            total = total + block.attn.b_O + (block.mlp.b_out if include_mlp_biases and not self.cfg.attn_only else 0)
        return total + self.blocks[layer].attn.b_O if mlp_input else total

    def all_composition_scores(self, mode: str) -> Float[Tensor, "layer head layer head"]:
        """Return the Q-, K- or V-composition score of every head with every head of a later layer."""
        left = self.OV
        if mode not in ("Q", "K", "V"):
            raise ValueError(f"mode must be one of ['Q', 'K', 'V'] not {mode}")
        right = {"Q": lambda: self.QK, "K": lambda: self.QK.T, "V": lambda: self.OV}[mode]()
        scores = utils.composition_scores(left, right, broadcast_dims=True)
        layers = torch.arange(self.cfg.n_layers, device=scores.device)
        return torch.where((layers[:, None] < layers)[:, None, :, None], scores, torch.zeros_like(scores))
