"""What TransformerLens' ways of running and patching cost through the façade, over the house's own calls.

GPT-2 small's shape (12 layers, d 768, 50257 tokens), random weights, one prompt of 15 tokens, one thread, one process.
Every ratio is to the house's own call on the same weights, measured beside it; both must return the same numbers.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from bench.frame import Row, finish, options, ratios, summary

BAR = 1.05


def jobs() -> dict[str, tuple[Callable[[], Any], Callable[[], Any]]]:
    """Return what is compared: a call of the façade and the house's own, by name."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    import cutaway as ca
    from cutaway.compat.transformer_lens import HookedTransformer, patching
    from cutaway.models.sweep.executor import sweep

    torch.manual_seed(0)
    model = HookedTransformer.from_pretrained("gpt2", hf_model=GPT2LMHeadModel(GPT2Config()).eval())
    house, ids = model.house, torch.randint(0, 50257, (1, 15))
    clean, (_, cache) = torch.randn(1, 15, 12, 64), model.run_with_cache(torch.randint(0, 50257, (1, 15)))
    streams = [ca.edits.Replace(f"resid_pre.{i}", cache["resid_pre", i][:, p], positions=(p,))
               for i in range(12) for p in range(15)]  # fmt: skip
    outs = [ca.edits.Replace(f"z.{i}.{h}", cache["z", i][:, :, h]) for i in range(12) for h in range(12)]

    def hook(z: Any, hook: Any) -> Any:
        z[:, :, 3] = clean[:, :, 3]
        return z

    def swept(edits: Any) -> Any:
        return sweep(house, house.tokens(ids), [[e] for e in edits], lambda last, _: last[:, 7] - last[:, 9])[:, 0]

    def metric(logits: Any) -> Any:
        return (logits[:, -1, 7] - logits[:, -1, 9]).mean()

    names, sites = [f"blocks.{i}.hook_resid_post" for i in range(12)], [f"resid_post.{i}" for i in range(12)]
    heads = [(f"blocks.{i}.attn.hook_z", ca.edits.Replace(f"z.{i}.3", clean[:, :, 3])) for i in range(12)]
    return {
        "12 runs with a head's z replaced": (
            lambda: torch.stack([model.run_with_hooks(ids, fwd_hooks=[(name, hook)]) for name, _ in heads]),
            lambda: torch.stack([house.run(ids, edits=edit) for _, edit in heads]),
        ),
        "a run with all residual streams kept": (
            lambda: torch.stack(list(model.run_with_cache(ids, names_filter=names)[1].values())),
            lambda: torch.stack([t for _, t in house.capture(ids, sites).items()]),
        ),
        "180 residual streams patched (patching.get_act_patch_resid_pre)": (
            lambda: patching.get_act_patch_resid_pre(model, ids, cache, metric).flatten(),
            lambda: swept(streams),
        ),
        "144 heads patched (patching.get_act_patch_attn_head_out_all_pos)": (
            lambda: patching.get_act_patch_attn_head_out_all_pos(model, ids, cache, metric).flatten(),
            lambda: swept(outs),
        ),
        "a run without hooks": (lambda: model(ids), lambda: house.run(ids)),
    }


def main() -> int:
    """Measure all jobs by turns, check that the numbers agree, and write the rows."""
    import torch

    chosen = options(__doc__, pairs=9).parse_args()
    torch.set_num_threads(1)
    rows = list[Row]()
    with torch.no_grad():
        for name, (facade, own) in jobs().items():
            torch.testing.assert_close(facade(), own(), atol=1e-4, rtol=1e-4)
            pairs = ratios(own, {name: facade}, chosen.pairs)[name]
            rows.append(summary(name, pairs, "× the house's own call", BAR))
    return finish("hooked", rows, write=not chosen.no_write, label=chosen.label)


if __name__ == "__main__":
    sys.exit(main())
