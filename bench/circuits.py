"""What scores of all edges cost, in plain forwards: attribution patching, integrated gradients, each edge measured.

GPT-2 small's shape (12 layers, d 768, 50257 tokens), random weights, one pair of prompts of 15 tokens of which two
differ, one thread. The graph has 157 writers, 445 readers and 32,491 edges. Every number is the CPU time of a user's
call without its audit over that of a plain forward of transformers with all logits, measured in turns in the same
process. One masked run keeps the edges of largest score, a twentieth of all, and gives all others the corrupt prompt's
values. `exact` runs once, beside plain forwards before and after it.

Memory is what attribution patching holds at its peak between forward and products: values and gradients at readers,
heads' outputs as they are before W_O, and the corrupt values. The formula counts numbers for each token and layer; it
must give the bytes held in models of other sizes, of grouped keys too. What writers add is expanded for some source
layers at a time (at most 256 MiB), and scores take writers × readers.
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path
from typing import Any

from bench import sweeps
from bench.frame import Row, finish, options, ratios, spent, summary

TOKENS, CHANGED = 15, (5, 7)
UNIT = "plain forwards"
BARS = {"EAP": 3.5, "EAP-IG, 5 steps": 15.0, "one masked run": 2.5}
EXACT_BAR = 4500
SCALED = ((2, 4, 4, 64), (3, 4, 2, 96), (6, 8, 2, 128))  # layers, heads, key-value heads, width
LLAMA_8B = (32, 32, 8, 4096)


def main() -> int:
    """Measure the calls in turns, exact patching once, and the bytes held."""
    import torch

    torch.set_num_threads(1)
    chosen = options(__doc__, rounds=7, exact=1).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        sweeps.save(folder)
        rows = time(Path(folder), chosen.rounds, bool(chosen.exact))
    return finish("circuits", [*rows, *memory()], write=not chosen.no_write, label=chosen.label)


def time(folder: Path, rounds: int, whole: bool) -> list[Row]:
    """The calls, each beside plain forwards."""
    import torch

    import cutaway as ca

    model, task = ca.load(folder, check=False), prompts()
    ids = task.bind(model).clean.ids

    @torch.no_grad()
    def plain() -> Any:
        return model.hf(ids, use_cache=False).logits

    jobs = {
        "EAP": lambda: ca.circuits.eap(model, task, audit=0),
        "EAP-IG, 5 steps": lambda: ca.circuits.eap_ig(model, task, audit=0),
        "one masked run": masked(model, task),
    }
    for job in jobs.values():
        job()
    rows = [summary(name, pairs, UNIT, BARS[name]) for name, pairs in ratios(plain, jobs, rounds).items()]
    return [*rows, exact(model, task, plain)] if whole else rows


def prompts() -> Any:
    """One pair of numbered words."""
    import torch

    import cutaway as ca

    words = torch.randint(50_000, (TOKENS,), generator=torch.Generator().manual_seed(1)).tolist()
    other = [w + 1 if i in CHANGED else w for i, w in enumerate(words)]
    clean, corrupt = (" ".join(f"t{w}" for w in side) for side in (words, other))
    return ca.Task("random words", (ca.Pair(clean, corrupt, " t1", " t2"),), corruption="two words are others")


def masked(model: Any, task: Any) -> Any:
    """One run of a circuit of a twentieth of the edges."""
    import cutaway as ca
    from cutaway.models.edits.edge_mask import places_written, written
    from cutaway.models.edits.wiring import wiring
    from cutaway.models.sweep.masks import sweep_masks

    bound, w = task.bind(model), wiring(model)
    mask = ca.circuits.eap(model, task, audit=0).mask(len(w.pairs) // 20)
    values = written(model, model.capture(bound.corrupt, places_written(w), logits=False))
    return lambda: sweep_masks(model, w, bound.clean, [mask], values, bound.measure)


def exact(model: Any, task: Any, plain: Any) -> Row:
    """Every edge measured, once, without the random steps of its control but for one edge."""
    import cutaway as ca

    before = [spent(plain)[0] for _ in range(5)]
    cpu, wall = spent(lambda: ca.circuits.exact(model, task, samples=1, null_cells=1))
    around = statistics.median([*before, *(spent(plain)[0] for _ in range(5))])
    work = "exact patching of all 32,491 edges"
    return Row(work, round(cpu / around, 1), UNIT, EXACT_BAR, wall=round(wall / around, 1))


def formula(layers: int, heads: int, kv_heads: int, width: int) -> int:
    """Numbers held for each token: values and gradients, those of projections, and alternative values."""
    d_head = width // heads
    places = (4 * layers + 1) * width + layers * heads * d_head  # streams, MLPs' inputs and outputs, z
    return 2 * places + layers * (heads + 2 * kv_heads) * d_head + width + layers * (heads * d_head + width)


def held(layers: int, heads: int, kv_heads: int, width: int) -> float:
    """The same, counted: the tensors of one call, over its tokens."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import cutaway as ca
    from cutaway.models.access.reader_gradients import reader_gradients
    from cutaway.models.access.reading import measure_of
    from cutaway.models.edits.edge_mask import places_written
    from cutaway.models.edits.wiring import wiring
    from cutaway.models.tokens import batch

    config = LlamaConfig(num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads,
                         hidden_size=width, intermediate_size=3 * width, vocab_size=99)  # fmt: skip
    model = ca.load(LlamaForCausalLM(config).eval(), check=False)
    places, tokens = places_written(wiring(model)), batch([list(range(3, 3 + TOKENS))])
    stand = model.capture(tokens, places, logits=False)
    measure = measure_of(lambda logits, _: logits[:, 5])
    with model.edited():
        found = reader_gradients(model.anatomy, tokens, measure, places)
    kept = [*stand.values(), *found.given.values(), *found.slopes.values(), *found.heads.values()]
    assert all(t.dtype == torch.float32 for t in kept)
    return sum(t.numel() for t in kept) / TOKENS


def memory() -> list[Row]:
    """The formula against what is held, and its value for a large model."""
    off = max(abs(held(*sizes) / formula(*sizes) - 1) for sizes in SCALED)
    layers, heads, kv_heads, _ = LLAMA_8B
    edges = (1 + layers * (heads + 1)) * (1 + layers * (heads + 2 * kv_heads + 1))
    return [
        Row("memory: the formula against the bytes held, three small models", off, "of them", 0.0),
        Row("memory: Llama 3 8B's shape, by the formula", round(4 * formula(*LLAMA_8B) / 2**20, 2), "MiB a token"),
        Row("memory: Llama 3 8B's shape, scores of a prompt", round(4 * edges / 2**20, 2), "MiB"),
    ]


if __name__ == "__main__":
    raise SystemExit(main())
