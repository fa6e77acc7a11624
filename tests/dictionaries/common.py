"""Random dictionaries of every topology, small enough to check by hand."""

import torch

from cutaway.dictionaries.dictionary import Dictionary
from cutaway.dictionaries.gates import Gated, JumpRelu, MatchingPursuit, Relu, TopK
from cutaway.dictionaries.parts import Block


class Draw:
    """Random numbers in float64 (or another dtype)."""

    def __init__(self, seed: int, dtype: torch.dtype = torch.float64):
        self.generator, self.dtype = torch.Generator().manual_seed(seed), dtype

    def __call__(self, *shape: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator).to(self.dtype) * scale


def gate_for(kind: str, n: int, draw: Draw):
    """A gate of one kind for n latents."""
    return {
        "relu": lambda: Relu(),
        "topk": lambda: TopK(3),
        "jump": lambda: JumpRelu(draw(n).abs() * 0.3),
        "gated": lambda: Gated(draw(n), draw(n), draw(n)),
        "pursuit": lambda: MatchingPursuit(0.1, 4),
    }[kind]()


def dictionary(
    blocks: list[tuple[int, list[str], list[str]]],
    widths: dict[str, int],
    kind: str = "relu",
    skip: list[tuple[str, str]] = [],  # noqa: B006
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    **settings,
) -> Dictionary:
    """A dictionary with random weights; blocks are (latents, reads, writes)."""
    draw = Draw(seed, dtype)
    greedy = kind == "pursuit"
    written = dict.fromkeys(w for _, _, writes in blocks for w in writes)
    return Dictionary(
        tuple(Block(n, tuple(r), tuple(w)) for n, r, w in blocks),
        tuple({} if greedy else {s: draw(n, widths[s], scale=0.5) for s in r} for n, r, _ in blocks),
        tuple({s: draw(n, widths[s], scale=0.4) for s in w} for n, _, w in blocks),
        tuple(draw(n, scale=0.0 if greedy else 0.3) for n, _, _ in blocks),
        {s: draw(widths[s]) for s in written},
        tuple(gate_for(kind, n, draw) for n, _, _ in blocks),
        {(r, w): draw(widths[w], widths[r]) for r, w in skip},
        **settings,
    )


A, B, C = "resid_post.0", "resid_post.1", "mlp_out.1"
WIDTHS = {A: 5, B: 4, C: 3, "z.0": 6}

#: every topology, by name: blocks and skips
TOPOLOGIES = {
    "autoencoder": ([(10, [A], [A])], []),
    "transcoder": ([(10, [A], [C])], []),
    "skip transcoder": ([(10, [A], [C])], [(A, C)]),
    "per-layer set": ([(8, [A], [C]), (6, [C], [B])], []),
    "cross-layer transcoder": ([(8, [A], [A, B, C]), (7, [B], [B, C]), (6, [C], [C])], [(B, C)]),
    "crosscoder": ([(9, [A, B, C], [A, B, C])], []),
    "weakly causal crosscoder": ([(5, [A], [A, B, C]), (6, [A, B], [B, C]), (4, [A, B, C], [C])], []),
}
