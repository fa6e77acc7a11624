"""Log-probabilities of the tokens of a text, beside the tokens that a model expected."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from cutaway.compat.circuitsvis.render import RenderedHTML, shown


def token_log_probs(
    token_indices: Tensor, log_probs: Tensor, to_string: Callable[[int], str], top_k: int = 10
) -> RenderedHTML:
    """Draw the log-probability of each token but the first, and the `top_k` tokens that were expected in its place."""
    ids, scores = token_indices.reshape(-1), log_probs.reshape(-1, log_probs.shape[-1])[:-1]
    own = scores.gather(1, ids[1:, None])
    names, most = [to_string(i) for i in ids[1:].tolist()], scores.topk(top_k, 1)
    ranked = [f"{name} (rank {rank})" for name, rank in zip(names, ((scores > own).sum(1) + 1).tolist(), strict=True)]
    guesses = [[to_string(i) for i in row] for row in most.indices.tolist()]
    axes = {"position": ranked, "guess": range(1, top_k + 1)}
    strip = shown(own[:, 0], {"position": names}, "log-probability")
    return RenderedHTML(strip, shown(most.values.exp(), axes, "probability of what was expected", guesses))
