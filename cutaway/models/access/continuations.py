"""Several continuations of a prompt in one forward: they stand behind one another, and none attends to the others.

Each goes on with its prompt as if it stood there alone: its positions count from the prompt's end, and attention hides
the others from it. So a prompt with two answers is one row of a batch, and one forward measures both.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from cutaway.core.refuse import Refused
from cutaway.models.access import attention
from cutaway.models.anatomy.anatomy import Anatomy
from cutaway.models.tokens import Tokens

_KERNELS = ("eager", "sdpa")  # whose masks are tensors that say which keys a query sees


@contextmanager
def apart(anatomy: Anatomy, tokens: Tokens | None, placed: bool) -> Iterator[None]:
    """Within the block, forwards of these tokens keep the continuations of each prompt apart.

    `placed` says that the model takes the positions of its tokens.

    Raises:
        Refused: a model that carries a state from token to token, or whose positions follow from the columns.
    """
    if tokens is None or not any(len(t) > 1 for t in tokens.tails):
        yield
        return
    modules = [anatomy.part(i, "attn") for i in range(anatomy.shape.n_layers)]
    why = _why_not(anatomy, placed, any(m is None for m in modules))
    if why:
        raise Refused("two continuations of one prompt", why, "measure one, as sequence_log_prob does")
    with attention.watching({m: (frozenset(), _same) for m in modules if m is not None}):
        yield


def _why_not(anatomy: Anatomy, placed: bool, stateful: bool) -> str:
    """Return the reason why this model cannot keep continuations apart; empty if it can."""
    kernel = getattr(anatomy.hf.config, "_attn_implementation", "eager")
    if stateful or anatomy.family.ssm:
        return f"layers of a {anatomy.family.name} model carry a state from one to the next"
    if not placed:
        return f"a {anatomy.family.name} model counts positions itself, so the second would begin where the first ends"
    return "" if kernel in _KERNELS else f"{kernel!r} attention takes no mask that tells them apart"


def _same(site: str, x: Tensor) -> Tensor:
    return x
