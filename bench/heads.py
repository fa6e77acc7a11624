"""What a classification of 144 heads costs, in plain forwards: attention to the previous token, the same token and
what followed it.

GPT-2 small's shape (12 layers, d 768, 50257 tokens), random weights, eight sequences of 24 random tokens said twice,
one thread. cutaway's call is the method as users call it for three types: with eight draws of shuffled keys, intervals
and value norms. TransformerLens' is `detect_head`, once for each of the three, which are all that it has. Every ratio
is to the bare transformers forward of the same sequences, measured beside it in the same process, and both must return
the same numbers: TransformerLens divides by all attention, cutaway by that of the queries that have such keys.

The layers up to the last pattern, without the unembedding, hold 64 % of the multiplications of a forward: no
classification of all heads costs less.
"""

from __future__ import annotations

import sys
from importlib.metadata import version
from typing import Any

from bench.beside import plain_forwards
from bench.frame import ratios, serve

WORK = "types of 144 heads, 8 sequences"
SEQUENCES, BLOCK = 8, 24
#: type → the detector of that name, and the queries that have such keys
SHARED = {
    "previous token": ("previous_token_head", 2 * BLOCK),
    "duplicate token": ("duplicate_token_head", BLOCK),
    "prefix matching": ("induction_head", BLOCK),
}
LEAST = 10.0


def main() -> int:
    """Measure both subjects in rounds that take turns, and write the row."""
    return plain_forwards("heads", __doc__, WORK, 3, LEAST)


def sequences(last: int) -> list[list[int]]:
    """Random tokens said twice, behind the token that begins a text."""
    import torch

    g = torch.Generator().manual_seed(0)
    blocks = [torch.randperm(last, generator=g)[:BLOCK].tolist() for _ in range(SEQUENCES)]
    return [[last, *block, *block] for block in blocks]


def cutaway(hf: Any, rows: list[list[int]]) -> tuple[str, Any]:
    """The method on token ids."""
    import transformers

    import cutaway as ca

    words = transformers.PreTrainedTokenizerFast.from_pretrained(hf.config.name_or_path)
    model = ca.load(hf, tokenizer=words, check=False)
    prompts = ca.tasks.as_prompts(rows)

    def run() -> Any:
        found = ca.heads.classify(model, prompts, types=tuple(SHARED), eigenvalues=False)
        return found.score[[found.labels["type"].index(name) for name in SHARED]]

    return ca.__version__, run


def transformer_lens(hf: Any, rows: list[list[int]]) -> tuple[str, Any]:
    """TransformerLens 4's detector, over its bridge; it puts the first token before each text itself."""
    import torch
    from transformer_lens.head_detector import detect_head
    from transformer_lens.model_bridge import TransformerBridge

    bridge: Any = TransformerBridge.boot_transformers(hf.config.name_or_path)
    texts = [" ".join(f"t{i}" for i in row[1:]) for row in rows]

    @torch.no_grad()
    def run() -> Any:
        width = 2 * BLOCK + 1
        return torch.stack([detect_head(bridge, texts, name) * width / n for name, n in SHARED.values()])

    return version("transformer-lens"), run


def serve_subject(name: str, folder: str) -> None:
    """Serve one subject's measurements."""
    import torch
    from transformers import GPT2LMHeadModel

    torch.set_num_threads(1)
    bare = GPT2LMHeadModel.from_pretrained(folder).eval().requires_grad_(False)
    rows = sequences(bare.config.vocab_size - 1)
    release, run = {"cutaway": cutaway, "transformer_lens": transformer_lens}[name](bare, rows)
    ids = torch.tensor(rows)

    @torch.no_grad()
    def plain() -> Any:
        return bare(ids, use_cache=False).logits

    def answer(first: int) -> dict[str, Any]:
        return {"ratios": ratios(plain, {"run": run}, 1, first)["run"], "values": run().flatten().tolist()}

    run()  # warm-up
    serve({"version": release}, answer)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--subject"]:
        serve_subject(*sys.argv[2:4])
    else:
        sys.exit(main())
