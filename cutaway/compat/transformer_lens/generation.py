"""Generation: tokens one by one under the model's hooks, with a cache of keys and values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cutaway.compat.transformer_lens.key_value_cache import HookedTransformerKeyValueCache as Cache
from cutaway.compat.transformer_lens.utils import get_attention_mask, sample_logits


@torch.inference_mode()
def generated(model, tokens, mask, max_new_tokens, stops, use_past_kv_cache, do_sample, verbose, **how) -> Tensor:
    """Return the tokens [batch, position] with new ones behind them; a row that has stopped goes on with its stop."""
    from tqdm import tqdm

    cache = Cache.init_cache(model.cfg, model.cfg.device, len(tokens)) if use_past_kv_cache else None
    done, given = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device), tokens
    for _ in tqdm(range(max_new_tokens), disable=not verbose):
        seen = None if mask is None else mask[:, -given.shape[1] :]
        logits = model(given, return_type="logits", past_kv_cache=cache, attention_mask=seen)[:, -1]
        new = sample_logits(logits, tokens=tokens, **how) if do_sample else logits.argmax(-1)
        new = new.to(tokens.device)
        if stops:
            new = torch.where(done, torch.full_like(new, stops[0]), new)
            done |= torch.isin(new, torch.tensor(stops, device=new.device))
        tokens = torch.cat([tokens, new[:, None]], 1)
        mask = None if mask is None else torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        given = new[:, None] if cache is not None else tokens
        if stops and bool(done.all()):
            break
    return tokens


def prompt_mask(model: Any, tokens: Tensor, prepend_bos: bool, side: str) -> Tensor | None:
    """Return 1 at the real tokens of a batch; None without a tokenizer."""
    return None if model.tokenizer is None else get_attention_mask(model.tokenizer, tokens, prepend_bos, side)
