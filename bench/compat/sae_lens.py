"""Seeded tiny SAEs of SAELens 6, alone and attached to a model, as the reference of a test.

Run in an environment with SAELens 6:

    python -m bench.compat.sae_lens tests/compat/reference/sae_lens.safetensors

A name of the file is `ARCHITECTURE/PART`: the input, what each hook point sees and the output of an SAE; or
`model/…`: the weights of a model, and what it gives with SAEs attached, with and without the error term. `contexts/…`
are the rows that documents of token ids become, by the policies of beginning-of-text tokens.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

D, F, BOS = 8, 24, 0
SIZES = {"n_layers": 2, "d_model": D, "n_ctx": 16, "d_head": 4, "n_heads": 2, "d_mlp": 16, "d_vocab": 32,
         "act_fn": "gelu", "normalization_type": "LN", "seed": 0}  # fmt: skip
#: name: architecture, and the words of its configuration
SAES: dict[str, tuple[str, dict[str, Any]]] = {
    "standard": ("standard", {}),
    "layer norm": ("standard", {"normalize_activations": "layer_norm", "apply_b_dec_to_input": False}),
    "token norm": ("standard", {"normalize_activations": "constant_norm_rescale"}),
    "gated": ("gated", {}),
    "jumprelu": ("jumprelu", {}),
    "topk": ("topk", {"k": 3}),
    "topk, norms": ("topk", {"k": 3, "rescale_acts_by_decoder_norm": True}),
    "abstopk": ("abstopk", {"k": 3}),
    "matching pursuit": ("matching_pursuit", {"max_iterations": 4}),
    "transcoder": ("transcoder", {"d_out": 6}),
    "skip transcoder": ("skip_transcoder", {"d_out": 6}),
    "jumprelu transcoder": ("jumprelu_transcoder", {"d_out": 6}),
    "jumprelu skip transcoder": ("jumprelu_skip_transcoder", {"d_out": 6}),
}
ATTACHED = {"resid": "blocks.1.hook_resid_pre", "z": "blocks.0.attn.hook_z", "mlp": "blocks.1.ln2.hook_normalized"}
TOKENS = torch.tensor([[0, 5, 9, 31, 5, 9], [0, 7, 7, 2, 1, 30]])
DOCUMENTS = [[int(i) for i in 1 + torch.randperm(31, generator=torch.Generator().manual_seed(n))[: 3 + 5 * n % 23]]
             for n in range(9)]  # fmt: skip


def configured(package: Any, kind: str, words: dict[str, Any], **facts: Any) -> Any:
    """Return the SAE of an architecture, its weights drawn anew; `package` is SAELens or its façade."""
    own = {"d_in": D, "d_sae": F, "architecture": kind, **words, "metadata": facts}
    own |= {"apply_b_dec_to_input": False} if "transcoder" in kind else {}
    sae = package.SAE.from_dict(own)
    g = torch.Generator().manual_seed(len(kind))
    with torch.no_grad():
        for _, weight in sorted(sae.named_parameters()):
            weight.copy_(torch.randn(weight.shape, generator=g) * (0.5 if weight.ndim > 1 else 0.2))
    return sae


def passed(sae: Any, x: Tensor) -> dict[str, Tensor]:
    """Return what each hook point of an SAE sees, and its outputs without and with the error term."""
    out, cache = sae.run_with_cache(x)
    found = {f"hook/{n}": t for n, t in cache.items()} | {"x": x, "out": out}
    if "d_out" not in sae.cfg.to_dict() and "gated" not in sae.cfg.architecture():
        sae.use_error_term = True
        found["with error"] = sae(x)
    return found


def attached(package: Any, model: Any) -> dict[str, Tensor]:
    """Return what a model gives with SAEs attached: a residual stream's, one of heads, and a transcoder."""
    kinds = {"resid": ("standard", {}), "z": ("gated", {"reshape_activations": "hook_z"}),
             "mlp": ("transcoder", {"d_out": D})}  # fmt: skip
    facts = {
        n: {"hook_name": ATTACHED[n], "hook_name_out": "blocks.1.hook_mlp_out" if n == "mlp" else None} for n in kinds
    }
    saes = {n: configured(package, *kinds[n], **facts[n]) for n in kinds}
    every, found = list(saes.values()), {"clean": model(TOKENS)}
    for error in (False, True):
        logits, cache = model.run_with_cache_with_saes(TOKENS, saes=every, use_error_term=error)
        found[f"error {error}"] = logits
        found |= {f"error {error}/{n}": t for n, t in cache.items() if "hook_sae" in n or n.endswith("resid_post")}
    hook = f"{ATTACHED['resid']}.hook_sae_acts_post"

    def ablate(acts: Tensor, hook: Any) -> Tensor:
        acts[..., :12] = 0.0
        return acts

    with model.saes(every[:1], use_error_term=True):
        found["ablated"] = model.run_with_hooks(TOKENS, fwd_hooks=[(hook, ablate)])
    found["afterwards"] = model(TOKENS)
    return found


def contexts() -> dict[str, Tensor]:
    """Return the rows that documents become, by whether contexts begin, and documents are parted, with the token."""
    from sae_lens.tokenization_and_batching import concat_and_batch_sequences

    found = {}
    for begin, between in ((True, True), (True, False), (False, False)):
        rows = concat_and_batch_sequences(
            iter([torch.tensor(d) for d in DOCUMENTS]),
            context_size=16,
            begin_batch_token_id=BOS if begin else None,
            sequence_separator_token_id=BOS if between else None,
        )
        found[f"{begin}, {between}"] = torch.stack(list(rows))
    return found


def main(path: str) -> None:
    """Write the reference."""
    import sae_lens
    from safetensors.torch import save_file
    from transformer_lens import HookedTransformerConfig

    g, found = torch.Generator().manual_seed(1), dict[str, Tensor]()
    for name, (kind, words) in SAES.items():
        sae, x = configured(sae_lens, kind, words), torch.randn(2, 5, D, generator=g)
        found |= {f"{name}/{part}": t for part, t in passed(sae, x).items()}
    model = sae_lens.HookedSAETransformer(HookedTransformerConfig(**SIZES))
    found |= {f"model/weights/{n}": t for n, t in model.state_dict().items() if "mask" not in n and "IGNORE" not in n}
    found |= {f"model/{n}": t for n, t in attached(sae_lens, model).items()}
    found |= {f"contexts/{n}": t for n, t in contexts().items()}
    about = {"SAELens": sae_lens.__version__}
    save_file({n: t.detach().contiguous().clone() for n, t in found.items()}, Path(path), metadata=about)


if __name__ == "__main__":
    main(sys.argv[1])
