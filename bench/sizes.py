"""Dictionaries at another size, beside SAELens and sparsify: tokens a second of CPU time.

d 768, 12288 latents, one thread: a TopK step (k 64, exact selection, 1024 tokens), a ReLU step with L1 and half of the
latents active (1024 tokens), both as in `bench.training`; and encoding and decoding 2048 tokens with a ReLU dictionary
half of whose latents are active. The second TopK row finds candidates in bfloat16, which cutaway's plan does where a
measurement says that it is right and quicker (it is on the machine below). "Products alone" are the float32 products
that the work cannot do without, one of the encoder's shape for the TopK step (SAELens and sparsify do more), five for
the ReLU step and two for coding, timed in the same rounds: their ratio is the most that any tool with this library of
products could reach.
"""

from __future__ import annotations

import contextlib
import statistics
import sys
from collections.abc import Callable
from typing import Any

from bench import trainers
from bench.frame import Row, Subject, finish, options, pythons, serve, spent
from bench.trainers import Job
from bench.training import PEERS, UNIT, quartiles

TOPK, RELU, CODING = Job("topk", 768, 12288, 64, 1024), Job("relu", 768, 12288, 64, 1024), 2048
QUICK = "cutaway_bfloat16"
WORKS = {
    "topk": ("TopK step, k 64, batch 1024", TOPK.tokens, 1, {"saelens": 6.0, "sparsify": 1.9}),
    "relu": ("ReLU step, half active, batch 1024", RELU.tokens, 5, {"saelens": 2.0}),
    "coding": ("encode and decode, ReLU, half active, 2048 tokens", CODING, 2, {"saelens": 1.2}),
}


def main() -> int:
    """Measure in rounds that take turns, and write the rows."""
    chosen = options(__doc__, rounds=9).parse_args()
    times: dict[tuple[str, str], list[tuple[float, float]]] = {}
    with contextlib.ExitStack() as stack:
        running = {}
        interpreters = pythons(chosen, {name: environment for name, (_, environment) in PEERS.items()})
        for name, python in (interpreters | {QUICK: interpreters["cutaway"]}).items():
            running[name] = Subject(python, "bench.sizes", "--subject", name)
            stack.callback(running[name].close)
        for work, (_, _, _, least) in WORKS.items():
            for _ in range(chosen.rounds):
                for name in (n for n in running if n == "cutaway" or n in least or (n == QUICK and work == "topk")):
                    for what, seconds in running[name].ask(work=work).items():
                        times.setdefault((work, what), []).append(seconds)
        labels = {p: PEERS[p][0].format(running[p].about["version"]) for p in PEERS if p in running}
    return finish("sizes", [r for w in WORKS for r in rows(w, times, labels)], not chosen.no_write, chosen.label)


def rows(work: str, times: dict[tuple[str, str], list[tuple[float, float]]], labels: dict[str, str]) -> list[Row]:
    """The rows of one work: ours against each peer, then the products alone."""
    words, tokens, products, least = WORKS[work]
    found = []
    quick = f"{words}, bfloat16 selection"
    for what, says in (("cutaway", words), (QUICK, quick), ("products", f"{words}: products alone ({products})")):
        if (work, what) not in times:
            continue
        speeds = [tokens / cpu for cpu, _ in times[work, what]]
        low, middle, high = quartiles(speeds)
        wall = round(statistics.median(tokens / w for _, w in times[work, what]), 1)
        row = Row(says, middle, UNIT, sense="min", quartiles=(low, high), wall=wall)
        peers = {p: statistics.median(tokens / cpu for cpu, _ in times[work, p]) for p in labels if (work, p) in times}
        bars: dict[str, float | None] = {p: least[p] if what != "products" else None for p in peers}
        found += [row.against(labels[p], round(speed, 1), bars[p]) for p, speed in peers.items()] or [row]
    return found


# --- subjects


def serve_subject(name: str) -> None:
    """Serve one subject's measurements."""
    made: dict[str, Callable[[], Any]] = {}

    def answer(work: str) -> dict[str, tuple[float, float]]:
        if work not in made:
            made.clear()
            made[work] = coding(name) if work == "coding" else stepping(name, {"topk": TOPK, "relu": RELU}[work])
            made[work]()
        found = {name: spent(made[work])}
        return found | ({"products": product(WORKS[work][1], WORKS[work][2])} if name == "cutaway" else {})

    import torch

    torch.set_num_threads(1)
    serve({"version": trainers.release(name)}, answer)


def stepping(name: str, job: Job) -> Callable[[], None]:
    """A training step, on batches by turns."""
    data = [trainers.batch(job, seed) for seed in (1, 2)]
    trainer, done = trainers.make(name, job, data[0]), []

    def step() -> None:
        trainer.step(data[len(done) % 2])
        done.append(None)

    return step


def coding(name: str) -> Callable[[], None]:
    """Encoding and decoding, by a dictionary at random weights."""
    import torch

    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(CODING, RELU.d, generator=g), torch.randn(RELU.latents, RELU.d, generator=g) / RELU.d**0.5
    if name == "saelens":
        import sae_lens

        sae: Any = sae_lens.StandardSAE(sae_lens.StandardSAEConfig(d_in=RELU.d, d_sae=RELU.latents))
        sae.load_state_dict({**sae.state_dict(), "W_enc": w.T.contiguous(), "W_dec": w})
        return torch.no_grad()(lambda: sae.decode(sae.encode(x)))
    from cutaway.dictionaries.dictionary import Dictionary
    from cutaway.dictionaries.gates import Relu
    from cutaway.dictionaries.parts import Block

    site = trainers.SITE
    zeros = torch.zeros(RELU.latents), {site: torch.zeros(RELU.d)}
    d = Dictionary(
        (Block(RELU.latents, (site,), (site,)),), ({site: w},), ({site: w},), (zeros[0],), zeros[1], (Relu(),)
    )
    return torch.no_grad()(lambda: d.decode(d.encode(x)))


def product(tokens: int, times: int) -> tuple[float, float]:
    """CPU and wall seconds of so many products of the encoder's shape in float32, in memory that is used again."""
    import torch

    x, w = torch.randn(tokens, RELU.d), torch.randn(RELU.latents, RELU.d)
    out = torch.zeros(tokens, RELU.latents)
    cpu, wall = spent(lambda: torch.mm(x, w.T, out=out))
    return times * cpu, times * wall


if __name__ == "__main__":
    if sys.argv[1:2] == ["--subject"]:
        serve_subject(sys.argv[2])
    else:
        sys.exit(main())
