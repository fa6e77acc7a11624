"""Families by hand: where their modules are, read with plain torch hooks and nothing of the package."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Wiring:
    """Paths of modules, and what the family does to its norms and logits."""

    blocks: str
    final: str
    o: str
    down: str
    head: str = "lm_head"
    after_attn: str = ""
    after_mlp: str = ""
    centred: bool = False
    one_more: bool = False  # the norm multiplies by 1 + weight
    scale: float = 1.0
    cap: float = 0.0
    positions: str = ""


_LLAMA = {"blocks": "model.layers", "final": "model.norm", "o": "self_attn.o_proj", "down": "mlp.down_proj"}
WIRING = {
    "gpt2": Wiring("transformer.h", "transformer.ln_f", "attn.c_proj", "mlp.c_proj", centred=True,
                   positions="transformer.wpe"),
    "llama_gqa": Wiring(**_LLAMA),
    "llama_mqa_bias_tied": Wiring(**_LLAMA),
    "gemma2": Wiring(**_LLAMA, after_attn="post_attention_layernorm", after_mlp="post_feedforward_layernorm",
                     one_more=True, cap=3.0),
    "olmo2": Wiring(**_LLAMA, after_attn="post_attention_layernorm", after_mlp="post_feedforward_layernorm"),
    "cohere": Wiring(**_LLAMA, centred=True, scale=0.5),
    "gpt_neox_parallel": Wiring("gpt_neox.layers", "gpt_neox.final_layer_norm", "attention.dense", "mlp.dense_4h_to_h",
                                centred=True),
    "falcon_40b": Wiring("transformer.h", "transformer.ln_f", "self_attention.dense", "mlp.dense_4h_to_h",
                         centred=True),
}  # fmt: skip


@dataclass
class Run:
    """One prompt: the last position's inputs of every output projection, and the stream between blocks."""

    stream: list[Tensor]  # entering each block, and last leaving the last
    z: list[Tensor]
    attn: list[Tensor]  # what the output projection gives
    mlp: list[Tensor]  # what the MLP adds to the stream (after its post-norm)
    post: list[Tensor]  # neurons
    position: Tensor | None
    logits: Tensor


def run(hf: Any, w: Wiring, ids: Tensor) -> Run:
    """A forward of one unpadded prompt with everything written down, in float64."""
    blocks, found, handles = list(hf.get_submodule(w.blocks)), {}, []

    def keep(key: Any, module: nn.Module, what: str) -> None:
        def after(m: nn.Module, args: Any, kw: Any, out: Any) -> None:
            x = (
                (args[0] if args else kw["hidden_states"])
                if what == "in"
                else out[0]
                if isinstance(out, tuple)
                else out
            )
            found[key] = x[0, -1].detach().double().clone()

        handles.append(module.register_forward_hook(after, with_kwargs=True))

    for i, b in enumerate(blocks):
        keep(("pre", i), b, "in")
        keep(("z", i), b.get_submodule(w.o), "in")
        keep(("attn", i), b.get_submodule(w.o), "out")
        keep(("mlp", i), b.get_submodule(w.after_mlp or w.down), "out")
        keep(("post", i), b.get_submodule(w.down), "in")
    keep("final", hf.get_submodule(w.final), "in")
    if w.positions:
        keep("positions", hf.get_submodule(w.positions), "out")
    try:
        with torch.no_grad():
            logits = hf(ids).logits[0, -1].double()
    finally:
        for h in handles:
            h.remove()
    layers = range(len(blocks))
    stream = [*(found["pre", i] for i in layers), found["final"]]
    columns = ([found[name, i] for i in layers] for name in ("z", "attn", "mlp", "post"))
    return Run(stream, *columns, found.get("positions"), logits)


def output_rows(module: nn.Module) -> Tensor:
    """The weight of an output projection as [in, out]."""
    weight = module.weight.detach().double()
    return weight if type(module).__name__ == "Conv1D" else weight.T


def frozen(norm: nn.Module, w: Wiring, x: Tensor, part: Tensor) -> Tensor:
    """What a norm makes of `part` of its input `x`, with the scale of all of `x`; no bias."""
    eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    middle = x - x.mean() if w.centred else x
    scale = (middle.pow(2).mean() + eps).sqrt()
    part = part - part.mean(-1, keepdim=True) if w.centred else part
    return part / scale * (norm.weight.detach().double() + (1 if w.one_more else 0))
