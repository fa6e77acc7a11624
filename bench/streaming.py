"""What streamed attention costs: statistics of a head at 100,000 tokens, and at 4,096 beside a dense softmax.

Random queries and keys (64 numbers each), token ids of 300 words, so that every query has many duplicates; one thread,
CPU seconds. Exact streaming stands beside dense ways in the same process, in turns: the same statistics read off a
pattern in plain torch, which must be the same numbers; its entropy and top keys alone; and the bare pattern (scores,
mask, softmax), of which nothing is read. Sampled streaming takes 512 queries. Its memory is the peak of a process,
torch included. `heads.stream` also runs texts of 25,000 and 100,000 tokens through a seeded Llama (2 layers of 4 heads,
16 numbers each), forward included; its memory is what the process grows by.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

from bench.frame import ROOT, Row, finish, options, quiet, ratios, spent, summary

WIDTH, TOP, DRAWN, SAMPLES, WORDS = 64, 8, 512, 8, 300
DENSE, GROWTH = 4096, (12_500, 25_000, 50_000, 100_000)
LENGTHS = (25_000, 100_000)  # of texts through a model
SECONDS, MEBIBYTES, GROWN, LEAST, STEEP = 2.0, 600.0, 600.0, 3.0, 1.15
CLOSE = 2e-5


def main() -> int:
    """Measure exact and sampled streaming, and write the rows."""
    if "--subject" in sys.argv:
        length = int(sys.argv[-1])
        print(json.dumps(through(length) if "--model" in sys.argv else alone()))
        return 0
    chosen = options(__doc__, rounds=5).parse_args()
    rows = [*exact(chosen.rounds), *sampled(chosen.rounds), *of_a_model()]
    return finish("streaming", rows, write=not chosen.no_write, label=chosen.label)


class Head:
    """Tiles of one head's random queries and keys."""

    formed = sink = False
    heads = 1

    def __init__(self, length: int):
        import torch

        g = torch.Generator().manual_seed(length)
        self.length = length
        self.q, self.k = (torch.randn(1, length, WIDTH, generator=g) for _ in range(2))
        self.q /= WIDTH**0.5
        self.ids = torch.randint(WORDS, (length,), generator=g)

    def __call__(self, rows: Any, start: int, stop: int) -> Any:
        import torch

        scores = self.q[:, rows] @ self.k[:, start:stop].transpose(1, 2)
        if stop - 1 > int(rows.min()):
            scores.masked_fill_(torch.arange(start, stop) > rows[:, None], -1e30)
        return scores

    def pattern(self) -> Any:
        """The whole pattern."""
        import torch

        scores = self.q @ self.k.transpose(1, 2)
        return scores.masked_fill_(torch.ones_like(scores[0]).triu_(1).bool(), -1e30).softmax(-1)


def streamed(head: Head, rows: Any) -> list[Any]:
    """Statistics of some queries: kinds of keys and their null, distance, entropy, top keys."""
    import torch

    from cutaway.heads.streamed import Asked, Looked, chunks, edges, look

    g = torch.Generator().manual_seed(0)
    parts, null = list[Looked](), list[Any]()
    for some in chunks(rows, 1):
        looked = look(head, Asked.draw(head.ids, some, SAMPLES, g), TOP, edges(head.length))
        null.append(looked.mass[:, 1:].sum(-1))
        parts.append(looked.alone())
    whole = Looked.join(parts)
    return [whole.mass[:, 0], whole.distance, whole.entropy, whole.weight, sum(null) / len(rows)]


def read_off(head: Head) -> list[Any]:
    """The same statistics of every query but the first, read off the whole pattern."""
    import torch

    from cutaway.heads.streamed import edges

    p, ids, n = head.pattern()[0], head.ids, head.length
    at = torch.arange(n)
    back = at[:, None] - at
    follows = torch.cat([ids.new_full((1,), -1), ids[:-1]])
    same, after = ((ids[:, None] == other) & (back > 0) for other in (ids, follows))
    mass = [p[at, (at - 1).clamp_min(0)], p.diagonal(), p[:, 0], (p * same).sum(-1), (p * after).sum(-1)]
    least = [*edges(n), n]
    distance = [(p * ((back >= a) & (back < b))).sum(-1) for a, b in pairwise(least)]
    entropy = -(p * p.clamp_min(1e-30).log()).sum(-1)
    g, null = torch.Generator().manual_seed(0), list[Any]()
    for _ in range(SAMPLES):
        key, other = (torch.rand(n, generator=g) * (at + 1)).long(), ids[torch.randperm(n, generator=g)][:, None]
        null.append(
            [p[at, key], (p * ((other == ids) & (back > 0))).sum(-1), (p * ((other == follows) & (back > 0))).sum(-1)]
        )
    return [
        torch.stack(mass)[:, None, 1:],
        torch.stack(distance)[:, None, 1:],
        entropy[None, 1:],
        p.topk(TOP, -1)[0][None, 1:],
    ]


def few(head: Head) -> list[Any]:
    """Entropy and top keys of the whole pattern."""
    p = head.pattern()
    return [-(p * p.clamp_min(1e-30).log()).sum(-1), p.topk(TOP, -1)]


