"""Rotary positions whose frequencies depend on the longest prompt of a batch: which prompts may run together.

With longrope (Phi-3) every prompt of a batch turns by the long frequencies as soon as one is longer than the length
that the model was first trained on; with dynamic scaling each longer length has frequencies of its own. A prompt has
the value that it has alone, so prompts on both sides of such a length run apart, and no keys are kept across it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from cutaway.core.refuse import Refused
from cutaway.models.anatomy.anatomy import Anatomy
from cutaway.models.tokens import Tokens

Side = tuple[int, ...]  # lengths of one side have the same frequencies


def side(anatomy: Anatomy, length: int) -> Side:
    """Return a key that differs between lengths with different frequencies; one key if none depend on length."""
    return tuple(max(length, n) if dynamic else int(length > n) for dynamic, n in _switches(anatomy))


def apart(anatomy: Anatomy, tokens: Tokens) -> list[list[int]]:
    """Return the rows of a batch that may run together."""
    if not _switches(anatomy):
        return [list(range(len(tokens)))]
    found: dict[Side, list[int]] = {}
    for i, length in enumerate(tokens.lengths.tolist()):
        found.setdefault(side(anatomy, length), []).append(i)
    return list(found.values())


def check(anatomy: Anatomy, tokens: Tokens) -> None:
    """Refuse a batch that would turn some prompts by the frequencies of others.

    Raises:
        Refused: it has prompts on both sides of a length at which the frequencies change.
    """
    if len(apart(anatomy, tokens)) > 1:
        lengths = ", ".join(str(n) for n in sorted({n for _, n in _switches(anatomy)}))
        why = f"its rotary frequencies change beyond {lengths} tokens, and in one batch they are those of the longest"
        raise Refused("prompts of these lengths together", why, "run prompts on both sides of it apart")


def in_order(rows: Sequence[Sequence[int]], parts: Sequence[Tensor]) -> Tensor:
    """Return the parts of a batch, each of some rows, as the whole batch."""
    if len(parts) == 1:
        return parts[0]
    order = torch.tensor([i for part in rows for i in part]).argsort()
    return torch.cat(list(parts)).index_select(0, order.to(parts[0].device))


def _switches(anatomy: Anatomy) -> tuple[tuple[bool, int], ...]:
    return anatomy.remember("rope", lambda: tuple(sorted(set(_found(anatomy)))))


def _found(anatomy: Anatomy) -> Iterable[tuple[bool, int]]:
    """(whether every longer length has its own frequencies, the length beyond which they change)."""
    for module in anatomy.hf.modules():
        kind: Any = getattr(module, "rope_type", None)
        config: Any = getattr(module, "config", None)
        for layers, name in kind.items() if isinstance(kind, dict) else [(None, kind)]:
            if name == "longrope":
                p = config.rope_parameters
                yield False, int((p if layers is None else p[layers])["original_max_position_embeddings"])
            elif isinstance(name, str) and "dynamic" in name:
                yield True, int(module.original_max_seq_len)  # type: ignore[arg-type]
