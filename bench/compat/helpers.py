"""What TransformerLens 3.9's cache, factored matrices, patching and other helpers return, as the reference of tests.

Run in an environment with TransformerLens 3.9:

    python -m bench.compat.helpers tests/compat/reference/helpers.json

Every function here takes the classes or modules of either package, and returns tensors by name.
"""

from __future__ import annotations

import itertools
import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.compat import hook_points

CLEAN = torch.tensor([[0, 5, 9, 31, 5, 9], [0, 7, 2, 11, 7, 2]])
CORRUPT = torch.tensor([[0, 5, 9, 12, 5, 9], [0, 7, 2, 30, 7, 2]])
SUBJECTS = ("gpt2", "meta-llama/Llama-3.2-1B")
NATIVE = ("standard", "attention only", "rotary")
# patching helpers that are tried on each model: a native model runs every cell alone
PATCHED = {"gpt2": "", "meta-llama/Llama-3.2-1B": "every", "standard": "all_pos_every", "rotary": "attn_head_k_all_pos"}
METRICS = {
    "last": lambda logits: (logits[:, -1, 3] - logits[:, -1, 8]).mean(),
    "ends": lambda logits: logits.log_softmax(-1)[torch.arange(2), torch.tensor([4, 5]), 3].mean(),
}
NAMES = (
    ("embed",), ("k", 6, "a"), ("pre", 2), ("normalized", 27, "ln2"), ("k6",), ("scale4ln1",), ("pre5",), ("scale",),
    ("resid_post", 6), ("scale", 4, "ln1"), ("attn", 3), ("mlp_post", 1), ("blocks.0.hook_x",), ("attn_logits", 2),
    ("key", 0), ("mlp_out", 3, "b"), ("resid_pre", 2, "block"), ("in", 1, "mlp"), ("q_input", 4), ("result", "3"),
)  # fmt: skip
SAMPLING: tuple[dict[str, float], ...] = (
    {}, {"temperature": 0.0}, {"top_k": 3}, {"top_p": 0.4}, {"temperature": 0.5, "top_p": 0.2}, {"freq_penalty": 0.7},
    {"repetition_penalty": 1.5}, {"top_k": 99},
)  # fmt: skip
SLICES = (None, 0, (1, 4), (0, 5, 2), [1, 2])


def caches(model: Any) -> dict[str, Tensor]:
    """Return what the cache's methods make of one run, under many arguments."""
    _, cache = model.run_with_cache(CLEAN)
    one = cache.apply_slice_to_batch_dim(1)
    onto = torch.randn(16, 2, generator=torch.Generator().manual_seed(3))
    out: dict[str, Tensor] = {"stack": cache.stack_activation("pattern"), "one": one["resid_post", -1]}
    for layer, norm, pos in itertools.product((1, -1), (False, True), (None, -1, (1, 4))):
        how = {"apply_ln": norm, "pos_slice": pos, "return_labels": True}
        made = {
            "accumulated": cache.accumulated_resid(layer, incl_mid=not model.cfg.attn_only, **how),
            "accumulated of one": one.accumulated_resid(layer, **how),
            "decomposed": cache.decompose_resid(layer, mlp_input=layer == 1 and not norm, **how),
            "heads": cache.stack_head_results(layer, incl_remainder=True, **how),
            "full": cache.get_full_resid_decomposition(layer, expand_neurons=False, **how),
        }
        if not model.cfg.attn_only:
            made["decomposed mlp"] = cache.decompose_resid(layer, mode="mlp", incl_embeds=False, **how)
            made["neurons"] = cache.stack_neuron_results(layer, neuron_slice=(2, 5), incl_remainder=True, **how)
            made["full neurons"] = one.get_full_resid_decomposition(layer, project_output_onto=onto, **how)
        for name, (stack, labels) in made.items():
            out[f"{name} {layer} {norm} {pos}: {', '.join(labels[-4:])}"] = stack
    last = cache.decompose_resid(pos_slice=-1)
    out["attribution"] = cache.logit_attrs(last, torch.tensor([3, 4]), torch.tensor([5, 6]), pos_slice=-1)
    out["attribution of one"] = one.logit_attrs(one.decompose_resid(), 3, 5, has_batch_dim=False)
    return out


