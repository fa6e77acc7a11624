"""Triton twins of the sparse kernels, for GPUs: the same products as in `kernels`, one program an output row.

Used only where tensors are on a GPU and Triton is there; `kernels` compares each with PyTorch once before it is
used. Triton's interpreter runs the same code on a processor (`tests/triton/check_twins.py`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

triton: Any
tl: Any
try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None

WIDTH, PAIRS = 128, 16  # numbers of a row that a program holds at once; pairs whose rows it reads together
_WIDTH, _PAIRS = (n if tl is None else tl.constexpr(n) for n in (WIDTH, PAIRS))


def _jit(kernel: Any) -> Any:
    return kernel if triton is None else triton.jit(kernel)


@_jit
def _dots(x, w, rows, others, out, n, d):
    pair = tl.program_id(0) * _PAIRS + tl.arange(0, _PAIRS)
    real = pair < n
    row = tl.load(rows + pair, mask=real, other=0)
    other = tl.load(others + pair, mask=real, other=0)
    total = tl.zeros((_PAIRS,), dtype=tl.float32)
    for start in range(0, d, _WIDTH):
        at = start + tl.arange(0, _WIDTH)
        inside = real[:, None] & (at < d)[None, :]
        a = tl.load(x + row[:, None] * d + at[None, :], mask=inside, other=0.0).to(tl.float32)
        b = tl.load(w + other[:, None] * d + at[None, :], mask=inside, other=0.0).to(tl.float32)
        total += tl.sum(a * b, axis=1)
    tl.store(out + pair, total, mask=real)


@_jit
def _bags(index, value, w, starts, out, d):
    bag = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * _WIDTH + tl.arange(0, _WIDTH)
    first = tl.load(starts + bag)
    last = tl.load(starts + bag + 1)
    total = tl.zeros((_WIDTH,), dtype=tl.float32)
    for start in range(first, last, _PAIRS):
        pair = start + tl.arange(0, _PAIRS)
        real = pair < last
        row = tl.load(index + pair, mask=real, other=0)
        factor = tl.load(value + pair, mask=real, other=0.0).to(tl.float32)
        inside = real[:, None] & (at < d)[None, :]
        part = tl.load(w + row[:, None] * d + at[None, :], mask=inside, other=0.0).to(tl.float32)
        total += tl.sum(part * factor[:, None], axis=0)
    tl.store(out + bag * d + at, total, mask=at < d)


def row_dots(x: Tensor, w: Tensor, rows: Tensor, others: Tensor) -> Tensor:
    """Return the dot product x[rows[e]] · w[others[e]] for every e."""
    n, d = len(rows), x.shape[1]
    out = torch.empty(n, dtype=x.dtype, device=x.device)
    _dots[(triton.cdiv(n, PAIRS),)](x.contiguous(), w.contiguous(), rows, others, out, n, d)
    return out


def bags(index: Tensor, value: Tensor, w: Tensor, starts: Tensor) -> Tensor:
    """Return the sum of value · w[index] over the entries of each bag; bag b is starts[b] to starts[b + 1]."""
    n, d = len(starts) - 1, w.shape[1]
    out = torch.empty(n, d, dtype=w.dtype, device=w.device)
    _bags[(n, triton.cdiv(d, WIDTH))](index, value.contiguous(), w.contiguous(), starts, out, d)
    return out
