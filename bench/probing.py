"""What probing all layers on 2,000 prompts costs, beside the loop that reads one prompt at a time.

Prompts of 8 to 16 of 2,000 words, random weights, one thread; GPT-2 small's shape (12 layers, d 768, 50257 tokens),
and that of the miniworld (6 layers, d 128, 2048 tokens). cutaway's call is `directions.probe` on the last token: it
reads all prompts in batches and fits everything that it says of all layers (five folds, shuffled labels, a control
task, words alone, the curve). TransformerLens' loop only reads: `run_with_cache` of each prompt, with a filter for the
places that are read, without any fit; it is measured on 100 of the prompts. The unit is a batched forward of the same
number of prompts by the bare transformers model, measured beside each in the same process, and both must read the same
vectors.

A forward of a prompt has as many products in a batch as alone, so what the loop pays beside them (weights read from
memory for a few tokens, calls, logits) bounds the ratio on a processor. That keeps it below the bar of 8, with float32
values as the model has them:

* GPT-2 small's shape: the loop costs 2.21 plain forwards a prompt. Ours, of real tokens only and without logits, cost
  0.45 of one: 4.9 times without a single fit. 8 times would leave 0.28. Kernels laid out for oneDNN
  (`models.access.fast_kernels`) take 1.17 times less, not counting the choice among them and the layouts.
* The miniworld's shape: the loop costs 7.9, our forwards about 0.9 (fast kernels: no less), the rest 1.2, mostly 185
  logistic fits. 8 times would leave 0.1 for these, 1 ms each; the quicker solver takes 3 ms for 1,600 x 128 (L-BFGS;
  Newton's 5 ms).

Texts are sorted by length: 1.4 % of the columns are padding. Batches of 256 to 2,048 tokens differ by a tenth.
"""

from __future__ import annotations

import random
import sys
from importlib.metadata import version
from typing import Any

from bench.beside import beside_plain
from bench.frame import finish, options, ratios, serve

PROMPTS, SHARE, WORDS = 2000, 100, 2000
LEAST = 8.0
#: the shapes by the work that is done with them
SHAPES: dict[str, dict[str, int]] = {
    "probing 12 layers, GPT-2 small's shape": {},
    "probing 6 layers, the miniworld's shape": {"n_layer": 6, "n_embd": 128, "n_head": 4, "vocab_size": 2048},
}


def main() -> int:
    """Measure both subjects on both shapes in rounds that take turns, and write the rows."""
    chosen = options(__doc__, rounds=3).parse_args()
    rows = [beside_plain("probing", chosen, work, LEAST, **sizes) for work, sizes in SHAPES.items()]
    return finish("probing", rows, write=not chosen.no_write, label=chosen.label)


def texts() -> list[str]:
    """Prompts of words drawn at random; every other one has the word that is probed for somewhere."""
    rng, found = random.Random(0), list[str]()
    for i in range(PROMPTS):
        words = [f"t{1 + rng.randrange(WORDS)}" for _ in range(rng.randint(8, 16))]
        words[rng.randrange(len(words))] = "t0" if i % 2 else words[0]
        found.append(" ".join(words))
    return found


def cutaway(hf: Any) -> tuple[str, Any, Any, int]:
    """The method on all prompts; and the vectors of a part of them."""
    import torch
    import transformers

    import cutaway as ca
    from cutaway.interventions.text_vectors import text_vectors

    words = transformers.PreTrainedTokenizerFast.from_pretrained(hf.config.name_or_path)
    model = ca.load(hf, tokenizer=words, check=False)
    prompts = texts()
    shown = torch.tensor([[i % 2 == 1] for i in range(PROMPTS)])
    labelled = ca.tasks.Labelled(tuple(prompts), ("marked",), shown, tuple(str(i % 10) for i in range(PROMPTS)))

    def run() -> Any:
        return ca.directions.probe(model, labelled, readings=("last",), samples=1)

    def read() -> Any:
        return text_vectors(model, prompts[:SHARE], "resid_post", ("last",)).vectors[0]

    return ca.__version__, run, read, PROMPTS


def transformer_lens(hf: Any) -> tuple[str, Any, Any, int]:
    """A loop over TransformerLens 4's bridge, without a beginning-of-text token, on a part of the prompts."""
    import torch
    from transformer_lens.model_bridge import TransformerBridge

    bridge: Any = TransformerBridge.boot_transformers(hf.config.name_or_path)
    names = [f"blocks.{i}.hook_resid_post" for i in range(hf.config.n_layer)]

    @torch.no_grad()
    def run() -> Any:
        found = []
        for text in texts()[:SHARE]:
            _, cache = bridge.run_with_cache(text, prepend_bos=False, names_filter=lambda name: name in names)
            found.append(torch.stack([cache[name][0, -1] for name in names]))
        return torch.stack(found, 1)

    return version("transformer-lens"), run, run, SHARE


def serve_subject(name: str, folder: str) -> None:
    """Serve one subject's measurements."""
    import torch
    from transformers import GPT2LMHeadModel

    torch.set_num_threads(1)
    bare = GPT2LMHeadModel.from_pretrained(folder).eval().requires_grad_(False)
    release, run, read, prompts = {"cutaway": cutaway, "transformer_lens": transformer_lens}[name](bare)
    rows = [[int(word[1:]) for word in text.split()] for text in texts()[:SHARE]]
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])

    @torch.no_grad()
    def plain() -> Any:
        return bare(ids, attention_mask=mask, use_cache=False).logits

    def answer(first: int) -> dict[str, Any]:
        parts = prompts / SHARE
        pairs = [(cpu / parts, wall / parts) for cpu, wall in ratios(plain, {"run": run}, 1, first)["run"]]
        return {"ratios": pairs, "values": read().mean(-1).flatten().tolist()}

    read()  # warm-up
    serve({"version": release}, answer)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--subject"]:
        serve_subject(*sys.argv[2:4])
    else:
        sys.exit(main())