def matrices(factored: Any, composition_scores: Any) -> dict[str, Tensor]:
    """Return what factored matrices make of each other; nothing here depends on the signs of singular vectors."""
    g, out = torch.Generator().manual_seed(0), dict[str, Tensor]()
    for a, b in (((5, 3), (3, 5)), ((2, 5, 3), (3, 5)), ((2, 1, 5, 3), (4, 3, 5)), ((3, 5), (5, 3))):
        m = factored(torch.randn(a, generator=g), torch.randn(b, generator=g))
        right, left = torch.randn(m.rdim, 4, generator=g), torch.randn(2, m.ldim, generator=g)
        found = {
            "AB": m.AB, "BA": m.BA, "T": m.T.AB, "S": m.S, "norm": m.norm(), "corner": m.get_corner(2),
            "even": m.make_even().AB, "eigenvalues": m.eigenvalues.abs().sort().values, "right": (m @ right).AB,
            "vector": m @ right[:, 0], "left": (left @ m).AB, "row": left[0] @ m, "product": (m @ m.T).AB,
            "scaled": (2 * m * 3).AB, "grams": m.collapse_r().mT @ m.collapse_r(), "more": m.unsqueeze(0).AB,
            "left gram": m.collapse_l() @ m.collapse_l().mT, "last": m[(0,) * (m.ndim - 2) + (-1, -1)].AB,
            "first": m[0].AB, "columns": m[(0,) * (m.ndim - 2) + (slice(None), slice(1, 3))].AB,
            "composition": composition_scores(m, m.T),
        }  # fmt: skip
        out |= {f"{name} of {a}": x for name, x in found.items()}
    return out


def halfway(corrupted: Tensor, index: Any, clean: Tensor) -> Tensor:
    """Set a position halfway between both runs: a setter of one's own."""
    corrupted[:, index[1]] = (corrupted[:, index[1]] + clean[:, index[1]]) / 2
    return corrupted


def patched(model: Any, patching: Any, some: str) -> dict[str, Tensor]:
    """Return what the helpers with `some` in their names find, for a metric of the last position and one of others."""
    _, clean = model.run_with_cache(CLEAN)
    out = dict[str, Tensor]()
    for (name, metric), helper in itertools.product(METRICS.items(), sorted(vars(patching))):
        if helper.startswith("get_act_patch") and some in helper and (name == "last" or "all_pos_every" in helper):
            out[f"{helper} {name}"] = getattr(patching, helper)(model, CORRUPT, clean, metric)
    how = {"activation_name": "mlp_out", "index_axis_names": ["layer", "pos"], "return_index_df": True}
    half, frame = patching.generic_activation_patch(model, CORRUPT, clean, METRICS["last"], halfway, **how)
    return out | {"halfway": half, "index": torch.tensor(frame.to_numpy())}


def numbers(utils: Any) -> dict[str, Tensor]:
    """Return losses, samples, slices and masks."""
    g = torch.Generator().manual_seed(0)
    logits, tokens = torch.randn(3, 7, 20, generator=g), torch.randint(20, (3, 7), generator=g)
    mask = torch.ones(3, 7, dtype=torch.long)
    mask[0, 5:] = mask[1, 0] = 0
    loss, right, sample = utils.lm_cross_entropy_loss, utils.lm_accuracy, utils.sample_logits
    out = {
        "loss": loss(logits, tokens), "losses": loss(logits, tokens, per_token=True),
        "masked": loss(logits, tokens, mask), "masked losses": loss(logits, tokens, mask, True),
        "accuracy": right(logits, tokens),
        "right": right(logits, tokens, True), "gelu": utils.gelu_new(logits[0, :3]),
    }  # fmt: skip
    for how in SAMPLING:
        torch.manual_seed(3)
        out[f"sample {how}"] = torch.stack([sample(logits[:, i], tokens=tokens, **how) for i in range(7)])
    for how in SLICES:
        out[f"slice {how}"] = utils.Slice(how).apply(tokens, 1)
    ids = torch.tensor([[0, 0, 0, 5, 6], [0, 1, 0, 2, 3], [4, 5, 0, 0, 0]])
    for pad, bos, side in itertools.product((0, 9), (0, 1), ("left", "right")):
        tokenizer = Special(pad, bos, side)
        out[f"mask {pad} {bos} {side}"] = utils.get_attention_mask(tokenizer, ids, True)
        out[f"no bos {pad} {bos} {side}"] = utils.get_tokens_with_bos_removed(tokenizer, ids[:2])
    return out


class Special:
    """The special tokens of a tokenizer."""

    def __init__(self, pad: int, bos: int, side: str):
        self.pad_token_id, self.bos_token_id, self.padding_side = pad, bos, side


def main() -> None:
    """Write the reference."""
    import transformer_lens as tl
    from transformer_lens import patching, utilities

    models = {name: hook_points.loaded(name, True) for name in SUBJECTS}
    models |= {name: tl.HookedTransformer(hook_points.native(name)) for name in NATIVE}
    out: dict[str, Any] = {"made with": f"transformer_lens {version('transformer_lens')}"}
    for name, model in models.items():
        out[f"cache of {name}"] = hook_points.digest(caches(model))
        if name in PATCHED:
            out[f"patching of {name}"] = hook_points.digest(patched(model, patching, PATCHED[name]))
    out["matrices"] = hook_points.digest(matrices(tl.FactoredMatrix, utilities.composition_scores))
    out["numbers"] = {name: x.tolist() for name, x in numbers(utilities).items()}
    out["names"] = [utilities.get_act_name(*given) for given in NAMES]
    text = json.dumps(out, separators=(",", ":"))
    Path(sys.argv[1]).write_text(text.replace("},", "},\n"), encoding="utf-8")


if __name__ == "__main__":
    main()
