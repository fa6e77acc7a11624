"""Weight processing: folding and centring, which change how a model is written and not what it computes.

Every function takes a state dict under TransformerLens' names and changes it in place.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from cutaway.compat.transformer_lens.config import HookedTransformerConfig as Config
from cutaway.compat.transformer_lens.factored_matrix import FactoredMatrix

State = dict[str, Tensor]


def fold_layer_norm(state: State, cfg: Config, fold_biases: bool = True, center_weights: bool = True) -> State:
    """Multiply each norm's weight (and bias) into the weights that read it, and centre those."""
    own = "" if cfg.n_key_value_heads is None else "_"
    for i in range(cfg.n_layers):
        attn, mlp = f"blocks.{i}.attn.", f"blocks.{i}.mlp."
        readers = [
            (f"{attn}{u}W_{letter}", f"{attn}{u}b_{letter}") for u, letter in (("", "Q"), (own, "K"), (own, "V"))
        ]
        _fold(state, f"blocks.{i}.ln1", readers, fold_biases, center_weights)
        if cfg.attn_only:
            continue
        readers = [(f"{mlp}W_in", f"{mlp}b_in"), *([(f"{mlp}W_gate", "")] if cfg.gated_mlp else [])]
        _fold(state, f"blocks.{i}.ln2", readers, fold_biases, center_weights)
        if cfg.is_layer_norm_activation():
            _fold(state, f"{mlp}ln", [(f"{mlp}W_out", f"{mlp}b_out")], fold_biases, center_weights)
    _fold(state, "ln_final", [("unembed.W_U", "unembed.b_U")], fold_biases, center_weights and not cfg.final_rms)
    return state


def _fold(state: State, norm: str, readers: list[tuple[str, str]], biases: bool, centre: bool) -> None:
    w, b = state.pop(f"{norm}.w", None), state.pop(f"{norm}.b", None)
    for name, bias in readers:
        if w is None:
            continue
        if biases and b is not None and bias:
            state[bias] = state[bias] + (state[name] * b[:, None]).sum(-2)
        state[name] = state[name] * w[:, None]
        if centre:
            state[name] = state[name] - state[name].mean(-2, keepdim=True)


def center_writing_weights(state: State, cfg: Config) -> State:
    """Take the mean over d_model from whatever writes into the stream: norms that centre never see it."""
    names = ["embed.W_E", "pos_embed.W_pos"]
    for i in range(cfg.n_layers):
        names += [f"blocks.{i}.{n}" for n in ("attn.W_O", "attn.b_O", "mlp.W_out", "mlp.b_out")]
    return _centred(state, names)


def _centred(state: State, names: list[str]) -> State:
    state.update({n: state[n] - state[n].mean(-1, keepdim=True) for n in names if n in state})
    return state


def center_unembed(state: State, cfg: Config) -> State:
    """Take the mean over the vocabulary from the unembedding: softmax never sees it."""
    state["unembed.W_U"] = state["unembed.W_U"] - state["unembed.W_U"].mean(-1, keepdim=True)
    state["unembed.b_U"] = state["unembed.b_U"] - state["unembed.b_U"].mean()
    return state


def fold_value_biases(state: State, cfg: Config) -> State:
    """Move b_V through W_O into b_O: patterns sum to one."""
    own = "" if cfg.n_key_value_heads is None else "_"
    for i in range(cfg.n_layers):
        v, o, out = (f"blocks.{i}.attn.{n}" for n in (f"{own}b_V", "b_O", "W_O"))
        b = state[v].repeat_interleave(state[out].shape[0] // state[v].shape[0], 0)
        state[o] = state[o] + (b[:, :, None] * state[out]).sum((0, 1))
        state[v] = torch.zeros_like(state[v])
    return state


def refactor_factored_attn_matrices(state: State, cfg: Config) -> State:
    """Rewrite W_Q, W_K and W_V, W_O as even factors of the same products."""
    if cfg.positional_embedding_type == "rotary" or cfg.n_key_value_heads is not None:
        raise AssertionError("You can't refactor the QK circuit when using rotary embeddings or shared keys")
    fold_value_biases(state, cfg)
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


def process(state, cfg, fold_ln, centre_writing, centre_unembed, fold_values, refactor) -> State:
    """Process a state dict as asked; what does not apply to the model is left out with a warning."""
    rms = str(cfg.normalization_type).startswith("RMS")
    if fold_ln:
        if cfg.normalization_type in ("LN", "LNPre", "RMS", "RMSPre"):
            fold_layer_norm(state, cfg, not rms, not rms)
        else:
            logging.warning("there is no layer norm to fold")
    if centre_writing and (rms or cfg.normalization_type is None or cfg.final_rms):
        logging.warning("writing weights are centred only where every norm subtracts the mean: left as they are")
        centre_writing = False
    if centre_writing:
        center_writing_weights(state, cfg)
    if centre_unembed:
        if cfg.output_logits_soft_cap > 0:
            logging.warning("the unembedding is not centred before a soft cap")
        else:
            center_unembed(state, cfg)
    if fold_values:
        fold_value_biases(state, cfg)
    if fold_values and centre_writing:  # what was added is centred but for rounding, which TransformerLens takes away
        _centred(state, [f"blocks.{i}.attn.b_O" for i in range(cfg.n_layers)])
    if refactor:
        refactor_factored_attn_matrices(state, cfg)
    return state