def exact(rounds: int) -> list[Row]:
    """Exact streaming beside both dense ways."""
    import torch

    torch.set_num_threads(1)
    head = Head(DENSE)
    every = torch.arange(1, DENSE)
    for a, b in zip(streamed(head, every), read_off(head), strict=False):
        if (far := float((a - b).abs().max())) > CLOSE:
            raise SystemExit(f"streamed and dense statistics differ by up to {far:.2g}")
    jobs: dict[str, Callable[[], Any]] = {
        "same": lambda: read_off(head),
        "few": lambda: few(head),
        "bare": head.pattern,
    }
    found = ratios(lambda: streamed(head, every), jobs, rounds)
    ours = statistics.median(spent(lambda: streamed(head, every))[0] for _ in range(rounds))
    words = f"exact streaming, one head, {DENSE} tokens"
    names = {"same": "the same statistics of a dense softmax", "few": "a dense softmax, its entropy and top keys alone"}
    names["bare"] = "a dense softmax, nothing read off it"
    rows = []
    for name, says in names.items():
        times = summary(words, found[name], "CPU s").value
        rows.append(
            Row(words, round(ours, 4), "CPU s").against(says, round(ours * times, 4), LEAST if name == "same" else None)
        )
    return rows


def sampled(rounds: int) -> list[Row]:
    """Sampled streaming at several lengths, in rounds that take turns, and its memory."""
    import torch

    torch.set_num_threads(1)
    heads = {n: Head(n) for n in GROWTH}
    drawn = {
        n: 1 + torch.randperm(n - 1, generator=torch.Generator().manual_seed(n))[:DRAWN].sort().values for n in GROWTH
    }
    times: dict[int, list[tuple[float, float]]] = {n: [] for n in GROWTH}
    for n in GROWTH:
        streamed(heads[n], drawn[n])
    for _ in range(rounds):
        for n in GROWTH:
            times[n].append(spent(lambda n=n: streamed(heads[n], drawn[n])))
    words = "sampled streaming, one head, 512 queries"
    rows = []
    for n in GROWTH:
        rows.append(summary(f"{words}, {n} tokens", times[n], "CPU s", SECONDS if n == GROWTH[-1] else None))
    steep = rows[-1].value / rows[0].value * GROWTH[0] / GROWTH[-1]
    grows = f"{words}: time from {GROWTH[0]} to {GROWTH[-1]} tokens, over linear growth"
    rows.append(Row(grows, round(steep, 3), "×", STEEP))
    return [*rows, Row(f"{words}, {GROWTH[-1]} tokens: peak memory", in_a_process(GROWTH[-1]), "MiB", MEBIBYTES)]


def of_a_model() -> list[Row]:
    """Whole texts through a model, at two lengths."""
    short, long = (in_a_process(n, "--model") for n in LENGTHS)
    words = f"heads.stream through a model of 2 × 4 heads, {LENGTHS[1]} tokens"
    grown = long["MiB"] / short["MiB"] * LENGTHS[0] / LENGTHS[1]
    return [
        Row(words, long["CPU s"], "CPU s"),
        Row(f"{words}: growth of memory", long["MiB"], "MiB", GROWN),
        Row(f"{words}: that growth from {LENGTHS[0]} tokens, over linear growth", round(grown, 3), "×", STEEP),
    ]


def in_a_process(length: int, *flags: str) -> Any:
    """What a process of its own says."""
    process = [sys.executable, "-m", "bench.streaming", "--subject", *flags, str(length)]
    return json.loads(subprocess.run(process, cwd=ROOT, env=quiet(), check=True, capture_output=True, text=True).stdout)


def through(length: int) -> dict[str, float]:
    """CPU seconds and growth of memory of a random text through a seeded model."""
    import torch
    import transformers as tf

    import cutaway as ca

    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = tf.LlamaConfig(
        vocab_size=WORDS,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=LENGTHS[-1],
        attn_implementation="sdpa",
    )
    model = ca.Model(tf.LlamaForCausalLM(config).eval(), None, "seeded")
    ca.heads.stream(model, ca.tasks.as_prompts(torch.arange(WORDS)[None]), mode="sampled")
    before, text = peak(), ca.tasks.as_prompts(torch.randint(WORDS, (1, length)))
    seconds, _ = spent(lambda: ca.heads.stream(model, text))
    return {"CPU s": round(seconds, 1), "MiB": round(peak() - before, 1)}


def alone() -> float:
    """The peak memory of this process once it has streamed the longest text."""
    import torch

    torch.set_num_threads(1)
    n = GROWTH[-1]
    streamed(Head(n), 1 + torch.randperm(n - 1, generator=torch.Generator().manual_seed(n))[:DRAWN].sort().values)
    return peak()


def peak() -> float:
    """The peak memory of this process alone so far, in MiB; `ru_maxrss` begins with its parent's."""
    said = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return round(int(said.split()[1]) / 1024, 1)


if __name__ == "__main__":
    sys.exit(main())
