"""Triton twins against PyTorch, in Triton's interpreter on a processor: make twins

Not collected by pytest, because Triton is no dependency. With a GPU, and TRITON_INTERPRET=0, the compiled kernels are
compared instead: python -m tests.triton.check_twins
"""

import os
import sys

os.environ.setdefault("TRITON_INTERPRET", "1")

import torch

from cutaway.dictionaries.kernels import sparse as kernels
from cutaway.dictionaries.kernels import triton_kernels as twins
from cutaway.dictionaries.kernels.sparse import Pairs


def main() -> int:
    device = "cpu" if os.environ["TRITON_INTERPRET"] == "1" else "cuda"
    g = torch.Generator().manual_seed(0)
    wrong = 0
    for tokens, latents, d, k in ((7, 50, 16, 3), (33, 20, 130, 5), (5, 300, 257, 40), (1, 4, 1, 1)):
        index = torch.rand(tokens, latents, generator=g).argsort(1)[:, :k]
        pairs = Pairs.fixed(index, latents)
        w, x = torch.randn(latents, d, generator=g), torch.randn(tokens, d, generator=g)
        value = torch.randn(tokens * k, generator=g)
        token, _, starts = pairs.by_latent
        there = [t.to(device) for t in (w, x, value, pairs.token, pairs.index, pairs.indptr, token, starts)]
        w_, x_, value_, token_, index_, indptr_, sorted_, starts_ = there
        found = {
            "dots": (twins.row_dots(x_, w_, token_, index_), kernels.dots(x, w, pairs)),
            "mix": (twins.bags(index_, value_, w_, indptr_), kernels.mix(pairs, value, w)),
            "spread": (
                twins.bags(sorted_, value_[pairs.order.to(device)], x_, starts_),
                kernels.spread(pairs, value, x),
            ),
        }
        for name, (got, true) in found.items():
            error = float((got.cpu() - true).norm() / true.norm())
            wrong += error > 1e-5
            sys.stdout.write(f"{name:7s} tokens {tokens:3d} latents {latents:3d} d {d:3d} k {k:2d}: {error:.1e}\n")
    if not kernels.agree(twins, device, torch.float32):
        wrong += 1
    sys.stdout.write("wrong\n" if wrong else "all agree\n")
    return min(wrong, 1)


if __name__ == "__main__":
    sys.exit(main())
