"""Scores of heads for an attention pattern that a kind of head would have."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor

from cutaway.compat.transformer_lens.utils import Mismatch

HeadName = Literal["previous_token_head", "duplicate_token_head", "induction_head"]
HEAD_NAMES = get_args(HeadName)
ErrorMeasure = Literal["abs", "mul"]


def detect_head(
    model: Any,
    seq: str | list[str],
    detection_pattern: Tensor | str,
    heads: list[tuple[int, int]] | dict[int, list[int]] | None = None,
    cache: Any = None,
    **how: Any,
) -> Tensor:
    """Return the score [layer head] of each head, −1 of those not asked for; of several texts, the mean.

    `how` is `error_measure` ("mul", the share of the attention that is in the pattern, or "abs", 1 minus the mean
    absolute difference times the length), `exclude_bos` and `exclude_current_token`.

    Raises:
        Mismatch: an unknown name or measure, a pattern of another shape, or a pattern or cache for several texts.
    """
    tokens, cfg, pattern = model.to_tokens(seq), model.cfg, detection_pattern
    if isinstance(seq, list) and isinstance(pattern, str) and cache is None:
        return torch.stack([detect_head(model, s, pattern, heads, **how) for s in seq]).mean(0)
    if isinstance(pattern, str) and pattern in HEAD_NAMES:
        pattern = globals()[f"get_{pattern}_detection_pattern"](tokens)
    n = tokens.shape[-1]
    fits = isinstance(pattern, Tensor) and pattern.shape == (n, n) and pattern.equal(pattern.tril())
    if isinstance(pattern, str) or not fits or len(tokens) != 1 or not 1 < n < cfg.n_ctx:
        why = f"it takes one text within the context, and {', '.join(HEAD_NAMES)} or a lower triangular pattern"
        raise Mismatch(f"detect_head of {detection_pattern!r} in {n} tokens", why, "give these")
    if cache is None:
        _, cache = model.run_with_cache(tokens, remove_batch_dim=True)
    asked = {i: range(cfg.n_heads) for i in range(cfg.n_layers)} if heads is None else heads
    pairs = [(i, h) for i, some in asked.items() for h in some] if isinstance(asked, dict) else asked
    scores = -torch.ones(cfg.n_layers, cfg.n_heads, dtype=cfg.dtype)
    for layer, head in pairs:
        attention = cache["pattern", layer, "attn"][head]
        scores[layer, head] = compute_head_attention_similarity_score(attention, pattern.to(attention.device), **how)
    return scores


def compute_head_attention_similarity_score(
    attention_pattern: Tensor,
    detection_pattern: Tensor,
    *,
    exclude_bos: bool = False,
    exclude_current_token: bool = False,
    error_measure: str = "mul",
) -> float:
    """Return the score of one attention pattern [query key]."""
    kept = torch.ones_like(attention_pattern)
    kept[:, 0] = not exclude_bos
    kept = kept.fill_diagonal_(0) if exclude_current_token else kept
    if error_measure == "mul":
        attention = attention_pattern * kept
        return float((attention * detection_pattern).sum() / attention.sum())
    if error_measure != "abs":
        raise Mismatch(f"error_measure={error_measure!r}", "there is no such measure", "use mul or abs")
    difference = (attention_pattern - detection_pattern).abs() * kept
    return 1 - round(float(difference.mean() * len(difference)), 3)


def get_previous_token_head_detection_pattern(tokens: Tensor) -> Tensor:
    """Return 1 from each token to the one before."""
    return torch.ones(tokens.shape[-1] - 1).diag(-1)


def get_duplicate_token_head_detection_pattern(tokens: Tensor) -> Tensor:
    """Return 1 from each token to the same token earlier."""
    row = tokens.reshape(-1).cpu()
    return (row[:, None] == row).float().tril(-1)


def get_induction_head_detection_pattern(tokens: Tensor) -> Tensor:
    """Return 1 from each token to the one behind the same token earlier."""
    shifted = get_duplicate_token_head_detection_pattern(tokens).roll(1, dims=1)
    shifted[:, 0] = 0
    return shifted.tril()
