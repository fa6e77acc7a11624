"""What direct logit attribution costs: a logit difference split among 144 heads, in plain forwards.

GPT-2 small's shape (12 layers, d 768, 50257 tokens), random weights, one prompt of 15 tokens, one thread. cutaway's
call is the method as users call it: with MLPs and embeddings, 20 random pairs of tokens as its null, intervals, closure
with the model's own logits, and record. TransformerLens' is `direct_logit_attribution` by heads, over its bridge in
compatibility mode. Every ratio is to the bare transformers forward measured beside it, in the same process, and both
must return the same numbers.
"""

from __future__ import annotations

import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bench.beside import plain_forwards
from bench.frame import ratios, serve

WORK = "direct logit attribution, 144 heads"
ANSWER, FOIL, HEADS = 7, 9, 144
BAR, LEAST = 1.2, 1.2


def main() -> int:
    """Measure both subjects in rounds that take turns, and write the row."""
    return plain_forwards("direct", __doc__, WORK, 7, LEAST, BAR)


def cutaway(hf: Any, ids: Any) -> tuple[str, Any]:
    """The method on a task of one pair."""
    import transformers

    import cutaway as ca
    from cutaway.tasks.pair import Pair
    from cutaway.tasks.task import Task

    words = transformers.PreTrainedTokenizerFast.from_pretrained(hf.config.name_or_path)
    model = ca.load(hf, tokenizer=words, check=False)
    clean, corrupt = (" ".join(f"t{i}" for i in row) for row in ids.tolist())
    task = Task("two prompts", (Pair(clean, corrupt, f"t{ANSWER}", f"t{FOIL}"),))

    def run() -> Any:
        found = ca.lenses.direct_attribution(model, task)
        return found.effect[[name.startswith("head_out") for name in found.labels["component"]]]

    return ca.__version__, run


def transformer_lens(hf: Any, ids: Any) -> tuple[str, Any]:
    """TransformerLens 4's own helper, which asks for folded weights."""
    import torch
    from transformer_lens.model_bridge import TransformerBridge
    from transformer_lens.tools.analysis.direct_logit_attribution import direct_logit_attribution

    bridge: Any = TransformerBridge.boot_transformers(hf.config.name_or_path)
    bridge.enable_compatibility_mode()

    @torch.no_grad()
    def run() -> Any:
        return direct_logit_attribution(bridge, ids[:1], ANSWER, FOIL, unit="head").attribution[:HEADS, 0]

    return version("transformer-lens"), run


def serve_subject(name: str, folder: str) -> None:
    """Serve one subject's measurements."""
    import torch
    from safetensors.torch import load_file
    from transformers import GPT2LMHeadModel

    torch.set_num_threads(1)
    ids = load_file(Path(folder, "ids.safetensors"))["ids"]
    bare = GPT2LMHeadModel.from_pretrained(folder).eval().requires_grad_(False)
    release, run = {"cutaway": cutaway, "transformer_lens": transformer_lens}[name](bare, ids)

    @torch.no_grad()
    def plain() -> Any:
        return bare(ids[:1], use_cache=False).logits

    def answer(first: int) -> dict[str, Any]:
        return {"ratios": ratios(plain, {"run": run}, 5, first)["run"], "values": run().tolist()}

    ratios(plain, {"run": run}, 3)  # warm-up
    serve({"version": release}, answer)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--subject"]:
        serve_subject(*sys.argv[2:4])
    else:
        sys.exit(main())
