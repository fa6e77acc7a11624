"""Rough evaluations; data sets are not downloaded here."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from cutaway.compat.transformer_lens.utils import lm_cross_entropy_loss
from cutaway.core.refuse import Refused

_ZOOM_IN = """Many important transition points in the history of science have been moments when science 'zoomed in.' \
At these points, we develop a visualization or tool that allows us to see the world in a new level of detail, and a \
new field of science develops to study the world through this lens."""


def sanity_check(model: Any) -> Any:
    """Return the loss on one paragraph of English: below 5 of a sound model."""
    return model(_ZOOM_IN, return_type="loss")


@torch.inference_mode()
def evaluate_on_dataset(model: Any, data_loader: Iterable[Any], truncate: int = 100, device: Any = "cuda") -> float:
    """Return the mean loss over the first batches of `tokens`."""
    losses = []
    for batch in data_loader:
        losses.append(model(batch["tokens"].to(device), return_type="loss").mean().item())
        if len(losses) > truncate:
            break
    return sum(losses) / len(losses)


@torch.inference_mode()
def induction_loss(
    model, tokenizer=None, batch_size=4, subseq_len=384, prepend_bos=None, device="cuda"
) -> torch.Tensor:
    """Return the loss on the second half of random tokens that are repeated once."""
    tokens = torch.randint(100, 20000, (batch_size, subseq_len)).to(device).repeat(1, 2)
    if model.cfg.default_prepend_bos if prepend_bos is None else prepend_bos:
        tokens[:, 0] = (tokenizer or model.tokenizer).bos_token_id
    loss = lm_cross_entropy_loss(model(tokens, return_type="logits"), tokens, per_token=True)
    return loss[:, subseq_len + 1 :].mean()


def evaluate(model: Any, truncate: int = 100, batch_size: int = 8, tokenizer: Any = None) -> Any:
    """Refuse: its data sets would have to be downloaded."""
    how = "give a local one to evaluate_on_dataset, through tokenize_and_concatenate"
    raise Refused("evaluate()", "wikitext, openwebtext, pile and code are not downloaded here", how)
