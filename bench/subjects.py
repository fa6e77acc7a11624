"""Who is measured by `bench.capture`: the plain forward and each tool's own way of doing the same work."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

Job = Callable[[], Any]
LAYERS = 12
MIDDLE = 6


def prepare(name: str, folder: str) -> tuple[str, Job, dict[str, Job]]:
    """Version, plain forward and jobs of a subject; all compute the same logits, and that is checked here."""
    import torch
    from safetensors.torch import load_file
    from transformers import GPT2LMHeadModel

    torch.set_num_threads(1)
    ids = load_file(Path(folder, "ids.safetensors"))["ids"]

    def fresh() -> Any:
        return GPT2LMHeadModel.from_pretrained(folder).eval().requires_grad_(False)

    bare = fresh()

    @torch.no_grad()
    def plain() -> Any:
        return bare(ids, use_cache=False).logits

    # cutaway looks at the very model that is run bare; peers rebuild theirs, so each gets its own copy.
    release, jobs = SUBJECTS[name](bare if name == "cutaway" else fresh(), ids)
    if not torch.allclose(jobs["none"](), plain(), atol=1e-4):
        raise SystemExit(f"{name} computes other logits than the plain forward")
    # cutaway's own calls are without gradients already.
    return release, plain, jobs if name == "cutaway" else {work: torch.no_grad()(job) for work, job in jobs.items()}


def cutaway(hf: Any, ids: Any) -> tuple[str, dict[str, Job]]:
    """Every site that the model has; head outputs and norm scales are computed when looked at."""
    import cutaway as ca
    from cutaway.core.sites import SITES

    model = ca.load(hf, check=False)
    tokens = model.tokens(ids)
    there = model.sites()
    every = [s.name for s in SITES if there[s.name].startswith("read")]

    def touched() -> None:
        found = model.capture(tokens, every)
        for value in found.values():
            value.shape  # noqa: B018

    return ca.__version__, {
        "none": lambda: model.run(tokens),
        "one": lambda: model.capture(tokens, f"resid_post.{MIDDLE}"),
        "some": lambda: model.capture(tokens, ["resid_post", "attn_out", "mlp_out"]),
        "every": lambda: model.capture(tokens, every),
        "touched": touched,
    }


def transformer_lens(hf: Any, ids: Any) -> tuple[str, dict[str, Job]]:
    """TransformerLens's bridge over the same transformers model."""
    from transformer_lens.model_bridge import TransformerBridge

    bridge: Any = TransformerBridge.boot_transformers(hf.config.name_or_path, hf_model=hf)
    one = f"blocks.{MIDDLE}.hook_resid_post"
    some = {f"blocks.{i}.hook_{s}" for i in range(LAYERS) for s in ("resid_post", "attn_out", "mlp_out")}
    kept: dict[str, Any] = {}

    def keep(value: Any, hook: Any) -> None:
        kept["value"] = value

    def every() -> None:
        bridge.run_with_cache(ids, use_cache=False)

    if len(bridge.run_with_cache(ids, names_filter=lambda n: n in some)[1]) != len(some):
        raise SystemExit("transformer-lens does not capture the 36 sites")
    return version("transformer-lens"), {
        "none": lambda: bridge(ids, use_cache=False),
        "one": lambda: bridge.run_with_hooks(ids, fwd_hooks=[(one, keep)], use_cache=False),
        "some": lambda: bridge.run_with_cache(ids, names_filter=lambda n: n in some, use_cache=False),
        "every": every,
        "touched": every,
    }


def nnsight(hf: Any, ids: Any) -> tuple[str, dict[str, Job]]:
    """nnsight's traces, with values saved by hand; it names no attention scores, so nothing stands for every site."""
    from nnsight import NNsight

    model: Any = NNsight(hf)

    def one() -> Any:
        with model.trace(ids, use_cache=False):
            value = model.transformer.h[MIDDLE].output.save()
        return value

    def some() -> Any:
        with model.trace(ids, use_cache=False):
            values = []
            for block in model.transformer.h:
                values.append(block.attn.output[0].save())
                values.append(block.mlp.output.save())
                values.append(block.output.save())
            values.save()
        return values

    if len(some()) != 3 * LAYERS:
        raise SystemExit("nnsight does not save the 36 sites")
    return version("nnsight"), {"none": lambda: hf(ids, use_cache=False).logits, "one": one, "some": some}


SUBJECTS = {"cutaway": cutaway, "transformer_lens": transformer_lens, "nnsight": nnsight}
