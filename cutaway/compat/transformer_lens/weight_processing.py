"""Weight processing: folding and centring, which change how a model is written and not what it computes.

Every function takes a state dict under TransformerLens' names and changes it in place.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from cutaway.compat.transformer_lens.config import HookedTransformerConfig as Config
from cutaway.compat.transformer_lens.factored_matrix import FactoredMatrix
from cutaway.core.refuse import Refused

State = dict[str, Tensor]
#: the steps of processing in their order, and which of them are done unless it is said otherwise
STEPS = {
    "fold_ln": True, "center_writing_weights": True, "center_unembed": True, "fold_value_biases": True,
    "refactor_factored_attn_matrices": False,
}  # fmt: skip


def fold_norms(state: State, cfg: Config) -> State:
    """Multiply each norm's weight (and bias) into the weights that read it, and centre those if the norm centres."""
    centring = not str(cfg.normalization_type).startswith("RMS")
    own = "" if cfg.n_key_value_heads is None else "_"
    for i in range(cfg.n_layers):
        attn, mlp = f"blocks.{i}.attn.", f"blocks.{i}.mlp."
        readers = [
            (f"{attn}{u}W_{letter}", f"{attn}{u}b_{letter}") for u, letter in (("", "Q"), (own, "K"), (own, "V"))
        ]
        _fold(state, f"blocks.{i}.ln1", readers, centring)
        if cfg.attn_only:
            continue
        readers = [(f"{mlp}W_in", f"{mlp}b_in"), *([(f"{mlp}W_gate", "")] if cfg.gated_mlp else [])]
        _fold(state, f"blocks.{i}.ln2", readers, centring)
        if cfg.is_layer_norm_activation():
            _fold(state, f"{mlp}ln", [(f"{mlp}W_out", f"{mlp}b_out")], centring)
    _fold(state, "ln_final", [("unembed.W_U", "unembed.b_U")], centring and not cfg.final_rms)
    return state


def _fold(state: State, norm: str, readers: list[tuple[str, str]], centre: bool) -> None:
    w, b = state.pop(f"{norm}.w", None), state.pop(f"{norm}.b", None)
    for name, bias in readers:
        if w is None:
            continue
        if b is not None and bias:
            state[bias] = state[bias] + (state[name] * b[:, None]).sum(-2)
        state[name] = state[name] * w[:, None]
        if centre:
            state[name] = state[name] - state[name].mean(-2, keepdim=True)


def centre_writers(state: State, cfg: Config) -> State:
    """Take the mean over d_model from whatever writes into the stream: norms that centre never see it."""
    names = ["embed.W_E", "pos_embed.W_pos"]
    for i in range(cfg.n_layers):
        names += [f"blocks.{i}.{n}" for n in ("attn.W_O", "attn.b_O", "mlp.W_out", "mlp.b_out")]
    return _centre(state, names)


def _centre(state: State, names: list[str]) -> State:
    state.update({n: state[n] - state[n].mean(-1, keepdim=True) for n in names if n in state})
    return state


def centre_unembedding(state: State, cfg: Config) -> State:
    """Take the mean over the vocabulary from the unembedding: softmax never sees it."""
    return _centre(state, ["unembed.W_U", "unembed.b_U"])


def move_value_biases(state: State, cfg: Config, centred: bool = False) -> State:
    """Move b_V through W_O into b_O: patterns sum to one. Where that is `centred`, take the sum's rounding away too."""
    own = "" if cfg.n_key_value_heads is None else "_"
    for i in range(cfg.n_layers):
        v, o, out = (f"blocks.{i}.attn.{n}" for n in (f"{own}b_V", "b_O", "W_O"))
        b = state[v].repeat_interleave(state[out].shape[0] // state[v].shape[0], 0)
        state[o] = state[o] + (b[:, :, None] * state[out]).sum((0, 1))
        state[v] = torch.zeros_like(state[v])
        if centred:
            _centre(state, [o])
    return state


def make_even(state: State, cfg: Config) -> State:
    """Rewrite W_Q, W_K and W_V, W_O as even factors of the same products."""
    if cfg.positional_embedding_type == "rotary" or cfg.n_key_value_heads is not None:
        raise AssertionError("You can't refactor the QK circuit when using rotary embeddings or shared keys")
    move_value_biases(state, cfg)
    for i in range(cfg.n_layers):
        names = [f"blocks.{i}.attn.{n}" for n in ("W_Q", "b_Q", "W_K", "b_K", "W_V", "W_O")]
        w_q, b_q, w_k, b_k, w_v, w_o = (state[n] for n in names)
        left, right = (torch.cat([w, b[:, None]], 1) for w, b in ((w_q, b_q), (w_k, b_k)))
        even = FactoredMatrix(left, right.transpose(-1, -2)).make_even()
        k = even.B.transpose(-1, -2)
        u, s, vh = FactoredMatrix(w_v, w_o).svd()
        new = (even.A[:, :-1], even.A[:, -1], k[:, :-1], k[:, -1], u * s[:, None], vh.transpose(-1, -2))
        state.update(zip(names, new, strict=True))
    return state


def process(state: State, cfg: Config, which: Mapping[str, bool]) -> State:
    """Process a state dict by some of `STEPS`; one that does not apply to the model is left out with a warning.

    Raises:
        Refused: another step.
    """
    kind, rms = cfg.normalization_type, str(cfg.normalization_type).startswith("RMS")
    centring = kind is not None and not rms and not cfg.final_rms
    move = partial(move_value_biases, centred=centring and which["center_writing_weights"])
    table: dict[str, tuple[bool, str, Callable[[State, Config], State]]] = {
        "fold_ln": (kind is not None, "there is no layer norm to fold", fold_norms),
        "center_writing_weights": (centring, "writing weights are centred for norms that centre", centre_writers),
        "center_unembed": (cfg.output_logits_soft_cap <= 0, "no centring before a soft cap", centre_unembedding),
        "fold_value_biases": (True, "", move),
        "refactor_factored_attn_matrices": (True, "", make_even),
    }
    if unknown := which.keys() - table.keys():
        raise Refused(f"process {min(unknown)!r}", "there is no such step", f"use one of {', '.join(STEPS)}")
    for step in [name for name in STEPS if which[name]]:
        fits, why, change = table[step]
        if fits:
            change(state, cfg)
        else:
            logging.warning("%s is left out: %s", step, why)
    return state
