"""The activations of a run by hook name, with TransformerLens' ways of taking the residual stream apart."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cutaway.compat.transformer_lens.utils import Mismatch, Slice, get_act_name

_CENTRED, _NORMS = ("LN", "LNPre"), ("LN", "LNPre", "RMS", "RMSPre")
Stack = Tensor | tuple[Tensor, list[str]]  # [component … d_model], with labels if they are asked for


@dataclass(frozen=True)
class _Norm:
    """Norm of stacks with its scale held at the run's, and a projection behind it: a linear map.

    Attributes:
        centred: True if it subtracts the mean.
        scale: its divisor [… 1]; None without a norm.
        onto: the projection [d_model] or [d_model outs], if any.
    """

    centred: bool = False
    scale: Tensor | None = None
    onto: Tensor | None = None

    def __call__(self, stack: Tensor) -> Tensor:
        return self.divided(self.linear(stack))

    def linear(self, x: Tensor) -> Tensor:
        x = x - x.mean(-1, keepdim=True) if self.centred else x
        return x if self.onto is None else x @ (self.onto if self.onto.ndim > 1 else self.onto[:, None])

    def divided(self, stack: Tensor) -> Tensor:
        return stack if self.scale is None else stack / self.scale

    def answer(self, stack: Tensor, labels: list[str], return_labels: bool) -> Stack:
        stack = stack.squeeze(-1) if self.onto is not None and self.onto.ndim == 1 else stack
        return (stack, labels) if return_labels else stack


class ActivationCache:
    """Activations by hook name; `cache["q", 3]`, `cache["resid_post", -1]` and full names all work.

    Layers count from the stream that enters them: `layer` takes what is written before it; −1, None and `n_layers` mean
    the unembedding. A `pos_slice` cuts positions as `utils.Slice` does. `project_output_onto`, [d_model] or
    [d_model, outs], stands in for the last axis without an array of all neurons' vectors.

    Attributes:
        cache_dict: the activations.
        model: the model they are of.
        has_batch_dim: False once the batch axis is removed.
    """

    def __init__(self, cache_dict: dict[str, Tensor], model: Any, has_batch_dim: bool = True):
        self.cache_dict, self.model, self.has_batch_dim = cache_dict, model, has_batch_dim
        self.has_embed, self.has_pos_embed = "hook_embed" in cache_dict, "hook_pos_embed" in cache_dict

    def __getitem__(self, key: Any) -> Tensor:
        if key in self.cache_dict:
            return self.cache_dict[key]
        if isinstance(key, str):
            return self.cache_dict[get_act_name(key)]
        name: Any
        name, layer, *rest = *key, *[None] * (len(key) < 2)
        layer = layer + self.model.cfg.n_layers if layer is not None and layer < 0 else layer
        return self.cache_dict[get_act_name(name, layer, *rest)]

    def __repr__(self) -> str:
        return f"ActivationCache with keys {list(self.cache_dict)}"

    def __len__(self) -> int:
        return len(self.cache_dict)

    def __iter__(self) -> Iterator[str]:
        return iter(self.cache_dict)

    def keys(self) -> Any:
        """Return the hook names."""
        return self.cache_dict.keys()

    def values(self) -> Any:
        """Return the activations."""
        return self.cache_dict.values()

    def items(self) -> Any:
        """Return names and activations."""
        return self.cache_dict.items()

    def to(self, device: Any) -> ActivationCache:
        """Move the activations to a device."""
        self.cache_dict = {key: value.to(device) for key, value in self.items()}
        return self

    def toggle_autodiff(self, mode: bool = False) -> None:
        """Switch gradients on or off in the whole process."""
        logging.warning("Changed the global state, set autodiff to %s", mode)
        torch.set_grad_enabled(mode)

    def _batch_size(self) -> int:
        counts = Counter(len(v) for v in self.values() if v.ndim)
        return counts.most_common(1)[0][0] if counts else 1

    def remove_batch_dim(self) -> ActivationCache:
        """Remove the batch axis of a single prompt, in place."""
        if not self.has_batch_dim:
            logging.warning("Tried removing batch dimension after already having removed it.")
        elif (size := self._batch_size()) != 1:
            raise Mismatch("remove_batch_dim()", f"the batch holds {size} prompts", "slice one of them")
        else:
            self.cache_dict.update({k: v[0] for k, v in self.items() if v.ndim and len(v) == 1})
            self.has_batch_dim = False
        return self

    def apply_slice_to_batch_dim(self, batch_slice: Any) -> ActivationCache:
        """Return a cache of some prompts; an int removes the batch axis."""
        cut, size = _slice(batch_slice), self._batch_size()
        if not self.has_batch_dim:
            raise Mismatch("apply_slice_to_batch_dim()", "the cache has no batch axis", "slice before removing it")
        some = {k: cut.apply(v) if v.ndim and len(v) == size else v for k, v in self.items()}
        return ActivationCache(some, self.model, has_batch_dim=cut.mode != "int")

    def stack_activation(
        self, activation_name: str, layer: int | None = -1, sublayer_type: str | None = None
    ) -> Tensor:
        """Return an activation of every layer before `layer` [layer …]."""
        return torch.stack([self[activation_name, i, sublayer_type] for i in range(self._before(layer))])

    def accumulated_resid(
        self, layer=None, incl_mid=False, apply_ln=False, pos_slice=None, mlp_input=False, return_labels=False
    ) -> Stack:
        """Return the residual stream at each layer up to `layer`; the final norm sees each state by itself."""
        layer, pos, final = self._before(layer), _slice(pos_slice), self.model.cfg.n_layers
        places = [(name, i) for i in range(layer) for name in ("pre", "mid")[: 1 + incl_mid]]
        places += [("post", final - 1)] if layer == final else [(n, layer) for n in ("pre", "mid")[: 1 + mlp_input]]
        stack = torch.stack([pos.apply(self[f"resid_{name}", i], -2) for name, i in places])
        if apply_ln:
            stack = self.apply_ln_to_stack(
                stack, layer, mlp_input, pos, has_batch_dim=self.has_batch_dim, recompute_ln=layer == final
            )
        return _Norm().answer(stack, ["final_post" if n == "post" else f"{i}_{n}" for n, i in places], return_labels)

    def decompose_resid(
        self,
        layer=None,
        mlp_input=False,
        mode="all",
        apply_ln=False,
        pos_slice=None,
        incl_embeds=True,
        return_labels=False,
    ) -> Stack:
        """Return what embeddings and sublayers write before `layer`; `mode` is "all", "attn" or "mlp"."""
        layer, pos = self._before(layer), _slice(pos_slice)
        writers = ["attn_out"] * (mode != "mlp") + ["mlp_out"] * (mode != "attn" and not self.model.cfg.attn_only)
        places: list[Any] = [(n,) for n in self._embeddings() if incl_embeds]
        places += [(n, i) for i in range(layer) for n in writers]
        places += [("attn_out", layer)] * (mlp_input and mode != "mlp")
        stack = torch.stack([pos.apply(self[place], -2) for place in places])
        stack = self.apply_ln_to_stack(stack, layer, mlp_input, pos) if apply_ln else stack
        return _Norm().answer(stack, ["_".join(map(str, place[::-1])) for place in places], return_labels)

    def compute_head_results(self) -> None:
        """Store what each head writes, [… pos head d_model], unless it is there."""
        for i, block in enumerate(self.model.blocks):
            name = f"blocks.{i}.attn.hook_result"
            if name not in self.cache_dict:
                self.cache_dict[name] = torch.einsum("...hd,hdm->...hm", self["z", i], block.attn.W_O)

    def stack_head_results(
        self, layer=-1, return_labels=False, incl_remainder=False, pos_slice=None, apply_ln=False
    ) -> Stack:
        """Return what each head before `layer` writes, labelled L0H0; the remainder is the rest of the stream."""
        layer, pos = self._before(layer), _slice(pos_slice)
        self.compute_head_results()
        norm = self._norm(layer, False, pos, apply_ln)
        parts = [norm(pos.apply(self["result", i], -3).movedim(-2, 0)) for i in range(layer)]
        labels = [f"L{i}H{h}" for i in range(layer) for h in range(self.model.cfg.n_heads)]
        return norm.answer(*self._stacked(parts, labels, layer, pos, norm, incl_remainder), return_labels)

    def get_neuron_results(
        self, layer: int, neuron_slice: Any = None, pos_slice: Any = None, project_output_onto: Tensor | None = None
    ) -> Tensor:
        """Return what each neuron of a layer writes [… pos neuron d_model]."""
        neurons, acts = _slice(neuron_slice), _slice(pos_slice).apply(self["post", layer], -2)
        acts, rows = neurons.apply(acts, -1), neurons.apply(self.model.blocks[layer].mlp.W_out, 0)
        rows = rows if project_output_onto is None else rows @ project_output_onto
        return (
            acts * rows if project_output_onto is not None and project_output_onto.ndim == 1 else acts[..., None] * rows
        )

    def stack_neuron_results(
        self,
        layer: int | None,
        pos_slice: Any = None,
        neuron_slice: Any = None,
        return_labels: bool = False,
        incl_remainder: bool = False,
        apply_ln: bool = False,
        project_output_onto: Tensor | None = None,
    ) -> Stack:
        """Return what each neuron before `layer` writes, labelled L0N0."""
        layer, pos = self._before(layer), _slice(pos_slice)
        norm = self._norm(layer, False, pos, apply_ln, project_output_onto)
        parts = self._neurons(layer, pos, _slice(neuron_slice), norm)
        numbers = _slice(neuron_slice).apply(torch.arange(self.model.cfg.d_mlp))
        labels = [f"L{i}N{n}" for i in range(layer) for n in numbers]
        return norm.answer(*self._stacked(parts, labels, layer, pos, norm, incl_remainder), return_labels)

    def get_full_resid_decomposition(
        self,
        layer: int | None = None,
        mlp_input: bool = False,
        expand_neurons: bool = True,
        apply_ln: bool = False,
        pos_slice: Any = None,
        return_labels: bool = False,
        project_output_onto: Tensor | None = None,
    ) -> Stack:
        """Return every head, every neuron (or MLP), the embeddings and the sum of the biases before `layer`."""
        layer, pos = self._before(layer), _slice(pos_slice)
        norm = self._norm(layer, mlp_input, pos, apply_ln, project_output_onto)
        labels: Any
        heads, labels = self.stack_head_results(layer + mlp_input, True, pos_slice=pos)
        parts = [norm(heads)]
        if layer > 0 and not self.model.cfg.attn_only and expand_neurons:
            parts += self._neurons(layer, pos, Slice(), norm)
            labels += [f"L{i}N{n}" for i in range(layer) for n in range(self.model.cfg.d_mlp)]
        elif layer > 0 and not self.model.cfg.attn_only:
            mlps, names = self.decompose_resid(layer, False, "mlp", False, pos, False, True)
            parts, labels = [*parts, norm(mlps)], [*labels, *names]
        parts += [norm(pos.apply(self[name], -2)[None]) for name in self._embeddings()]
        bias = self.model.accumulated_bias(layer, mlp_input, include_mlp_biases=expand_neurons)
        parts.append(norm(bias.expand(1, *heads.shape[1:])))
        return norm.answer(torch.cat(parts), [*labels, *self._embeddings(), "bias"], return_labels)

    def apply_ln_to_stack(
        self,
        residual_stack,
        layer=None,
        mlp_input=False,
        pos_slice=None,
        batch_slice=None,
        has_batch_dim=True,
        recompute_ln=False,
    ) -> Tensor:
        """Norm a stack by the scale that the norm in front of `layer` had; or again by the final norm."""
        if self.model.cfg.normalization_type not in _NORMS:
            return residual_stack
        layer, cut = self._before(layer), _slice(batch_slice)
        stack = cut.apply(residual_stack, 1) if has_batch_dim else residual_stack
        if recompute_ln and layer == self.model.cfg.n_layers:
            return self.model.ln_final(stack.reshape(1, -1, stack.shape[-1])).reshape(stack.shape)
        return self._norm(layer, mlp_input, _slice(pos_slice), True, batch=cut)(stack)

    def logit_attrs(
        self, residual_stack, tokens, incorrect_tokens=None, pos_slice=None, batch_slice=None, has_batch_dim=True
    ) -> Tensor:
        """Return each component's contribution to the logit of `tokens`, or to its difference to `incorrect_tokens`."""
        direction = self.model.tokens_to_residual_directions(tokens)
        if incorrect_tokens is not None:
            other = self.model.tokens_to_residual_directions(incorrect_tokens)
            if other.shape != direction.shape:
                shapes = f"their shapes differ: {tuple(direction.shape[:-1])} and {tuple(other.shape[:-1])}"
                raise Mismatch("tokens and incorrect_tokens", shapes, "give one wrong token for each right one")
            direction = direction - other
        stack = self.apply_ln_to_stack(residual_stack, -1, False, pos_slice, batch_slice, has_batch_dim)
        return (stack * direction).sum(-1)

    def _before(self, layer: int | None) -> int:
        return self.model.cfg.n_layers if layer is None or layer == -1 else layer

    def _embeddings(self) -> list[str]:
        return ["embed"] * self.has_embed + ["pos_embed"] * self.has_pos_embed

    def _norm(
        self,
        layer: int,
        mlp_input: bool,
        pos: Slice,
        apply: bool,
        onto: Tensor | None = None,
        batch: Slice | None = None,
    ) -> _Norm:
        kind = self.model.cfg.normalization_type
        if not apply or kind not in _NORMS:
            return _Norm(onto=onto)
        final = layer == self.model.cfg.n_layers
        name = "ln_final" if final else f"blocks.{layer}.ln{2 if mlp_input else 1}"
        scale = pos.apply(self[f"{name}.hook_scale"], -2)
        return _Norm(kind in _CENTRED, batch.apply(scale) if batch and self.has_batch_dim else scale, onto)

    def _neurons(self, layer: int, pos: Slice, neurons: Slice, norm: _Norm) -> list[Tensor]:
        """Return what the neurons of each layer write [neuron … out]: W_out goes through the norm, not its outputs."""
        found = []
        for i in range(layer):
            acts = neurons.apply(pos.apply(self["post", i], -2), -1).movedim(-1, 0)
            rows = norm.linear(neurons.apply(self.model.blocks[i].mlp.W_out, 0))
            found.append(norm.divided(torch.einsum("n...,no->n...o", acts, rows)))
        return found

    def _stacked(
        self, parts: list[Tensor], labels: list[str], layer: int, pos: Slice, norm: _Norm, remainder: bool
    ) -> tuple[Tensor, list[str]]:
        """Return the components as one stack, with what they lack of the stream in front of `layer` if asked."""
        stack = torch.cat(parts) if parts else norm(pos.apply(self["embed"], -2)[None])[:0]
        if not remainder:
            return stack, labels
        whole = norm(pos.apply(self["resid_post", layer - 1], -2)[None])
        return torch.cat([stack, whole - stack.sum(0, keepdim=True)]), [*labels, "remainder"]


def _slice(given: Any) -> Slice:
    return given if isinstance(given, Slice) else Slice(given)
